"""What boosting gives by mixture: ``python benchmarks/conditions.py out/results/ss data/valid-ss/val``.

Takes the items.csv of ``kb-evaluate`` on a pair and its network alone, and the metadata.csv of the mixtures. Prints
SI-SDRi of both and the large network's, in classes of the angle between the talkers, of their level difference, of the
reverberation time and, for target speech extraction, of how much alike their voices are (cosine of the d-vectors), and
writes the same as JSON. Intervals are 95 % bootstrap intervals of the paired difference.
"""

import argparse
import csv
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from training.evaluation_plot import bootstrap

Record = dict[str, str]


def angle(record: Record) -> float:
    """Between the talkers, degrees."""
    return abs((float(record["azimuth00_deg"]) - float(record["azimuth01_deg"]) + 180) % 360 - 180)


def likeness(item: Path) -> float:
    """Cosine of the d-vectors of an item's talkers."""
    first, second = (torch.load(item / f"spk_id{number}.pt", weights_only=True).flatten() for number in ("00", "01"))
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


# A figure of an item, by its line of metadata, its place and its folder; and the edges of its classes.
Condition = tuple[Callable[[Record, int, Path], float], list[float]]
ROOM: dict[str, Condition] = {
    "angle between talkers, degrees": (lambda record, *_: angle(record), [15, 45, 90, 135, 180]),
    "reverberation time, s": (lambda record, *_: float(record["rt60_s"]), [0, 0.01, 0.12, 0.2, 0.6]),
}
TALKERS: dict[str, dict[str, Condition]] = {
    "ss": {
        "level of talker 1 over 2, dB": (lambda record, *_: float(record["level_difference_db"]), [-5, -2.5, 0, 2.5, 5])
    },
    "tse": {
        # The target is the one of the item's number, even or odd.
        "level of the target over the other, dB": (
            lambda record, index, _: float(record["level_difference_db"]) * (-1 if index % 2 else 1),
            [-5, -2.5, 0, 2.5, 5],
        ),
        "likeness of the voices": (lambda _, __, folder: likeness(folder), [0.3, 0.5, 0.55, 0.6, 0.65, 1]),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="folder of kb-evaluate with one pair and one network alone")
    parser.add_argument("split", type=Path, help="folder of the mixtures, with metadata.csv")
    parser.add_argument("--json", type=Path, default=Path("out/conditions.json"))
    arguments = parser.parse_args()
    task = json.loads((arguments.results / "results.json").read_text())["task"]
    with (arguments.split / "metadata.csv").open() as file:
        records = {record["item"]: record for record in csv.DictReader(file)}
    figures: dict[str, dict[str, float]] = {}
    with (arguments.results / "items.csv").open() as file:
        for line in csv.DictReader(file):
            if line["trained_delay"] != "false":
                figures.setdefault(line["system"], {})[line["item"]] = float(line["si_sdri"])
    items = list(figures["boosted"])
    alone, boosted, large = (
        np.array([figures[name][item] for item in items]) for name in ("alone", "boosted", "large")
    )

    found: dict[str, list[dict[str, float | int | None]]] = {}
    for name, (value_of, edges) in (ROOM | TALKERS[task]).items():
        values = np.array([value_of(records[item], index, arguments.split / item) for index, item in enumerate(items)])
        table = Table(name, "items", "alone", "boosted", "difference", "large", title=f"SI-SDRi, dB, {task.upper()}")
        found[name] = []
        for low, high in pairwise(edges):
            chosen = (values >= low) & ((values < high) | (high == edges[-1]))
            if not chosen.any():
                continue
            gain = bootstrap((boosted - alone)[chosen], seed=0)
            entry = {
                "low": low,
                "high": high,
                "items": int(chosen.sum()),
                "alone": round(float(alone[chosen].mean()), 2),
                "boosted": round(float(boosted[chosen].mean()), 2),
                "large": round(float(large[chosen].mean()), 2),
                "difference": gain.mean,
                "difference_low": gain.low,
                "difference_high": gain.high,
            }
            found[name].append(entry)
            interval = "" if gain.low is None else f" ({gain.low:+.2f}…{gain.high:+.2f})"
            table.add_row(
                f"{low:g} to {high:g}",
                str(entry["items"]),
                f"{entry['alone']:.2f}",
                f"{entry['boosted']:.2f}",
                f"{gain.mean:+.2f}{interval}",
                f"{entry['large']:.2f}",
            )
        Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"task": task, "conditions": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
