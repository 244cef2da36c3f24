"""What runs the small network on the device."""

from typing import Protocol

import numpy as np

from knowledge_boosting.models.manifest import Manifest
from knowledge_boosting.protos.codec import Samples


class Engine(Protocol):
    """The small network of one session, frame by frame."""

    overflows: int  # frames whose estimate was not finite; the input was given in its place

    def step(self, window: Samples, hint: Samples | None) -> Samples:
        """The next frame.

        Args:
            window: ``[M, n_fft]``, the frame's samples.
            hint: ``[hint channels, F]`` of ``delay`` frames ago; None for a hint that is missing or not due yet.

        Returns:
            ``[S, M, chunk]`` samples of the estimate.
        """
        ...


class Network(Protocol):
    """What :class:`CheckedEngine` runs: an engine whose estimates may be anything."""

    def step(self, window: Samples, hint: Samples | None) -> Samples:
        """As :meth:`Engine.step`."""
        ...

    def reset(self) -> None:
        """Begin again, as if nothing had been heard."""
        ...


class CheckedEngine:
    """An engine whose estimates are finite: where the network's are not, it gives the input, and begins it again."""

    def __init__(self, network: Network) -> None:
        self.overflows = 0
        self._network = network
        self._last: Samples | None = None  # [S, M, 1] of what was given last
        self._replaced = False  # whether that was the input

    def step(self, window: Samples, hint: Samples | None) -> Samples:
        estimate = self._network.step(window, hint)
        finite = bool(np.isfinite(estimate).all())
        if not finite or self._replaced:
            estimate = self._replace(estimate, window[:, : estimate.shape[2]], finite)
        self._replaced = not finite
        self._last = estimate[..., -1:]
        return estimate

    def _replace(self, estimate: Samples, samples: Samples, finite: bool) -> Samples:
        """The chunk of a change between estimate and input, without a click, or the input alone."""
        ramp: Samples = np.linspace(0, 1, samples.shape[1] + 1, dtype=np.float32)[1:]
        if finite:
            return _fade(samples, estimate, ramp)
        self.overflows += 1
        self._network.reset()
        given: Samples = np.nan_to_num(np.broadcast_to(samples, estimate.shape))
        return given if self._last is None or self._replaced else _fade(self._last, given, ramp)


def _fade(before: Samples, after: Samples, ramp: Samples) -> Samples:
    faded: Samples = (before * (1 - ramp) + after * ramp).astype(np.float32)
    return faded


class Model(Protocol):
    """A bundle's small network, from which sessions are made."""

    manifest: Manifest

    def session(self, speaker_embedding: Samples | None) -> Engine:
        """A session from its start; ``speaker_embedding`` is ``[256]`` for TSE."""
        ...
