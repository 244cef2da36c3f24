"""The records of an evaluation: systems, figures with their intervals, and comparisons."""

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
    "small_without_hints": "hints withheld",
    "boosted": "boosted",
    "boosted_wrong_hints": "wrong hints",
    "large": "large",
}
OTHER_DELAY_NOTE = "* The weights were trained for another delay"


class Figure(Strict):
    """The mean of a metric over the items, with its percentile bootstrap interval."""

    mean: float | None = Field(description="null if no item has the figure")
    low: float | None = Field(description="lower end of the interval; null if fewer than two items have the figure")
    high: float | None = Field(description="upper end of the interval")
    items: int = Field(description="items that have the figure; STOI, PESQ and WER have none if they find no speech")


class Row(Strict):
    """The figures of one system of one model."""

    model: str | None = Field(description="name of the model; null for the mixture")
    system: System
    untrained: bool = Field(description="whether the weights are random; then no figure of this row is a result")
    delay_frames: int | None = Field(description="delay of the hints, frames; null if no hints are used")
    delay_ms: float | None
    trained_delay: bool | None = Field(description="whether the weights were trained for that delay")
    network: str | None = Field(default=None, description="simulated network over which the hints arrive")
    figures: dict[MetricName, Figure]

    @property
    def delay_label(self) -> str:
        """The delay or the network of the hints, for tables. A star marks weights trained for another delay."""
        if self.delay_ms is None:
            return self.network or ""
        return f"{self.delay_ms:g} ms" + ("" if self.trained_delay else "*")


class ModelRecord(Strict):
    """A bundle or a run that was measured."""

    name: str
    given: str = Field(description="as given to the command")
    kind: Literal["bundle", "run"]
    id: str = Field(description="id of a bundle; for a run, the digest of its checkpoint")
    checkpoint: str | None = Field(description="for a run: the file that was measured")
    untrained: bool
    delay_frames: int | None = Field(description="delay that the weights were trained for; null for one network alone")
    delay_ms: float | None
    compression: int | None

    @property
    def label(self) -> str:
        """The name for tables and pictures, which marks untrained weights."""
        return f"{self.name} (UNTRAINED)" if self.untrained else self.name


class DataRecord(Strict):
    """The mixtures that were measured."""

    root: str = Field(description="as given to the command")
    split: str
    items: int
    seconds: float


class BootstrapRecord(Strict):
    """The parameters of the bootstrap, which draws items with replacement and takes quantiles of the means."""

    resamples: int = RESAMPLES
    confidence: float = CONFIDENCE
    seed: int


class StreamingRecord(Strict):
    """The largest difference between streaming and whole signals, and where it occurred."""

    largest_difference_db: float = Field(description="difference of SI-SDRi or SNRi, over all items and systems")
    item: str
    model: str
    system: System


class Comparison(Strict):
    """The gain of a system of a pair over a network alone, computed item by item."""

    model: str
    system: System
    delay_frames: int | None
    network: str | None = None
    over: str = Field(description="name of the network alone")
    si_sdri: Figure = Field(description="difference in dB; the interval is that of the paired differences")


class Results(Strict):
    """The content of ``results.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    notice: str | None = Field(description="a warning about the figures, or null")
    task: TaskName
    data: DataRecord
    path: Literal["offline", "streaming"] = Field(
        description="offline: whole signals; streaming: one frame in each call"
    )
    streaming: StreamingRecord | None
    bootstrap: BootstrapRecord
    metrics: list[MetricName] = Field(description="each is the mean over sources and microphones")
    models: list[ModelRecord]
    rows: list[Row]
    comparisons: list[Comparison] = Field(
        description="every system of a pair at its trained delay, over every network alone"
    )

    @property
    def title(self) -> str:
        """The task, the data and the path; a second line has the notice, if there is one."""
        task, data = TASKS[self.task].label.capitalize(), self.data
        length = f"{data.seconds / 60:.1f} min" if data.seconds >= 100 else f"{data.seconds:g} s"
        mixtures = "1 mixture" if data.items == 1 else f"{data.items} mixtures"
        title = f"{task}: {mixtures} ({length}) of {Path(data.root).name}/{data.split}, {self.path}"
        return title if self.notice is None else f"{title}\n{self.notice}"


class ItemFigures(NamedTuple):
    """The figures of a row by metric and item. An item without a figure has NaN."""

    row: Row
    values: Mapping[MetricName, Values]


def bootstrap(values: Values, seed: int) -> Figure:
    """Return the mean of the values that are not NaN, with its percentile bootstrap interval."""
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
    """Compare the systems of pairs at their trained delays with networks alone, item by item."""
    alone = [found for found in figures if found.row.system == "alone"]
    return [
        Comparison(
            model=row.model,
            system=row.system,
            delay_frames=row.delay_frames,
            network=row.network,
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
