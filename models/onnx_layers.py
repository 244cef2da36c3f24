"""The layers of the device's network as nodes of an ONNX graph; see :mod:`models.onnx_graph`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from knowledge_boosting.models.arrival_fusion import ArrivalFusion
from knowledge_boosting.models.arrivals import MERGES
from knowledge_boosting.models.layers import Fusion, HintFusion, SelfAttention
from knowledge_boosting.models.level import RunningLevel
from knowledge_boosting.models.tfgridnet import GridNetBlock
from knowledge_boosting.models.transforms import FLOOR, INAUDIBLE, REFERENCE, SILENCE

OPSET = 20
_IR_VERSION = 10
Array = NDArray[np.float32]
Attention: TypeAlias = SelfAttention | Fusion


class Graph:
    """The nodes, weights, inputs and outputs of a graph, in the order in which they were added."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, *shape: int) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def output(self, value: str, name: str, *shape: int) -> None:
        """Add an output with a name."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def weight(self, value: Tensor | Array | Sequence[int]) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
        name = f"w{len(self._weights)}"
        self._weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node. Returns the name of its output, or a list of names if there are several."""
        names = [f"v{len(self._nodes)}_{number}" for number in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def reshape(self, value: str, *shape: int) -> str:
        return cast("str", self.node("Reshape", value, self.weight(shape)))

    def layer_norm(self, value: str, scale: Tensor | Array, shift: Tensor | Array, *, axis: int = -1) -> str:
        weights = self.weight(scale), self.weight(shift)
        return cast("str", self.node("LayerNormalization", value, *weights, axis=axis, epsilon=1e-5))

    def linear(self, value: str, layer: nn.Linear) -> str:
        """Apply a linear layer: ``[F, in]`` to ``[F, out]``."""
        return cast("str", self.node("Gemm", value, self.weight(layer.weight.T), self.weight(layer.bias)))

    def linear_transposed(self, value: str, weight: Tensor, bias: Tensor) -> str:
        """Apply a linear layer and transpose: ``[F, in]`` to ``[out, F]``."""
        return cast("str", self.node("Gemm", self.weight(weight), value, self.weight(bias[:, None]), transB=1))

    def file(self, metadata: dict[str, str]) -> bytes:
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, self._weights)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="knowledge-boosting"
        )
        model.ir_version = _IR_VERSION
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString()


def running_level(graph: Graph, level: RunningLevel, spectrum: str) -> tuple[str, str]:
    """Return the spectrum ``[M, 2F]`` at the reference level, and the gain ``[1]`` for the frame of the estimate."""

    def constant(value: float) -> str:
        return graph.weight(np.array([value], np.float32))

    total = graph.reshape(graph.node("ReduceSumSquare", spectrum, keepdims=0), 1)
    power = graph.node("Mul", total, constant(level.unit))
    running = graph.node("Max", power, graph.node("Mul", graph.input("level", 1), constant(math.exp(-level.fading))))
    graph.output(running, "new_level", 1)
    floored = graph.node("Max", running, constant(FLOOR))
    scale = graph.node("Mul", graph.node("Sqrt", floored), constant(1 / REFERENCE))
    silence = graph.node("Add", graph.node("Mul", running, constant(SILENCE)), constant(INAUDIBLE))
    audible = graph.node("Div", power, graph.node("Add", power, silence))
    return graph.node("Div", spectrum, scale), graph.node("Mul", scale, audible)


def convolution(graph: Graph, value: str, conv: nn.Conv2d, weight: Tensor) -> str:
    """Apply a causal convolution to three frames ``[1, C_in, 3, F]``: ``[1, C_out, 1, F]``."""
    bias = conv.bias
    assert bias is not None
    return cast("str", graph.node("Conv", value, graph.weight(weight), graph.weight(bias), pads=[0, 1, 0, 1]))


def grid_net_block(graph: Graph, block: GridNetBlock, x: str, index: int, bins: int, channels: int, hidden: int) -> str:
    """Apply the LSTMs of a block along frequency and time to features ``[F, D]``."""
    normed = graph.layer_norm(x, block.intra_norm.weight, block.intra_norm.bias)
    y = graph.node(
        "LSTM",
        graph.reshape(normed, bins, 1, channels),
        *_lstm_weights(graph, block.intra_lstm),
        hidden_size=hidden,
        direction="bidirectional",
    )
    y = graph.linear(graph.reshape(y, bins, 2 * hidden), block.intra_linear)
    x = graph.node("Add", x, y)

    normed = graph.layer_norm(x, block.inter_norm.weight, block.inter_norm.bias)
    state = graph.input(f"hidden_{index}", 1, bins, hidden), graph.input(f"cell_{index}", 1, bins, hidden)
    _, new_hidden, new_cell = graph.node(
        "LSTM",
        graph.reshape(normed, 1, bins, channels),
        *_lstm_weights(graph, block.inter_lstm),
        "",
        *state,
        hidden_size=hidden,
        outputs=3,
    )
    graph.output(new_hidden, f"new_hidden_{index}", 1, bins, hidden)
    graph.output(new_cell, f"new_cell_{index}", 1, bins, hidden)
    y = graph.linear(graph.reshape(new_hidden, bins, hidden), block.inter_linear)
    return cast("str", graph.node("Add", x, y))


