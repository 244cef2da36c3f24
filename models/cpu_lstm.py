"""Half a GridNet block, ``x + linear(lstm(norm(x)))``, for training on a CPU several times as fast as with torch.

TF-GridNet runs short LSTMs over hundreds of sequences at once. Torch trains them with a sequence of small operators,
which write every intermediate result to memory and copy data to change its layout. That takes most of a training step.
``cpu_lstm.cpp`` makes one forward pass and one backward pass over x without changing its layout.
"""

import ctypes
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from knowledge_boosting.models.compiled import is_wanted, library, pointer, required_library

_MULTIPLE, _MAX_SIZE = 16, 256  # cpu_lstm.cpp supports multiples of 16 up to 256 channels and units

TIME, FREQUENCY = 1, 2  # axes of features [B, T, F, D]


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("steps", "sequences", "inner", "outer_stride", "inner_stride")),
        *((name, ctypes.c_int64) for name in ("step_stride", "channels", "units")),
        *((name, ctypes.c_int32) for name in ("directions", "threads")),
    ]


def _pointers(*names: str) -> type[ctypes.Structure]:
    return type("_Pointers", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_void_p) for name in names]})


_Weights = _pointers("gates", "bias", "linear", "linear_bias")
_Kept = _pointers("normal", "deviation", "gates", "hidden", "cells")
_Gradients = _pointers("dy", "dhn", "dcn", "dx", "dh0", "dc0", "weights")


def fits(x: Tensor, lstm: nn.LSTM) -> bool:
    """Return whether :func:`residual_lstm` supports ``x`` and the LSTM: float32 on a CPU, and a supported size."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and all(size % _MULTIPLE == 0 and size <= _MAX_SIZE for size in (lstm.input_size, lstm.hidden_size))
        and library() is not None
    )


def residual_lstm(
    x: Tensor, axis: int, norm: nn.LayerNorm, lstm: nn.LSTM, linear: nn.Linear, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``x + linear(lstm(norm(x)))``. The LSTM has one layer, and one or two directions along an axis.

    Args:
        x: features ``[B, T, F, D]``.
        axis: ``TIME`` or ``FREQUENCY``; there are N = B F or B T sequences.
        norm: the normalisation.
        lstm: the LSTM.
        linear: the linear layer.
        hidden, cell: the states at the start, ``[directions, N, H]``.

    Returns:
        Features ``[B, T, F, D]``, and the states at the end.
    """
    parts = zip(*lstm.all_weights, strict=True)
    w_input, w_hidden, b_input, b_hidden = (torch.stack(part) for part in parts)
    # The affine part of the norm is folded into the weights.
    bias = b_input + b_hidden + w_input @ norm.bias
    gates = torch.cat([w_input * norm.weight, w_hidden], dim=-1)
    last = linear.weight.unflatten(1, (len(gates), -1)).transpose(0, 1)
    arguments = (_by_group(gates), _by_group(bias[..., None])[..., 0], last.contiguous(), linear.bias)
    outputs: tuple[Tensor, Tensor, Tensor] = _ResidualLstm.apply(x, hidden, cell, *arguments, axis)  # type: ignore[no-untyped-call]
    return outputs


def _by_group(weight: Tensor) -> Tensor:
    """Reorder the rows of ``[directions, 4 H, K]`` from torch's order to groups of as many units as a vector has."""
    width = int(required_library().vector_width())
    grouped: Tensor = weight.unflatten(1, (4, -1, width)).transpose(1, 2).flatten(1, 3)
    return grouped


