"""Fusion of hints from the moment they arrive, at any age.

Every frame attends to the earlier frames of its window whose hints have arrived. The others are masked. So hints can
arrive at any time and in any order, and a hint that never arrives is as if its frame did not exist. Without any hint,
fusion adds nothing. The published method is :class:`models.layers.HintFusion`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from knowledge_boosting.models.arrivals import MASKED, RAMP
from knowledge_boosting.models.layers import Fusion, channels_of_heads, prelu

_RECENCY = 8.0  # frames over which the weight of a key falls by a factor of e, at the start of training
NEVER = 1 << 30  # the frame at which a hint is merged that is never merged


@dataclass(frozen=True)
class ArrivedHints:
    """Hints that are merged during a call of T frames. Frames are counted from the first one of the call."""

    values: Tensor  # [B, K, F, hint channels]
    merged_at: Tensor  # [B, K], the frame at which each hint is merged; NEVER if it is not
    # [B, K], the frame of each hint, negative for a frame of an earlier call. None: hint k is that of frame k.
    frames: Tensor | None = None


@dataclass(frozen=True)
class ArrivalState:
    """The state of fusion after a call: the last W frames, the oldest first."""

    features: Tensor  # [B, W, F, D]
    keys: Tensor  # [B, L, W, key size], of merged frames
    values: Tensor  # [B, L, W, value size]


@dataclass(frozen=True)
class ArrivalPlan:
    """The positions and masks of a call; the same for all fusions of a network.

    The *line* of a call has the W frames before it and its own T frames. Queries are processed in blocks of Q = W, or
    in one block of Q = T, as in :func:`models.layers.window_of`.
    """

    hints: ArrivedHints
    places: Tensor  # [B, K], the place of each hint in the line; W + T for a hint that cannot be used
    visible: Tensor  # [B, blocks, Q, W + Q], whether a query can attend to a key of its block
    ages: Tensor  # [Q, W + Q], the age of each key; at least 1, at most W
    youngest: Tensor  # [B, T], the age of the youngest key that is visible
    strength: Tensor  # [B, T, 1, 1]
    arrived: Tensor  # [B, W], whether the last W frames are merged, after the call


def plan_arrivals(hints: ArrivedHints, arrived: Tensor, frames: Tensor, steps: int) -> ArrivalPlan:
    """Compute the positions and masks of T frames.

    Args:
        hints: the hints.
        arrived: ``[B, W]``, whether the W frames before are merged.
        frames: ``[B]``, the number of previous frames of each stream.
        steps: T.
    """
    batch, size = arrived.shape
    device = arrived.device
    of = torch.arange(steps, device=device).expand(batch, -1) if hints.frames is None else hints.frames
    usable = (hints.merged_at > of) & (hints.merged_at < steps) & (of >= -size) & (of + frames[:, None] >= 0)
    places = torch.where(usable, of + size, size + steps)
    since = torch.full((batch, size + steps + 1), NEVER, device=device)
    since[:, :size] = torch.where(arrived, 0, NEVER)
    since = since.scatter(1, places, hints.merged_at)[:, : size + steps]

    block = min(steps, size)
    blocks = -(-steps // block)
    query = torch.arange(blocks * block, device=device)
    spans = functional.pad(since, (0, len(query) - steps), value=NEVER).unfold(1, size + block, block)
    ages = size + query[:block, None] - torch.arange(size + block, device=device)
    in_window = (ages >= 1) & (ages <= size)
    visible = (spans[:, :, None] <= query.view(blocks, block, 1)) & in_window
    youngest = torch.where(visible, ages, size).amin(-1).flatten(1)[:, :steps]
    strength = (visible.sum(-1).flatten(1)[:, :steps] / RAMP).clamp(max=1)[..., None, None]
    return ArrivalPlan(hints, places, visible, ages.clamp(1, size), youngest, strength, since[:, steps:] < steps)


class ArrivalFusion(Fusion):
    """Residual fusion of hints from the moment they arrive.

    Frame ``t`` attends to the frames ``t - W`` to ``t - 1`` whose hints have arrived. What it adds fades in over the
    first frames with hints, and depends on the age of the youngest one.
    """

    def __init__(self, channels: int, bins: int, heads: int, window: int, hint_channels: int) -> None:
        super().__init__(channels, bins, heads, window, hint_channels)
        # Of scores, by the age of the key. At first, young keys count most. Without this, attention begins as a mean
        # over the window, which says little about a frame, and training takes a thousand updates to find them.
        recency = -torch.arange(window) / _RECENCY
        self.age_bias = nn.Parameter(recency.expand(heads, -1).clone())
        self.age_scale = nn.Parameter(torch.ones(window))  # of the result, by the age of the youngest key

    def initial_state(self, batch: int) -> ArrivalState:
        weight, bins, window = self.film.weight, self.bins, self.window
        return ArrivalState(
            weight.new_zeros(batch, window, bins, self.merge.in_features),
            weight.new_zeros(batch, self.heads, window, bins * self.key),
            weight.new_zeros(batch, self.heads, window, bins * self.value),
        )

    def forward(self, x: Tensor, plan: ArrivalPlan, state: ArrivalState) -> tuple[Tensor, ArrivalState]:
        """Run T frames.

        Args:
            x: features ``[B, T, F, D]``.
            plan: the hints and their positions.
            state: the state after the frame before.

        Returns:
            Features ``[B, T, F, D]``, and the state after the last frame.
        """
        steps, size = x.shape[1], self.window
        line = torch.cat([state.features, x], dim=1)
        if plan.hints.frames is None:
            merged = x
        else:
            stream = torch.arange(len(x), device=x.device)[:, None]
            merged = line[stream, plan.places.clamp(max=size + steps - 1)]
        key, value = self.merged(merged, plan.hints.values)
        keys, values = _into_line(state.keys, key, plan, steps), _into_line(state.values, value, plan, steps)

        blocks, block = plan.visible.shape[1:3]
        fill = (0, 0, 0, blocks * block - steps)
        query = functional.pad(self.queries(x) * key.shape[-1] ** -0.5, fill).unflatten(2, (blocks, block))
        scores = query @ _spans(keys, blocks, block, size).transpose(-1, -2)
        scores = scores + self.age_bias[:, plan.ages - 1].unsqueeze(1)
        # Where nothing is visible, the result is arbitrary, and its strength is 0.
        scores = scores.masked_fill(~plan.visible[:, None], MASKED)
        attended = (scores.softmax(-1) @ _spans(values, blocks, block, size)).flatten(2, 3)[:, :, :steps]

        added = self.norm_merge(prelu(self.merge(channels_of_heads(attended, self.bins)), self.slope_merge))
        strength = plan.strength * self.age_scale[plan.youngest - 1][..., None, None]
        fused = torch.addcmul(x, added, strength)
        return fused, ArrivalState(line[:, steps:], keys[:, :, steps:], values[:, :, steps:])


def _into_line(past: Tensor, new: Tensor, plan: ArrivalPlan, steps: int) -> Tensor:
    """Return the rows ``[B, L, W + T, size]`` of all frames in the line; those that are not merged are arbitrary."""
    if plan.hints.frames is None:
        return torch.cat([past, new], dim=2)
    line = torch.cat([past, past.new_zeros(*past.shape[:2], steps + 1, past.shape[3])], dim=2)
    return line.scatter(2, plan.places[:, None, :, None].expand_as(new), new)[:, :, :-1]


def _spans(line: Tensor, blocks: int, block: int, size: int) -> Tensor:
    """Split a line ``[B, L, W + T, size]`` into the keys or values of each block, ``[B, L, blocks, W + Q, size]``."""
    if blocks == 1:
        return line[:, :, None]
    fill = (blocks + 1) * size - line.shape[2]
    parts = functional.pad(line, (0, 0, 0, fill)).unflatten(2, (blocks + 1, block))
    # Overlapping views would need no copy, but their gradients are slow.
    return torch.cat([parts[:, :, :-1], parts[:, :, 1:]], dim=3)
