"""TF-GridNet, causal, in the two sizes of knowledge boosting.

Sources: Wang et al., "TF-GridNet", IEEE/ACM TASLP 2023 (arXiv 2211.12433); Srinivas et al., "Knowledge boosting during
low-latency inference", Interspeech 2024.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from knowledge_boosting.models import cpu_lstm
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, NetworkSize
from knowledge_boosting.models.cpu_lstm import FREQUENCY, TIME, FasterLstm
from knowledge_boosting.models.layers import (
    AttentionCache,
    CausalConv2d,
    FusionState,
    HintFusion,
    SelfAttention,
    Window,
    window_of,
)


@dataclass(frozen=True)
class BlockState:
    """What one GridNet block remembers: the time LSTM's state per frequency, the attention's keys and values."""

    hidden: Tensor  # [B, F, H]
    cell: Tensor  # [B, F, H]
    attention: AttentionCache | None


@dataclass(frozen=True)
class SpeakerModulation:
    """A session's speaker, as the modulation ``x * weight + bias`` after one block. Constant for the session."""

    weight: Tensor  # [B, 1, F, D]
    bias: Tensor  # [B, 1, F, D]


@dataclass(frozen=True)
class NetworkState:
    """The streaming state of one network; every tensor has the streams' batch axis first."""

    frames: Tensor  # [B] frames seen
    input: Tensor  # [B, 2, F, 2M]
    blocks: tuple[BlockState, ...]
    speaker: tuple[SpeakerModulation, ...]  # empty for separation
    fusion: tuple[FusionState, ...]  # empty without hints
    output: Tensor  # [B, 2, F, D]


Blocks: TypeAlias = "Iterable[GridNetBlock]"
Fusions: TypeAlias = Iterable[HintFusion]


class GridNetBlock(nn.Module):
    """BiLSTM along frequency, LSTM along time, and in the large network self-attention over frames; all residual."""

    def __init__(self, size: NetworkSize, bins: int) -> None:
        super().__init__()
        channels, hidden = size.channels, size.hidden
        self.intra_norm = nn.LayerNorm(channels)
        self.intra_lstm = nn.LSTM(channels, hidden, bidirectional=True)
        self.intra_linear = nn.Linear(2 * hidden, channels)
        self.inter_norm = nn.LayerNorm(channels)
        self.inter_lstm = nn.LSTM(channels, hidden)
        self.inter_linear = nn.Linear(hidden, channels)
        self.attention = SelfAttention(channels, bins, size.heads, size.window) if size.self_attention else None

    def initial_state(self, batch: int, bins: int) -> BlockState:
        zeros = self.inter_norm.weight.new_zeros(batch, bins, self.inter_lstm.hidden_size)
        return BlockState(zeros, zeros.clone(), self.attention.initial_cache(batch) if self.attention else None)

    def forward(self, x: Tensor, state: BlockState, window: Window) -> tuple[Tensor, BlockState]:
        batch, steps, bins, _ = x.shape
        zeros = x.new_zeros(2, batch * steps, self.intra_lstm.hidden_size)
        x, _, _ = residual_lstm(x, FREQUENCY, self.intra_norm, self.intra_lstm, self.intra_linear, zeros, zeros)
        states = (each.reshape(1, batch * bins, -1) for each in (state.hidden, state.cell))
        x, hidden, cell = residual_lstm(x, TIME, self.inter_norm, self.inter_lstm, self.inter_linear, *states)
        cache = state.attention
        if self.attention is not None and cache is not None:
            x, cache = self.attention(x, cache, window)
        return x, BlockState(hidden.view(batch, bins, -1), cell.view(batch, bins, -1), cache)


