"""One frame of a network as one call of ``cpu_step.cpp``. This module does not need torch.

In torch or ONNX Runtime, a frame consists of hundreds of small operations. Dispatching them takes longer than their
arithmetic, and the weights of the LSTMs are rearranged for each of them. Here, weights are packed once.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.models.arrivals import MERGES, Hint, check_hints
from knowledge_boosting.models.compiled import STEP, library, required_library
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, ModelConfig, NetworkSize, Pair
from knowledge_boosting.models.packed_network import Array, PackedNetwork, Weights, structure

# Engines use a compiled step only if it equals theirs up to this error, relative to the largest value or to one, and
# takes at most this part of their time. A smaller gain is not worth another implementation.
MAX_ERROR = 1e-4
MAX_RELATIVE_TIME = 2 / 3

_MAX_SIZE = 512  # of channels and of units; buffers grow with it

# Structures of pointers, as in cpu_step.cpp.
_BlockStates = structure(
    "_BlockStates",
    ctypes.c_void_p,
    *("hidden", "cell", "keys", "values", "weight", "bias", "fusion_keys", "fusion_values", "features"),
)
_StepStates = structure(
    "_StepStates",
    ctypes.c_void_p,
    *("frames", "level", "input", "output", "encoder", "overlap", "arrived", "blocks"),
)


def supports(size: NetworkSize, *, quiet: bool = False) -> bool:
    """Return whether networks of a size can run here. If the library is missing, and not ``quiet``, print a warning."""
    return max(size.channels, size.hidden) <= _MAX_SIZE and library(STEP, quiet=quiet) is not None


@dataclass(frozen=True)
class LargeStates:
    """The addresses of the states of a large network. The first axis of all is the slot."""

    # Frames, running level, and the past of input, output and encoder.
    network: tuple[int | None, ...]
    # For each block: hidden, cell, keys and values of self-attention, and factor and summand of the speaker.
    blocks: Sequence[tuple[int | None, ...]]


class LargeStep:
    """Steps of one frame of any streams through a large network, whose states are changed in place."""

    def __init__(self, config: Pair, weights: Weights, states: LargeStates) -> None:
        """Pack the weights of a network whose size is supported. The states must outlive this object."""
        self._network = PackedNetwork(config, config.large, weights, device=False)
        self._step = required_library(STEP).step_large
        self._blocks = (_BlockStates * len(states.blocks))(*(_BlockStates(*block) for block in states.blocks))
        self._states = _StepStates(*states.network, None, None, ctypes.addressof(self._blocks))

    def __call__(self, slots: int, count: int, samples: int, hints: int, threads: int) -> None:
        """Advance ``count`` streams by a frame.

        Args:
            slots: the address of their slots, int64 ``[count]``.
            count: the number of streams.
            samples: the address of their samples, ``[count, M, n_fft]``.
            hints: the address of the result, ``[count, hint channels, F]``.
            threads: the maximum number of threads.
        """
        self._step(
            *(ctypes.byref(each) for each in (self._network.sizes, self._network.weights, self._states)),
            *(ctypes.c_void_p(slots), ctypes.c_int64(count), ctypes.c_void_p(samples), ctypes.c_void_p(hints)),
            ctypes.c_int32(threads),
        )


class SmallNetwork:
    """The device's network, which several streams can share."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        """Pack the weights of a network whose size is supported.

        Raises:
            KeyError: a weight is missing.
            ValueError: a weight has another shape.
        """
        self.config = config
        self.packed = PackedNetwork(config, config.on_device, weights, device=True)
        between = config.on_device.blocks - 1 if config.needs_speaker else 0
        values = 2 * config.framing.bins * config.on_device.channels
        self._speaker = [
            (
                self.packed.get(f"network.speaker.{index}.weight", values, SPEAKER_EMBEDDING_SIZE).astype(np.float32),
                self.packed.get(f"network.speaker.{index}.bias", values).astype(np.float32),
            )
            for index in range(between)
        ]

    def modulations(self, speaker_embedding: Array | None) -> list[Array]:
        """Return factor and summand ``[2, F, D]`` after each block, for the speaker of a stream."""
        if self._speaker and speaker_embedding is None:
            raise ValueError("target speech extraction needs a speaker embedding")
        shape = 2, self.config.framing.bins, self.config.on_device.channels
        embedding = np.zeros(0) if speaker_embedding is None else speaker_embedding
        return [(weight @ embedding + bias).astype(np.float32).reshape(shape) for weight, bias in self._speaker]


class SmallStep:
    """One stream through the device's network."""

    def __init__(self, network: SmallNetwork, speaker_embedding: Array | None = None) -> None:
        """Begin a stream. ``speaker_embedding`` is ``[256]`` for TSE, otherwise None."""
        config, size, sizes = network.config, network.config.on_device, network.packed.sizes
        bins, framing = config.framing.bins, config.framing
        self._network = network
        self._step = required_library(STEP).step_small
        self._shape = config.sources, config.microphones, framing.chunk
        self._modulations = network.modulations(speaker_embedding)
        self._states: list[NDArray[np.generic]] = []
        self._frames = np.zeros(1, np.int64)

        def state(*shape: int, kind: type[np.generic] = np.float32) -> int:
            self._states.append(np.zeros(shape, kind))
            return int(self._states[-1].ctypes.data)

        def rings(attention: ctypes.Structure) -> tuple[int, int]:
            rows = attention.heads, attention.window
            return state(*rows, bins * attention.key), state(*rows, bins * attention.value)

        blocks = []
        for index in range(size.blocks):
            own: list[int | None] = [state(bins, size.hidden), state(bins, size.hidden)]
            own += rings(sizes.attention) if size.self_attention else (None, None)
            own += _addresses(self._modulations[index]) if index < len(self._modulations) else (None, None)
            if config.hint_channels and index < size.blocks - 1:
                waiting = size.window if config.on_arrival else config.delay
                own += [*rings(sizes.fusion), state(waiting, bins, network.packed.padded_channels)]
            blocks.append(_BlockStates(*own))
        self._blocks = (_BlockStates * len(blocks))(*blocks)
        self._pointers = _StepStates(
            self._frames.ctypes.data,
            state(1) if config.running_level else None,
            state(2, bins, 2 * config.microphones),
            state(2, bins, size.channels),
            None,
            state(config.spectrum_channels // 2, framing.lookahead),
            state(size.window, kind=np.uint8) if config.on_arrival else None,
            ctypes.addressof(self._blocks),
        )
        self._hints, self._ages = (ctypes.c_void_p * MERGES)(), (ctypes.c_int64 * MERGES)()

    def reset(self) -> None:
        """Restore the state at the start of a stream."""
        for buffer in (self._frames, *self._states):
            buffer[...] = 0

    def step(self, window: Array, hints: Sequence[Hint] = ()) -> Array:
        """Process the next frame, as :meth:`models.onnx_stream.OnnxStream.step`.

        Raises:
            ValueError: the window or a hint has another shape, or a hint cannot be used at this frame.
        """
        config, packed = self._network.config, self._network.packed
        check_hints(config, hints)
        _check_shape(window, config.microphones, config.framing.n_fft)
        for hint in hints:
            _check_shape(hint.values, config.hint_channels, config.framing.bins)
        arrays = [np.ascontiguousarray(values, np.float32) for values in (window, *(hint.values for hint in hints))]
        for index, hint in enumerate(hints):
            self._hints[index], self._ages[index] = arrays[index + 1].ctypes.data, hint.age
        estimate = np.empty(self._shape, np.float32)
        self._step(
            *(ctypes.byref(each) for each in (packed.sizes, packed.weights, self._pointers)),
            *(ctypes.c_void_p(arrays[0].ctypes.data), self._hints, self._ages, ctypes.c_int64(len(hints))),
            ctypes.c_void_p(estimate.ctypes.data),
        )
        return estimate


def _addresses(arrays: Array) -> tuple[int, ...]:
    return tuple(int(array.ctypes.data) for array in arrays)


def _check_shape(array: Array, *shape: int) -> None:
    if array.shape != shape:
        raise ValueError(f"the shape must be {list(shape)}, not {list(array.shape)}")
