"""Hints for the small network, and the order in which those that have arrived are used. It does not need torch.

With the policy ``arrival``, the small network *merges* every hint with its features of the hint's frame, and later
frames attend to the merged frames. At most :data:`MERGES` hints are merged at each frame, so that a frame never takes
longer than usual, even if many hints arrive together after a stall.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.models.config import ModelConfig

RAMP = 8  # merged frames in the window with which fusion has its full strength; with fewer it fades in or out
MERGES = 2  # hints that are merged at each frame, at most
# The score of a key that is not visible. It is finite, so that the result is too, even if no key is visible.
MASKED = -1e30


class Hint(NamedTuple):
    """A hint that the small network uses at a frame."""

    age: int  # frames since the frame of the hint
    values: NDArray[np.float32]  # [hint channels, F]


def check_hints(config: ModelConfig, hints: Sequence[Hint]) -> None:
    """Check that a network can use these hints at one frame.

    Raises:
        ValueError: it cannot.
    """
    if not config.on_arrival and (len(hints) > 1 or any(hint.age != config.delay for hint in hints)):
        raise ValueError(f"hints must have the age {config.delay}")
    if config.on_arrival and (len(hints) > MERGES or any(not 1 <= hint.age <= config.max_age for hint in hints)):
        raise ValueError(f"at most {MERGES} hints with ages from 1 to {config.max_age} can be used at a frame")


class MergeQueue:
    """The hints of one stream that have arrived and are not merged yet, by their frames."""

    def __init__(self, max_age: int) -> None:
        """Make an empty queue for hints that are useless when they are older than ``max_age`` frames."""
        self._max_age = max_age
        self._waiting: list[int] = []  # in the order of frames
        self._taken: deque[int] = deque(maxlen=2 * max_age)

    def put(self, frame: int) -> None:
        """Add the hint of a frame. A hint that came before is ignored."""
        if frame not in self._waiting and frame not in self._taken:
            self._waiting.append(frame)
            self._waiting.sort()

    def __contains__(self, frame: int) -> bool:
        return frame in self._waiting

    def take(self, frame: int) -> list[int]:
        """Return the frames of the hints to merge at a frame, newest first, and remove them.

        The newest hints are merged first, because they say most about the frames to come. A hint of the frame itself
        or of a later one waits.
        """
        chosen = [number for number in self._waiting if frame - self._max_age <= number < frame][: -MERGES - 1 : -1]
        self._waiting = [number for number in self._waiting if number >= frame - self._max_age and number not in chosen]
        self._taken.extend(chosen)
        return chosen
