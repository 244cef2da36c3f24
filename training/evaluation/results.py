"""What an evaluation found, for programs and people: records, tables, picture. Needs no torch."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_file, check_folder
from knowledge_boosting.common.pictures import any_words
from knowledge_boosting.models.config import Strict

SCHEMA_VERSION: Final = 1
RESAMPLES: Final = 2000
CONFIDENCE: Final = 0.95
RESULT_FILES = ("results.json", "results.csv", "items.csv", "results.png")

Values = npt.NDArray[np.float64]
Metric = Literal["si_sdri", "snri", "stoi", "pesq"]
System = Literal["mixture", "alone", "small_without_hints", "boosted", "boosted_wrong_hints", "large"]


class _Display(NamedTuple):
    heading: str
    digits: int


METRICS: dict[Metric, _Display] = {
    "si_sdri": _Display("SI-SDRi, dB", 2),
    "snri": _Display("SNRi, dB", 2),
    "stoi": _Display("STOI", 3),
    "pesq": _Display("PESQ-WB", 2),
}
SYSTEMS: dict[System, str] = {
    "mixture": "mixture",
    "alone": "alone",
    "small_without_hints": "small, no hints",
    "boosted": "boosted",
    "boosted_wrong_hints": "wrong hints",
    "large": "large",
}
_RETIMED = "* The weights were trained for another delay"


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
    figures: dict[Metric, Figure]


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
    task: Literal["tse", "ss"]
    data: DataRecord
    path: Literal["offline", "streaming"] = Field(description="offline: whole signals; streaming: one frame a call")
    streaming: StreamingRecord | None
    bootstrap: BootstrapRecord
    metrics: list[Metric] = Field(description="each the mean over sources and microphones")
    models: list[ModelRecord]
    rows: list[Row]
    comparisons: list[Comparison] = Field(description="every trained system of a pair over every network alone")


class ItemFigures(NamedTuple):
    """A row's figures by metric and item, NaN where an item has none."""

    row: Row
    values: Mapping[Metric, Values]


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


def table(results: Results, width: int) -> RenderableType:
    """The results for a person, on a terminal of a width; intervals have lines of their own where it is narrow."""
    headings = ["", "late by", *(METRICS[metric].heading for metric in results.metrics)]
    for interval in (" ({}…{})", "\n{}…{}"):
        lines = [_line(row, results.metrics, interval) for row in results.rows]
        widths = [
            max(cell_len(part) for cell in column for part in cell.plain.split("\n"))
            for column in zip(map(Text, headings), *lines, strict=True)
        ]
        total = sum(widths) + 2 * (len(widths) - 1)
        if total <= width:
            break
    labels = {model.name: model.label for model in results.models}
    parts: list[RenderableType] = [Text(_title(results), style="bold"), ""]
    parts += [_grid([[Text(heading, style="bold") for heading in headings]], widths), Text("─" * total, style="dim")]
    for name, group in groupby(zip(results.rows, lines, strict=True), key=lambda pair: pair[0].model):
        if name is not None:
            parts += ["", Text(labels[name], style="bold")]
        parts.append(_grid([line for _, line in group], widths))
    parts += [Text("─" * total, style="dim"), *map(Text, _notes(results))]
    return Group(*parts, *_comparisons(results))


def _comparisons(results: Results) -> list[RenderableType]:
    if not results.comparisons:
        return []
    several = len({comparison.over for comparison in results.comparisons}) > 1
    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for number in range(3):
        grid.add_column(justify="right" if number == 2 else "left", no_wrap=True)
    for comparison in results.comparisons:
        name = SYSTEMS[comparison.system] + (f" over {comparison.over}" if several else "")
        gain = comparison.si_sdri
        cell = Text("-" if gain.mean is None else f"{gain.mean:+.2f}")
        if gain.low is not None:
            cell.append(f" ({gain.low:+.2f}…{gain.high:+.2f})", style="dim")
        grid.add_row(comparison.model, name, cell)
    over = "the network alone" if several else results.comparisons[0].over
    return ["", Text(f"SI-SDRi over {over}, dB, item by item", style="bold"), "", grid]


def _line(row: Row, metrics: Sequence[Metric], interval: str) -> list[Text]:
    cells = [Text(("  " if row.model else "") + SYSTEMS[row.system]), Text(_delay(row))]
    for metric in metrics:
        figure, digits = row.figures[metric], METRICS[metric].digits
        cell = Text("-" if figure.mean is None else f"{figure.mean:.{digits}f}")
        if figure.low is not None and figure.low != figure.high:
            cell.append(interval.format(f"{figure.low:.{digits}f}", f"{figure.high:.{digits}f}"), style="dim")
        cells.append(cell)
    return cells


def _grid(lines: Sequence[Sequence[Text]], widths: Sequence[int]) -> Table:
    grid = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    for number, width in enumerate(widths):
        grid.add_column(justify="right" if number else "left", width=width, no_wrap=True)
    for line in lines:
        grid.add_row(*line)
    return grid