def torch_residual_lstm(
    x: Tensor, axis: int, norm: nn.LayerNorm, lstm: nn.LSTM, linear: nn.Linear, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`models.cpu_lstm.residual_lstm` computes, on any device and for any size."""
    # The sequence axis first is the layout in which torch runs LSTMs fastest.
    there, back = ((1, 0, 2, 3), (1, 0, 2, 3)) if axis == TIME else ((2, 0, 1, 3), (1, 2, 0, 3))
    moved = norm(x).permute(there)
    sequences = moved.reshape(len(moved), -1, x.shape[-1])
    weights: list[Tensor] = [weight for direction in lstm.all_weights for weight in direction]
    # On a CPU oneDNN's LSTM is two to seven times as fast as torch's own without gradients, and four times slower with.
    # As a function it goes without the checks that cost as much as a small network's step.
    with _without_onednn() if torch.is_grad_enabled() else nullcontext():
        y, hidden, cell = torch.lstm(
            sequences, (hidden, cell), weights, True, 1, 0.0, lstm.training, lstm.bidirectional, False
        )
    return x + linear(y.view(*moved.shape[:3], -1)).permute(back), hidden, cell


@contextmanager
def _without_onednn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # the public switch sets more than this, and warns of it
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


residual_lstm = FasterLstm(cpu_lstm.residual_lstm, torch_residual_lstm)


def describe_lstms(model: nn.Module) -> str:
    """By what the LSTMs of a model are trained on this CPU, as one line."""
    blocks = (block for block in model.modules() if isinstance(block, GridNetBlock))
    lstms = [block.intra_lstm for block in blocks if block.intra_lstm.weight_ih_l0.requires_grad]
    descriptions = (f"LSTMs of {lstm.hidden_size} units by {residual_lstm.describe(lstm)}" for lstm in lstms)
    return "; ".join(dict.fromkeys(descriptions))


class TFGridNet(nn.Module):
    """Spectrum of the mixture in, spectrum of the estimate (the network's *embedding*) out."""

    def __init__(
        self,
        size: NetworkSize,
        *,
        microphones: int,
        spectrum_channels: int,
        bins: int,
        speaker: bool,
        hint_channels: int = 0,
        delay: int = 0,
    ) -> None:
        """A network that expects a speaker if ``speaker``, and hints if ``hint_channels`` is not 0."""
        super().__init__()
        self.bins, self.channels, self.window = bins, size.channels, size.window
        between = size.blocks - 1
        self.input_conv = CausalConv2d(2 * microphones, size.channels)
        self.input_norm = nn.LayerNorm(size.channels)
        self.blocks = nn.ModuleList([GridNetBlock(size, bins) for _ in range(size.blocks)])
        self.speaker = nn.ModuleList(
            nn.Linear(SPEAKER_EMBEDDING_SIZE, 2 * bins * size.channels) for _ in range(between if speaker else 0)
        )
        for layer in cast("Iterable[nn.Linear]", self.speaker):
            # Start near x * 1 + 0, so that features pass before the speaker's part is learned.
            nn.init.ones_(layer.bias[: bins * size.channels])
            nn.init.zeros_(layer.bias[bins * size.channels :])
        self.fusion = nn.ModuleList(
            HintFusion(size.channels, bins, size.heads, size.window, hint_channels, delay)
            for _ in range(between if hint_channels else 0)
        )
        self.output_conv = CausalConv2d(size.channels, spectrum_channels)

    def initial_state(self, batch: int, speaker_embedding: Tensor | None = None) -> NetworkState:
        """The state at the start of ``batch`` streams.

        Args:
            speaker_embedding: ``[B, 256]``, whom to extract; only for networks that take one.
        """
        weight = self.input_norm.weight
        speaker = []
        for layer in self.speaker:
            if speaker_embedding is None:
                raise ValueError("target speech extraction needs a speaker embedding")
            modulation = layer(speaker_embedding).view(batch, 2, 1, self.bins, self.channels)
            speaker.append(SpeakerModulation(modulation[:, 0], modulation[:, 1]))
        return NetworkState(
            frames=torch.zeros(batch, dtype=torch.long, device=weight.device),
            input=self.input_conv.initial_past(batch, self.bins),
            blocks=tuple(block.initial_state(batch, self.bins) for block in cast("Blocks", self.blocks)),
            speaker=tuple(speaker),
            fusion=tuple(fusion.initial_state(batch) for fusion in cast("Fusions", self.fusion)),
            output=self.output_conv.initial_past(batch, self.bins),
        )

    def forward(
        self, spectrum: Tensor, state: NetworkState, hints: Tensor | None = None
    ) -> tuple[Tensor, NetworkState]:
        """Run T >= 1 frames.

        Args:
            spectrum: ``[B, T, F, 2M]``.
            state: of the frame before; used up.
            hints: ``[B, T, F, hint channels]``, for every frame ``t`` the hint of frame ``t - delay`` or zeros; only
                for networks that take hints.

        Returns:
            The embedding ``[B, T, F, 2S']``, and the state after the last frame.
        """
        x, input_state = self.input_conv(spectrum, state.input)
        x = self.input_norm(x)
        window = window_of(state.frames, spectrum.shape[1], self.window)
        blocks, fusion = [], []
        for index, block in enumerate(self.blocks):
            x, block_state = block(x, state.blocks[index], window)
            blocks.append(block_state)
            if index == len(self.blocks) - 1:
                break
            if state.speaker:
                x = torch.addcmul(state.speaker[index].bias, x, state.speaker[index].weight)
            if self.fusion:
                if hints is None:
                    raise ValueError("this network fuses hints: give them, or zeros")
                x, fusion_state = self.fusion[index](x, hints, state.fusion[index], window)
                fusion.append(fusion_state)
        embedding, output_state = self.output_conv(x, state.output)
        frames = state.frames + spectrum.shape[1]
        return embedding, NetworkState(frames, input_state, tuple(blocks), state.speaker, tuple(fusion), output_state)
