"""Runs the device's network frame by frame with ONNX Runtime, without torch.

All buffers are allocated and bound once. States that change completely have two buffers, which alternate as input and
output. The rings of attention are not moved; each frame writes one row. :mod:`models.onnx_graph` describes the graph.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.models.arrivals import MASKED, MERGES, RAMP, Hint, check_hints
from knowledge_boosting.models.config import ModelConfig

Samples = NDArray[np.float32]
_MAX_VALUES = 2**24  # in an input or output


def load_graph(source: Path | bytes) -> onnxruntime.InferenceSession:
    """Load a graph from a file or from bytes, to run on one thread of the CPU.

    Raises:
        InputError: ONNX Runtime cannot run it.
    """
    options = onnxruntime.SessionOptions()
    # A frame is too little work for several threads.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the exceptions of the runtime have no common base class
        name = "the graph" if isinstance(source, bytes) else source
        raise InputError(f"{name}: not a graph that ONNX Runtime can run ({reason(error)})") from None


def check_sizes(graph: onnxruntime.InferenceSession) -> None:
    """Check that all inputs and outputs of a graph have fixed sizes that are not too large.

    Raises:
        ValueError: a size is not fixed or too large, or the type is not float32.
    """
    for value in (*graph.get_inputs(), *graph.get_outputs()):
        sizes = value.shape
        if value.type != "tensor(float)" or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"{value.name} is {value.type} of {sizes}")
        if math.prod(sizes) > _MAX_VALUES:
            raise ValueError(f"{value.name} has {sizes} values")


class OnnxStream:
    """The state of one stream through the graph."""

    def __init__(
        self, graph: onnxruntime.InferenceSession, model: ModelConfig, speaker: Mapping[str, Samples] | None = None
    ) -> None:
        """Begin a stream.

        Args:
            graph: the result of :func:`load_graph`; streams can share it.
            model: the configuration of the network in the graph.
            speaker: for TSE, the inputs ``speaker_weight_j`` and ``speaker_bias_j``.
        """
        self._graph, self._model = graph, model
        self._chunk, self._lookahead = model.framing.chunk, model.framing.lookahead
        self._signals = model.sources, model.microphones
        self._window = model.on_device.window
        self._number = 0

        shapes = {value.name: tuple(value.shape) for value in (*graph.get_inputs(), *graph.get_outputs())}
        buffers = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        for name, value in (speaker or {}).items():
            buffers[name][:] = value
        self._buffers = buffers
        self._overlap = np.zeros((shapes["frame"][0], self._lookahead), np.float32)
        fusions = [index for index in range(model.on_device.blocks - 1) if f"keys_{index}" in shapes]
        self._fusion: _DelayedHints | _ArrivedHints | None = None
        if fusions:
            self._fusion = (_ArrivedHints if model.on_arrival else _DelayedHints)(buffers, fusions, model)

        # For every attention, the rings [L, key size, W] and [L, W, value size], and the new row of each.
        attentions = [("", index) for index in fusions if not model.on_arrival]
        if model.on_device.self_attention:
            attentions += [("self_", index) for index in range(model.on_device.blocks)]
        self._rings = [
            (
                buffers[f"{of}keys_{index}"],
                buffers[f"{of}key_{index}"],
                buffers[f"{of}values_{index}"],
                buffers[f"{of}value_{index}"],
            )
            for of, index in attentions
        ]
        names = ("self_mask",) if model.on_arrival else ("mask", "self_mask")
        self._masks = [buffers[name] for name in names if name in shapes]

        replaced = [name for name in shapes if f"new_{name}" in shapes]
        swapped = {name: buffers[f"new_{name}"] for name in replaced} | {
            f"new_{name}": buffers[name] for name in replaced
        }
        self._bindings = [self._bind(buffers), self._bind(buffers | swapped)]
        self.reset()

    def _bind(self, buffers: Mapping[str, Samples]) -> onnxruntime.IOBinding:
        binding = self._graph.io_binding()
        for values, bind in (
            (self._graph.get_inputs(), binding.bind_input),
            (self._graph.get_outputs(), binding.bind_output),
        ):
            for value in values:
                buffer = buffers[value.name]
                bind(value.name, "cpu", 0, np.float32, buffer.shape, buffer.ctypes.data)
        return binding

    def reset(self) -> None:
        """Restore the state at the start of a stream."""
        for name, buffer in self._buffers.items():
            if not name.startswith("speaker_"):
                buffer[:] = 0
        if "self_mask" in self._buffers:
            self._buffers["self_mask"][:] = -np.inf
        self._overlap[:] = 0
        if self._fusion is not None:
            self._fusion.reset()
        self._number = 0

    def step(self, window: Samples, hints: Sequence[Hint] = ()) -> Samples:
        """Process the next frame.

        Args:
            window: the samples of the frame, ``[M, n_fft]``.
            hints: the hints to use from this frame on. With a fixed delay that of ``delay`` frames ago, if there is
                one; else at most :data:`models.arrivals.MERGES` that have arrived.

        Returns:
            Samples of the estimate, ``[S, M, chunk]``.
        """
        check_hints(self._model, hints)
        buffers, chunk, lookahead = self._buffers, self._chunk, self._lookahead
        row = self._number % self._window
        buffers["window"][:] = window
        if self._fusion is not None:
            self._fusion.before(self._number, hints)
        for mask in self._masks:
            mask[row] = -np.inf
        self._graph.run_with_iobinding(self._bindings[self._number % 2])
        for mask in self._masks:
            mask[row] = 0
        for keys, key, values, value in self._rings:
            keys[:, :, row] = key[:, 0]
            values[:, row] = value[:, 0]
        if self._fusion is not None:
            self._fusion.after(self._number)
        for part in ("input", "output"):
            past = buffers[f"{part}_past"]
            past[:, :, 0] = past[:, :, 1]
            past[:, :, 1] = buffers[f"{part}_new"][:, :, 0]
        self._number += 1
        frame = buffers["frame"]
        samples = frame[:, :chunk].copy()
        samples[:, :lookahead] += self._overlap
        self._overlap[:] = frame[:, chunk:]
        return samples.reshape(*self._signals, chunk)


class _DelayedHints:
    """The hints of a fixed delay: the features of frames that wait for them."""

    def __init__(self, buffers: Mapping[str, Samples], fusions: Sequence[int], model: ModelConfig) -> None:
        self._delay, self._hint = model.delay, buffers["hint"]
        size = model.framing.bins, model.on_device.channels
        self._waiting = np.zeros((len(fusions), self._delay, *size), np.float32)
        self._features = [buffers[f"features_{index}"] for index in fusions]
        self._delayed = [buffers[f"delayed_{index}"] for index in fusions] if self._delay else []

    def reset(self) -> None:
        self._waiting[:] = 0

    def before(self, number: int, hints: Sequence[Hint]) -> None:
        """Fill the inputs of a frame."""
        self._hint[:] = hints[0].values if hints else 0
        for waiting, delayed in zip(self._waiting, self._delayed, strict=False):
            delayed[:] = waiting[number % self._delay]

    def after(self, number: int) -> None:
        """Store the outputs of a frame."""
        if self._delay:
            for waiting, features in zip(self._waiting, self._features, strict=True):
                waiting[number % self._delay] = features


class _ArrivedHints:
    """Hints that are used on arrival: the features, keys and values of the last W frames.

    Frame ``t`` has row ``t mod W``.
    """

    def __init__(self, buffers: Mapping[str, Samples], fusions: Sequence[int], model: ModelConfig) -> None:
        window, bins, channels = model.on_device.window, model.framing.bins, model.on_device.channels
        self._window = window
        self._features = np.zeros((len(fusions), window, bins, channels), np.float32)
        self._new_features = [buffers[f"features_{index}"] for index in fusions]
        self._rings = [
            (ring, buffers[f"{new}_{index}"])
            for index in fusions
            for ring, new in (
                (buffers[f"keys_{index}"].transpose(2, 0, 1), "key"),
                (buffers[f"values_{index}"].transpose(1, 0, 2), "value"),
            )
        ]  # [W, L, size], and [L, K, size] of the hints of the current frame
        self._hints = buffers["hint"].reshape(model.hint_channels, MERGES, bins).transpose(1, 0, 2)
        self._waiting = [buffers[f"waiting_{index}"].reshape(MERGES, bins, channels) for index in fusions]
        self._ages, self._mask = buffers["ages"], buffers["mask"]
        self._youngest, self._strength = buffers["youngest"], buffers["strength"]
        # The ages of the rows at all frames: at frame t, they begin at W - t mod W.
        self._cycle = np.tile(np.arange(window, 0, -1, dtype=np.float32), 2)
        self._rows: list[int] = []  # of the hints of the current frame
        self.reset()

    def reset(self) -> None:
        self._features[:] = 0
        self._mask[:] = MASKED

    def before(self, number: int, hints: Sequence[Hint]) -> None:
        """Fill the inputs of a frame."""
        window, mask, ages = self._window, self._mask, self._ages
        first = -number % window
        ages[:window] = self._cycle[first : first + window]
        mask[window:] = MASKED
        # A network that was reset has forgotten the features of the frames before.
        hints = [hint for hint in hints if hint.age <= number]
        self._rows = [(number - hint.age) % window for hint in hints]
        for merge, (hint, row) in enumerate(zip(hints, self._rows, strict=True)):
            mask[row], mask[window + merge], ages[window + merge] = MASKED, 0, hint.age
            self._hints[merge] = hint.values
            for waiting, features in zip(self._waiting, self._features, strict=True):
                waiting[merge] = features[row]
        visible = np.count_nonzero(mask == 0)
        self._youngest[0] = (ages - mask).min() if visible else window
        self._strength[0] = min(1.0, visible / RAMP)

    def after(self, number: int) -> None:
        """Store the outputs of a frame."""
        for merge, row in enumerate(self._rows):
            self._mask[row] = 0
            for ring, new in self._rings:
                ring[row] = new[:, merge]
        row = number % self._window
        for features, new in zip(self._features, self._new_features, strict=True):
            features[row] = new
        self._mask[row] = MASKED
