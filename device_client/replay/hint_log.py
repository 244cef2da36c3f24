"""The log of all hints of a run: whether each was on time, late or missing, and its age."""

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.device_client.replay.tally import Tally

_BLOCK = 1 << 16  # frames that are processed at a time


class HintLog:
    """The log of the hints of a run of T frames. All times are in nanoseconds."""

    def __init__(self, frames: int, delay: int) -> None:
        """Create a log for up to ``frames`` frames. :meth:`end` sets their actual number."""
        self.delay = delay
        self.captured_at: NDArray[np.int64] = np.zeros(frames, np.int64)  # when the window of a frame was complete
        self.arrived_at: NDArray[np.int64] = np.full(frames, -1, np.int64)  # when the hint of a frame arrived, or -1
        self.used: NDArray[np.bool_] = np.zeros(frames, np.bool_)
        self.age_used: NDArray[np.int64] = np.zeros(frames, np.int64)  # the age of a used hint when it was used, frames

    def end(self, frames: int) -> None:
        """Set the actual number of frames, which is at most that of the constructor."""
        for name in ("captured_at", "arrived_at", "used", "age_used"):
            setattr(self, name, getattr(self, name)[:frames])

    def classify(self, end: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
        """Return whether each hint was on time, late or missing when the run ended at ``end``.

        Returns:
            Three arrays ``[T - delay]``. The hints of the last ``delay`` frames are not included, because no frame
            could use them.
        """
        due = max(len(self.used) - self.delay, 0)
        on_time = self.used[:due]
        arrived = (self.arrived_at[:due] >= 0) & (self.arrived_at[:due] <= end)
        return on_time, arrived & ~on_time, ~arrived & ~on_time

    def tally(self, end: int) -> Tally:
        """Return the ages of all hints that arrived until ``end``."""
        tally = Tally()
        for first in range(0, len(self.used), _BLOCK):
            block = slice(first, first + _BLOCK)
            arrived_at = self.arrived_at[block]
            arrived = (arrived_at >= 0) & (arrived_at <= end)
            tally.add_all(np.rint((arrived_at - self.captured_at[block])[arrived] / 1e3).astype(np.int64))
        return tally

    def share_younger(self, max_age: int) -> float:
        """Return the share of the frames whose newest hint was at most ``max_age`` frames old.

        This is for hints that are used on arrival, from their first use on.
        """
        frames = np.arange(len(self.used))
        newest = np.full(len(self.used), -1)  # the newest hint that is used from each frame on
        hints = frames[self.used]
        at = hints + self.age_used[hints]
        np.maximum.at(newest, at[at < len(newest)], hints[at < len(newest)])
        newest = np.maximum.accumulate(newest)
        return float(np.mean((newest >= 0) & (frames - newest <= max_age))) if len(newest) else 0.0

    def ages_ms(self, end: int) -> NDArray[np.float64]:
        """Return the ages of the hints in milliseconds, ``[T]``. They are NaN for hints that arrived after ``end``."""
        arrived = (self.arrived_at >= 0) & (self.arrived_at <= end)
        return np.where(arrived, (self.arrived_at - self.captured_at) / 1e6, np.nan)
