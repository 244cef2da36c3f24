"""What an evaluation found, as records: systems, figures with their intervals, comparisons."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from knowledge_boosting.models.config import Strict
from knowledge_boosting.models.tasks import TASKS, TaskName
from knowledge_boosting.training.evaluation.metrics import MetricName

SCHEMA_VERSION: Final = 1
RESAMPLES: Final = 2000
CONFIDENCE: Final = 0.95

Values = npt.NDArray[np.float64]
System = Literal["mixture", "alone", "small_without_hints", "boosted", "boosted_wrong_hints", "large"]
SYSTEMS: dict[System, str] = {
    "mixture": "mixture",
    "alone": "alone",
    "small_without_hints": "small, no hints",
    "boosted": "boosted",
    "boosted_wrong_hints": "wrong hints",
    "large": "large",
}
OTHER_DELAY_NOTE = "* The weights were trained for another delay"


class Figure(Strict):
    """A figure over the items: its mean, and the percentile bootstrap interval of that mean."""

    mean: float | None = Field(description="null if no item has the figure")
    low: float | None = Field(description="lower end of the interval; null for fewer than two items")
    high: float | None = Field(description="upper end")
    items: int = Field(description="items that have the figure; STOI and PESQ have none where they find no speech")


class Row(Strict):
    """One system of one model."""

    model: str | None = Field(description="its name; null for the mixture")
    system: System
    untrained: bool = Field(description="random weights: no figure of this row is a result")
    delay_frames: int | None = Field(description="frames that hints were late; null where none are used")
    delay_ms: float | None
    trained_delay: bool | None = Field(description="whether the weights were trained for that delay")
    figures: dict[MetricName, Figure]

    @property
    def delay_label(self) -> str:
        """How late hints were, for a person; a star marks weights of another delay."""
        if self.delay_ms is None:
            return ""
        return f"{self.delay_ms:g} ms" + ("" if self.trained_delay else "*")


class ModelRecord(Strict):
    """A bundle or a run that was measured."""

    name: str
    given: str = Field(description="as given to the command")
    kind: Literal["bundle", "run"]
    id: str = Field(description="a bundle's id; of a run, the digest of its checkpoint")
    checkpoint: str | None = Field(description="of a run: the file that was chosen")
    untrained: bool
    delay_frames: int | None = Field(description="trained for; null for one network alone")
    delay_ms: float | None
    compression: int | None

    @property
    def label(self) -> str:
        """The name as a person should see it: untrained weights are called so."""
        return f"{self.name} (UNTRAINED)" if self.untrained else self.name


class DataRecord(Strict):
    """The mixtures."""

    root: str = Field(description="as given to the command")
    split: str
    items: int
    seconds: float


class BootstrapRecord(Strict):
    """How intervals were made: items drawn with replacement, quantiles of the means."""

    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE
    seed: int


class StreamingRecord(Strict):
    """How far the streaming path is from whole signals at most, and where."""

    largest_difference_db: float = Field(description="of SI-SDRi and SNRi, over all items and systems")
    item: str
    model: str
    system: System


class Comparison(Strict):
    """What a system of a pair gains over a network alone, item by item."""

    model: str
    system: System
    delay_frames: int | None
    over: str = Field(description="the model that is one network alone")
    si_sdri: Figure = Field(description="difference in dB; its interval is of the paired differences")


class Results(Strict):
    """The content of ``results.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    notice: str | None = Field(description="what must be known before any figure here is used")
    task: TaskName
    data: DataRecord
    path: Literal["offline", "streaming"] = Field(description="offline: whole signals; streaming: one frame a call")
    streaming: StreamingRecord | None
    bootstrap: BootstrapRecord
    metrics: list[MetricName] = Field(description="each the mean over sources and microphones")
    models: list[ModelRecord]
    rows: list[Row]
    comparisons: list[Comparison] = Field(description="every trained system of a pair over every network alone")

    @property
    def title(self) -> str:
        """What was measured on what; untrained weights are called so on a second line."""
        task, data = TASKS[self.task].label.capitalize(), self.data
        length = f"{data.seconds / 60:.1f} min" if data.seconds >= 100 else f"{data.seconds:g} s"
        mixtures = "1 mixture" if data.items == 1 else f"{data.items} mixtures"
        title = f"{task}: {mixtures} ({length}) of {Path(data.root).name}/{data.split}, {self.path}"
        return title if self.notice is None else f"{title}\n{self.notice}"


class ItemFigures(NamedTuple):
    """A row's figures by metric and item, NaN where an item has none."""

    row: Row
    values: Mapping[MetricName, Values]


def bootstrap(values: Values, seed: int) -> Figure:
    """Mean of the values that are numbers, with its percentile bootstrap interval."""
    numbers = values[~np.isnan(values)]
    count = len(numbers)
    if not count:
        return Figure(mean=None, low=None, high=None, items=0)
    mean = round(float(numbers.mean()), 4)
    if count == 1:
        return Figure(mean=mean, low=None, high=None, items=1)
    rng = np.random.default_rng(seed)
    means = [numbers[rng.integers(count, size=count)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Figure(mean=mean, low=round(float(low), 4), high=round(float(high), 4), items=count)


def compare(figures: Sequence[ItemFigures], seed: int) -> list[Comparison]:
    """The trained systems of pairs over networks alone, item by item."""
    alone = [found for found in figures if found.row.system == "alone"]
    return [
        Comparison(
            model=row.model,
            system=row.system,
            delay_frames=row.delay_frames,
            over=base.row.model,
            si_sdri=bootstrap(values["si_sdri"] - base.values["si_sdri"], seed),
        )
        for base in alone
        for row, values in figures
        if row.model is not None
        and base.row.model is not None
        and row.system not in ("alone", "mixture")
        and row.trained_delay is not False
    ]
