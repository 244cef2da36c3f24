"""Measures the live frame loop at full speed with ten minutes of noise: ``python benchmarks/live_loop.py``.

Prints how long a frame takes from its capture until it is passed on for playback, and how much the memory of the
process has grown since the first minute of audio. Writes the figures as JSON.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import get_args

import numpy as np

from knowledge_boosting.device_client.engines.loading import EngineName, load_model
from knowledge_boosting.device_client.hints.reconnecting import LiveHints
from knowledge_boosting.device_client.hints.stream import Encodings
from knowledge_boosting.device_client.live.loop import LiveLoop
from knowledge_boosting.models.bundle import DEFAULT_BUNDLE, Bundle
from knowledge_boosting.protos.codec import Samples

MINUTE = 7500  # frames


def memory_mib() -> float:
    """Return the resident memory of this process, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Noise:
    """Live audio that never makes the loop wait, and records the time of each frame."""

    underruns = overruns = 0
    latency_ms = None

    def __init__(self, frames: int) -> None:
        self._noise = np.random.default_rng(0).normal(0, 0.1, (2, 16_000)).astype(np.float32)
        self._began = 0
        self._frames = frames
        self.milliseconds = np.zeros(frames)
        self.count = 0
        self.memory_after_a_minute = 0.0

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def read(self, samples: Samples) -> bool:
        place = 128 * (self.count % 100)
        samples[:] = self._noise[:, place : place + samples.shape[1]]
        self._began = time.perf_counter_ns()
        return self.count < self._frames

    def write(self, samples: Samples) -> None:
        self.milliseconds[self.count] = (time.perf_counter_ns() - self._began) / 1e6
        self.count += 1
        if self.count == MINUTE:
            self.memory_after_a_minute = memory_mib()


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the live loop.")
    parser.add_argument("--bundle", default=DEFAULT_BUNDLE)
    parser.add_argument("--engine", choices=get_args(EngineName), default="auto")
    parser.add_argument("--server", help="HOST:PORT of a server; hints that arrive on time are fused")
    parser.add_argument("--frames", type=int, default=10 * MINUTE)
    parser.add_argument("--json", type=Path, default=Path("out/live_loop.json"))
    options = parser.parse_args()
    model = load_model(Bundle(options.bundle), options.engine)
    hints = LiveHints([options.server], model.manifest, encodings=Encodings()) if options.server else None
    if hints is not None:
        hints.start()
    audio = Noise(options.frames)
    audio.milliseconds[:] = 1.0  # allocates the pages of the array
    loop = LiveLoop(model.session(None), model.manifest.model, audio, hints, "1")
    loop.run()
    growth = memory_mib() - audio.memory_after_a_minute
    figures = {f"p{q}_ms": round(float(np.percentile(audio.milliseconds, q)), 3) for q in (50, 95, 99, 99.9)}
    figures["max_ms"] = round(float(audio.milliseconds.max()), 3)
    figures["memory_growth_mib"] = round(growth, 2)
    if hints is not None:
        hints.close()
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    report = {"machine": machine, "bundle": model.manifest.label, "frames": options.frames, **figures}
    for name, value in report.items():
        print(f"{name:20} {value}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