class _ResidualLstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, hidden, cell, gates, bias, linear, linear_bias, axis = inputs
        x, hidden, cell, gates, bias = (tensor.contiguous() for tensor in (x, hidden, cell, gates, bias))
        batch, frames, bins, channels = x.shape
        directions, _, units = linear.shape
        along_time = (frames, batch * bins, bins, frames * bins * channels, channels, bins * channels)
        along_frequency = (bins, batch * frames, batch * frames, 0, bins * channels, channels)
        layout = along_time if axis == TIME else along_frequency
        sizes = _Sizes(*layout, channels, units, directions, torch.get_num_threads())
        steps, sequences = sizes.steps, sizes.sequences
        kept = [
            x.new_empty(sequences * steps * channels),
            x.new_empty(sequences * steps),
            x.new_empty(directions * sequences * steps * 4 * units),
            *(x.new_empty(directions * sequences * (steps + 1) * units) for _ in range(2)),
        ]
        weights = (gates, bias, linear, linear_bias)
        outputs = torch.empty_like(x), torch.empty_like(hidden), torch.empty_like(cell)
        required_library().lstm_forward(
            ctypes.byref(sizes),
            ctypes.byref(_Weights(*map(pointer, weights))),
            ctypes.byref(_Kept(*map(pointer, kept))),
            *(pointer(tensor) for tensor in (x, hidden, cell, *outputs)),
        )
        ctx.sizes, ctx.shape = sizes, x.shape
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*weights, *kept)
        return outputs

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None) -> tuple[Tensor | None, ...]:
        sizes, tensors = ctx.sizes, ctx.saved_tensors
        weights, kept = tensors[:4], tensors[4:]
        states = (sizes.directions, sizes.sequences, sizes.units)
        dx, dh0, dc0 = weights[0].new_empty(ctx.shape), weights[0].new_empty(states), weights[0].new_empty(states)
        dy = torch.zeros_like(dx) if dy is None else dy.contiguous()
        given = [dy, *(each if each is None else each.contiguous() for each in (dhn, dcn))]
        lengths = [weight.numel() for weight in weights]
        by_thread = weights[0].new_zeros(sizes.threads, sum(lengths))
        required_library().lstm_backward(
            ctypes.byref(sizes),
            ctypes.byref(_Weights(*map(pointer, weights))),
            ctypes.byref(_Kept(*map(pointer, kept))),
            ctypes.byref(_Gradients(*map(pointer, (*given, dx, dh0, dc0, by_thread)))),
        )
        total = by_thread.sum(0).split(lengths)
        return dx, dh0, dc0, *(part.view_as(weight) for part, weight in zip(total, weights, strict=True)), None


ResidualLstm: TypeAlias = Callable[
    [Tensor, int, nn.LayerNorm, nn.LSTM, nn.Linear, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]
]


class FasterLstm:
    """Uses the faster of two implementations on this machine. The speed is measured once for every size."""

    def __init__(self, ours: ResidualLstm, torchs: ResidualLstm) -> None:
        self._ours, self._torchs = ours, torchs
        self._speedups: dict[tuple[int, int, bool], float] = {}

    def __call__(
        self, x: Tensor, axis: int, norm: nn.LayerNorm, lstm: nn.LSTM, linear: nn.Linear, hidden: Tensor, cell: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute :func:`residual_lstm`. Ours is used only if it is wanted, fits and is faster."""
        trains = torch.is_grad_enabled()
        ours = (
            is_wanted(x.shape[1], trains=trains)
            and fits(x, lstm)
            and self.speedup(lstm.input_size, lstm.hidden_size, trains=trains) >= 1
        )
        return (self._ours if ours else self._torchs)(x, axis, norm, lstm, linear, hidden, cell)

    def speedup(self, channels: int, units: int, *, trains: bool) -> float:
        """Return the speed of our implementation relative to torch's on one core.

        Args:
            channels: the size of the input.
            units: the size of the LSTM.
            trains: whether to run the forward and the backward pass, or the forward pass without gradients.
        """
        key = channels, units, trains
        if key not in self._speedups:
            self._speedups[key] = self._measure(*key)
        return self._speedups[key]

    def describe(self, lstm: nn.LSTM) -> str:
        """Return which implementation trains an LSTM, and how much faster it is than the other."""
        if not fits(lstm.all_weights[0][0], lstm):
            return "torch"
        speedup = self.speedup(lstm.input_size, lstm.hidden_size, trains=True)
        ours, torchs = f"the C++ library with {required_library().instructions().decode()}", "torch"
        faster, slower = (ours, torchs) if speedup >= 1 else (torchs, ours)
        return f"{faster}, {max(speedup, 1 / speedup):.1f} times as fast as {slower}"

    def _measure(self, channels: int, units: int, trains: bool) -> float:
        with torch.random.fork_rng(devices=()):  # the measurement must not affect the random numbers of training
            modules = nn.LayerNorm(channels), nn.LSTM(channels, units), nn.Linear(units, channels)
        x = torch.linspace(-1, 1, 32 * 96 * channels).view(1, 32, 96, channels).requires_grad_()
        states = torch.zeros(2, 1, 96, units)
        weights = [x, *(weight for module in modules for weight in module.parameters())]

        def seconds(way: ResidualLstm) -> float:
            started = time.thread_time()
            with torch.enable_grad() if trains else torch.no_grad():
                y, _, _ = way(x, TIME, *modules, *states)
                if trains:
                    torch.autograd.grad(y.sum(), weights)
            return time.thread_time() - started

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so that processor time does not depend on other processes
        try:
            times = [(seconds(self._ours), seconds(self._torchs)) for _ in range(4)]  # the first one takes longer
        finally:
            torch.set_num_threads(threads)
        return min(time for _, time in times) / min(time for time, _ in times)
