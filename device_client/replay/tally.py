"""Times by number, in a room that hardly grows with them."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray


class Tally:
    """Times counted by the whole microsecond."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.total = 0  # microseconds

    def add(self, microseconds: int) -> None:
        """Count one time."""
        self.counts[microseconds] += 1
        self.total += microseconds

    def add_all(self, microseconds: NDArray[np.int64]) -> None:
        """Count many."""
        values, counts = np.unique(microseconds, return_counts=True)
        self.counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self.total += int(microseconds.sum())

    def __len__(self) -> int:
        return self.counts.total()

    def percentile_ms(self, q: float) -> float:
        """The percentile in milliseconds, interpolated linearly between two times; there must be one at least."""
        values = sorted(self.counts)
        ends = np.cumsum([self.counts[value] for value in values])
        place = (ends[-1] - 1) * q / 100
        below, above = (values[int(np.searchsorted(ends, at, "right"))] for at in (np.floor(place), np.ceil(place)))
        return float(below + (above - below) * (place % 1)) / 1e3
