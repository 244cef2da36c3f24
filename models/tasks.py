"""The tasks of networks. This module does not need torch."""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["tse", "ss"]


@dataclass(frozen=True)
class Task:
    """The output of a network for a mixture."""

    label: str
    sources: int  # signals in the output
    needs_speaker: bool  # whether the network needs a speaker embedding of the target


TASKS: dict[TaskName, Task] = {
    "tse": Task("target speech extraction", sources=1, needs_speaker=True),
    "ss": Task("two-speaker separation", sources=2, needs_speaker=False),
}
