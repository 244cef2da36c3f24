"""Mix the input and the estimates for playback, and change the mix without a click."""

from typing import Literal

import numpy as np

from knowledge_boosting.protos.codec import Samples

Play = Literal["bypass", "1", "2", "both"]
_FADE = 4  # duration of a change, chunks


class Mixer:
    """Computes a weighted sum of the input and all estimates. The weights change gradually over a few chunks."""

    def __init__(self, sources: int, microphones: int, play: Play) -> None:
        """Create a mixer for S sources and M microphones that starts with the mix ``play``."""
        single: tuple[Play, ...] = ("bypass", "1", "2")
        self._targets: dict[Play, Samples] = {}
        for signal, name in enumerate(single[: 1 + sources]):
            self._targets[name] = np.zeros((1 + sources, microphones), np.float32)
            self._targets[name][signal] = 1
        if sources == 2 and microphones == 2:
            self._targets["both"] = np.array([[0, 0], [1, 0], [0, 1]], np.float32)
        self._weights = self._targets[play].copy()

    @property
    def choices(self) -> list[Play]:
        """The mixes that are possible with these numbers of sources and microphones."""
        return list(self._targets)

    def mix(self, play: Play, chunk: Samples, estimate: Samples) -> Samples:
        """Mix the next chunk for playback.

        Args:
            play: ``bypass``: the input. ``1`` or ``2``: that speaker. ``both``: speaker 1 left, speaker 2 right.
            chunk: Samples ``[M, n]`` of the input.
            estimate: Samples ``[S, M, n]`` of the estimate for the same time.

        Returns:
            Samples ``[M, n]``.
        """
        signals = np.concatenate([chunk[None], estimate])
        target = self._targets[play]
        step = np.clip(target - self._weights, -1 / _FADE, 1 / _FADE)
        weights = self._weights[..., None]
        if step.any():
            ramp = np.arange(1, chunk.shape[1] + 1, dtype=np.float32) / np.float32(chunk.shape[1])
            weights = weights + step[..., None] * ramp
            self._weights += step
        mixed: Samples = (weights * signals).sum(axis=0)
        return mixed
