"""The frame loop: one stream through the small network, with the hints that are there in time.

Whatever runs the small network frame by frame calls it: replay, live, a recording that is run again, the benchmarks
and :class:`knowledge_boosting.Enhancer`.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from knowledge_boosting.device_client.engines.engine import Engine
from knowledge_boosting.models.config import Framing, ModelConfig
from knowledge_boosting.protos.codec import Samples

# After so many frames without hints the network's attention holds none, and the next ones come in slowly.
_FORGOTTEN = 50
_RAMP = 8  # frames


class HintSource(Protocol):
    """Where a stream sends audio and takes hints. Neither call waits. Times are in nanoseconds, on one clock."""

    def send(self, frame: int, samples: Samples, now: int) -> None:
        """Send the samples ``[M, n]`` that complete a frame; they may change after the call."""
        ...

    def take(self, frame: int, now: int) -> Samples | None:
        """The hint ``[channels, F]`` of a frame if it is there."""
        ...


class HintRamp:
    """Brings hints in slowly when they come back after a while, so that nothing changes with a click."""

    def __init__(self) -> None:
        self._absent, self._gain = 0, 1.0

    def scale(self, hint: Samples | None) -> Samples | None:
        """The hint to fuse at the next frame."""
        if hint is None:
            self._absent += 1
            return None
        if self._absent >= _FORGOTTEN:
            self._gain = 0.0
        self._absent = 0
        if self._gain < 1:
            self._gain += 1 / _RAMP
            hint = hint * np.float32(self._gain)
        return hint


@dataclass(frozen=True, slots=True)
class Frame:
    """What became of a frame. ``window`` and ``fresh`` are overwritten by the step after the next."""

    number: int
    window: Samples  # [M, n_fft]
    fresh: Samples  # [M, n], what was new in it
    hint: Samples | None  # [channels, F], that was fused
    hint_due: bool  # whether there could have been one
    estimate: Samples  # [S, M, chunk]
    compute_ns: int  # the small network's time


class BoostedStream:
    """A stream from its start: fill :attr:`fresh`, call :meth:`step`, and again."""

    def __init__(
        self, engine: Engine, model: ModelConfig, hints: HintSource | None = None, *, ramp: bool = False
    ) -> None:
        """A stream that has heard nothing.

        Args:
            engine: a session of its own.
            hints: None for a network alone, or for one whose hints are withheld.
            ramp: whether hints that come back after a while come in slowly.
        """
        framing = model.framing
        self.engine, self.hints = engine, hints
        self.hints_on = True  # whether hints are fused; they are taken anyway
        self.frames = self.hints_due = self.hints_used = 0  # hints are due only where they are on
        self._delay, self._lookahead, self._chunk = model.delay, framing.lookahead, framing.chunk
        self._ramp = HintRamp() if ramp else None
        # Two take turns, so that a frame can be looked at while the next one is filled.
        self._window, self._other = (np.zeros((model.microphones, framing.n_fft), np.float32) for _ in range(2))
        self.fresh: Samples = self._window  # [M, n_fft] at first, then [M, chunk]: what the next frame waits for

    def step(self, now: int) -> Frame:
        """The next frame, whose last sample was captured at ``now``."""
        number, window, fresh, hints = self.frames, self._window, self.fresh, self.hints
        if not np.isfinite(fresh).all():
            fresh[:] = 0  # one such sample would stay in the network's state for good
        hint, due = None, hints is not None and number >= self._delay
        if hints is not None:
            hints.send(number, fresh, now)
        if hints is not None and due:
            hint, on = hints.take(number - self._delay, now), self.hints_on
            if not on:
                hint = None
            if self._ramp is not None:
                hint = self._ramp.scale(hint)
            self.hints_due += on
            self.hints_used += hint is not None
        began = time.perf_counter_ns()
        estimate = self.engine.step(window, hint)
        took = time.perf_counter_ns() - began
        self._window, self._other = self._other, window
        self._window[:, : self._lookahead] = window[:, self._chunk :]
        self.fresh = self._window[:, self._lookahead :]
        self.frames = number + 1
        return Frame(number, window, fresh, hint, due, estimate, took)


def frames_of(mixture: Iterable[Samples], framing: Framing) -> Iterator[tuple[Samples, int]]:
    """What each frame of a recording waits for, and how many samples of its chunk are the recording's.

    Args:
        mixture: the recording, ``[M, n]`` at a time. Zeros follow it until the last frame is complete.
    """
    wanted, rest = framing.n_fft, np.zeros((0, 0), np.float32)
    for samples in mixture:
        rest = np.concatenate([rest, samples], axis=1) if rest.size else samples
        first = 0
        while first + wanted <= rest.shape[1]:
            yield rest[:, first : first + wanted], framing.chunk
            first, wanted = first + wanted, framing.chunk
        rest = rest[:, first:]
    # The lookahead of the frames that are done is a part of the ones that are left.
    known = framing.lookahead if wanted == framing.chunk else 0
    left = known + rest.shape[1]
    for first in range(0, left, framing.chunk):
        samples = rest[:, :wanted]
        yield np.pad(samples, ((0, 0), (0, wanted - samples.shape[1]))), min(framing.chunk, left - first)
        rest, wanted = rest[:, wanted:], framing.chunk
