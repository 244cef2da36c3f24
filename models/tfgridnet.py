"""Causal TF-GridNets, the networks of knowledge boosting.

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
from knowledge_boosting.models.arrival_fusion import ArrivalFusion, ArrivalState, ArrivedHints, plan_arrivals
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
    """The state of one GridNet block: the state of the time LSTM for each frequency, and the cache of attention."""

    hidden: Tensor  # [B, F, H]
    cell: Tensor  # [B, F, H]
    attention: AttentionCache | None


@dataclass(frozen=True)
class SpeakerModulation:
    """The modulation ``x * weight + bias`` after one block, which is constant for the speaker of a stream."""

    weight: Tensor  # [B, 1, F, D]
    bias: Tensor  # [B, 1, F, D]


@dataclass(frozen=True)
class NetworkState:
    """The streaming state of one network. The first axis of every tensor is the stream."""

    frames: Tensor  # [B], the number of processed frames
    input: Tensor  # [B, 2, F, 2M]
    blocks: tuple[BlockState, ...]
    speaker: tuple[SpeakerModulation, ...]  # empty for separation
    fusion: tuple[FusionState | ArrivalState, ...]  # empty without hints
    output: Tensor  # [B, 2, F, D]
    arrived: Tensor | None = None  # [B, W], whether hints of the last W frames are merged; only if used on arrival


Blocks: TypeAlias = "Iterable[GridNetBlock]"
Fusions: TypeAlias = Iterable[HintFusion | ArrivalFusion]


class GridNetBlock(nn.Module):
    """A block with a BiLSTM along frequency, an LSTM along time and optional self-attention, all residual."""

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
    """Compute :func:`models.cpu_lstm.residual_lstm` with torch, on any device and for any size."""
    # Torch runs LSTMs fastest if the sequence axis comes first.
    there, back = ((1, 0, 2, 3), (1, 0, 2, 3)) if axis == TIME else ((2, 0, 1, 3), (1, 2, 0, 3))
    moved = norm(x).permute(there)
    sequences = moved.reshape(len(moved), -1, x.shape[-1])
    weights: list[Tensor] = [weight for direction in lstm.all_weights for weight in direction]
    # On a CPU, the LSTM of oneDNN is two to seven times as fast as that of torch without gradients, and four times
    # slower with gradients. The function is called directly, because the checks of the module cost as much as a step of
    # a small network.
    with _without_onednn() if torch.is_grad_enabled() else nullcontext():
        y, hidden, cell = torch.lstm(
            sequences, (hidden, cell), weights, True, 1, 0.0, lstm.training, lstm.bidirectional, False
        )
    return x + linear(y.view(*moved.shape[:3], -1)).permute(back), hidden, cell


@contextmanager
def _without_onednn() -> Iterator[None]:
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # the public switch changes more settings and warns
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


residual_lstm = FasterLstm(cpu_lstm.residual_lstm, torch_residual_lstm)


def describe_lstms(model: nn.Module) -> str:
    """Return one line that says how the LSTMs of a model are trained on this CPU."""
    blocks = (block for block in model.modules() if isinstance(block, GridNetBlock))
    lstms = [block.intra_lstm for block in blocks if block.intra_lstm.weight_ih_l0.requires_grad]
    descriptions = (f"LSTMs of {lstm.hidden_size} units by {residual_lstm.describe(lstm)}" for lstm in lstms)
    return "; ".join(dict.fromkeys(descriptions))


class TFGridNet(nn.Module):
    """A network that computes a *spectral estimate* of the sources from the spectrum of the mixture."""

    def __init__(
        self,
        size: NetworkSize,
        *,
        microphones: int,
        spectrum_channels: int,
        bins: int,
        speaker: bool,
        hint_channels: int = 0,
        delay: int | None = 0,
    ) -> None:
        """Build a network.

        It needs a speaker embedding if ``speaker``, and hints if ``hint_channels`` is not 0. Without a ``delay``, it
        uses them from the moment they arrive.
        """
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
            # The modulation starts near x * 1 + 0, so that features pass through before it is trained.
            nn.init.ones_(layer.bias[: bins * size.channels])
            nn.init.zeros_(layer.bias[bins * size.channels :])
        self.on_arrival = delay is None
        fusion = (size.channels, bins, size.heads, size.window, hint_channels)
        self.fusion = nn.ModuleList(
            ArrivalFusion(*fusion) if delay is None else HintFusion(*fusion, delay)
            for _ in range(between if hint_channels else 0)
        )
        self.output_conv = CausalConv2d(size.channels, spectrum_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights and features."""
        return self.input_norm.weight.dtype

    def initial_state(self, batch: int, speaker_embedding: Tensor | None = None) -> NetworkState:
        """Return the state at the start of ``batch`` streams.

        Args:
            batch: the number of streams.
            speaker_embedding: ``[B, 256]``, the speakers to extract; only for networks that need one.
        """
        weight = self.input_norm.weight
        speaker = []
        for layer in self.speaker:
            if speaker_embedding is None:
                raise ValueError("target speech extraction needs a speaker embedding")
            modulation = layer(speaker_embedding.to(self.dtype)).view(batch, 2, 1, self.bins, self.channels)
            speaker.append(SpeakerModulation(modulation[:, 0], modulation[:, 1]))
        return NetworkState(
            frames=torch.zeros(batch, dtype=torch.long, device=weight.device),
            input=self.input_conv.initial_past(batch, self.bins),
            blocks=tuple(block.initial_state(batch, self.bins) for block in cast("Blocks", self.blocks)),
            speaker=tuple(speaker),
            fusion=tuple(fusion.initial_state(batch) for fusion in cast("Fusions", self.fusion)),
            output=self.output_conv.initial_past(batch, self.bins),
            arrived=torch.zeros(batch, self.window, dtype=torch.bool, device=weight.device)
            if self.on_arrival
            else None,
        )

    def forward(
        self, spectrum: Tensor, state: NetworkState, hints: Tensor | ArrivedHints | None = None
    ) -> tuple[Tensor, NetworkState]:
        """Run T >= 1 frames.

        Args:
            spectrum: ``[B, T, F, 2M]``.
            state: the state after the frame before, which can be overwritten.
            hints: only for networks with fusion. With a fixed delay ``[B, T, F, hint channels]``, for every frame ``t``
                the hint of frame ``t - delay`` or zeros; else the hints that arrive.

        Returns:
            The spectral estimate ``[B, T, F, 2S']``, and the state after the last frame.
        """
        x, input_state = self.input_conv(spectrum, state.input)
        x = self.input_norm(x)
        window = window_of(state.frames, spectrum.shape[1], self.window)
        blocks, fusion = [], []
        plan = None
        if self.fusion:
            if isinstance(hints, ArrivedHints) != self.on_arrival or hints is None:
                raise ValueError(
                    "this network has fusion: give hints in the form of its policy, even if there are none"
                )
            if isinstance(hints, ArrivedHints):
                assert state.arrived is not None
                plan = plan_arrivals(hints, state.arrived, state.frames, spectrum.shape[1])
        for index, block in enumerate(self.blocks):
            x, block_state = block(x, state.blocks[index], window)
            blocks.append(block_state)
            if index == len(self.blocks) - 1:
                break
            if state.speaker:
                x = torch.addcmul(state.speaker[index].bias, x, state.speaker[index].weight)
            if self.fusion:
                past = state.fusion[index]
                given = (hints, past, window) if plan is None else (plan, past)
                x, fusion_state = self.fusion[index](x, *given)
                fusion.append(fusion_state)
        embedding, output_state = self.output_conv(x, state.output)
        return embedding, NetworkState(
            frames=state.frames + spectrum.shape[1],
            input=input_state,
            blocks=tuple(blocks),
            speaker=state.speaker,
            fusion=tuple(fusion),
            output=output_state,
            arrived=plan.arrived if plan is not None else None,
        )
