"""A compact histogram of times."""

from collections import Counter

import numpy as np
from numpy.typing import NDArray


class Tally:
    """A histogram of times in whole microseconds. Its memory does not grow with the number of equal times."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.total = 0  # microseconds

    def add(self, microseconds: int) -> None:
        """Add one time."""
        self.counts[microseconds] += 1
        self.total += microseconds

    def add_all(self, microseconds: NDArray[np.int64]) -> None:
        """Add an array of times."""
        values, counts = np.unique(microseconds, return_counts=True)
        self.counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self.total += int(microseconds.sum())

    def __len__(self) -> int:
        return self.counts.total()

    def percentile_ms(self, q: float) -> float:
        """Return the percentile ``q`` in milliseconds, with linear interpolation. There must be at least one time."""
        values = sorted(self.counts)
        ends = np.cumsum([self.counts[value] for value in values])
        rank = (ends[-1] - 1) * q / 100
        below, above = (values[int(np.searchsorted(ends, index, "right"))] for index in (np.floor(rank), np.ceil(rank)))
        return float(below + (above - below) * (rank % 1)) / 1e3
