"""What became of every hint of a run."""

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.device_client.replay.tally import Tally

_TALLIED = 1 << 16  # frames at a time


class HintLog:
    """What became of every hint of a run of T frames."""

    def __init__(self, frames: int, delay: int) -> None:
        """A log with room for ``frames``; :meth:`end` says how many there were."""
        self.delay = delay
        self.captured_at: NDArray[np.int64] = np.zeros(frames, np.int64)  # when the window was complete, ns
        self.arrived_at: NDArray[np.int64] = np.full(frames, -1, np.int64)  # ns; -1: not yet
        self.used: NDArray[np.bool_] = np.zeros(frames, np.bool_)

    def end(self, frames: int) -> None:
        """The run had ``frames`` frames, at most those that there is room for."""
        self.captured_at, self.arrived_at, self.used = (
            self.captured_at[:frames],
            self.arrived_at[:frames],
            self.used[:frames],
        )

    def classify(self, end: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Which frames' hints were on time, late and missing when the run ended at ``end`` (ns), each ``[T - delay]``.

        The last ``delay`` frames' hints are never due, so they are neither.
        """
        due = max(len(self.used) - self.delay, 0)
        on_time = self.used[:due]
        came = (self.arrived_at[:due] >= 0) & (self.arrived_at[:due] <= end)
        return on_time, came & ~on_time, ~came & ~on_time

    def tally(self, end: int) -> Tally:
        """The ages of all hints that came by ``end`` (ns)."""
        tally = Tally()
        for first in range(0, len(self.used), _TALLIED):
            part = slice(first, first + _TALLIED)
            arrived = self.arrived_at[part]
            came = (arrived >= 0) & (arrived <= end)
            tally.add_all(np.rint((arrived - self.captured_at[part])[came] / 1e3).astype(np.int64))
        return tally

    def ages_ms(self, end: int) -> NDArray[np.float64]:
        """Milliseconds from a window's completion to its hint's arrival, ``[T]``; NaN where none came by ``end``."""
        came = (self.arrived_at >= 0) & (self.arrived_at <= end)
        return np.where(came, (self.arrived_at - self.captured_at) / 1e6, np.nan)
