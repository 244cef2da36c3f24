"""The interfaces of the engines that run the small network on the device."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.manifest import Manifest
from knowledge_boosting.protos.codec import Samples


class Engine(Protocol):
    """Runs the small network for one session, frame by frame. Its estimates are always finite."""

    overflows: int  # number of frames whose estimate was not finite and was replaced by the input

    def step(self, window: Samples, hints: Sequence[Hint] = ()) -> Samples:
        """Process the next frame.

        Args:
            window: The samples of the frame, ``[M, n_fft]``.
            hints: The hints to use from this frame on. With a fixed delay that of ``delay`` frames ago, if there is
                one; else at most :data:`models.arrivals.MERGES` that have arrived.

        Returns:
            Samples ``[S, M, chunk]`` of the estimate.
        """
        ...


class Network(Protocol):
    """A small network for :class:`CheckedEngine`. Its estimates need not be finite."""

    def step(self, window: Samples, hints: Sequence[Hint] = ()) -> Samples:
        """Process the next frame, like :meth:`Engine.step`."""
        ...

    def reset(self) -> None:
        """Return to the initial state."""
        ...


class CheckedEngine:
    """An engine that replaces an estimate that is not finite by the input, and then resets the network."""

    def __init__(self, network: Network) -> None:
        self.overflows = 0
        self._network = network
        self._last: Samples | None = None  # [S, M, 1], the last samples of the output
        self._replaced = False  # whether the last output was the input

    def step(self, window: Samples, hints: Sequence[Hint] = ()) -> Samples:
        estimate = self._network.step(window, hints)
        finite = bool(np.isfinite(estimate).all())
        if not finite or self._replaced:
            estimate = self._replace(estimate, window[:, : estimate.shape[2]], finite)
        self._replaced = not finite
        self._last = estimate[..., -1:]
        return estimate

    def _replace(self, estimate: Samples, samples: Samples, finite: bool) -> Samples:
        """Return the input, or a cross-fade where the output changes between estimate and input."""
        ramp: Samples = np.linspace(0, 1, samples.shape[1] + 1, dtype=np.float32)[1:]
        if finite:
            return _fade(samples, estimate, ramp)
        self.overflows += 1
        self._network.reset()
        replacement: Samples = np.nan_to_num(np.broadcast_to(samples, estimate.shape))
        return replacement if self._last is None or self._replaced else _fade(self._last, replacement, ramp)


def _fade(before: Samples, after: Samples, ramp: Samples) -> Samples:
    faded: Samples = (before * (1 - ramp) + after * ramp).astype(np.float32)
    return faded


class Model(Protocol):
    """The small network of a bundle, which creates sessions."""

    manifest: Manifest
    engine: str  # the name of the engine

    def session(self, speaker_embedding: Samples | None) -> Engine:
        """Start a session. ``speaker_embedding`` is ``[256]`` for TSE, otherwise None."""
        ...