def _lstm_weights(graph: Graph, lstm: nn.LSTM) -> tuple[str, str, str]:
    """Return the weights, recurrences and biases of all directions.

    The gates are in the order of ONNX (i, o, f, g); the order of torch is (i, f, g, o).
    """

    def gates(tensor: Tensor) -> Array:
        i, f, g, o = tensor.detach().chunk(4)
        return np.concatenate([part.cpu().numpy() for part in (i, o, f, g)])

    directions = [[gates(weight) for weight in direction] for direction in lstm.all_weights]
    return (
        graph.weight(np.stack([weights[0] for weights in directions])),
        graph.weight(np.stack([weights[1] for weights in directions])),
        graph.weight(np.stack([np.concatenate(weights[2:]) for weights in directions])),
    )


def self_attention(graph: Graph, attention: SelfAttention, x: str, mask: str, index: int) -> str:
    """Apply the self-attention of a block to features ``[F, D]``."""
    heads, key, value = attention.heads, attention.key, attention.value
    projected = graph.linear_transposed(x, attention.project.weight, attention.project.bias)
    slope = torch.cat([attention.slope_qk.repeat_interleave(key), attention.slope_v.repeat_interleave(value)])
    # PRelu is not used, because it branches at every value.
    steep = graph.node("Mul", projected, graph.weight(slope[:, None]))
    rest = graph.node("Mul", graph.node("Relu", projected), graph.weight(1 - slope[:, None]))
    sizes = graph.weight([heads * key, heads * key, heads * value])
    parts = graph.node("Split", graph.node("Add", steep, rest), sizes, outputs=3, axis=0)
    scales = (*attention.scale_qk.chunk(2), attention.scale_v)
    shifts = (*attention.shift_qk.chunk(2), attention.shift_v)
    query, new_key, new_value = (
        _normed_heads(graph, *part, attention) for part in zip(parts, scales, shifts, strict=True)
    )
    return _attend(graph, attention, x, query, new_key, new_value, mask, "self_", index)


def delayed_fusion(graph: Graph, fusion: HintFusion, x: str, hint: str, mask: str, index: int) -> str:
    """Fuse the hint of a fixed delay, or zeros, into features ``[F, D]``."""
    bins, channels = fusion.bins, fusion.merge.in_features
    graph.output(x, f"features_{index}", bins, channels)
    delayed = graph.input(f"delayed_{index}", bins, channels) if fusion.delay else x
    new_key, new_value = _merged(graph, fusion, delayed, hint, 1)
    return _attend(graph, fusion, x, _query(graph, fusion, x), new_key, new_value, mask, "", index)


def _query(graph: Graph, fusion: Fusion, x: str) -> str:
    """Return the queries ``[L, 1, key size]`` of features ``[F, D]``."""
    projected = graph.linear_transposed(x, fusion.query.weight, fusion.query.bias)
    return _normed_part(graph, fusion, projected, fusion.slope_query, fusion.norm_query, 1)


def _merged(graph: Graph, fusion: Fusion, features: str, hint: str, count: int) -> tuple[str, str]:
    """Return keys and values ``[L, K, size]`` of K frames, from features ``[K F, D]`` and hints ``[channels, K F]``."""
    film = graph.node("Gemm", hint, graph.weight(fusion.film.weight.T), graph.weight(fusion.film.bias), transA=1)
    weight, bias = graph.node("Split", film, outputs=2, axis=1, num_outputs=2)
    merged = graph.node("Add", graph.node("Mul", features, weight), bias)
    split = fusion.heads * fusion.key
    weights, biases = fusion.key_value.weight, fusion.key_value.bias
    key = graph.linear_transposed(merged, weights[:split], biases[:split])
    value = graph.linear_transposed(merged, weights[split:], biases[split:])
    return (
        _normed_part(graph, fusion, key, fusion.slope_key, fusion.norm_key, count),
        _normed_part(graph, fusion, value, fusion.slope_value, fusion.norm_value, count),
    )


def _normed_part(graph: Graph, fusion: Fusion, part: str, slope: Tensor, norm: nn.LayerNorm, count: int) -> str:
    part = graph.node("PRelu", part, graph.weight(slope.reshape(1, 1)))
    return _normed_heads(graph, part, norm.weight, norm.bias, fusion, count)


class Arrivals(NamedTuple):
    """The inputs of a graph that are the same for all fusions, if hints are used on arrival."""

    hint: str
    ages: str  # [W + K], whole numbers from 0 to W - 1
    mask: str
    youngest: str  # [1], likewise
    strength: str


