"""Quality by condition: ``python benchmarks/conditions.py out/results/ss data/valid-ss/val``.

Takes the items.csv of ``kb-evaluate`` and the metadata.csv of the mixtures. Prints the SI-SDRi of every system in
classes of what listens (a head, two microphones, one), of the angle between the speakers, of the reverberation time,
of the speakers' level difference and, for target speech extraction, of how much alike their voices are (cosine of the
d-vectors), and writes the same as JSON. Intervals are 95 % bootstrap intervals of the paired difference.
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from knowledge_boosting.training.evaluation.results import bootstrap

Record = dict[str, str]
_UNEQUAL_DB = 6.0  # that two microphones differ by anyway
Mask = NDArray[np.bool_]


def angle(record: Record) -> float:
    """Between the speakers, degrees."""
    return abs((float(record["azimuth00_deg"]) - float(record["azimuth01_deg"]) + 180) % 360 - 180)


def likeness(item: Path) -> float:
    """Cosine of the d-vectors of an item's speakers."""
    first, second = (torch.load(item / f"spk_id{number}.pt", weights_only=True).flatten() for number in ("00", "01"))
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


# A figure of an item, by its line of metadata, its place and its folder; and the edges of its classes.
Condition = tuple[Callable[[Record, int, Path], float], list[float]]
ROOM_CONDITIONS: dict[str, Condition] = {
    "angle between speakers, degrees": (lambda record, *_: angle(record), [15, 45, 90, 135, 180]),
    "reverberation time, s": (lambda record, *_: float(record["rt60_s"]), [0, 0.01, 0.12, 0.2, 0.6]),
}
SPEAKER_CONDITIONS: dict[str, dict[str, Condition]] = {
    "ss": {
        "level of speaker 1 over 2, dB": (
            lambda record, *_: float(record["level_difference_db"]),
            [-5, -2.5, 0, 2.5, 5],
        )
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


def listener(record: Record) -> str:
    """What heard an item, a head by its name; apart from these, any of them with one side 20 dB weaker."""
    unequal = abs(float(record.get("sensitivity_difference_db", 0))) > _UNEQUAL_DB
    return "one side 20 dB weaker" if unequal else record.get("listener", "head")


def classes_of(task: str, records: list[Record], folders: list[Path]) -> Iterator[tuple[str, str, Mask]]:
    """Conditions, their classes, and which items belong to each."""
    everything = np.ones(len(records), dtype=bool)
    yield "all", "all", everything
    heard = np.array([listener(record) for record in records])
    for name in sorted(set(heard)):
        yield "listener", name, heard == name
    for condition, (value_of, edges) in (ROOM_CONDITIONS | SPEAKER_CONDITIONS[task]).items():
        pairs = enumerate(zip(records, folders, strict=True))
        values = np.array([value_of(record, index, folder) for index, (record, folder) in pairs])
        for low, high in pairwise(edges):
            yield condition, f"{low:g} to {high:g}", (values >= low) & ((values < high) | (high == edges[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of kb-evaluate")
    parser.add_argument("split", type=Path, help="folder of the mixtures, with metadata.csv")
    parser.add_argument("--against", help="MODEL:SYSTEM that others are compared with; the first network alone if not")
    parser.add_argument("--json", type=Path, default=Path("out/conditions.json"))
    arguments = parser.parse_args()
    task = json.loads((arguments.results / "results.json").read_text())["task"]
    with (arguments.split / "metadata.csv").open() as file:
        records = {record["item"]: record for record in csv.DictReader(file)}
    figures: dict[str, dict[str, float]] = {}
    with (arguments.results / "items.csv").open() as file:
        for line in csv.DictReader(file):
            if line["trained_delay"] != "false" and line["system"] != "mixture":
                figures.setdefault(f"{line['model']}:{line['system']}", {})[line["item"]] = float(line["si_sdri"])
    against = arguments.against or next((name for name in figures if name.endswith(":alone")), next(iter(figures)))
    if against not in figures:
        parser.error(f"--against {against}: not among {', '.join(figures)}")
    items = list(figures[against])
    scores = {name: np.array([own[item] for item in items]) for name, own in figures.items()}
    chosen_records, folders = [records[item] for item in items], [arguments.split / item for item in items]

    found: list[dict[str, object]] = []
    table = Table("condition", "class", "items", "system", "SI-SDRi, dB", f"over {against}", title=task.upper())
    for condition, name, mask in classes_of(task, chosen_records, folders):
        if not mask.any():
            continue
        for system, score in scores.items():
            gain = bootstrap((score - scores[against])[mask], seed=0)
            entry = {"condition": condition, "class": name, "items": int(mask.sum()), "system": system}
            entry |= {"si_sdri": round(float(score[mask].mean()), 2)}
            entry |= {"difference": gain.mean, "difference_low": gain.low, "difference_high": gain.high}
            found.append(entry)
            interval = "" if gain.low is None else f" ({gain.low:+.2f}…{gain.high:+.2f})"
            difference = "" if system == against else f"{gain.mean:+.2f}{interval}"
            table.add_row(condition, name, str(entry["items"]), system, f"{score[mask].mean():.2f}", difference)
        table.add_section()
    Console(width=160).print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"task": task, "against": against, "conditions": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
