"""Runs the device's network frame by frame with ONNX Runtime, without torch.

All buffers are allocated and bound once. States that change completely have two buffers, which alternate as input and
output. The rings of attention are not moved; each frame writes one row. :mod:`models.onnx_graph` describes the graph.
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
        # The features of frames that wait for their hints.
        self._waiting = np.zeros(
            (len(self._fusions), self._delay, model.framing.bins, model.on_device.channels), np.float32
        )

        # For every attention, the rings [L, key size, W] and [L, W, value size], and the new row of each.
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
        """Restore the state at the start of a stream."""
        for name, buffer in self._buffers.items():
            if not name.startswith("speaker_"):
                buffer[:] = 0
        if "self_mask" in self._buffers:
            self._buffers["self_mask"][:] = -np.inf
        self._overlap[:] = 0
        self._waiting[:] = 0
        self._number = 0

    def step(self, window: Samples, hint: Samples | None) -> Samples:
        """Process the next frame.

        Args:
            window: the samples of the frame, ``[M, n_fft]``.
            hint: the hint of ``delay`` frames ago, ``[hint channels, F]``; None if it is missing or not due yet.

        Returns:
            Samples of the estimate, ``[S, M, chunk]``.
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
