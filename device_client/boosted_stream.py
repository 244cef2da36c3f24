"""The frame loop: one stream through the small network, with the hints that arrive in time.

Everything that runs the small network frame by frame uses it: replay, live, repeated sessions, the benchmarks and
:class:`knowledge_boosting.Enhancer`.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from knowledge_boosting.device_client.engines.engine import Engine
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.config import Framing, ModelConfig
from knowledge_boosting.protos.codec import Samples

_ATTENTION_FRAMES = 50  # the network's attention covers this number of past frames
_RAMP = 8  # frames


class HintSource(Protocol):
    """The interface through which a stream sends audio and takes hints. No call waits.

    All times are nanoseconds on the same clock.
    """

    def send(self, frame: int, samples: Samples, now: int) -> None:
        """Send the samples ``[M, n]`` that complete a frame. The array can be overwritten after the call."""
        ...

    def take(self, frame: int, now: int) -> Sequence[Hint]:
        """Return the hints to use from a frame on, of those that have arrived."""
        ...


class HintRamp:
    """Fades hints in when they return after a gap that is longer than the network's attention, to avoid a click.

    A network that uses hints on arrival does this itself.
    """

    def __init__(self) -> None:
        self._missing, self._gain = 0, 1.0

    def scale(self, hints: Sequence[Hint]) -> Sequence[Hint]:
        """Return the hint to use at the next frame, if there is one."""
        if not hints:
            self._missing += 1
            return hints
        if self._missing >= _ATTENTION_FRAMES:
            self._gain = 0.0
        self._missing = 0
        if self._gain < 1:
            self._gain += 1 / _RAMP
            return [hint._replace(values=hint.values * np.float32(self._gain)) for hint in hints]
        return hints


@dataclass(frozen=True, slots=True)
class Frame:
    """The result of one step. ``window`` and ``fresh`` stay valid until the step after the next."""

    number: int
    window: Samples  # [M, n_fft]
    fresh: Samples  # [M, n], the new samples of the window
    hints: Sequence[Hint]  # the hints that were used from this frame on
    hint_due: bool  # whether this frame could have a hint
    estimate: Samples  # [S, M, chunk]
    compute_ns: int  # time of the small network


class BoostedStream:
    """One stream through the small network. Fill :attr:`fresh` and call :meth:`step` for each frame."""

    def __init__(
        self, engine: Engine, model: ModelConfig, hints: HintSource | None = None, *, ramp: bool = False
    ) -> None:
        """Start a stream.

        Args:
            engine: A new session of the small network.
            model: The configuration of the bundle's model.
            hints: The source of hints. None for one network alone, or to withhold the hints.
            ramp: Whether hints that return after a gap are faded in.
        """
        framing = model.framing
        self.engine, self.hints = engine, hints
        self.hints_on = True  # whether hints are fused; they are taken from the source in any case
        self.frames = self.hints_due = self.hints_used = 0  # hints are counted as due only while hints_on is set
        self._delay, self._lookahead, self._chunk = model.delay, framing.lookahead, framing.chunk
        self._ramp = HintRamp() if ramp and not model.on_arrival else None
        # Two windows alternate, so that a frame stays valid while the next one is filled.
        self._window, self._other = (np.zeros((model.microphones, framing.n_fft), np.float32) for _ in range(2))
        # The caller stores the new samples of the next frame here: [M, n_fft] for the first one, then [M, chunk].
        self.fresh: Samples = self._window

    def step(self, now: int) -> Frame:
        """Process the next frame, whose last sample was captured at ``now`` (nanoseconds)."""
        number, window, fresh, hints = self.frames, self._window, self.fresh, self.hints
        if not np.isfinite(fresh).all():
            fresh[:] = 0  # a sample that is not finite would stay in the network's state forever
        used, due = list[Hint](), hints is not None and number >= self._delay
        if hints is not None:
            hints.send(number, fresh, now)
        if hints is not None and due:
            used, on = list(hints.take(number, now)), self.hints_on
            if not on:
                used = []
            if self._ramp is not None:
                used = list(self._ramp.scale(used))
            self.hints_due += on
            self.hints_used += len(used)
        started = time.perf_counter_ns()
        estimate = self.engine.step(window, used)
        compute_ns = time.perf_counter_ns() - started
        self._window, self._other = self._other, window
        self._window[:, : self._lookahead] = window[:, self._chunk :]
        self.fresh = self._window[:, self._lookahead :]
        self.frames = number + 1
        return Frame(number, window, fresh, used, due, estimate, compute_ns)


def split_frames(mixture: Iterable[Samples], framing: Framing) -> Iterator[tuple[Samples, int]]:
    """Split a recording into the new samples of each frame.

    Args:
        mixture: The samples of the recording, ``[M, n]`` at a time. Zeros are appended to complete the last frame.
        framing: The framing of the model.

    Yields:
        For each frame, its new samples for :attr:`BoostedStream.fresh`, and the number of samples in its chunk that
        belong to the recording.
    """
    size, pending = framing.n_fft, np.zeros((0, 0), np.float32)
    for samples in mixture:
        pending = np.concatenate([pending, samples], axis=1) if pending.size else samples
        first = 0
        while first + size <= pending.shape[1]:
            yield pending[:, first : first + size], framing.chunk
            first, size = first + size, framing.chunk
        pending = pending[:, first:]
    # The lookahead of the frames so far belongs to the chunks of the remaining frames.
    overlap = framing.lookahead if size == framing.chunk else 0
    remaining = overlap + pending.shape[1]
    for first in range(0, remaining, framing.chunk):
        samples = pending[:, :size]
        yield np.pad(samples, ((0, 0), (0, size - samples.shape[1]))), min(framing.chunk, remaining - first)
        pending, size = pending[:, size:], framing.chunk
