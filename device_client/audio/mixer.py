"""What a listener hears of input and estimates, and how it changes without a click."""

from typing import Literal

import numpy as np

from knowledge_boosting.protos.codec import Samples

Play = Literal["bypass", "1", "2", "both"]
_FADE = 4  # chunks that a change takes


class Mixer:
    """Weighted sums of the input and of every voice, whose weights move over a few chunks."""

    def __init__(self, sources: int, microphones: int, play: Play) -> None:
        """A mixer that begins with what ``play`` says."""
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
        """What can be played of these signals."""
        return list(self._targets)

    def mix(self, play: Play, chunk: Samples, estimate: Samples) -> Samples:
        """The next chunk to play.

        Args:
            play: ``bypass``: the input; ``1`` or ``2``: that voice; ``both``: voice 1 at the left, 2 at the right.
            chunk: ``[M, n]`` samples of the input.
            estimate: ``[S, M, n]`` of the same time.

        Returns:
            ``[M, n]``
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
