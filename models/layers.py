"""Causal building blocks. Features are ``[B, T, F, C]`` throughout: batch, frame, frequency, channel.

Every block is a function from (input, state) to (output, state) over any T >= 1 frames. A state passed in is used
up: its tensors may be overwritten (a ring buffer writes one row, it does not copy itself), so keep a copy if you need
the state again. Under autograd nothing is overwritten.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from knowledge_boosting.models import cpu_attention


class CausalConv2d(nn.Module):
    """3 x 3 convolution over (time, frequency), causal in time, zero-padded by one bin in frequency.

    Its state is the two input frames before, ``[B, 2, F, C_in]``, zeros at the start of a stream.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=(0, 1))

    def initial_past(self, batch: int, bins: int) -> Tensor:
        return self.conv.weight.new_zeros(batch, 2, bins, self.conv.in_channels)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([past, x], dim=1)
        y: Tensor = self.conv(x.permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1), x[:, -2:]


@dataclass(frozen=True)
class AttentionCache:
    """Ring buffers of the last W frames' keys and values: frame ``t`` lies in row ``t mod W``."""

    keys: Tensor  # [B, L, W, key size]
    values: Tensor  # [B, L, W, value size]
    # Which rings belong to the streams of a step, where there are more rings than streams: they stay in their place.
    streams: Tensor | None = None  # [B]


@dataclass(frozen=True)
class Window:
    """Where T frames stand in rings of W rows, and what each may see; the same for all rings of a network."""

    stream: Tensor  # [B, 1]
    rows: Tensor  # [B, min(T, W)] rows that the newest frames are written to
    past: Tensor | None  # [B, W] rows of the frames before, oldest first; None for one frame
    band: Tensor | None  # [Q, W + Q] which of a block's keys lie in a query's window, Q = min(T, W); None for one frame
    unseen: Tensor  # rows or keys from before the start of a stream: [B, 1, 1, W], or [B, 1, blocks, 1, W + Q]


def window_of(frames: Tensor, steps: int, size: int) -> Window:
    """The window positions of ``steps`` new frames.

    Args:
        frames: ``[B]`` frames seen before, each stream its own.
        steps: T, the new frames.
        size: W, the frames that attention sees.
    """
    device = frames.device
    stream = torch.arange(len(frames), device=device)[:, None]
    frames = frames[:, None]
    slot = torch.arange(size, device=device)
    if steps == 1:
        return Window(stream, frames % size, None, None, (slot > frames)[:, None, None])
    rows = (frames + torch.arange(max(steps - size, 0), steps, device=device)) % size
    # Queries go in blocks of W, or one of T; the keys of a block are its own frames and the W before it, of which the
    # very first is in nobody's window: whole blocks need no overlapping views, whose gradients are slow.
    block = min(steps, size)
    key = torch.arange(size + block, device=device)
    distance = key - slot[:block, None] - 1
    first = torch.arange(0, steps, block, device=device)[:, None] - size
    unseen = frames[:, :, None] + first + key < 0
    band = (distance >= 0) & (distance < size)
    return Window(stream, rows, (frames + slot) % size, band, unseen[:, None, :, None])


