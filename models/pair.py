"""The two networks of knowledge boosting, separately and as a pair in one process.

:class:`SmallModel` runs on the device and computes audio from audio and delayed hints. :class:`LargeModel` runs on the
server and computes hints from audio. :class:`BoostedPair` combines both for training and offline evaluation.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from knowledge_boosting.models.arrival_fusion import NEVER, ArrivedHints
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.config import ModelConfig, NetworkSize, Pair
from knowledge_boosting.models.framing import Stft, pad_to_frames
from knowledge_boosting.models.layers import CausalConv2d
from knowledge_boosting.models.level import RunningLevel
from knowledge_boosting.models.tfgridnet import NetworkState, TFGridNet


@dataclass(frozen=True)
class SmallState:
    """The streaming state of :class:`SmallModel`."""

    network: NetworkState
    overlap: Tensor  # [B, S', lookahead]
    level: Tensor | None = None  # [B], only with a running level


@dataclass(frozen=True)
class LargeState:
    """The streaming state of :class:`LargeModel`."""

    network: NetworkState
    encoder: Tensor  # [B, 2, F, 2S']
    level: Tensor | None = None  # [B], only with a running level


def _network(config: ModelConfig, size: NetworkSize, *, hints: bool) -> TFGridNet:
    return TFGridNet(
        size,
        microphones=config.microphones,
        spectrum_channels=config.spectrum_channels,
        bins=config.framing.bins,
        speaker=config.needs_speaker,
        hint_channels=config.hint_channels if hints else 0,
        delay=None if hints and config.on_arrival else config.delay,
    )


def _apply_running_level(
    running: RunningLevel | None, spectrum: Tensor, past: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the input spectrum of a network, the gain of its estimate, and the state of the level, if there is one."""
    if running is None or past is None:
        return spectrum, None, past
    levels = running(spectrum, past)
    return levels.spectrum, levels.gain, levels.power


