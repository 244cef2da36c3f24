"""The buffer between the thread that receives hints and the frame loop."""

from dataclasses import dataclass

from knowledge_boosting.protos.codec import Samples


@dataclass(frozen=True)
class _Entry:
    frame: int
    hint: Samples
    arrived_at: int


class HintBuffer:
    """A ring buffer of hints by frame index, for one thread that puts and one that takes.

    A slot is a single reference, which is replaced as a whole. So no lock is needed, and no thread waits.
    """

    def __init__(self, delay: int) -> None:
        """Create a buffer for hints whose deadline is ``delay`` frames after their own frame."""
        # A hint arrives after the capture of its frame, and is taken ``delay`` frames later. So at most delay + 1 hints
        # are in the buffer at a time.
        self._slots: list[_Entry | None] = [None] * (delay + 2)

    def put(self, frame: int, hint: Samples, arrived_at: int) -> None:
        """Store the hint ``[channels, F]`` of a frame, which arrives at the time ``arrived_at`` (nanoseconds)."""
        self._slots[frame % len(self._slots)] = _Entry(frame, hint, arrived_at)

    def take(self, frame: int, now: int) -> Samples | None:
        """Return the hint of a frame. None if it has not arrived at ``now`` (nanoseconds) or before."""
        entry = self._slots[frame % len(self._slots)]
        if entry is None or entry.frame != frame or entry.arrived_at > now:
            return None
        return entry.hint
