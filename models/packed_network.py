"""The weights of a network in the order in which ``cpu_step.cpp`` reads them. This module does not need torch."""

import ctypes
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.models.arrivals import RAMP
from knowledge_boosting.models.compiled import STEP, required_library
from knowledge_boosting.models.config import ModelConfig, NetworkSize
from knowledge_boosting.models.transforms import (
    FLOOR,
    INAUDIBLE,
    REFERENCE,
    SILENCE,
    level_fading,
    level_unit,
    transforms,
)

Array = NDArray[np.float32]
Weights = Mapping[str, Array]  # the state dict of a network

_SELF_KEYS, _FUSION_KEYS = 512, 256  # values of a key over all bins, at least


def structure(name: str, kind: type, *fields: str) -> type[ctypes.Structure]:
    """Make a structure whose fields all have one type."""
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kind) for field in fields]})


_AttentionSizes = structure("_AttentionSizes", ctypes.c_int64, "heads", "key", "value", "window")
_LevelSizes = structure("_LevelSizes", ctypes.c_float, "unit", "fading", "floor", "reference", "silence", "inaudible")


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("microphones", "n_fft", "chunk", "bins", "outputs", "hints")),
        *((name, ctypes.c_int64) for name in ("channels", "units", "blocks")),
        *((name, _AttentionSizes) for name in ("attention", "fusion")),
        *((name, ctypes.c_int64) for name in ("delay", "ramp")),
        ("level", _LevelSizes),
    ]


# Structures of pointers, in the order of cpu_step.cpp.
_ATTENTION, _FILM, _LSTMS = 17, 4, 14
_BlockWeights = structure(
    "_BlockWeights", ctypes.c_void_p, *(f"weight_{number}" for number in range(_LSTMS + 2 * _ATTENTION + _FILM))
)
_StepWeights = structure(
    "_StepWeights",
    ctypes.c_void_p,
    *("analysis", "input", "input_bias", "input_scale", "input_shift", "output", "output_bias"),
    *("encoder", "encoder_bias", "synthesis", "blocks"),
)


