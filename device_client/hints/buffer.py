"""The buffers between the thread that receives hints and the frame loop."""

from collections import deque
from dataclasses import dataclass

from knowledge_boosting.models.arrivals import Hint, MergeQueue
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.protos.codec import Samples


@dataclass(frozen=True)
class _Entry:
    frame: int
    hint: Samples
    arrived_at: int


class FixedDelayBuffer:
    """A ring buffer of hints by frame index, for one thread that puts and one that takes.

    A slot is a single reference, which is replaced as a whole. So no lock is needed, and no thread waits.
    """

    def __init__(self, delay: int) -> None:
        """Create a buffer for hints whose deadline is ``delay`` frames after their own frame."""
        self._delay = delay
        # A hint arrives after the capture of its frame, and is taken ``delay`` frames later. So at most delay + 1 hints
        # are in the buffer at a time.
        self._slots: list[_Entry | None] = [None] * (delay + 2)

    def put(self, frame: int, hint: Samples, arrived_at: int) -> None:
        """Store the hint ``[channels, F]`` of a frame, which arrives at the time ``arrived_at`` (nanoseconds)."""
        self._slots[frame % len(self._slots)] = _Entry(frame, hint, arrived_at)

    def take(self, frame: int, now: int) -> list[Hint]:
        """Return the hint to use at a frame, if it has arrived at ``now`` (nanoseconds) or before."""
        wanted = frame - self._delay
        entry = self._slots[wanted % len(self._slots)]
        if entry is None or entry.frame != wanted or entry.arrived_at > now:
            return []
        return [Hint(self._delay, entry.hint)]


class ArrivalBuffer:
    """A queue of hints that are used from the moment they arrive, for one thread that puts and one that takes."""

    def __init__(self, max_age: int) -> None:
        """Create a buffer for hints that are useless when they are older than ``max_age`` frames."""
        self._max_age = max_age
        self._arriving: deque[_Entry] = deque()  # adding and removing an entry needs no lock
        self._arrived: dict[int, Samples] = {}
        self._queue = MergeQueue(max_age)

    def put(self, frame: int, hint: Samples, arrived_at: int) -> None:
        """Store the hint ``[channels, F]`` of a frame, which arrives at ``arrived_at``, not before an earlier one."""
        self._arriving.append(_Entry(frame, hint, arrived_at))

    def take(self, frame: int, now: int) -> list[Hint]:
        """Return the hints to use from a frame on, of those that have arrived at ``now`` (nanoseconds) or before."""
        while self._arriving and self._arriving[0].arrived_at <= now:
            entry = self._arriving.popleft()
            self._arrived[entry.frame] = entry.hint
            self._queue.put(entry.frame)
        hints = [Hint(frame - number, self._arrived.pop(number)) for number in self._queue.take(frame)]
        for number in [number for number in self._arrived if number not in self._queue]:
            del self._arrived[number]
        return hints


HintBuffer = FixedDelayBuffer | ArrivalBuffer


def hint_words(*, on_arrival: bool) -> tuple[str, str]:
    """Return what users read of hints that were used, and of hints that came but could not be used."""
    return ("used", "too old") if on_arrival else ("on time", "late")


def hint_buffer(model: ModelConfig) -> HintBuffer:
    """Create the buffer for the hints of a model."""
    return ArrivalBuffer(model.max_age) if model.on_arrival else FixedDelayBuffer(model.delay)
