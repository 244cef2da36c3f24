"""Normalisation of attention heads and windowed attention, for training on a CPU.

Torch computes these with a sequence of operations. Each writes its whole result to memory, and heads are rearranged by
copies. ``cpu_attention.cpp`` processes each frame and each head while it is in the cache.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from knowledge_boosting.models.compiled import is_wanted, library, pointer, required_library

_MAX_SECTIONS, _MAX_COLUMNS = 3, 1024  # as in cpu_attention.cpp

Sections = Sequence[tuple[int, int]]  # the number of heads and the size of each


class _Projection(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "steps", "bins", "columns", "sections")),
        *((name, ctypes.c_int64 * _MAX_SECTIONS) for name in ("heads", "size")),
        ("threads", ctypes.c_int32),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "steps", "window", "bins", "key", "value")),
        ("threads", ctypes.c_int32),
    ]


def fits(x: Tensor, frames: int) -> bool:
    """Return whether the functions of this module can be used for ``x``, which has this number of frames.

    They are used for float32 on a CPU, for training and where :func:`models.compiled.is_wanted` says so, if the library
    is available.
    """
    return (
        is_wanted(frames, trains=torch.is_grad_enabled())
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.shape[-1] <= _MAX_COLUMNS
        and library() is not None
    )


def normalised_heads(
    x: Tensor, sections: Sections, slope: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Apply PReLU, and then layer normalisation of every head over frequency and its columns.

    Args:
        x: features ``[B, T, F, C]``, whose columns are sections of heads.
        sections: the heads of each section.
        slope: the slopes of the PReLU, ``[C]``.
        scale, shift: the affine part of the normalisation, ``[F, C]``.
        residual: features ``[B, T, F, C]`` to add; only if there is one section with one head.

    Returns:
        The output ``[B, heads, T, F * size]`` of every section.
    """
    return tuple(_NormalisedHeads.apply(x, slope, scale, shift, residual, tuple(sections)))  # type: ignore[no-untyped-call]


class _NormalisedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, residual, sections = inputs
        x, slope, scale, shift = (tensor.contiguous() for tensor in tensors)
        batch, steps, bins, columns = x.shape
        heads, sizes = zip(*sections, strict=True)
        counts = ctypes.c_int64 * _MAX_SECTIONS
        projection = _Projection(
            batch, steps, bins, columns, len(sections), counts(*heads), counts(*sizes), torch.get_num_threads()
        )
        outputs = tuple(x.new_empty(batch, count, steps, bins * size) for count, size in sections)
        statistics = x.new_empty(batch * steps, 2, sum(heads))
        required_library().norm_forward(
            ctypes.byref(projection),
            *map(pointer, (x, slope, scale, shift)),
            pointer(residual if residual is None else residual.contiguous()),
            pointer(statistics),
            _array(outputs),
        )
        ctx.projection, ctx.has_residual = projection, residual is not None
        ctx.save_for_backward(x, slope, scale, statistics)
        return outputs

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, slope, scale, statistics = ctx.saved_tensors
        given = tuple(gradient.contiguous() for gradient in gradients)
        dx = torch.empty_like(x)
        by_thread = x.new_zeros(ctx.projection.threads, 1 + 2 * len(scale), len(slope))
        required_library().norm_backward(
            ctypes.byref(ctx.projection),
            *map(pointer, (x, slope, scale, statistics)),
            _array(given),
            *map(pointer, (dx, by_thread)),
        )
        dslope, dscale, dshift = by_thread.sum(0).split((1, len(scale), len(scale)))
        return dx, dslope[0], dscale, dshift, given[0].view_as(x) if ctx.has_residual else None, None


def _array(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*map(pointer, tensors))


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, unseen: Tensor, bins: int
) -> Tensor:
    """Compute the attention of every frame over the window of W frames that ends with it.

    Args:
        query, key: ``[B, L, T, key size]`` of L heads; scores are divided by the square root of the key size.
        value: ``[B, L, T, F * size]``.
        past_key, past_value: keys and values of the W frames before.
        unseen: ``[B]``, the number of these frames, from the first on, that are ignored.
        bins: F.

    Returns:
        Features ``[B, T, F, L * size]``.
    """
    output: Tensor = _WindowAttention.apply(query, key, value, past_key, past_value, unseen, bins)  # type: ignore[no-untyped-call]
    return output


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, unseen, bins = inputs
        tensors = [tensor.contiguous() for tensor in tensors]
        query, _, value, past, _ = tensors
        batch, heads, steps, size = query.shape
        window = past.shape[2]
        attention = _Attention(batch, heads, steps, window, bins, size, value.shape[-1], torch.get_num_threads())
        probabilities = query.new_empty(required_library().probabilities_size(ctypes.byref(attention)))
        output: Tensor = query.new_empty(batch, steps, bins, heads * value.shape[-1] // bins)
        required_library().attention_forward(
            ctypes.byref(attention),
            *map(pointer, tensors),
            ctypes.c_void_p(unseen.data_ptr()),
            *map(pointer, (probabilities, output)),
        )
        ctx.attention = attention
        ctx.save_for_backward(*tensors, probabilities)
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, probabilities = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in tensors]
        required_library().attention_backward(
            ctypes.byref(ctx.attention), *map(pointer, (*tensors, probabilities, gradient.contiguous(), *gradients))
        )
        return *gradients, None, None