def _notes(results: Results) -> list[str]:
    notes = [f"Means over items, with {100 * results.bootstrap.confidence:g} % bootstrap intervals."]
    if any(row.trained_delay is False for row in results.rows):
        notes.append(f"{_RETIMED}.")
    if any(row.system == "boosted_wrong_hints" for row in results.rows):
        notes.append("Wrong hints are those of the next item's mixture.")
    fewest = min(figure.items for row in results.rows for figure in row.figures.values())
    if fewest < results.data.items:
        notes.append(f"Some figures are of fewer items, the fewest of {fewest}: STOI and PESQ need speech.")
    if results.streaming is not None:
        worst = results.streaming
        notes.append(f"Streaming is within {worst.largest_difference_db:.1g} dB of whole signals, on every item.")
    return notes


def _title(results: Results) -> str:
    """What was measured on what; untrained weights are called so on a second line."""
    task = {"ss": "Separation", "tse": "Target speech extraction"}[results.task]
    data = results.data
    length = f"{data.seconds / 60:.1f} min" if data.seconds >= 100 else f"{data.seconds:g} s"
    mixtures = "1 mixture" if data.items == 1 else f"{data.items} mixtures"
    title = f"{task}: {mixtures} ({length}) of {Path(data.root).name}/{data.split}, {results.path}"
    return title if results.notice is None else f"{title}\n{results.notice}"


