"""Formats the results of an evaluation as a table."""

from collections.abc import Sequence
from itertools import groupby

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from knowledge_boosting.training.evaluation.metrics import METRICS, MetricName
from knowledge_boosting.training.evaluation.results import OTHER_DELAY_NOTE, SYSTEMS, Results, Row


def table(results: Results, width: int) -> RenderableType:
    """Return the results as a table for a terminal of a given width. If it is narrow, intervals have separate lines."""
    headings = ["", "delay", *(METRICS[metric].heading for metric in results.metrics)]
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
    parts: list[RenderableType] = [Text(results.title, style="bold"), ""]
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
        where = f", {comparison.network}" if comparison.network is not None else ""
        name = SYSTEMS[comparison.system] + where + (f" over {comparison.over}" if several else "")
        gain = comparison.si_sdri
        cell = Text("-" if gain.mean is None else f"{gain.mean:+.2f}")
        if gain.low is not None:
            cell.append(f" ({gain.low:+.2f}…{gain.high:+.2f})", style="dim")
        grid.add_row(comparison.model, name, cell)
    over = "the network alone" if several else results.comparisons[0].over
    return ["", Text(f"SI-SDRi over {over}, dB, item by item", style="bold"), "", grid]


def _line(row: Row, metrics: Sequence[MetricName], interval: str) -> list[Text]:
    cells = [Text(("  " if row.model else "") + SYSTEMS[row.system]), Text(row.delay_label)]
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
        notes.append(f"{OTHER_DELAY_NOTE}.")
    if any(row.system == "boosted_wrong_hints" for row in results.rows):
        notes.append("Wrong hints are the hints of the next item.")
    fewest = min(figure.items for row in results.rows for figure in row.figures.values())
    if fewest < results.data.items:
        notes.append(
            f"Some figures are means over fewer items, at least {fewest}, because STOI, PESQ and WER need speech."
        )
    if results.streaming is not None:
        worst = results.streaming
        notes.append(f"Streaming is within {worst.largest_difference_db:.1g} dB of whole signals on every item.")
    return notes
