"""Runs a server under steady load for a long time: ``python -m benchmarks.soak --minutes 30 --sessions 20``.

Each session sends a chunk every 8 ms in real time. Without --bundle, the networks are tiny. Every ten seconds it prints
the latency and loss of hints and the resources of the server; at the end it writes all figures as JSON.
"""

import argparse
import asyncio
import json
import tempfile
from pathlib import Path

import numpy as np

from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.manifest import read_manifest
from tests.load import Arrivals, DeviceAudio, Load, open_load, write_random_bundle
from tests.processes import Server, descriptors, memory_mib, running_server, threads

WINDOW = 10.0  # seconds


def window(server: Server, arrivals: Arrivals, deadline_ms: float) -> dict[str, float]:
    latency = arrivals.milliseconds()["latency"]
    pid = server.process.pid
    return {
        "hints": len(latency),
        "late": int((latency > deadline_ms).sum()),
        **{f"p{q}_ms": round(float(np.percentile(latency, q)), 3) if len(latency) else np.inf for q in (50, 99)},
        "memory_mib": round(memory_mib(pid), 2),
        "threads": threads(pid),
        "descriptors": descriptors(pid),
    }


async def soak(server: Server, audio: DeviceAudio, sessions: int, seconds: float) -> dict[str, object]:
    windows: list[dict[str, float]] = []

    async def watch(load: Load) -> None:
        while True:
            await asyncio.sleep(WINDOW)
            windows.append(window(server, load.take(), audio.deadline_ms))
            print(", ".join(f"{name} {value:g}" for name, value in windows[-1].items()), flush=True)

    async with open_load(server.address, audio, sessions) as load:
        watching = asyncio.create_task(watch(load))
        await load.run(seconds)
        await load.settle()
        watching.cancel()
        windows.append(window(server, load.take(), audio.deadline_ms))
        lost = load.sent - load.hints
        missed = lost + sum(int(part["late"]) for part in windows)
        return {
            "sessions": sessions,
            "seconds": seconds,
            "chunks": load.sent,
            "lost": lost,
            "missed": missed,
            "missed_percent": round(100 * missed / max(load.sent, 1), 4),
            "ended": load.ended,
            "windows": windows,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Run a server under steady load.")
    parser.add_argument("--bundle", help="name or path of a bundle; by default one with tiny networks")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument(
        "--server-option", action="append", default=[], help="flag of kb-server, as --server-option=--NAME=V"
    )
    parser.add_argument("--json", type=Path, default=Path("out/soak.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle(options.bundle).directory if options.bundle else write_random_bundle(Path(folder), "tiny")
        with running_server(bundle, "--max-sessions", options.sessions, *options.server_option) as server:
            audio = DeviceAudio(read_manifest(bundle))
            report = asyncio.run(soak(server, audio, options.sessions, 60 * options.minutes))
    print({name: value for name, value in report.items() if name != "windows"})
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"bundle": bundle.name, **report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