def arrival_inputs(graph: Graph, hint_channels: int, bins: int, window: int) -> Arrivals:
    """Add the inputs for hints that are used on arrival."""

    def index(name: str, size: int) -> str:
        whole = graph.node("Cast", graph.input(name, size), to=TensorProto.INT64)
        return cast("str", graph.node("Sub", whole, graph.weight([1])))

    keys = window + MERGES
    return Arrivals(
        graph.input("hint", hint_channels, MERGES * bins),
        index("ages", keys),
        graph.input("mask", keys),
        index("youngest", 1),
        graph.input("strength", 1),
    )


def arrival_fusion(graph: Graph, fusion: ArrivalFusion, x: str, arrivals: Arrivals, index: int) -> str:
    """Fuse the hints that have arrived into features ``[F, D]``."""
    bins, heads, window, channels = fusion.bins, fusion.heads, fusion.window, fusion.merge.in_features
    key, value = fusion.key * bins, fusion.value * bins
    graph.output(x, f"features_{index}", bins, channels)
    waiting = graph.input(f"waiting_{index}", MERGES * bins, channels)
    new_key, new_value = _merged(graph, fusion, waiting, arrivals.hint, MERGES)
    graph.output(new_key, f"key_{index}", heads, MERGES, key)
    graph.output(new_value, f"value_{index}", heads, MERGES, value)

    query = graph.node("Mul", _query(graph, fusion, x), graph.weight(np.array(key**-0.5, np.float32)))
    kept = graph.node("MatMul", query, graph.input(f"keys_{index}", heads, key, window))
    own = graph.node("MatMul", query, graph.node("Transpose", new_key, perm=[0, 2, 1]))
    bias = graph.node("Gather", graph.weight(fusion.age_bias), arrivals.ages, axis=1)
    bias = graph.reshape(graph.node("Add", bias, arrivals.mask), heads, 1, window + MERGES)
    scores = graph.node("Add", graph.node("Concat", kept, own, axis=2), bias)
    weights = graph.node("Softmax", scores, axis=2)
    kept, own = graph.node("Split", weights, graph.weight([window, MERGES]), outputs=2, axis=2)
    attended = graph.node("MatMul", kept, graph.input(f"values_{index}", heads, window, value))
    attended = graph.node("Add", attended, graph.node("MatMul", own, new_value))
    scale = graph.node("Gather", graph.weight(fusion.age_scale), arrivals.youngest, axis=0)
    scale = graph.node("Mul", scale, arrivals.strength)
    return cast("str", graph.node("Add", x, graph.node("Mul", _merge_heads(graph, fusion, attended), scale)))


def _normed_heads(graph: Graph, part: str, scale: Tensor, shift: Tensor, attention: Attention, count: int = 1) -> str:
    """Normalise heads: ``[L * size, K F]`` to ``[L, K, size * F]``. The affine part of torch has the bins first."""
    heads, bins = attention.heads, attention.bins
    scale, shift = (each.unflatten(-1, (bins, -1)).transpose(-2, -1).flatten(-2) for each in (scale, shift))
    size = scale.shape[-1]
    if count > 1:
        part = graph.node("Transpose", graph.reshape(part, heads, size // bins, count, bins), perm=[0, 2, 1, 3])
    return graph.layer_norm(graph.reshape(part, heads, count, size), scale, shift)


def _attend(
    graph: Graph,
    attention: Attention,
    x: str,
    query: str,
    new_key: str,
    new_value: str,
    mask: str,
    prefix: str,
    index: int,
) -> str:
    """Attend to the new frame and the frames in the rings, merge the result, and add it to ``x``."""
    heads, bins, window = attention.heads, attention.bins, attention.window
    key, value = attention.key * bins, attention.value * bins
    graph.output(new_key, f"{prefix}key_{index}", heads, 1, key)
    graph.output(new_value, f"{prefix}value_{index}", heads, 1, value)

    query = graph.node("Mul", query, graph.weight(np.array(key**-0.5, np.float32)))
    keys = graph.input(f"{prefix}keys_{index}", heads, key, window)
    kept = graph.node("Add", graph.node("MatMul", query, keys), mask)
    own = graph.node("ReduceSum", graph.node("Mul", query, new_key), graph.weight([2]), keepdims=1)
    weights = graph.node("Softmax", graph.node("Concat", kept, own, axis=2), axis=2)
    kept, own = graph.node("Split", weights, graph.weight([window, 1]), outputs=2, axis=2)
    attended = graph.node("MatMul", kept, graph.input(f"{prefix}values_{index}", heads, window, value))
    attended = graph.node("Add", attended, graph.node("Mul", new_value, own))

    return cast("str", graph.node("Add", x, _merge_heads(graph, attention, attended)))


def _merge_heads(graph: Graph, attention: Attention, attended: str) -> str:
    """Merge the result ``[L, 1, value size]`` of attention into normalised features ``[F, D]``."""
    merge, norm = attention.merge, attention.norm_merge
    merged = graph.node(
        "Gemm",
        graph.reshape(attended, merge.in_features, attention.bins),
        graph.weight(merge.weight.T),
        graph.weight(merge.bias),
        transA=1,
    )
    merged = graph.node("PRelu", merged, graph.weight(attention.slope_merge.reshape(1, 1)))
    return graph.layer_norm(merged, norm.weight, norm.bias, axis=0)
