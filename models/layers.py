"""Causal layers. All features are ``[B, T, F, C]``: batch, frame, frequency, channel.

Every layer is a function from (input, state) to (output, state) for any T >= 1 frames. A layer can overwrite the
tensors of the state that it receives, because a ring buffer writes one row in place. Make a copy if you need a state
again. Under autograd nothing is overwritten.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from knowledge_boosting.models import cpu_attention


class CausalConv2d(nn.Module):
    """A 3 x 3 convolution over (time, frequency), causal in time, zero-padded by one bin in frequency.

    Its state is the previous two input frames, ``[B, 2, F, C_in]``, which are zeros at the start of a stream.
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
    """Ring buffers with the keys and values of the last W frames. Row ``t mod W`` has frame ``t``."""

    keys: Tensor  # [B, L, W, key size]
    values: Tensor  # [B, L, W, value size]
    # The index of the ring of each stream in a step. It is used if there are more rings than streams in the step, so
    # that the rings need not be moved.
    streams: Tensor | None = None  # [B]


@dataclass(frozen=True)
class Window:
    """The positions of T frames in rings of W rows, and their attention masks; the same for all rings of a network."""

    stream: Tensor  # [B, 1]
    rows: Tensor  # [B, min(T, W)], the rows of the newest frames
    past: Tensor | None  # [B, W], the rows of the previous frames, oldest first; None for one frame
    # [Q, W + Q], whether a key of a block is in the window of a query, Q = min(T, W); None for one frame.
    band: Tensor | None
    # Whether a row or key is from before the start of the stream, [B, 1, 1, W] or [B, 1, blocks, 1, W + Q].
    unseen: Tensor


def window_of(frames: Tensor, steps: int, size: int) -> Window:
    """Compute the positions and masks of ``steps`` new frames.

    Args:
        frames: ``[B]``, the number of previous frames of each stream.
        steps: T, the number of new frames.
        size: W, the length of the attention window.
    """
    device = frames.device
    stream = torch.arange(len(frames), device=device)[:, None]
    frames = frames[:, None]
    slot = torch.arange(size, device=device)
    if steps == 1:
        return Window(stream, frames % size, None, None, (slot > frames)[:, None, None])
    rows = (frames + torch.arange(max(steps - size, 0), steps, device=device)) % size
    # Queries are processed in blocks of W, or in one block of T. The keys of a block are its own frames and the W
    # frames before it. The first of these is in no window, but whole blocks need no overlapping views, whose gradients
    # are slow.
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
    """Compute the attention of every frame over the window of W frames that ends with it.

    Args:
        query, key: ``[B, L, T, key size]`` of L heads; scores are divided by the square root of the key size.
        value: ``[B, L, T, F * size]``.
        cache: the previous W frames, zeros at the start of a stream.
        window: the positions of these T frames.
        bins: F.
        mask_unseen: whether frames before the start of a stream are masked in the softmax; else they count as zero keys
            and values.

    Returns:
        Features ``[B, T, F, L * size]``, and the cache with the new frames.
    """
    steps, size = query.shape[2], cache.keys.shape[2]
    if window.past is None or window.band is None:
        # The oldest row is replaced first. Then the ring is the window, and attention does not depend on its order.
        # The attention function of torch is not used, because it scales a copy of all keys.
        cache = _write(cache, key, value, window)
        scores = _with_rings(query * query.shape[-1] ** -0.5, cache.keys.transpose(-1, -2), cache.streams)
        if mask_unseen:
            scores = scores.masked_fill(window.unseen, -torch.inf)
        return channels_of_heads(_with_rings(scores.softmax(-1), cache.values, cache.streams), bins), cache
    stream, past = _streams(cache, window), window.past
    past_key, past_value = (ring[stream, :, past].transpose(1, 2) for ring in (cache.keys, cache.values))
    written = _write(cache, key[:, :, -size:], value[:, :, -size:], window)
    if cpu_attention.fits(query, query.shape[2]):
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
    return channels_of_heads(output.flatten(2, 3)[:, :, :steps], bins), written


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
    """Compute ``x @ rings``, where each stream has its own ring."""
    if streams is None:
        return x @ rings
    if rings.device.type == "cpu":
        # Gathering the rings would move more memory than the rest of a step.
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
    """Return a scripted ``_products`` for traces. A trace would fix the number of streams it was made with."""
    return torch.jit.script(_products)


