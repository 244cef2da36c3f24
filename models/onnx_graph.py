"""Writes the device's network as an ONNX graph that computes one frame, for devices without torch.

The network is the small one of a pair, or one network alone, which can be a large one with self-attention.

The graph contains only the network. Its caller, :mod:`models.onnx_stream`, owns all buffers and moves their data:

- Attention caches are rings, which the graph reads but never writes. The key and value of the new frame are outputs.
  Inside the graph they are used beside the ring, and a mask excludes the oldest row. The caller then writes them into
  that row.
- States that change completely, those of LSTMs, are an input and an output, so that two buffers can alternate.
- The caller overlaps and adds the frames.

The layouts avoid transposition: spectra and the inputs of attention are ``[channels, F]``, features are ``[F, D]``.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, Pair
from knowledge_boosting.models.layers import HintFusion, SelfAttention
from knowledge_boosting.models.level import FLOOR, INAUDIBLE, REFERENCE, SILENCE, RunningLevel
from knowledge_boosting.models.onnx_stream import OnnxStream, check_sizes, load_graph
from knowledge_boosting.models.pair import SmallModel
from knowledge_boosting.models.tfgridnet import GridNetBlock

OPSET = 20
_IR_VERSION = 10
Array = NDArray[np.float32]
Attention: TypeAlias = SelfAttention | HintFusion


class _Graph:
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


def frame_graph(model: SmallModel) -> bytes:
    """Return an ONNX file that computes one frame of the device's network for one stream.

    These are its inputs, all float32, for each block ``i`` and each fusion ``j`` (after every block except the last):

    ===================  =======================  =======================================================
    ``window``           ``[M, n_fft]``           the frame's samples
    ``level``            ``[1]``                  ``new_level`` of the frame before; only with a running level
    ``input_past``       ``[1, 2M, 2, F]``        ``input_new`` of the previous two frames, the older first
    ``hidden_i``         ``[1, F, H]``            ``new_hidden_i`` of the frame before; ``cell_i`` likewise
    ``output_past``      ``[1, D, 2, F]``         ``output_new`` of the previous two frames
    ``speaker_weight_j`` ``[F, D]``               TSE: modulation by the speaker layer; ``speaker_bias_j`` likewise
    ``hint``             ``[hint channels, F]``   the hint of ``delay`` frames ago, or zeros
    ``delayed_j``        ``[F, D]``               ``features_j`` of ``delay`` frames ago; not with delay 0
    ``keys_j``           ``[L, key size, W]``     ``key_j`` of the last W frames, in any order
    ``values_j``         ``[L, W, value size]``   ``value_j`` of the same frames
    ``mask``             ``[W]``                  minus infinity at the oldest of these frames, else 0
    ``self_keys_i``      ``[L, key size, W]``     ``self_key_i`` of the last W frames; only with self-attention
    ``self_values_i``    ``[L, W, value size]``   ``self_value_i`` of the same frames
    ``self_mask``        ``[W]``                  as ``mask``; minus infinity also for rows without a frame
    ===================  =======================  =======================================================

    At the start of a stream, all inputs except ``self_mask`` are zeros. The outputs are ``frame`` ``[S', n_fft]``,
    which is already divided by the window sums and must be overlapped and added; ``input_new`` ``[1, 2M, 1, F]``,
    ``output_new`` ``[1, D, 1, F]``, ``new_hidden_i``, ``new_cell_i``, ``features_j`` ``[F, D]``, ``key_j`` and
    ``self_key_i`` ``[L, 1, key size]``, ``value_j`` and ``self_value_i`` ``[L, 1, value size]``.
    """
    config, network = model.config, model.network
    framing, mics, bins, signals = (
        config.framing,
        config.microphones,
        config.framing.bins,
        config.spectrum_channels // 2,
    )
    channels, hidden, window = config.on_device.channels, config.on_device.hidden, config.on_device.window
    graph = _Graph("small")

    # The spectrum [M, 2F] is reshaped to [2M, F], so its channels are (real, imaginary) of every microphone.
    spectrum = graph.node("MatMul", graph.input("window", mics, framing.n_fft), graph.weight(model.stft.analysis))
    gain = ""
    if model.level is not None:
        spectrum, gain = _running_level(graph, model.level, spectrum)
    new = graph.reshape(spectrum, 1, 2 * mics, 1, bins)
    graph.output(new, "input_new", 1, 2 * mics, 1, bins)
    past = graph.input("input_past", 1, 2 * mics, 2, bins)
    conv = network.input_conv.conv
    order = [part * mics + mic for mic in range(mics) for part in range(2)]
    x = _conv(graph, graph.node("Concat", past, new, axis=2), conv, conv.weight[:, order])
    x = graph.node("Transpose", graph.reshape(x, channels, bins), perm=[1, 0])
    x = graph.layer_norm(x, network.input_norm.weight, network.input_norm.bias)

    hint = mask = self_mask = ""
    if len(network.fusion):
        hint, mask = graph.input("hint", config.hint_channels, bins), graph.input("mask", window)
    if config.on_device.self_attention:
        self_mask = graph.input("self_mask", window)
    for index, block in enumerate(cast("Iterable[GridNetBlock]", network.blocks)):
        x = _block(graph, block, x, index, bins, channels, hidden)
        if block.attention is not None:
            x = _self_attention(graph, block.attention, x, self_mask, index)
        if index == len(network.blocks) - 1:
            break
        if len(network.speaker):
            weight = graph.input(f"speaker_weight_{index}", bins, channels)
            x = graph.node("Mul", x, weight)
            x = graph.node("Add", x, graph.input(f"speaker_bias_{index}", bins, channels))
        if len(network.fusion):
            x = _fusion(graph, cast("HintFusion", network.fusion[index]), x, hint, mask, index)

    new = graph.reshape(graph.node("Transpose", x, perm=[1, 0]), 1, channels, 1, bins)
    graph.output(new, "output_new", 1, channels, 1, bins)
    conv = network.output_conv.conv
    past = graph.input("output_past", 1, channels, 2, bins)
    embedding = _conv(graph, graph.node("Concat", past, new, axis=2), conv, conv.weight)
    # [2S', F] is reshaped to [S', 2F], with all real parts before all imaginary parts, so the rows of the matrix are
    # reordered. It also includes the division by the window sums.
    synthesis = model.stft.synthesis.unflatten(0, (bins, 2)).transpose(0, 1).flatten(0, 1).clone()
    head, body = model.stft.head_gain, model.stft.body_gain
    synthesis[:, : framing.lookahead] *= head
    synthesis[:, framing.lookahead : framing.chunk] *= body
    synthesis[:, framing.chunk :] *= head
    frame = graph.node("MatMul", graph.reshape(embedding, signals, 2 * bins), graph.weight(synthesis))
    graph.output(graph.node("Mul", frame, gain) if gain else frame, "frame", signals, framing.n_fft)
    return graph.file({"task": config.task, "delay": str(config.delay)})


def check_graph(graph: bytes, model: SmallModel) -> None:
    """Run graph and network on frames of noise, a third of them without hints, and compare their samples.

    Raises:
        InputError: the network is too large to run frame by frame.
        Failure: the samples differ by more than 1e-4 of the loudest one.
    """
    config, rng = model.config, np.random.default_rng(0)
    embedding, speaker = None, {}
    if config.needs_speaker:
        embedding = torch.from_numpy(rng.normal(0, 1 / 16, (1, SPEAKER_EMBEDDING_SIZE)).astype(np.float32))
    loudest = worst = 0.0
    session = load_graph(graph)
    try:
        check_sizes(session)
    except ValueError as error:
        raise InputError(
            f"too large to run on a device: {error}; give the network fewer heads or a shorter window"
        ) from None
    with torch.inference_mode():
        state = model.initial_state(1, embedding)
        for index, modulation in enumerate(state.network.speaker):
            speaker[f"speaker_weight_{index}"] = modulation.weight[0, 0].numpy()
            speaker[f"speaker_bias_{index}"] = modulation.bias[0, 0].numpy()
        stream = OnnxStream(session, config, speaker)
        for frame in range(2 * config.on_device.window):
            window = rng.normal(0, 0.1, (config.microphones, config.framing.n_fft)).astype(np.float32)
            hint = np.zeros((config.hint_channels, config.framing.bins), np.float32)
            if frame % 3:
                hint = rng.normal(0, 1, hint.shape).astype(np.float32)
            hints = torch.from_numpy(hint)[None, None] if isinstance(config, Pair) else None
            expected, state = model(torch.from_numpy(window)[None], state, hints)
            worst = max(worst, float(np.abs(stream.step(window, hint) - expected[0].numpy()).max()))
            loudest = max(loudest, float(expected.abs().max()))
    if not worst <= 1e-4 * loudest:
        raise Failure(f"the exported graph differs from the network by {worst:.2g} (loudest sample {loudest:.2g})")


def _running_level(graph: _Graph, level: RunningLevel, spectrum: str) -> tuple[str, str]:
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


def _conv(graph: _Graph, value: str, conv: nn.Conv2d, weight: Tensor) -> str:
    bias = conv.bias
    assert bias is not None
    return cast("str", graph.node("Conv", value, graph.weight(weight), graph.weight(bias), pads=[0, 1, 0, 1]))


def _block(graph: _Graph, block: GridNetBlock, x: str, index: int, bins: int, channels: int, hidden: int) -> str:
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


def _lstm_weights(graph: _Graph, lstm: nn.LSTM) -> tuple[str, str, str]:
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


def _self_attention(graph: _Graph, attention: SelfAttention, x: str, mask: str, index: int) -> str:
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


def _fusion(graph: _Graph, fusion: HintFusion, x: str, hint: str, mask: str, index: int) -> str:
    bins, channels = fusion.bins, fusion.merge.in_features
    graph.output(x, f"features_{index}", bins, channels)
    delayed = graph.input(f"delayed_{index}", bins, channels) if fusion.delay else x
    film = graph.node("Gemm", hint, graph.weight(fusion.film.weight.T), graph.weight(fusion.film.bias), transA=1)
    weight, bias = graph.node("Split", film, outputs=2, axis=1, num_outputs=2)
    merged = graph.node("Add", graph.node("Mul", delayed, weight), bias)

    def normed(part: str, slope: Tensor, norm: nn.LayerNorm) -> str:
        part = graph.node("PRelu", part, graph.weight(slope.reshape(1, 1)))
        return _normed_heads(graph, part, norm.weight, norm.bias, fusion)

    query = normed(
        graph.linear_transposed(x, fusion.query.weight, fusion.query.bias), fusion.slope_query, fusion.norm_query
    )
    split = fusion.heads * fusion.key
    weights, biases = fusion.key_value.weight, fusion.key_value.bias
    new_key = normed(
        graph.linear_transposed(merged, weights[:split], biases[:split]), fusion.slope_key, fusion.norm_key
    )
    new_value = normed(
        graph.linear_transposed(merged, weights[split:], biases[split:]), fusion.slope_value, fusion.norm_value
    )
    return _attend(graph, fusion, x, query, new_key, new_value, mask, "", index)


def _normed_heads(graph: _Graph, part: str, scale: Tensor, shift: Tensor, attention: Attention) -> str:
    """Normalise heads: ``[L * size, F]`` to ``[L, 1, size * F]``. The affine part of torch has the bins first."""
    heads, bins = attention.heads, attention.bins
    scale, shift = (each.unflatten(-1, (bins, -1)).transpose(-2, -1).flatten(-2) for each in (scale, shift))
    return graph.layer_norm(graph.reshape(part, heads, 1, scale.shape[-1]), scale, shift)


def _attend(
    graph: _Graph,
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

    merge, norm = attention.merge, attention.norm_merge
    merged = graph.node(
        "Gemm",
        graph.reshape(attended, merge.in_features, bins),
        graph.weight(merge.weight.T),
        graph.weight(merge.bias),
        transA=1,
    )
    merged = graph.node("PRelu", merged, graph.weight(attention.slope_merge.reshape(1, 1)))
    return cast("str", graph.node("Add", x, graph.layer_norm(merged, norm.weight, norm.bias, axis=0)))
