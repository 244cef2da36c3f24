"""Measures quality with real processes and simulated networks: ``python benchmarks/networks.py --data data/valid-ss``.

Starts a kb-server, and runs ``kb-client replay`` on the first mixtures of a dataset, once with every hint on time and
once for each network. Prints the SI-SDRi of the boosted output and the share of hints on time, and writes them as JSON.
``--evaluated FOLDER`` compares the run with every hint on time with the items.csv of ``kb-evaluate``, item by item.
Both must have the same figures.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from rich.console import Console
from rich.table import Table

from knowledge_boosting.models.bundle import DEFAULT_BUNDLE, Bundle

NETWORKS: dict[str, list[str]] = {
    "on time": [],
    "lan": ["--network", "lan"],
    "wifi": ["--network", "wifi"],
    "5g": ["--network", "5g"],
    "lte": ["--network", "lte"],
    "satellite": ["--network", "satellite"],
    "10 % of packets lost": ["--delay-ms", "20", "--loss", "0.1"],
    "30 % of packets lost": ["--delay-ms", "20", "--loss", "0.3"],
    "jitter 20 ms": ["--delay-ms", "20", "--jitter-ms", "20"],
    "all hints late": ["--delay-ms", "200"],
}


def replay(folder: Path, server: str, bundle: str, item: Path, index: int, flags: list[str]) -> tuple[float, float]:
    """Return the SI-SDRi of the boosted output, dB, and the share of hints on time."""
    sources = [soundfile.read(item / f"source{number:02d}.wav")[0] for number in (0, 1)]
    soundfile.write(folder / "mixture.wav", sources[0] + sources[1], 16000, subtype="FLOAT")
    call = [sys.executable, "-m", "knowledge_boosting.device_client.main", "replay", str(folder / "mixture.wav")]
    call += ["-o", str(folder / "out.wav"), "--bundle", bundle, "--server", server, "--seed", str(index)]
    targets = [0, 1]
    if Bundle(bundle).model.needs_speaker:
        targets = [index % 2]
        embedding = torch.load(item / f"spk_id{targets[0]:02d}.pt", weights_only=True)
        np.save(folder / "embedding.npy", embedding.numpy().flatten())
        call += ["--enrollment", str(folder / "embedding.npy")]
    for number in targets:
        call += ["--reference", str(item / f"source{number:02d}.wav")]
    subprocess.run([*call, "--report", str(folder / "report.json"), *flags], check=True, capture_output=True)
    report = json.loads((folder / "report.json").read_text())
    return report["quality"]["boosted"]["si_sdri"], report["hints"]["on_time"] / max(report["hints"]["due"], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", default=DEFAULT_BUNDLE)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--evaluated", type=Path, help="output folder of kb-evaluate on the same data")
    parser.add_argument(
        "--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="run only these networks"
    )
    parser.add_argument("--json", type=Path, default=Path("out/networks.json"))
    arguments = parser.parse_args()
    items = sorted(path for path in (arguments.data / arguments.split).iterdir() if path.name.isdecimal())
    items = items[: arguments.items]
    serve = [sys.executable, "-m", "knowledge_boosting.remote_server.main", "--bundle", arguments.bundle, "--port", "0"]
    results: dict[str, dict[str, float]] = {}
    table = Table("network", "hints on time", "SI-SDRi, dB", title=f"{arguments.bundle}, {len(items)} mixtures")
    with (
        tempfile.TemporaryDirectory() as name,
        subprocess.Popen([*serve, "--until-stdin-ends"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server,
    ):
        assert server.stdout is not None
        assert server.stdin is not None
        address = server.stdout.readline().decode().split("listening on ")[1].split(",")[0]
        for network in arguments.networks:
            figures = np.array(
                [
                    replay(Path(name), address, arguments.bundle, item, index, NETWORKS[network])
                    for index, item in enumerate(items)
                ]
            )
            gain, on_time = figures.mean(axis=0)
            results[network] = {"si_sdri": round(float(gain), 3), "hints_on_time": round(float(on_time), 4)}
            table.add_row(network, f"{100 * on_time:.1f} %", f"{gain:.2f}")
            if network == "on time" and arguments.evaluated is not None:
                with (arguments.evaluated / "items.csv").open() as file:
                    evaluated = {
                        line["item"]: float(line["si_sdri"])
                        for line in csv.DictReader(file)
                        if line["system"] == "boosted" and line["trained_delay"] == "true"
                    }
                largest_difference = max(abs(figures[i, 0] - evaluated[item.name]) for i, item in enumerate(items))
                results[network]["largest_difference_from_evaluation_db"] = round(float(largest_difference), 4)
        server.stdin.close()
    Console().print(table)
    difference = results.get("on time", {}).get("largest_difference_from_evaluation_db")
    if difference is not None:
        print(f"largest difference from kb-evaluate: {difference} dB")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"bundle": arguments.bundle, "items": len(items), "networks": results}
    arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