class SmallModel(nn.Module):
    """The device's network, which computes samples from samples and hints. One network alone uses no hints."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.stft = Stft(config.framing, remove_offset=config.running_level)
        self.level = RunningLevel(config.framing, config.microphones) if config.running_level else None
        self.network = _network(config, config.on_device, hints=True)

    def initial_state(self, batch: int, speaker_embedding: Tensor | None = None) -> SmallState:
        """Return the state at the start of ``batch`` streams; ``speaker_embedding`` is ``[B, 256]`` for TSE."""
        overlap = self.stft.initial_overlap(batch, self.config.sources * self.config.microphones)
        level = overlap.new_zeros(batch) if self.level else None
        return SmallState(self.network.initial_state(batch, speaker_embedding), overlap, level)

    def forward(
        self, samples: Tensor, state: SmallState, hints: Tensor | ArrivedHints | None = None
    ) -> tuple[Tensor, SmallState]:
        """Run T >= 1 frames.

        Args:
            samples: ``[B, M, chunk T + lookahead]``, from the first sample of the first frame.
            state: the state after the frame before, which can be overwritten.
            hints: None for one network alone. With a fixed delay ``[B, T, hint channels, F]``, for every frame ``t``
                the hint of frame ``t - delay``, or zeros if there is none. Else the hints that arrive, whose values
                are ``[B, K, hint channels, F]``.

        Returns:
            Estimates ``[B, S, M, chunk T]``, and the state after the last frame.
        """
        if isinstance(hints, ArrivedHints):
            hints = replace(hints, values=hints.values.transpose(2, 3))
        elif hints is not None:
            hints = hints.transpose(2, 3)
        spectrum, gain, level = _apply_running_level(self.level, self.stft.analyse(samples), state.level)
        embedding, network = self.network(spectrum, state.network, hints)
        estimate, overlap = self.stft.synthesise(embedding if gain is None else embedding * gain, state.overlap)
        estimate = estimate.view(len(estimate), self.config.sources, self.config.microphones, -1)
        return estimate, SmallState(network, overlap, level)


class LargeModel(nn.Module):
    """The server's network and hint encoder, which compute hints from samples."""

    def __init__(self, config: Pair) -> None:
        super().__init__()
        self.config = config
        self.stft = Stft(config.framing, remove_offset=config.running_level)
        self.level = RunningLevel(config.framing, config.microphones) if config.running_level else None
        self.network = _network(config, config.large, hints=False)
        self.encoder = CausalConv2d(config.spectrum_channels, config.hint_channels)

    def initial_state(self, batch: int, speaker_embedding: Tensor | None = None) -> LargeState:
        """Return the state at the start of ``batch`` streams; ``speaker_embedding`` is ``[B, 256]`` for TSE."""
        past = self.encoder.initial_past(batch, self.config.framing.bins)
        level = past.new_zeros(batch) if self.level else None
        return LargeState(self.network.initial_state(batch, speaker_embedding), past, level)

    def forward(self, samples: Tensor, state: LargeState) -> tuple[Tensor, Tensor, LargeState]:
        """Run T >= 1 frames.

        Args:
            samples: ``[B, M, chunk T + lookahead]``, from the first sample of the first frame.
            state: the state after the frame before, which can be overwritten.

        Returns:
            Hints ``[B, T, hint channels, F]``; the spectral estimate ``[B, T, F, 2S']`` that they encode, at the level
            of the signal; and the state after the last frame. With a running level, hints are at the reference level.
        """
        embedding, gain, state = self._embed(samples, state)
        hints, encoder = self.encoder(embedding, state.encoder)
        embedding = embedding if gain is None else embedding * gain
        return hints.transpose(2, 3), embedding, replace(state, encoder=encoder)

    def _embed(self, samples: Tensor, state: LargeState) -> tuple[Tensor, Tensor | None, LargeState]:
        # Training can freeze the large network. Without the records of autograd it is several times as fast.
        frozen = not self.network.output_conv.conv.weight.requires_grad
        spectrum, gain, level = _apply_running_level(self.level, self.stft.analyse(samples), state.level)
        with torch.no_grad() if frozen else nullcontext():
            embedding, network = self.network(spectrum.to(self.network.dtype), state.network)
        return embedding.float(), gain, replace(state, network=network, level=level)

    def embed(self, mixture: Tensor, speaker_embedding: Tensor | None = None) -> Tensor:
        """Compute the input of the hint encoder, ``[B, T, F, 2S']``, for mixtures ``[B, M, N]`` from their start.

        With a running level, it has the level at which the network hears the mixtures, not their own.
        """
        state = self.initial_state(len(mixture), speaker_embedding)
        return self._embed(pad_to_frames(mixture, self.config.framing), state)[0]

    def encode(self, embedding: Tensor) -> Tensor:
        """Compute the hints ``[B, T, hint channels, F]`` of whole signals from the result of :meth:`embed`."""
        hints: Tensor = self.encoder(embedding, self.encoder.initial_past(len(embedding), embedding.shape[2]))[0]
        return hints.transpose(2, 3)

    def estimate(self, embedding: Tensor) -> Tensor:
        """Convert the spectral estimate ``[B, T, F, 2S']`` of whole signals to samples ``[B, S, M, N]``."""
        overlap = self.stft.initial_overlap(len(embedding), self.config.sources * self.config.microphones)
        samples, _ = self.stft.synthesise(embedding, overlap)
        return samples.view(len(samples), self.config.sources, self.config.microphones, -1)


@dataclass(frozen=True)
class PairOutput:
    """The results of both networks for whole signals."""

    small: Tensor  # [B, S, M, N]
    large: Tensor  # [B, S, M, N]
    hints: Tensor  # [B, T, hint channels, F], not delayed
    embedding: Tensor  # [B, T, F, 2S'], the spectral estimate of the large network


