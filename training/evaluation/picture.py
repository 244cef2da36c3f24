"""Draws the results of an evaluation: one line for each system and, if there are several delays, quality by delay."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from knowledge_boosting.common.pictures import literal_text
from knowledge_boosting.training.evaluation.results import OTHER_DELAY_NOTE, SYSTEMS, Results, Row, System

_COLOURS: dict[System, str] = {  # the palette of Okabe and Ito, which color-blind people can distinguish
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


@literal_text()
def draw(path: Path, results: Results) -> None:
    """Draw the results into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_delay = len({row.delay_frames for row in results.rows if row.system == "boosted"}) > 1
    height = max(0.34 * (len(results.rows) + len(results.models)) + 1.2, 5.2 if by_delay else 2.4)
    figure = plt.figure(figsize=(13.0 if by_delay else 8.0, height), layout="constrained")
    try:
        if by_delay:
            # The size of the curve does not depend on the number of systems beside it.
            grid = figure.add_gridspec(2, 2, width_ratios=(1.1, 1), height_ratios=(5.0, max(height - 5.0, 0.01)))
            _draw_systems(figure.add_subplot(grid[:, 0]), results)
            _draw_delays(figure.add_subplot(grid[0, 1] if height > 6 else grid[:, 1]), results)
        else:
            _draw_systems(figure.add_subplot(), results)
        figure.suptitle(results.title, fontsize=11)
        figure.savefig(path, dpi=130)
    finally:
        plt.close(figure)


def _draw_systems(axis: Any, results: Results) -> None:
    """Draw one line for each system, grouped by model."""
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
            delay = f", {row.delay_label}" if row.delay_label else ""
            ticks.append((line, SYSTEMS[row.system] + delay))
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
    axis.set_xlabel(f"SI-SDRi, dB (mean, 95 % interval){f'{chr(10)}{OTHER_DELAY_NOTE}' if retimed else ''}")
    _style_axes(axis, "x")


def _draw_point(axis: Any, row: Row, place: float, *, horizontal: bool, label: str | None = None) -> None:
    figure = row.figures["si_sdri"]
    if figure.mean is None:
        return
    spread = None
    if figure.low is not None and figure.high is not None:
        # Rounding can move a quantile of the resampled means past the mean.
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
    """Draw every system at the delay of its model, and boosted systems also at delays they were not trained for."""
    trained = {model.name: model.delay_ms for model in results.models if model.delay_ms is not None}
    rows = [row for row in results.rows if row.model in trained and row.network is None]
    places = {id(row): trained[row.model or ""] if row.delay_ms is None else row.delay_ms for row in rows}
    step = 0.012 * max(places.values())  # systems stand side by side, so that their intervals do not overlap
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
    axis.tick_params(axis="x", labelrotation=90)  # short delays are close to each other
    axis.set_xlabel("delay of hints, ms")
    axis.set_ylabel("SI-SDRi, dB")
    _style_axes(axis, "both")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8.5, frameon=False)


def _style_axes(axis: Any, grid: str) -> None:
    axis.grid(axis=grid, color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