def window_attention(
    query: Tensor, key: Tensor, value: Tensor, cache: AttentionCache, window: Window, bins: int, *, mask_unseen: bool
) -> tuple[Tensor, AttentionCache]:
    """Attention of every frame over a window of W frames that ends with it.

    Args:
        query, key: ``[B, L, T, key size]`` of L heads; scores are scaled by the root of the key size.
        value: ``[B, L, T, F * size]``.
        cache: the W frames before, zeros at the start of a stream.
        window: of these T frames.
        bins: F.
        mask_unseen: whether frames before the start of a stream stay out of the softmax (else they take part as
            zero keys and values).

    Returns:
        ``[B, T, F, L * size]``, and the cache with the new frames in it.
    """
    steps, size = query.shape[2], cache.keys.shape[2]
    if window.past is None or window.band is None:
        # The oldest row is replaced first; then the ring is the window, in an order that attention does not see.
        # Written out, because the library's attention scales a copy of all keys.
        cache = _write(cache, key, value, window)
        scores = _with_rings(query * query.shape[-1] ** -0.5, cache.keys.transpose(-1, -2), cache.streams)
        if mask_unseen:
            scores = scores.masked_fill(window.unseen, -torch.inf)
        return _channels(_with_rings(scores.softmax(-1), cache.values, cache.streams), bins), cache
    stream, past = _streams(cache, window), window.past
    past_key, past_value = (ring[stream, :, past].transpose(1, 2) for ring in (cache.keys, cache.values))
    written = _write(cache, key[:, :, -size:], value[:, :, -size:], window)
    if cpu_attention.fits(query):
        unseen = window.unseen[:, 0, 0, 0].sum(-1) if mask_unseen else torch.zeros(len(query), dtype=torch.long)
        return cpu_attention.window_attention(query, key, value, past_key, past_value, unseen, bins), written
    block = min(steps, size)
    blocks = -(-steps // block)
    tail = (0, 0, 0, blocks * block - steps)

    def banded(before: Tensor, new: Tensor) -> Tensor:
        whole = torch.cat([before, new], dim=2)
        if blocks == 1:
            return whole[:, :, None]
        whole = functional.pad(whole, tail).unflatten(2, (blocks + 1, size))
        return torch.cat([whole[:, :, :-1], whole[:, :, 1:]], dim=3)

    output = functional.scaled_dot_product_attention(
        functional.pad(query, tail).unflatten(2, (blocks, block)),
        banded(past_key, key),
        banded(past_value, value),
        attn_mask=window.band & ~window.unseen if mask_unseen else window.band,
    )
    return _channels(output.flatten(2, 3)[:, :, :steps], bins), written


def _write(cache: AttentionCache, key: Tensor, value: Tensor, window: Window) -> AttentionCache:
    keys, values = cache.keys, cache.values
    if torch.is_grad_enabled():
        keys, values = keys.clone(), values.clone()
    stream = _streams(cache, window)
    keys[stream, :, window.rows] = key.transpose(1, 2)
    values[stream, :, window.rows] = value.transpose(1, 2)
    return AttentionCache(keys, values, cache.streams)


def _streams(cache: AttentionCache, window: Window) -> Tensor:
    return window.stream if cache.streams is None else cache.streams[:, None]


def _with_rings(x: Tensor, rings: Tensor, streams: Tensor | None) -> Tensor:
    """``x @ rings``, each stream with its own ring."""
    if streams is None:
        return x @ rings
    if rings.device.type == "cpu":
        # Gathering the rings would move more memory than everything else in a step.
        tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
        products = _scripted_products() if tracing else _products
        product: Tensor = products(x, rings, streams)
        return product
    return x @ rings[streams]


def _products(x: Tensor, rings: Tensor, streams: Tensor) -> Tensor:
    products: list[Tensor] = []
    for index in range(x.shape[0]):
        products.append(x[index] @ rings[int(streams[index])])
    return torch.stack(products)


@functools.cache
def _scripted_products() -> Any:
    """The same, for a trace: it would keep as many products as the streams it was made with."""
    return torch.jit.script(_products)


def normalise_frame(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer normalisation over a frame's last axis, its affine part free to differ along the axes before.

    ``scale`` and ``shift`` are ``[..., size]`` and broadcast against ``x``; eps 1e-5.
    """
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:]), scale)


class SelfAttention(nn.Module):
    """Local causal self-attention over frames with L heads, as in TF-GridNet (arXiv 2211.12433), residual.

    Every head has its own PReLU slope and its own affine normalisation over (frequency, channel); here the heads'
    layers are stacked so that one matrix product serves all of them.
    """

    def __init__(self, channels: int, bins: int, heads: int, window: int) -> None:
        super().__init__()
        key, value = -(-512 // bins), channels // heads
        self.heads, self.key, self.value, self.window, self.bins = heads, key, value, window, bins
        self.project = nn.Linear(channels, heads * (2 * key + value))
        self.slope_qk = nn.Parameter(torch.full((2 * heads,), 0.25))
        self.slope_v = nn.Parameter(torch.full((heads,), 0.25))
        self.scale_qk = nn.Parameter(torch.ones(2 * heads, 1, bins * key))
        self.shift_qk = nn.Parameter(torch.zeros(2 * heads, 1, bins * key))
        self.scale_v = nn.Parameter(torch.ones(heads, 1, bins * value))
        self.shift_v = nn.Parameter(torch.zeros(heads, 1, bins * value))
        self.merge = nn.Linear(channels, channels)
        self.slope_merge = nn.Parameter(torch.full((1,), 0.25))
        self.norm_merge = nn.LayerNorm((bins, channels))

    def initial_cache(self, batch: int) -> AttentionCache:
        return _empty_cache(self.scale_v, batch, self.heads, self.window, self.bins * self.key, self.bins * self.value)

    def forward(self, x: Tensor, cache: AttentionCache, window: Window) -> tuple[Tensor, AttentionCache]:
        heads, sizes = self.heads, (self.key, self.value)
        slopes = [each.repeat_interleave(size) for each, size in zip((self.slope_qk, self.slope_v), sizes, strict=True)]
        projected, slope = self.project(x), torch.cat(slopes)
        if cpu_attention.fits(projected):
            parts = [(self.scale_qk, self.scale_v), (self.shift_qk, self.shift_v)]
            scale, shift = (torch.cat([_by_bin(part, self.bins) for part in each], dim=-1) for each in parts)
            sections = [(heads, self.key), (heads, self.key), (heads, self.value)]
            query, key, value = cpu_attention.normalised_heads(projected, sections, slope, scale, shift)
        else:
            projected = prelu(projected, slope)
            split = 2 * heads * self.key
            qk = _heads(projected[..., :split], 2 * heads)
            query, key = normalise_frame(qk, self.scale_qk, self.shift_qk).chunk(2, dim=1)
            value = normalise_frame(_heads(projected[..., split:], heads), self.scale_v, self.shift_v)
        attended, cache = window_attention(query, key, value, cache, window, self.bins, mask_unseen=True)
        return _add_normalised(x, self.merge(attended), self.slope_merge, self.norm_merge), cache


@dataclass(frozen=True)
class FusionState:
    """What hint fusion remembers: the features that still wait for their hints, and the merged frames' keys."""

    delayed: Tensor  # [B, delay, F, D]
    cache: AttentionCache


class HintFusion(nn.Module):
    """Fusion of late hints into the small network: align, modulate (FiLM), cross-attend; residual.

    The hint given with frame ``t`` is that of frame ``t - delay``; it modulates the features of its own frame, and
    frame ``t`` attends to the modulated frames. Source: Srinivas et al., Interspeech 2024.
    """

    def __init__(self, channels: int, bins: int, heads: int, window: int, hint_channels: int, delay: int) -> None:
        super().__init__()
        self.heads, self.window, self.bins, self.delay = heads, window, bins, delay
        self.key, self.value = -(-256 // bins), channels // heads
        self.film = nn.Linear(hint_channels, 2 * channels)
        self.query = nn.Linear(channels, heads * self.key)
        self.key_value = nn.Linear(channels, heads * self.key + channels)
        self.slope_query = nn.Parameter(torch.full((1,), 0.25))
        self.slope_key = nn.Parameter(torch.full((1,), 0.25))
        self.slope_value = nn.Parameter(torch.full((1,), 0.25))
        self.norm_query = nn.LayerNorm(bins * self.key)
        self.norm_key = nn.LayerNorm(bins * self.key)
        self.norm_value = nn.LayerNorm(bins * self.value)
        self.merge = nn.Linear(channels, channels)
        self.slope_merge = nn.Parameter(torch.full((1,), 0.25))
        self.norm_merge = nn.LayerNorm((bins, channels))
        # Fusion begins by adding next to nothing, and what it adds grows where hints help. At full scale it is noise at
        # first, and training turns it into a constant before it can be of use.
        nn.init.constant_(self.norm_merge.weight, 0.01)

    def initial_state(self, batch: int) -> FusionState:
        weight = self.film.weight
        return FusionState(
            delayed=weight.new_zeros(batch, self.delay, self.bins, self.merge.in_features),
            cache=_empty_cache(weight, batch, self.heads, self.window, self.bins * self.key, self.bins * self.value),
        )

    def forward(self, x: Tensor, hint: Tensor, state: FusionState, window: Window) -> tuple[Tensor, FusionState]:
        """``hint`` is ``[B, T, F, hint channels]``: for every frame ``t`` that of frame ``t - delay``, else zeros."""
        steps = x.shape[1]
        line = torch.cat([state.delayed, x], dim=1)
        weight, bias = self.film(hint).chunk(2, dim=-1)
        merged = torch.addcmul(bias, line[:, :steps], weight)
        split = self.heads * self.key
        slope = torch.cat([self.slope_key.expand(split), self.slope_value.expand(self.heads * self.value)])
        key_value, projected = self.key_value(merged), self.query(x)
        if cpu_attention.fits(key_value):
            sections = [(self.heads, self.key), (self.heads, self.value)]
            key, value = cpu_attention.normalised_heads(
                key_value, sections, slope, *self._affine(self.norm_key, self.norm_value)
            )
            (query,) = cpu_attention.normalised_heads(
                projected, sections[:1], self.slope_query.expand(split), *self._affine(self.norm_query)
            )
        else:
            key_value = prelu(key_value, slope)
            query = self.norm_query(_heads(prelu(projected, self.slope_query), self.heads))
            key = self.norm_key(_heads(key_value[..., :split], self.heads))
            value = self.norm_value(_heads(key_value[..., split:], self.heads))
        attended, cache = window_attention(query, key, value, state.cache, window, self.bins, mask_unseen=False)
        fused = _add_normalised(x, self.merge(attended), self.slope_merge, self.norm_merge)
        return fused, FusionState(line[:, steps:], cache)

    def _affine(self, *norms: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """What all heads share, weights and biases ``[F * size]`` of norms, as two of ``[F, heads * sizes]``."""
        parts = [[norm.weight for norm in norms], [norm.bias for norm in norms]]
        weight, bias = (
            torch.cat([_by_bin(part.expand(self.heads, 1, -1), self.bins) for part in each], dim=-1) for each in parts
        )
        return weight, bias


def _by_bin(affine: Tensor, bins: int) -> Tensor:
    """``[heads, 1, F * size]`` to ``[F, heads * size]``."""
    by_bin: Tensor = affine.unflatten(-1, (bins, -1))[:, 0].transpose(0, 1).flatten(1)
    return by_bin


def _add_normalised(x: Tensor, y: Tensor, slope: Tensor, norm: nn.LayerNorm) -> Tensor:
    """``x + norm(prelu(y))`` of features ``[B, T, F, C]``."""
    if cpu_attention.fits(y):
        size = y.shape[-1]
        (added,) = cpu_attention.normalised_heads(y, [(1, size)], slope.expand(size), norm.weight, norm.bias, x)
        return added.view_as(x)
    normalised: Tensor = norm(prelu(y, slope))
    return x + normalised


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """``x`` where it is positive, else ``x * slope``, of vectorised operations: the library's own is not, on a CPU."""
    y: Tensor = torch.addcmul(x * slope, x.relu(), 1 - slope)
    return y


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[B, T, F, heads * size]`` to ``[B, heads, T, F * size]``."""
    batch, steps, bins, _ = x.shape
    return x.reshape(batch, steps, bins, heads, -1).permute(0, 3, 1, 2, 4).flatten(-2)


def _channels(x: Tensor, bins: int) -> Tensor:
    """``[B, heads, T, F * size]`` to ``[B, T, F, heads * size]``."""
    batch, heads, steps, _ = x.shape
    return x.reshape(batch, heads, steps, bins, -1).permute(0, 2, 3, 1, 4).flatten(-2)


def _empty_cache(like: Tensor, batch: int, heads: int, window: int, key: int, value: int) -> AttentionCache:
    return AttentionCache(like.new_zeros(batch, heads, window, key), like.new_zeros(batch, heads, window, value))