class BoostedPair(nn.Module):
    """Both networks in one process, for whole signals."""

    def __init__(self, config: Pair) -> None:
        super().__init__()
        self.config = config
        self.small = SmallModel(config)
        self.large = LargeModel(config)

    def forward(
        self, mixture: Tensor, speaker_embedding: Tensor | None = None, ready_at: Tensor | None = None
    ) -> PairOutput:
        """Run whole signals from their start.

        Args:
            mixture: ``[B, M, N]``.
            speaker_embedding: ``[B, 256]`` for TSE.
            ready_at: ``[T]`` or ``[B, T]``, the frame at which the hint of each frame is ready for use, NEVER for lost
                hints. None: all are in time for a fixed delay; and if hints are used on arrival, they arrive after
                :data:`USUAL_DELAY` frames.
        """
        samples = pad_to_frames(mixture, self.config.framing)
        hints, embedding, _ = self.large(samples, self.large.initial_state(len(mixture), speaker_embedding))
        small = self.estimate_small(mixture, hints, speaker_embedding, ready_at)
        return PairOutput(small, self.large.estimate(embedding)[..., : mixture.shape[-1]], hints, embedding)

    def estimate_small(
        self, mixture: Tensor, hints: Tensor, speaker_embedding: Tensor | None = None, ready_at: Tensor | None = None
    ) -> Tensor:
        """Compute the estimate ``[B, S, M, N]`` of the small network from a mixture and hints ``[B, T, channels, F]``.

        Hint ``t`` is that of frame ``t``. The other arguments are those of :meth:`forward`.
        """
        samples = pad_to_frames(mixture, self.config.framing)
        state = self.small.initial_state(len(mixture), speaker_embedding)
        estimate: Tensor = self.small(samples, state, small_hints(self.config, hints, ready_at))[0]
        return estimate[..., : mixture.shape[-1]]


USUAL_DELAY = 6  # frames


def small_hints(config: Pair, hints: Tensor, ready_at: Tensor | None = None) -> Tensor | ArrivedHints:
    """Return the hints of whole signals as the small network receives them.

    Args:
        config: the pair.
        hints: ``[B, T, ...]``; hint ``t`` is that of frame ``t``.
        ready_at: ``[T]`` or ``[B, T]``, see :meth:`BoostedPair.forward`.
    """
    frames = torch.arange(hints.shape[1], device=hints.device)
    if config.on_arrival:
        ready_at = frames + USUAL_DELAY if ready_at is None else ready_at.to(hints.device)
        return ArrivedHints(hints, ready_at.expand(hints.shape[:2]))
    if ready_at is not None:
        in_time = (ready_at.to(hints.device) <= frames + config.delay).expand(hints.shape[:2])
        hints = hints * in_time.to(hints)[..., None, None]
    return delay_hints(hints, config.delay)


def delay_hints(hints: Tensor, delay: int) -> Tensor:
    """Delay hints ``[B, T, ...]`` by ``delay`` frames, with zeros at the start."""
    shifted = torch.zeros_like(hints)
    shifted[:, delay:] = hints[:, : max(hints.shape[1] - delay, 0)]
    return shifted


def part_of(hints: Tensor | ArrivedHints, first: int, end: int) -> Tensor | ArrivedHints:
    """Return the hints of whole signals for a call of the small network with the frames ``first`` to ``end``."""
    if isinstance(hints, Tensor):
        return hints[:, first:end]
    merged_at = hints.merged_at
    here = ((merged_at >= first) & (merged_at < end)).any(0)
    frames = torch.arange(merged_at.shape[1], device=merged_at.device)[here] - first
    merged_at = merged_at[:, here]
    at = torch.where((merged_at >= first) & (merged_at < end), merged_at - first, NEVER)
    return ArrivedHints(hints.values[:, here], at, frames.expand_as(at))


def torch_hints(config: ModelConfig, hints: Sequence[Hint]) -> Tensor | ArrivedHints | None:
    """Return the hints of one frame of one stream as the small network receives them. None for one network alone."""
    if not config.hint_channels:
        return None
    shape = config.hint_channels, config.framing.bins
    if config.on_arrival:
        values = torch.zeros(1, len(hints), *shape)
        for row, hint in zip(values[0], hints, strict=True):
            row.copy_(torch.from_numpy(hint.values))
        frames = -torch.tensor([[hint.age for hint in hints]], dtype=torch.long)
        return ArrivedHints(values, torch.zeros_like(frames), frames)
    if len(hints) > 1 or any(hint.age != config.delay for hint in hints):
        raise ValueError(f"hints must have the age {config.delay}")
    return torch.from_numpy(hints[0].values)[None, None] if hints else torch.zeros(1, 1, *shape)
