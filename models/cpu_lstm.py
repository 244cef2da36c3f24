"""An LSTM for training on a CPU, several times as fast as torch's with gradients.

TF-GridNet runs short LSTMs over hundreds of sequences at once. Torch trains them by one small operator after another,
with every intermediate in memory, and that is most of a step. ``cpu_lstm.cpp`` makes one pass forward and one back.
Where it cannot be compiled, or is not the faster of the two, torch's own is used.
"""

import ctypes
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.compiled import library

_MULTIPLE, _MOST_UNITS = 16, 256  # what cpu_lstm.cpp is made for


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("steps", "sequences", "inputs", "units", "output_stride")),
        *((name, ctypes.c_int32) for name in ("reverse", "threads")),
    ]


def fits(x: Tensor, units: int) -> bool:
    """Whether :func:`lstm` is to run ``x``: float32 on a CPU, sizes it is made for, and no slower than torch's."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.shape[-1] % _MULTIPLE == 0
        and units % _MULTIPLE == 0
        and units <= _MOST_UNITS
        and library() is not None
        and speedup(x.shape[-1], units) >= 1
    )


def lstm(x: Tensor, hidden: Tensor, cell: Tensor, weights: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """What :class:`torch.nn.LSTM` computes, of one layer and one or two directions.

    Args:
        x: ``[T, N, D]``.
        hidden, cell: ``[directions, N, H]``, the states at the start.
        weights: of every direction: ``w_ih``, ``w_hh``, ``b_ih``, ``b_hh``, as in ``torch.nn.LSTM.all_weights``.

    Returns:
        ``[T, N, directions * H]``, and the states at the end.
    """
    outputs, hiddens, cells = [], [], []
    for direction, (w_ih, w_hh, b_ih, b_hh) in enumerate(weights):
        reverse = direction == 1
        y, last = _Direction.apply(x, hidden[direction], cell[direction], w_ih, w_hh, b_ih + b_hh, reverse)  # type: ignore[no-untyped-call]
        outputs.append(y)
        hiddens.append(y[0 if reverse else -1])
        cells.append(last)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    return output, torch.stack(hiddens), torch.stack(cells)


class _Direction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x, hidden, cell, w_ih, w_hh, bias, reverse = inputs
        x, hidden, cell = x.contiguous(), hidden.contiguous(), cell.contiguous()
        steps, sequences, size = x.shape
        units, width = w_hh.shape[1], _width()
        y = x.new_empty(steps, sequences, units)
        gates, cells = x.new_empty(steps, sequences, 4 * units), torch.empty_like(y)
        ctx.sizes = _Sizes(steps, sequences, size, units, units, int(reverse), torch.get_num_threads())
        packed = [_by_gates(weight, width) for weight in (w_ih, w_hh, bias[:, None])]
        _call("lstm_forward", ctx.sizes, x, hidden, cell, *packed, y, gates, cells)
        ctx.save_for_backward(x, hidden, cell, w_ih, w_hh, y, cells)
        ctx.gates = gates
        return y, cells[0 if reverse else -1].clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, cell, w_ih, w_hh, y, cells = ctx.saved_tensors
        dy, dcell = (gradient.contiguous() for gradient in gradients)
        if ctx.gates is None:
            raise RuntimeError("gradients of this LSTM were computed already, and what they need was given up")
        sizes, gates, ctx.gates = ctx.sizes, ctx.gates, None
        size, units, reverse = sizes.inputs, sizes.units, bool(sizes.reverse)
        width = _width()
        vectors = next(count for count in (4, 2, 1) if (size + units) % (count * width) == 0)
        rows = torch.cat([w_ih, w_hh], dim=1).view(4, units // width, width, -1).transpose(0, 1).reshape(4 * units, -1)
        blocks = rows.view(4 * units, -1, vectors * width).transpose(0, 1).contiguous()
        dx, dhidden, dcell_start = torch.empty_like(x), torch.empty_like(hidden), torch.empty_like(cell)
        _call("lstm_backward", sizes, dy, dcell, cell, blocks, vectors, cells, gates, dx, dhidden, dcell_start)
        # The gates now hold the gradients of their sums.
        before = torch.cat([y[1:], hidden[None]]) if reverse else torch.cat([hidden[None], y[:-1]])
        flat = gates.flatten(0, 1)
        dw_ih, dw_hh = _transposed_product(flat, x.flatten(0, 1)), _transposed_product(flat, before.flatten(0, 1))
        dbias = flat.sum(0)[:, None]
        return (
            dx,
            dhidden,
            dcell_start,
            *(_by_rows(dw, width) for dw in (dw_ih, dw_hh)),
            _by_rows(dbias, width)[:, 0],
            None,
        )


def _by_gates(weight: Tensor, width: int) -> Tensor:
    """``[4 H, K]``, torch's rows, to ``[H / width, K, 4, width]``."""
    rows, depth = weight.shape
    return weight.detach().view(4, rows // (4 * width), width, depth).permute(1, 3, 0, 2).contiguous()


def _by_rows(gradient: Tensor, width: int) -> Tensor:
    """``[H / width * 4 * width, K]``, the gates' own order, to torch's rows ``[4 H, K]``."""
    rows, depth = gradient.shape
    return gradient.view(-1, 4, width, depth).transpose(0, 1).reshape(rows, depth)


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b`` of two matrices with far more rows than columns."""
    product = a.new_zeros(a.shape[1], b.shape[1])
    sizes = (ctypes.c_int64(len(a)), ctypes.c_int64(a.shape[1]), ctypes.c_int64(b.shape[1]))
    strides = (ctypes.c_int64(a.shape[1]), ctypes.c_int64(b.shape[1]))
    _compiled().transposed_product(
        _pointer(a), strides[0], _pointer(b), strides[1], *sizes, _pointer(product), torch.get_num_threads()
    )
    return product


def _call(name: str, sizes: _Sizes, *arguments: Tensor | int) -> None:
    passed = [_pointer(value) if isinstance(value, Tensor) else value for value in arguments]
    getattr(_compiled(), name)(ctypes.byref(sizes), *passed)


def _width() -> int:
    """Floats in a vector of the compiled part."""
    return int(_compiled().vector_width())


def _compiled() -> ctypes.CDLL:
    found = library()
    assert found is not None
    return found


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def torch_lstm(
    x: Tensor, hidden: Tensor, cell: Tensor, weights: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, by torch: of what it has on a CPU, the fastest with gradients."""
    flat = [weight for direction in weights for weight in direction]
    with _without_onednn():  # which is two to seven times as fast without gradients, and four times slower with
        return torch.lstm(x, (hidden, cell), flat, True, 1, 0.0, True, len(weights) == 2, False)


@contextmanager
def _without_onednn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # the public switch sets more than this, and warns of it
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


Lstm: TypeAlias = Callable[[Tensor, Tensor, Tensor, Sequence[Sequence[Tensor]]], tuple[Tensor, Tensor, Tensor]]


def measure_speedup(one: Lstm, other: Lstm, size: int, units: int) -> float:
    """How many times as fast as the ``other`` the ``one`` is, forward and back, for inputs of a size and units."""
    generator = torch.Generator().manual_seed(0)  # of its own: what is trained draws as if nothing had been measured
    shapes = [
        (32, 96, size),
        (1, 96, units),
        (1, 96, units),
        (4 * units, size),
        (4 * units, units),
        *[(4 * units,)] * 2,
    ]
    tensors = [(torch.randn(shape, generator=generator) * 0.1).requires_grad_() for shape in shapes]

    def seconds(lstm: Lstm) -> float:
        started = time.thread_time()
        with torch.enable_grad():
            y, _, _ = lstm(*tensors[:3], [tensors[3:]])
            torch.autograd.grad(y.sum(), tensors)
        return time.thread_time() - started

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whose processor time tells of no other process
    try:
        times = [(seconds(one), seconds(other)) for _ in range(4)]  # the first of them takes longer
    finally:
        torch.set_num_threads(threads)
    return min(time for _, time in times) / min(time for time, _ in times)


@functools.cache
def speedup(size: int, units: int) -> float:
    """How many times as fast as torch's own :func:`lstm` is on this machine; measured once, on one core."""
    return measure_speedup(lstm, torch_lstm, size, units)