class PackedNetwork:
    """The sizes and weights of a network as ``cpu_step.cpp`` reads them."""

    def __init__(self, config: ModelConfig, size: NetworkSize, weights: Weights, *, device: bool) -> None:
        """Pack the weights of the device's network, or else of a large network with its hint encoder."""
        self._all, self._size, self._framing = weights, size, config.framing
        self._width = int(required_library(STEP).vector_width())
        self._kept: list[object] = []  # what the pointers refer to
        self.padded_channels = -(-size.channels // self._width) * self._width
        bins, framing = config.framing.bins, config.framing
        fused = device and config.hint_channels

        def attention(values: int, window: int) -> ctypes.Structure:
            return _AttentionSizes(size.heads, -(-values // bins), size.channels // size.heads, window)

        level = (
            _LevelSizes(
                *(level_unit(framing, config.microphones), math.exp(-level_fading(framing))),
                *(FLOOR, REFERENCE, SILENCE, INAUDIBLE),
            )
            if config.running_level
            else _LevelSizes()
        )
        self.sizes = _Sizes(
            *(config.microphones, framing.n_fft, framing.chunk, bins, config.spectrum_channels, config.hint_channels),
            *(size.channels, size.hidden, size.blocks),
            attention(_SELF_KEYS, size.window) if size.self_attention else _AttentionSizes(),
            attention(_FUSION_KEYS, size.window) if fused else _AttentionSizes(),
            *(-1 if config.on_arrival else config.delay, RAMP),
            level,
        )
        matrices = transforms(framing, remove_offset=config.running_level)
        synthesis = matrices.synthesis.copy()
        synthesis[:, : framing.lookahead] *= matrices.head_gain
        synthesis[:, framing.lookahead : framing.chunk] *= matrices.body_gain
        synthesis[:, framing.chunk :] *= matrices.head_gain
        blocks = [self._block(index, fused=bool(fused) and index < size.blocks - 1) for index in range(size.blocks)]
        self._blocks = (_BlockWeights * len(blocks))(*blocks)
        norm = "network.input_norm"
        self.weights = _StepWeights(
            self._packed(matrices.analysis),
            *self._convolution("network.input_conv", 2 * config.microphones, size.channels),
            *(self._padded(self.get(f"{norm}.{part}", size.channels)) for part in ("weight", "bias")),
            *self._convolution("network.output_conv", size.channels, config.spectrum_channels),
            *((None, None) if device else self._convolution("encoder", config.spectrum_channels, config.hint_channels)),
            self._packed(synthesis) if device else None,
            ctypes.addressof(self._blocks),
        )

    def get(self, name: str, *shape: int) -> NDArray[np.float64]:
        """Return a weight of a shape in double precision.

        Raises:
            KeyError: there is no such weight.
            ValueError: its shape is another one.
        """
        value = self._all[name]
        if value.shape != shape:
            raise ValueError(f"{name} has the shape {list(value.shape)}, expected {list(shape)}")
        return value.astype(np.float64)

    def _keep(self, values: NDArray[np.float64]) -> int:
        kept = np.ascontiguousarray(values, np.float32)
        self._kept.append(kept)
        return int(kept.ctypes.data)

    def _pad(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Pad the last axis to whole vectors."""
        return np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, -values.shape[-1] % self._width)])

    def _padded(self, values: NDArray[np.float64]) -> int:
        return self._keep(self._pad(values))

    def _packed(self, *matrices: NDArray[np.float64]) -> int:
        """Keep matrices ``[depth, columns]`` in the order in which products read them, see ``vectors.h``."""
        parts = []
        for matrix in map(self._pad, matrices):
            column = 0
            while column < matrix.shape[1]:
                vectors = next(count for count in (4, 2, 1) if matrix.shape[1] - column >= count * self._width)
                parts.append(matrix[:, column : column + vectors * self._width].ravel())
                column += vectors * self._width
        return self._keep(np.concatenate(parts))

    def _convolution(self, name: str, inputs: int, outputs: int) -> tuple[int, int]:
        """Keep a convolution as three matrices ``[3 C_in, C_out]``, one for each frame, and its bias."""
        weight = self.get(f"{name}.conv.weight", outputs, inputs, 3, 3)
        by_frame = weight.transpose(2, 3, 1, 0)  # [3 frames, 3 bins, C_in, C_out]
        matrices = by_frame.reshape(3, -1, outputs)
        return self._packed(*matrices), self._padded(self.get(f"{name}.conv.bias", outputs))

    def _gates(self, weight: NDArray[np.float64]) -> NDArray[np.float64]:
        """Rearrange ``[4 H, depth]`` to ``[depth, gates]``: by group of units, and then by gate."""
        gates = weight.reshape(4, self._size.hidden, -1)
        gates = np.pad(gates, [(0, 0), (0, -self._size.hidden % self._width), (0, 0)])
        groups = gates.reshape(4, -1, self._width, gates.shape[-1]).swapaxes(0, 1)
        rearranged: NDArray[np.float64] = groups.reshape(-1, gates.shape[-1]).T
        return rearranged

    def _lstm(self, name: str, norm: str, suffix: str = "") -> tuple[int, int, int]:
        """Keep the weights of the input, of the state, and the bias. They include the affine part of the norm."""
        gates, channels, units = 4 * self._size.hidden, self._size.channels, self._size.hidden
        from_input = self.get(f"{name}.weight_ih_l0{suffix}", gates, channels)
        from_hidden = self.get(f"{name}.weight_hh_l0{suffix}", gates, units)
        bias = sum(self.get(f"{name}.bias_{part}_l0{suffix}", gates) for part in ("ih", "hh"))
        bias = bias + from_input @ self.get(f"{norm}.bias", channels)
        from_input = from_input * self.get(f"{norm}.weight", channels)
        packed = (self._packed(self._gates(weight)) for weight in (from_input, from_hidden))
        return (*packed, self._keep(self._gates(bias[:, None])))  # type: ignore[return-value]

    def _linear(self, name: str, *shape: int) -> tuple[int, int]:
        return self._packed(self.get(f"{name}.weight", *shape).T), self._padded(self.get(f"{name}.bias", shape[0]))

    def _block(self, index: int, *, fused: bool) -> ctypes.Structure:
        name, size = f"network.blocks.{index}", self._size
        intra = [self._lstm(f"{name}.intra_lstm", f"{name}.intra_norm", suffix) for suffix in ("", "_reverse")]
        linear = self.get(f"{name}.intra_linear.weight", size.channels, 2 * size.hidden)
        none = [None] * _ATTENTION
        return _BlockWeights(
            *(each for directions in zip(*intra, strict=True) for each in directions),
            *(self._packed(half.T) for half in np.split(linear, 2, axis=1)),
            self._padded(self.get(f"{name}.intra_linear.bias", size.channels)),
            *self._lstm(f"{name}.inter_lstm", f"{name}.inter_norm"),
            *self._linear(f"{name}.inter_linear", size.channels, size.hidden),
            *(self._self_attention(f"{name}.attention") if size.self_attention else none),
            *(self._fusion(f"network.fusion.{index}") if fused else ()),
        )

    def _merge(self, name: str) -> tuple[int, ...]:
        channels, bins = self._size.channels, self._framing.bins
        return (
            *self._linear(f"{name}.merge", channels, channels),
            self._keep(self.get(f"{name}.slope_merge", 1)),
            *(self._padded(self.get(f"{name}.norm_merge.{part}", bins, channels)) for part in ("weight", "bias")),
        )

    def _self_attention(self, name: str) -> tuple[int, ...]:
        sizes, channels, bins = self.sizes.attention, self._size.channels, self._framing.bins
        keys = sizes.heads * sizes.key
        weight = self.get(f"{name}.project.weight", 2 * keys + channels, channels)
        bias = self.get(f"{name}.project.bias", 2 * keys + channels)
        slopes = np.concatenate(
            [
                np.repeat(self.get(f"{name}.slope_qk", 2 * sizes.heads), sizes.key),
                np.repeat(self.get(f"{name}.slope_v", sizes.heads), sizes.value),
            ]
        )
        scale, shift = (
            self.get(f"{name}.{part}_qk", 2 * sizes.heads, 1, bins * sizes.key).reshape(2, sizes.heads, -1)
            for part in ("scale", "shift")
        )
        return (
            *(self._packed(weight[:keys].T), self._padded(bias[:keys]), self._padded(slopes[:keys])),
            *(self._packed(weight[keys:].T), self._padded(bias[keys:]), self._padded(slopes[keys:])),
            *(self._keep(part) for part in (scale[0], shift[0], scale[1], shift[1])),
            *(
                self._keep(self.get(f"{name}.{part}_v", sizes.heads, 1, bins * sizes.value))
                for part in ("scale", "shift")
            ),
            *self._merge(name),
        )

    def _fusion(self, name: str) -> tuple[int, ...]:
        sizes, channels, bins = self.sizes.fusion, self._size.channels, self._framing.bins
        keys = sizes.heads * sizes.key

        def slopes(part: str, count: int) -> NDArray[np.float64]:
            return np.repeat(self.get(f"{name}.slope_{part}", 1), count)

        def affine(part: str, values: int) -> list[int]:
            # All heads have the same.
            parts = (self.get(f"{name}.norm_{part}.{kind}", bins * values) for kind in ("weight", "bias"))
            return [self._keep(np.tile(each, (sizes.heads, 1))) for each in parts]

        weight = self.get(f"{name}.film.weight", 2 * channels, self.sizes.hints).reshape(2, channels, -1)
        film = np.concatenate([self._pad(half.T) for half in weight], axis=1)
        bias = self.get(f"{name}.film.bias", 2 * channels).reshape(2, channels)
        ages = {"age_bias": (sizes.heads, sizes.window), "age_scale": (sizes.window,)} if self.sizes.delay < 0 else {}
        return (
            *self._linear(f"{name}.query", keys, channels),
            self._padded(slopes("query", keys)),
            *self._linear(f"{name}.key_value", keys + channels, channels),
            self._padded(np.concatenate([slopes("key", keys), slopes("value", channels)])),
            *(*affine("query", sizes.key), *affine("key", sizes.key), *affine("value", sizes.value)),
            *self._merge(name),
            *(self._packed(film), self._padded(bias)),
            *(self._keep(self.get(f"{name}.{part}", *shape)) for part, shape in ages.items()),
        )
