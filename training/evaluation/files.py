"""Writes the results of an evaluation into a folder and into the measured bundles."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_file, check_folder
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.networks import record_quality
from knowledge_boosting.training.evaluation.metrics import METRICS, MetricName
from knowledge_boosting.training.evaluation.picture import draw
from knowledge_boosting.training.evaluation.results import SYSTEMS, ItemFigures, Results, Row

RESULT_FILES = ("results.json", "results.csv", "items.csv", "results.png")


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Make a folder for results, and remove it at the end if it is empty.

    Raises:
        InputError: the folder cannot be made or written to, or a folder has the name of a result file.
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
                raise InputError(
                    f"{path / name}: is a folder, but a file of that name must be written; give another --output"
                )
        yield
    finally:
        if made and not any(path.iterdir()):
            path.rmdir()


def write_results(folder: Path, results: Results, items: Sequence[str], figures: Sequence[ItemFigures]) -> None:
    """Write all four result files, or none if one of them cannot be written.

    Raises:
        InputError: a file cannot be written.
    """
    with ExitStack() as stack:
        # The files are renamed in reverse order when all are complete. So when results.json is new, the others are too.
        paths = {name: stack.enter_context(atomic_file(folder / name)) for name in RESULT_FILES}
        paths["results.json"].write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
        paths["results.csv"].write_text(_summary_csv(results), encoding="utf-8")
        paths["items.csv"].write_text(_items_csv(results.metrics, items, figures), encoding="utf-8")
        draw(paths["results.png"], results)


def _system_cells(row: Row) -> dict[str, object]:
    return {
        "model": row.model or "",
        "system": row.system,
        "untrained": str(row.untrained).lower(),
        "delay_frames": _blank(row.delay_frames),
        "delay_ms": _blank(row.delay_ms),
        "network": row.network or "",
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


def _items_csv(metrics: Sequence[MetricName], items: Sequence[str], figures: Sequence[ItemFigures]) -> str:
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


def record_in_bundles(results: Results) -> None:
    """Write the figures of every bundle into its manifest and its model card."""
    data = f"{results.data.items} mixtures of {Path(results.data.root).name}/{results.data.split}"
    for model in results.models:
        quality: dict[str, float] = {}
        lines = ["| system | " + " | ".join(METRICS[metric].heading for metric in results.metrics) + " |"]
        lines.append("|---" * (1 + len(results.metrics)) + "|")
        for row in results.rows:
            if row.model != model.name or row.delay_frames not in (None, model.delay_frames) or row.network is not None:
                continue
            cells = []
            for metric, figure in row.figures.items():
                digits = METRICS[metric].digits
                if figure.mean is not None:
                    quality[f"{row.system}_{metric}"] = figure.mean
                interval = "" if figure.low is None else f" ({figure.low:.{digits}f}…{figure.high:.{digits}f})"
                cells.append("-" if figure.mean is None else f"{figure.mean:.{digits}f}{interval}")
            lines.append(f"| {SYSTEMS[row.system]} | {' | '.join(cells)} |")
        lines += [
            f"| {SYSTEMS[gain.system]}, over {gain.over} | {gain.si_sdri.mean:+.2f} "
            f"({gain.si_sdri.low:+.2f}…{gain.si_sdri.high:+.2f}) |" + " |" * (len(results.metrics) - 1)
            for gain in results.comparisons
            if gain.model == model.name and gain.si_sdri.low is not None
            if gain.delay_frames in (None, model.delay_frames) and gain.network is None
        ]
        lines += ["", f"On {data}, with {100 * results.bootstrap.confidence:g} % bootstrap intervals."]
        record_quality(Bundle(model.given), quality, "\n".join(lines))
