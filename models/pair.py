"""The two networks of knowledge boosting, separately and as a pair in one process.

:class:`SmallModel` runs on the device and computes audio from audio and delayed hints. :class:`LargeModel` runs on the
server and computes hints from audio. :class:`BoostedPair` combines both for training and offline evaluation.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

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
        delay=config.delay if hints else 0,
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

    def forward(self, samples: Tensor, state: SmallState, hints: Tensor | None = None) -> tuple[Tensor, SmallState]:
        """Run T >= 1 frames.

        Args:
            samples: ``[B, M, chunk T + lookahead]``, from the first sample of the first frame.
            state: the state after the frame before, which can be overwritten.
            hints: ``[B, T, hint channels, F]``, for every frame ``t`` the hint of frame ``t - delay``, or zeros if
                there is none. None for one network alone.

        Returns:
            Estimates ``[B, S, M, chunk T]``, and the state after the last frame.
        """
        channels_last = hints.transpose(2, 3) if hints is not None else None
        spectrum, gain, level = _apply_running_level(self.level, self.stft.analyse(samples), state.level)
        embedding, network = self.network(spectrum, state.network, channels_last)
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
            embedding, network = self.network(spectrum, state.network)
        return embedding, gain, replace(state, network=network, level=level)

    def embed(self, mixture: Tensor, speaker_embedding: Tensor | None = None) -> Tensor:
        """Compute the input of the hint encoder, ``[B, T, F, 2S']``, for mixtures ``[B, M, N]`` from their start."""
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
    """Both networks in one process, for whole signals. Every hint is delayed by exactly ``delay`` frames."""

    def __init__(self, config: Pair) -> None:
        super().__init__()
        self.config = config
        self.small = SmallModel(config)
        self.large = LargeModel(config)

    def forward(
        self, mixture: Tensor, speaker_embedding: Tensor | None = None, hint_mask: Tensor | None = None
    ) -> PairOutput:
        """Run whole signals from their start.

        Args:
            mixture: ``[B, M, N]``.
            speaker_embedding: ``[B, 256]`` for TSE.
            hint_mask: ``[T]`` or ``[B, T]``, 1 for frames whose hints reach the small network, 0 for lost hints.
        """
        samples = pad_to_frames(mixture, self.config.framing)
        hints, embedding, _ = self.large(samples, self.large.initial_state(len(mixture), speaker_embedding))
        small = self.estimate_small(mixture, hints, speaker_embedding, hint_mask)
        return PairOutput(small, self.large.estimate(embedding)[..., : mixture.shape[-1]], hints, embedding)

    def estimate_small(
        self, mixture: Tensor, hints: Tensor, speaker_embedding: Tensor | None = None, hint_mask: Tensor | None = None
    ) -> Tensor:
        """Compute the estimate ``[B, S, M, N]`` of the small network from a mixture and hints ``[B, T, channels, F]``.

        Hint ``t`` is that of frame ``t``; it is delayed here. The other arguments are those of :meth:`forward`.
        """
        used = hints if hint_mask is None else hints * hint_mask.to(hints)[..., None, None]
        samples = pad_to_frames(mixture, self.config.framing)
        state = self.small.initial_state(len(mixture), speaker_embedding)
        estimate: Tensor = self.small(samples, state, delay_hints(used, self.config.delay))[0]
        return estimate[..., : mixture.shape[-1]]


def delay_hints(hints: Tensor, delay: int) -> Tensor:
    """Delay hints ``[B, T, ...]`` by ``delay`` frames, as the small network receives them, with zeros at the start."""
    shifted = torch.zeros_like(hints)
    shifted[:, delay:] = hints[:, : max(hints.shape[1] - delay, 0)]
    return shifted
