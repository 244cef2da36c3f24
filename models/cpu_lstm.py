"""An LSTM for training on a CPU, several times as fast as torch's with gradients.

TF-GridNet runs short LSTMs over hundreds of sequences at once. Torch trains them by one small operator after another,
with every intermediate in memory, and that is most of a step. ``cpu_lstm.cpp`` makes one pass forward and one back. It
is compiled when it is first needed and kept in the user's cache folder; without a C++ compiler torch's own is used.
"""

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.cli import warn
from common.errors import InputError, reason
from common.files import atomic_file

_SOURCE = Path(__file__).with_suffix(".cpp")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-std=c++17")
_WIDTH, _MOST_UNITS = 16, 256  # of cpu_lstm.cpp


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("steps", "sequences", "inputs", "units", "output_stride")),
        *((name, ctypes.c_int32) for name in ("reverse", "threads")),
    ]


def fits(x: Tensor, units: int) -> bool:
    """Whether :func:`lstm` can run ``x`` here: float32 on a CPU, sizes that are multiples of 16, a compiler."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.shape[-1] % _WIDTH == 0
        and units % _WIDTH == 0
        and units <= _MOST_UNITS
        and _library() is not None
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
        units = w_hh.shape[1]
        y = x.new_empty(steps, sequences, units)
        gates, cells = x.new_empty(steps, sequences, 4 * units), torch.empty_like(y)
        ctx.sizes = _Sizes(steps, sequences, size, units, units, int(reverse), torch.get_num_threads())
        packed = _by_gates(w_ih), _by_gates(w_hh), _by_gates(bias[:, None])
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
        vectors = next(count for count in (4, 2, 1) if (size + units) % (count * _WIDTH) == 0)
        rows = (
            torch.cat([w_ih, w_hh], dim=1).view(4, units // _WIDTH, _WIDTH, -1).transpose(0, 1).reshape(4 * units, -1)
        )
        blocks = rows.view(4 * units, -1, vectors * _WIDTH).transpose(0, 1).contiguous()
        dx, dhidden, dcell_start = torch.empty_like(x), torch.empty_like(hidden), torch.empty_like(cell)
        _call("lstm_backward", sizes, dy, dcell, cell, blocks, vectors, cells, gates, dx, dhidden, dcell_start)
        # The gates now hold the gradients of their sums.
        before = torch.cat([y[1:], hidden[None]]) if reverse else torch.cat([hidden[None], y[:-1]])
        flat = gates.flatten(0, 1)
        dw_ih, dw_hh = _transposed_product(flat, x.flatten(0, 1)), _transposed_product(flat, before.flatten(0, 1))
        dbias = flat.sum(0)[:, None]
        return dx, dhidden, dcell_start, _by_rows(dw_ih), _by_rows(dw_hh), _by_rows(dbias)[:, 0], None


def _by_gates(weight: Tensor) -> Tensor:
    """``[4 H, K]``, torch's rows, to ``[H / 16, K, 4, 16]``."""
    rows, depth = weight.shape
    return weight.detach().view(4, rows // (4 * _WIDTH), _WIDTH, depth).permute(1, 3, 0, 2).contiguous()


def _by_rows(gradient: Tensor) -> Tensor:
    """``[H / 16 * 4 * 16, K]``, the gates' own order, to torch's rows ``[4 H, K]``."""
    rows, depth = gradient.shape
    return gradient.view(-1, 4, _WIDTH, depth).transpose(0, 1).reshape(rows, depth)


def _transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b`` of two matrices with far more rows than columns."""
    product = a.new_zeros(a.shape[1], b.shape[1])
    sizes = (ctypes.c_int64(len(a)), ctypes.c_int64(a.shape[1]), ctypes.c_int64(b.shape[1]))
    strides = (ctypes.c_int64(a.shape[1]), ctypes.c_int64(b.shape[1]))
    library = _library()
    assert library is not None
    library.transposed_product(
        _pointer(a), strides[0], _pointer(b), strides[1], *sizes, _pointer(product), torch.get_num_threads()
    )
    return product


def _call(name: str, sizes: _Sizes, *arguments: Tensor | int) -> None:
    passed = [_pointer(value) if isinstance(value, Tensor) else value for value in arguments]
    getattr(_library(), name)(ctypes.byref(sizes), *passed)


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX", "c++")
    try:
        # What the compiler knows of itself and of this processor.
        macros = [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
        machine = subprocess.run(macros, capture_output=True, check=True).stdout
        digest = hashlib.sha256(machine + " ".join(_FLAGS).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knowledge-boosting"
        library = cache / f"lstm-{digest}.so"
        if not library.is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with atomic_file(library) as temporary:
                call = [compiler, *_FLAGS, str(_SOURCE), "-o", str(temporary)]
                subprocess.run(call, capture_output=True, check=True)
        return ctypes.CDLL(str(library))
    except (OSError, RuntimeError, InputError, subprocess.CalledProcessError) as error:
        warn(f"training on this CPU takes about twice as long: no C++ compiler that serves ({reason(error)})")
        return None
