"""Where the network leaves hints and the frame loop picks them up."""

from dataclasses import dataclass

from knowledge_boosting.protos.codec import Samples


@dataclass(frozen=True)
class _Entry:
    frame: int
    hint: Samples
    arrived_at: int


class HintBuffer:
    """Hints by frame index, in a ring of fixed size. Neither side ever waits for the other.

    One thread puts, another takes; a slot is one reference, replaced as a whole, so there is no lock to hold.
    """

    def __init__(self, delay: int) -> None:
        """A buffer for hints that are due ``delay`` frames after their own."""
        # A hint comes after its frame was captured and is due when frame + delay is: delay + 1 can wait at a time.
        self._slots: list[_Entry | None] = [None] * (delay + 2)

    def put(self, frame: int, hint: Samples, arrived_at: int) -> None:
        """Leave the hint ``[channels, F]`` of a frame, which arrives at a time in nanoseconds."""
        self._slots[frame % len(self._slots)] = _Entry(frame, hint, arrived_at)

    def take(self, frame: int, now: int) -> Samples | None:
        """The hint of a frame if it has arrived by ``now`` (nanoseconds; that instant included), else None."""
        entry = self._slots[frame % len(self._slots)]
        if entry is None or entry.frame != frame or entry.arrived_at > now:
            return None
        return entry.hint
