"""Time per frame of the full-size networks, one thread, torch engine: ``python benchmarks/frame_time.py``.

Prints a table and writes it as JSON. The sizes are the published ones; the weights are random, which costs the same.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from models.config import Boosting, ModelConfig, NetworkSize
from models.pair import LargeModel, SmallModel

SMALL = NetworkSize(channels=16, hidden=16)
LARGE = NetworkSize(channels=64, hidden=64, heads=8, self_attention=True)


def measure(step: Callable[[], None], frames: int) -> dict[str, float]:
    """Milliseconds of each of many calls, after a warm-up."""
    for _ in range(100):
        step()
    times = []
    for _ in range(frames):
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    names = {"p50": 50, "p95": 95, "p99": 99, "p99.9": 99.9}
    return {name: round(float(np.percentile(times, value)), 3) for name, value in names.items()}


@torch.inference_mode()
def benchmark(task: str, frames: int) -> dict[str, dict[str, float]]:
    """The small network with fusion and the large one with hint encoder, each frame by frame."""
    config = ModelConfig(task=task, small=SMALL, large=LARGE, boosting=Boosting(delay=6))  # type: ignore[arg-type]
    torch.manual_seed(0)
    small, large = SmallModel(config).eval(), LargeModel(config).eval()
    speaker = torch.randn(1, 256) if task == "tse" else None
    window = torch.randn(1, config.microphones, config.framing.n_fft)
    hint = torch.randn(1, 1, config.hint_channels, config.framing.bins)
    small_state, large_state = small.initial_state(1, speaker), large.initial_state(1, speaker)

    def step_small() -> None:
        nonlocal small_state
        _, small_state = small(window, small_state, hint)

    def step_large() -> None:
        nonlocal large_state
        _, _, large_state = large(window, large_state)

    results = {}
    for name, step in (("small with fusion", step_small), ("large with hint encoder", step_large)):
        figures = measure(step, frames)
        factor = figures["p50"] / (1e3 * config.framing.chunk_seconds)
        results[f"{task.upper()} {name}"] = {**figures, "real_time_factor": round(factor, 4)}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path("out/frame_time.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: row for task in ("tse", "ss") for name, row in benchmark(task, arguments.frames).items()}
    table = Table(
        "network", "p50 ms", "p95", "p99", "p99.9", "real-time factor", title="Time per 8 ms frame, one thread"
    )
    for name, row in results.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    arguments.json.write_text(
        json.dumps({"machine": machine, "frames": arguments.frames, "ms": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