def normalise_frame(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise a frame over its last axis. The affine part can differ along the other axes.

    ``scale`` and ``shift`` are ``[..., size]`` and broadcast against ``x``; eps is 1e-5.
    """
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:]), scale)


class SelfAttention(nn.Module):
    """Residual local causal self-attention over frames with L heads, as in TF-GridNet (arXiv 2211.12433).

    Every head has its own PReLU slope and its own affine normalisation over (frequency, channel). The layers of all
    heads are stacked here, so that one matrix product computes them.
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
        if cpu_attention.fits(projected, projected.shape[1]):
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
    """The state of hint fusion: the features that wait for their hints, and keys and values of the merged frames."""

    delayed: Tensor  # [B, delay, F, D]
    cache: AttentionCache


class Fusion(nn.Module):
    """The common part of :class:`HintFusion` and :class:`ArrivalFusion`: modulation (FiLM) and cross-attention."""

    def __init__(self, channels: int, bins: int, heads: int, window: int, hint_channels: int) -> None:
        super().__init__()
        self.heads, self.window, self.bins = heads, window, bins
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
        # At first, the output of fusion is noise. At full scale, training would turn it into a constant before it is
        # useful. At a small scale, it grows where hints help.
        nn.init.constant_(self.norm_merge.weight, 0.01)

    def merged(self, x: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys ``[B, L, K, key size]`` and values of frames, from their features and hints ``[B, K, F, C]``."""
        weight, bias = self.film(hint).chunk(2, dim=-1)
        key_value = self.key_value(torch.addcmul(bias, x, weight))
        split = self.heads * self.key
        slope = torch.cat([self.slope_key.expand(split), self.slope_value.expand(self.heads * self.value)])
        if cpu_attention.fits(key_value, key_value.shape[1]):
            sections = [(self.heads, self.key), (self.heads, self.value)]
            affine = self._affine(self.norm_key, self.norm_value)
            key, value = cpu_attention.normalised_heads(key_value, sections, slope, *affine)
            return key, value
        key_value = prelu(key_value, slope)
        key = self.norm_key(_heads(key_value[..., :split], self.heads))
        return key, self.norm_value(_heads(key_value[..., split:], self.heads))

    def queries(self, x: Tensor) -> Tensor:
        """Return the queries ``[B, L, T, key size]`` of features ``[B, T, F, D]``."""
        projected, size = self.query(x), self.heads * self.key
        if cpu_attention.fits(projected, projected.shape[1]):
            slope, affine = self.slope_query.expand(size), self._affine(self.norm_query)
            (query,) = cpu_attention.normalised_heads(projected, [(self.heads, self.key)], slope, *affine)
            return query
        normalised: Tensor = self.norm_query(_heads(prelu(projected, self.slope_query), self.heads))
        return normalised

    def _affine(self, *norms: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Repeat weights and biases ``[F * size]`` of norms for all heads, as two tensors ``[F, heads * sizes]``."""
        parts = [[norm.weight for norm in norms], [norm.bias for norm in norms]]
        weight, bias = (
            torch.cat([_by_bin(part.expand(self.heads, 1, -1), self.bins) for part in each], dim=-1) for each in parts
        )
        return weight, bias


class HintFusion(Fusion):
    """Residual fusion of hints that have a fixed delay.

    The hint that comes with frame ``t`` is that of frame ``t - delay``. It modulates the features of frame
    ``t - delay``, and frame ``t`` attends to the modulated frames. Source: Srinivas et al., Interspeech 2024.
    """

    def __init__(self, channels: int, bins: int, heads: int, window: int, hint_channels: int, delay: int) -> None:
        super().__init__(channels, bins, heads, window, hint_channels)
        self.delay = delay

    def initial_state(self, batch: int) -> FusionState:
        weight = self.film.weight
        return FusionState(
            delayed=weight.new_zeros(batch, self.delay, self.bins, self.merge.in_features),
            cache=_empty_cache(weight, batch, self.heads, self.window, self.bins * self.key, self.bins * self.value),
        )

    def forward(self, x: Tensor, hint: Tensor, state: FusionState, window: Window) -> tuple[Tensor, FusionState]:
        """Run T frames.

        Args:
            x: features ``[B, T, F, D]``.
            hint: ``[B, T, F, hint channels]``, for every frame ``t`` the hint of frame ``t - delay``, or zeros.
            state: the state after the frame before.
            window: the positions of the T frames.

        Returns:
            Features ``[B, T, F, D]``, and the state after the last frame.
        """
        steps = x.shape[1]
        line = torch.cat([state.delayed, x], dim=1)
        key, value = self.merged(line[:, :steps], hint)
        attended, cache = window_attention(
            self.queries(x), key, value, state.cache, window, self.bins, mask_unseen=False
        )
        fused = _add_normalised(x, self.merge(attended), self.slope_merge, self.norm_merge)
        return fused, FusionState(line[:, steps:], cache)


def _by_bin(affine: Tensor, bins: int) -> Tensor:
    """Rearrange ``[heads, 1, F * size]`` to ``[F, heads * size]``."""
    by_bin: Tensor = affine.unflatten(-1, (bins, -1))[:, 0].transpose(0, 1).flatten(1)
    return by_bin


def _add_normalised(x: Tensor, y: Tensor, slope: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Compute ``x + norm(prelu(y))`` for features ``[B, T, F, C]``."""
    if cpu_attention.fits(y, y.shape[1]):
        size = y.shape[-1]
        (added,) = cpu_attention.normalised_heads(y, [(1, size)], slope.expand(size), norm.weight, norm.bias, x)
        return added.view_as(x)
    normalised: Tensor = norm(prelu(y, slope))
    return x + normalised


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Return ``x`` where it is positive, else ``x * slope``. On a CPU, the function of torch is not vectorised."""
    y: Tensor = torch.addcmul(x * slope, x.relu(), 1 - slope)
    return y


def _heads(x: Tensor, heads: int) -> Tensor:
    """Rearrange ``[B, T, F, heads * size]`` to ``[B, heads, T, F * size]``."""
    batch, steps, bins, columns = x.shape
    return x.reshape(batch, steps, bins, heads, columns // heads).permute(0, 3, 1, 2, 4).flatten(-2)


def channels_of_heads(x: Tensor, bins: int) -> Tensor:
    """Rearrange ``[B, heads, T, F * size]`` to ``[B, T, F, heads * size]``."""
    batch, heads, steps, _ = x.shape
    return x.reshape(batch, heads, steps, bins, -1).permute(0, 2, 3, 1, 4).flatten(-2)


def _empty_cache(like: Tensor, batch: int, heads: int, window: int, key: int, value: int) -> AttentionCache:
    return AttentionCache(like.new_zeros(batch, heads, window, key), like.new_zeros(batch, heads, window, value))
