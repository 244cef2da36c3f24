"""What networks are made for. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

TaskName = Literal["tse", "ss"]


@dataclass(frozen=True)
class Task:
    """What a network makes of a mixture."""

    label: str
    sources: int  # signals in the output
    needs_speaker: bool  # whether it must be told, by an embedding, whose voice is wanted


TASKS: dict[TaskName, Task] = {
    "tse": Task("target speech extraction", sources=1, needs_speaker=True),
    "ss": Task("two-speaker separation", sources=2, needs_speaker=False),
}