def _delay(row: Row) -> str:
    if row.delay_ms is None:
        return ""
    return f"{row.delay_ms:g} ms" + ("" if row.trained_delay else "*")


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Makes the folder, and removes it again if it is left empty.

    Raises:
        InputError: it cannot be made or written to, or the results have no place in it.
    """
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot make the folder ({reason(error)}); give another --output") from None
    try:
        check_folder(path)
        for name in RESULT_FILES:
            if (path / name).is_dir():
                raise InputError(f"{path / name}: is a folder, where a file is to be written; give another --output")
        yield
    finally:
        if made and not any(path.iterdir()):
            path.rmdir()


def write_results(folder: Path, results: Results, items: Sequence[str], figures: Sequence[ItemFigures]) -> None:
    """Write all four files, or none.

    Raises:
        InputError: they cannot be written.
    """
    with ExitStack() as stack:
        # They take their places in reverse order when all are written: whoever finds a new JSON finds the others too.
        paths = {name: stack.enter_context(atomic_file(folder / name)) for name in RESULT_FILES}
        paths["results.json"].write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
        paths["results.csv"].write_text(_summary_csv(results), encoding="utf-8")
        paths["items.csv"].write_text(_items_csv(results.metrics, items, figures), encoding="utf-8")
        _draw(paths["results.png"], results)


def _system_cells(row: Row) -> dict[str, object]:
    return {
        "model": row.model or "",
        "system": row.system,
        "untrained": str(row.untrained).lower(),
        "delay_frames": _blank(row.delay_frames),
        "delay_ms": _blank(row.delay_ms),
        "trained_delay": "" if row.trained_delay is None else str(row.trained_delay).lower(),
    }


def _summary_csv(results: Results) -> str:
    lines = []
    for row in results.rows:
        cells = _system_cells(row)
        for metric, figure in row.figures.items():
            cells |= {
                metric: _blank(figure.mean),
                f"{metric}_low": _blank(figure.low),
                f"{metric}_high": _blank(figure.high),
                f"{metric}_items": figure.items,
            }
        lines.append(cells)
    return _csv(lines)


def _items_csv(metrics: Sequence[Metric], items: Sequence[str], figures: Sequence[ItemFigures]) -> str:
    return _csv(
        [
            {"item": item, **_system_cells(row)}
            | {metric: "" if np.isnan(values[metric][index]) else f"{values[metric][index]:.6f}" for metric in metrics}
            for index, item in enumerate(items)
            for row, values in figures
        ]
    )


def _blank(value: float | None) -> object:
    return "" if value is None else value


def _csv(lines: Sequence[Mapping[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


# The picture

_COLOURS: dict[System, str] = {  # Okabe and Ito: told apart by everybody
    "mixture": "#999999",
    "alone": "#CC79A7",
    "small_without_hints": "#E69F00",
    "boosted": "#0072B2",
    "boosted_wrong_hints": "#D55E00",
    "large": "#009E73",
}
_MARKERS: dict[System, str] = {
    "mixture": "|",
    "alone": "D",
    "small_without_hints": "s",
    "boosted": "o",
    "boosted_wrong_hints": "X",
    "large": "^",
}


@any_words()
def _draw(path: Path, results: Results) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_delay = len({row.delay_frames for row in results.rows if row.system == "boosted"}) > 1
    height = max(0.34 * (len(results.rows) + len(results.models)) + 1.2, 5.2 if by_delay else 2.4)
    figure = plt.figure(figsize=(13.0 if by_delay else 8.0, height), layout="constrained")
    try:
        if by_delay:
            # The curve keeps its shape however many systems are listed beside it.
            grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1), height_ratios=(5.0, max(height - 5.0, 0.01)))
            _draw_systems(figure.add_subplot(grid[:, 0]), results)
            _draw_delays(figure.add_subplot(grid[0, 1] if height > 6 else grid[:, 1]), results)
        else:
            _draw_systems(figure.add_subplot(), results)
        figure.suptitle(_title(results), fontsize=11)
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)


def _draw_systems(axis: Any, results: Results) -> None:
    """One line a system, grouped by model."""
    labels = {model.name: model.label for model in results.models}
    ticks: list[tuple[float, str]] = []
    headings: list[str] = []
    line = 0.0
    measured = [row for row in results.rows if row.model is not None]
    for name, rows in groupby(measured, key=lambda row: row.model or ""):
        ticks.append((line, labels[name]))
        headings.append(labels[name])
        for row in rows:
            line -= 1
            late = f", {_delay(row)}" if row.delay_ms is not None else ""
            ticks.append((line, SYSTEMS[row.system] + late))
            figure = row.figures["si_sdri"]
            _draw_point(axis, row, line, horizontal=True)
            if figure.mean is not None:
                text = f"{figure.mean:.2f}"
                axis.annotate(text, (figure.mean, line), (0, 5), textcoords="offset points", ha="center", fontsize=7.5)
        line -= 1.4
    axis.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    for tick, (_, label) in zip(axis.yaxis.get_major_ticks(), ticks, strict=True):
        if label in headings:
            tick.label1.set_fontweight("bold")
            tick.tick1line.set_visible(False)
    axis.axvline(0, color="0.5", linewidth=1, zorder=0)
    axis.set_ylim(line + 0.7, 0.7)
    axis.margins(x=0.1)
    axis.annotate("mixture", (0, 1), (0, 2), ("data", "axes fraction"), "offset points", ha="center", fontsize=8)
    retimed = any(row.trained_delay is False for row in results.rows)
    axis.set_xlabel(f"SI-SDRi, dB (mean, 95 % interval){f'{chr(10)}{_RETIMED}' if retimed else ''}")
    _plain(axis, "x")


def _draw_point(axis: Any, row: Row, place: float, *, horizontal: bool, label: str | None = None) -> None:
    figure = row.figures["si_sdri"]
    if figure.mean is None:
        return
    spread = None
    if figure.low is not None and figure.high is not None:
        # A quantile of the resampled means may lie on the far side of a mean by rounding.
        spread = [[max(figure.mean - figure.low, 0)], [max(figure.high - figure.mean, 0)]]
    axis.errorbar(
        *((figure.mean, place) if horizontal else (place, figure.mean)),
        **{"xerr" if horizontal else "yerr": spread},
        fmt=_MARKERS[row.system],
        color=_COLOURS[row.system],
        markerfacecolor="white" if row.trained_delay is False else _COLOURS[row.system],
        markersize=6,
        elinewidth=1.2,
        capsize=2.5,
        label=label,
        zorder=3,
    )


def _draw_delays(axis: Any, results: Results) -> None:
    """Every system at its model's delay, and boosted ones also at those their weights were not trained for."""
    trained = {model.name: model.delay_ms for model in results.models if model.delay_ms is not None}
    rows = [row for row in results.rows if row.model in trained]
    places = {id(row): trained[row.model or ""] if row.delay_ms is None else row.delay_ms for row in rows}
    step = 0.012 * max(places.values())  # side by side, so that intervals can be told apart
    shift = {system: step * (number - 2) for number, system in enumerate(list(SYSTEMS)[1:])}
    named: set[str] = set()
    for row in rows:
        label = SYSTEMS[row.system] + (", weights of another delay" if row.trained_delay is False else "")
        place = places[id(row)] + shift[row.system]
        _draw_point(axis, row, place, horizontal=False, label=None if label in named else label)
        named.add(label)

    def join(joined: Sequence[Row], style: str) -> None:
        points = sorted(
            (places[id(row)] + shift[row.system], row.figures["si_sdri"].mean)
            for row in joined
            if row.figures["si_sdri"].mean is not None
        )
        if len(points) > 1:
            axis.plot(*zip(*points, strict=True), style, color=_COLOURS[joined[0].system], linewidth=1, zorder=1)

    for row in results.rows:
        if row.system == "alone":
            axis.axhline(row.figures["si_sdri"].mean, color=_COLOURS["alone"], linestyle="--", label=row.model)
    for name in trained:
        join([row for row in rows if row.model == name and row.system == "boosted"], ":")
    if len(set(trained.values())) == len(trained):
        for system in SYSTEMS:
            join([row for row in rows if row.system == system and row.trained_delay is not False], "-")
    axis.set_xticks(sorted(set(places.values())))
    axis.set_xlabel("hints late by, ms")
    axis.set_ylabel("SI-SDRi, dB")
    _plain(axis, "both")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8.5, frameon=False)


def _plain(axis: Any, grid: str) -> None:
    axis.grid(axis=grid, color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
