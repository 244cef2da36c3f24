"""A stream through the device's network under ONNX Runtime, frame by frame. Needs no torch.

Every buffer is made once and bound once. Whole states come in two copies that take turns as input and output; the rings
of attention are written one row a frame, and stay where they are. What the graph computes: :mod:`models.onnx_graph`.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.models.config import ModelConfig

Samples = NDArray[np.float32]
_MAX_VALUES = 2**24  # of an input or output


def load_graph(source: Path | bytes) -> onnxruntime.InferenceSession:
    """A graph file, or the bytes of one, ready to run on one thread of the CPU.

    Raises:
        InputError: ONNX Runtime cannot run it.
    """
    options = onnxruntime.SessionOptions()
    # One thread: a frame is too little work to share.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions have no common base
        name = "the graph" if isinstance(source, bytes) else source
        raise InputError(f"{name}: not a graph that ONNX Runtime can run ({reason(error)})") from None


def check_sizes(graph: onnxruntime.InferenceSession) -> None:
    """Whether all inputs and outputs of a graph are of sizes that it says, and that fit a machine.

    Raises:
        ValueError: not.
    """
    for value in (*graph.get_inputs(), *graph.get_outputs()):
        sizes = value.shape
        if value.type != "tensor(float)" or not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"{value.name} is {value.type} of {sizes}")
        if math.prod(sizes) > _MAX_VALUES:
            raise ValueError(f"{value.name} has {sizes} values")


class OnnxStream:
    """The state of one stream, and its next frame."""

    def __init__(
        self, graph: onnxruntime.InferenceSession, model: ModelConfig, speaker: Mapping[str, Samples] | None = None
    ) -> None:
        """A stream from its start.

        Args:
            graph: of :func:`load_graph`; streams may share it.
            model: the configuration the graph was made for.
            speaker: for TSE, its inputs ``speaker_weight_j`` and ``speaker_bias_j``.
        """
        self._graph = graph
        self._chunk, self._lookahead = model.framing.chunk, model.framing.lookahead
        self._signals = model.sources, model.microphones
        self._delay, self._window = model.delay, model.on_device.window
        self._number = 0

        shapes = {value.name: tuple(value.shape) for value in (*graph.get_inputs(), *graph.get_outputs())}
        buffers = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        for name, value in (speaker or {}).items():
            buffers[name][:] = value
        self._buffers = buffers
        self._overlap = np.zeros((shapes["frame"][0], self._lookahead), np.float32)
        self._fusions = [index for index in range(model.on_device.blocks - 1) if f"keys_{index}" in shapes]
        # Features of the frames that wait for their hints.
        self._waiting = np.zeros(
            (len(self._fusions), self._delay, model.framing.bins, model.on_device.channels), np.float32
        )

        # Of every attention the rings, [L, key size, W] and [L, W, value size], and the row that a frame adds to each.
        attentions = [("", index) for index in self._fusions]
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
        self._masks = [buffers[name] for name in ("mask", "self_mask") if name in shapes]

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
        """Begin again, as if nothing had been heard."""
        for name, buffer in self._buffers.items():
            if not name.startswith("speaker_"):
                buffer[:] = 0
        if "self_mask" in self._buffers:
            self._buffers["self_mask"][:] = -np.inf
        self._overlap[:] = 0
        self._waiting[:] = 0
        self._number = 0

    def step(self, window: Samples, hint: Samples | None) -> Samples:
        """The next frame.

        Args:
            window: ``[M, n_fft]``, the frame's samples.
            hint: ``[hint channels, F]`` of ``delay`` frames ago; None for a hint that is missing or not due yet.

        Returns:
            ``[S, M, chunk]`` samples of the estimate.
        """
        buffers, chunk, lookahead = self._buffers, self._chunk, self._lookahead
        row = self._number % self._window
        turn = self._number % self._delay if self._delay else 0
        buffers["window"][:] = window
        if self._fusions:
            buffers["hint"][:] = 0 if hint is None else hint
        for mask in self._masks:
            mask[row] = -np.inf
        for index in self._fusions if self._delay else ():
            buffers[f"delayed_{index}"][:] = self._waiting[index, turn]
        self._graph.run_with_iobinding(self._bindings[self._number % 2])
        for mask in self._masks:
            mask[row] = 0
        for keys, key, values, value in self._rings:
            keys[:, :, row] = key[:, 0]
            values[:, row] = value[:, 0]
        for index in self._fusions if self._delay else ():
            self._waiting[index, turn] = buffers[f"features_{index}"]
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
