"""Measures quality by condition: ``python -m benchmarks.conditions out/results/listeners-ss data/listeners-ss/val``.

Reads the items.csv of ``kb-evaluate`` and the metadata.csv of the mixtures. Prints the SI-SDRi of every system by class
of each condition, and writes it as JSON. The conditions are the listener (a head, two microphones or one), the angle
between the speakers, the reverberation time and the level difference of the speakers. For target speech extraction, the
similarity of the voices, the cosine of their d-vectors, is another condition. Intervals are 95 % bootstrap intervals of
the paired difference.
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
_MAX_SENSITIVITY_DIFFERENCE_DB = 6.0  # between two microphones of the same device
Mask = NDArray[np.bool_]


def angle(record: Record) -> float:
    """Return the angle between the speakers, degrees."""
    return abs((float(record["azimuth00_deg"]) - float(record["azimuth01_deg"]) + 180) % 360 - 180)


def voice_similarity(item: Path) -> float:
    """Return the cosine of the d-vectors of the two speakers of an item."""
    first, second = (torch.load(item / f"spk_id{number}.pt", weights_only=True).flatten() for number in ("00", "01"))
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


# A function that returns the value of an item from its metadata, its index and its folder; and the edges of the
# classes.
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
        # The target is the first speaker in items with an even index, and the second one in the others.
        "level of the target over the other, dB": (
            lambda record, index, _: float(record["level_difference_db"]) * (-1 if index % 2 else 1),
            [-5, -2.5, 0, 2.5, 5],
        ),
        "similarity of the voices": (lambda _, __, folder: voice_similarity(folder), [0.3, 0.5, 0.55, 0.6, 0.65, 1]),
    },
}


def listener(record: Record) -> str:
    """Return the listener of an item, with all items that have one side 20 dB weaker in a class of their own."""
    unequal = abs(float(record.get("sensitivity_difference_db", 0))) > _MAX_SENSITIVITY_DIFFERENCE_DB
    return "one side 20 dB weaker" if unequal else record.get("listener", "head")


def classes_of(task: str, records: list[Record], folders: list[Path]) -> Iterator[tuple[str, str, Mask]]:
    """Yield all conditions with their classes, and whether each item is in the class."""
    everything = np.ones(len(records), dtype=bool)
    yield "all", "all", everything
    listeners = np.array([listener(record) for record in records])
    for name in sorted(set(listeners)):
        yield "listener", name, listeners == name
    for condition, (value_of, edges) in (ROOM_CONDITIONS | SPEAKER_CONDITIONS[task]).items():
        pairs = enumerate(zip(records, folders, strict=True))
        values = np.array([value_of(record, index, folder) for index, (record, folder) in pairs])
        for low, high in pairwise(edges):
            yield condition, f"{low:g} to {high:g}", (values >= low) & ((values < high) | (high == edges[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="output folder of kb-evaluate")
    parser.add_argument("split", type=Path, help="folder of the mixtures, with metadata.csv")
    parser.add_argument("--against", help="MODEL:SYSTEM to compare the others with; by default the first network alone")
    parser.add_argument("--json", type=Path, default=Path("out/conditions.json"))
    arguments = parser.parse_args()
    results = json.loads((arguments.results / "results.json").read_text())
    task, delays = results["task"], {model["name"]: model["delay_frames"] for model in results["models"]}
    with (arguments.split / "metadata.csv").open() as file:
        records = {record["item"]: record for record in csv.DictReader(file)}
    figures: dict[str, dict[str, float]] = {}
    with (arguments.results / "items.csv").open() as file:
        for line in csv.DictReader(file):
            usual = line["delay_frames"] in ("", str(delays.get(line["model"])))
            if line["system"] != "mixture" and usual and not line["network"]:
                figures.setdefault(f"{line['model']}:{line['system']}", {})[line["item"]] = float(line["si_sdri"])
    against = arguments.against or next((name for name in figures if name.endswith(":alone")), next(iter(figures)))
    if against not in figures:
        parser.error(f"--against {against}: choose one of {', '.join(figures)}")
    items = list(figures[against])
    scores = {name: np.array([own[item] for item in items]) for name, own in figures.items()}
    chosen_records, folders = [records[item] for item in items], [arguments.split / item for item in items]

    entries: list[dict[str, object]] = []
    table = Table("condition", "class", "items", "system", "SI-SDRi, dB", f"over {against}", title=task.upper())
    for condition, name, mask in classes_of(task, chosen_records, folders):
        if not mask.any():
            continue
        for system, score in scores.items():
            gain = bootstrap((score - scores[against])[mask], seed=0)
            entry = {"condition": condition, "class": name, "items": int(mask.sum()), "system": system}
            entry |= {"si_sdri": round(float(score[mask].mean()), 2)}
            entry |= {"difference": gain.mean, "difference_low": gain.low, "difference_high": gain.high}
            entries.append(entry)
            interval = "" if gain.low is None else f" ({gain.low:+.2f}…{gain.high:+.2f})"
            difference = "" if system == against else f"{gain.mean:+.2f}{interval}"
            table.add_row(condition, name, str(entry["items"]), system, f"{score[mask].mean():.2f}", difference)
        table.add_section()
    Console(width=160).print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"task": task, "against": against, "conditions": entries}, indent=2) + "\n")


if __name__ == "__main__":
    main()
