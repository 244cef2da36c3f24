"""Compares the ways to run a pair, by kind of listener: ``python -m benchmarks.agreement BUNDLE DATA``.

Measures the SI-SDRi of the first mixtures of every kind of listener in a split, with hints at a delay of 48 ms:

- offline: whole signals in torch, as kb-evaluate does;
- streaming: frame by frame in torch;
- ONNX: the device's loop in ONNX Runtime, in this process;
- two processes: ``kb-client replay`` against a ``kb-server``, each with the engine that it chooses.

All must give the same figures. Prints the mean of each, and the largest difference from offline over the mixtures, and
writes them as JSON.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.conditions import listener
from knowledge_boosting.device_client.engines.engine import Model
from knowledge_boosting.device_client.engines.loading import load_model
from knowledge_boosting.device_client.hints.local_server import local_server
from knowledge_boosting.device_client.replay.delay_curve import KeptHints
from knowledge_boosting.device_client.replay.hint_log import HintLog
from knowledge_boosting.device_client.replay.loop import Run, run_frames
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.protos.codec import Samples
from knowledge_boosting.training.config import FolderData
from knowledge_boosting.training.data.mixture_folder import MixtureFolder
from knowledge_boosting.training.evaluation.metrics import SAMPLE_RATE, si_sdr_improvement
from knowledge_boosting.training.evaluation.systems import EvaluationItem, load_models, run_systems, usual_delay

DELAY_MS = 48
WAYS = ("offline", "streaming", "ONNX", "two processes")


@dataclass(frozen=True)
class Chosen:
    """Some items of a folder. The speaker to extract depends on the place of an item in the folder."""

    folder: MixtureFolder
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def example(self, address: tuple[int, int]) -> Mapping[str, Any]:
        return self.folder.example((0, self.indices[address[1]]))


def boosted_in_onnx(model: Model, item: EvaluationItem) -> Samples:
    """Return the estimate ``[S, M, N]`` of the device's loop, in one process."""
    config = model.manifest.model
    assert item.hints is not None
    hints = dict(enumerate(item.hints[0].numpy()))
    speaker = None if item.speaker is None else item.speaker[0].numpy()
    mixture = item.mixture[0].numpy()
    blocks: list[Samples] = []
    run = Run(HintLog(config.framing.frames(mixture.shape[1]), config.delay))
    kept = KeptHints(config, hints, DELAY_MS)
    run_frames(model.session(speaker), [mixture], config, kept, run, blocks.append, lambda: None)
    return np.concatenate(blocks, axis=-1)


def boosted_in_two_processes(folder: Path, bundle: str, server: str, item: EvaluationItem) -> float:
    """Return the SI-SDRi that ``kb-client replay`` reports."""
    soundfile.write(folder / "mixture.wav", item.mixture[0].T, SAMPLE_RATE, subtype="FLOAT")
    call = [sys.executable, "-m", "knowledge_boosting.device_client.main", "replay", folder / "mixture.wav"]
    call += ["-o", folder / "out.wav", "--bundle", bundle, "--server", server, "--delay-ms", DELAY_MS]
    for number, source in enumerate(item.sources[0]):
        soundfile.write(folder / f"source{number}.wav", source.T, SAMPLE_RATE, subtype="FLOAT")
        call += ["--reference", folder / f"source{number}.wav"]
    if item.speaker is not None:
        np.save(folder / "speaker.npy", item.speaker[0].numpy())
        call += ["--enrollment", folder / "speaker.npy"]
    call += ["--report", folder / "report.json"]
    subprocess.run([str(word) for word in call], check=True, capture_output=True)
    gain: float = json.loads((folder / "report.json").read_text())["quality"]["boosted"]["si_sdri"]
    return gain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="name or path of a pair")
    parser.add_argument("data", type=Path, help="root of a dataset with the split val")
    parser.add_argument("--items", type=int, default=20, help="of each kind of listener")
    parser.add_argument("--json", type=Path, default=Path("out/agreement.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)  # the processes share the cores
    [model] = load_models([options.bundle])
    device = load_model(Bundle(options.bundle), "onnx")
    data = MixtureFolder(
        FolderData(root=str(options.data), split="val"), model.config, seed=0, training=False, skip_broken=False
    )
    with (options.data / "val" / "metadata.csv").open() as file:
        listeners = {record["item"]: listener(record) for record in csv.DictReader(file)}
    chosen: dict[str, list[int]] = {}
    for index, item in enumerate(data.items):
        of_listener = chosen.setdefault(listeners[item.name], [])
        if len(of_listener) < options.items:
            of_listener.append(index)
    of = {index: name for name, indices in chosen.items() for index in indices}
    items = Chosen(data, sorted(of))
    figures: dict[str, list[list[float]]] = {name: [] for name in sorted(chosen)}
    delay = usual_delay(model.config)
    with tempfile.TemporaryDirectory() as folder, local_server(Bundle(options.bundle).directory) as server:
        runs = (
            run_systems(model, items, [delay], {}, torch.device("cpu"), streaming=streaming)
            for streaming in (False, True)
        )
        for index, (item, whole), (_, streamed) in zip(items.indices, *runs, strict=True):
            row = []
            for estimates in (whole, streamed):
                boosted = next(estimate for key, estimate in estimates.items() if key.system == "boosted")
                row.append(float(si_sdr_improvement(boosted, item.sources, item.mixture)))
            boosted = torch.from_numpy(boosted_in_onnx(device, item))[None]
            row.append(float(si_sdr_improvement(boosted, item.sources, item.mixture)))
            row.append(boosted_in_two_processes(Path(folder), options.bundle, server, item))
            figures[of[index]].append(row)
    table = Table("listener", "items", *WAYS, "largest difference, dB", title=f"{options.bundle}, SI-SDRi, dB")
    results = {}
    for name, rows in figures.items():
        values = np.array(rows)
        worst = float(np.abs(values[:, 1:] - values[:, :1]).max())
        means = [round(float(mean), 3) for mean in values.mean(0)]
        table.add_row(name, str(len(rows)), *(f"{mean:.3f}" for mean in means), f"{worst:.4f}")
        results[name] = {"items": len(rows), **dict(zip(WAYS, means, strict=True)), "largest_difference_db": worst}
    Console(width=110).print(table)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"bundle": options.bundle, "listeners": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
