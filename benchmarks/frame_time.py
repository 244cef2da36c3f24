"""Measures the time per frame of the full-size networks on one thread: ``python benchmarks/frame_time.py``.

Prints a table and writes it as JSON. The networks have the published sizes and random weights, which do not affect the
time.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from knowledge_boosting.device_client.boosted_stream import BoostedStream
from knowledge_boosting.device_client.engines.onnx_engine import OnnxModel
from knowledge_boosting.device_client.engines.torch_engine import TorchModel
from knowledge_boosting.device_client.hints.buffer import hint_buffer
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import FixedDelay, NetworkSize, Pair
from knowledge_boosting.models.networks import write_bundle
from knowledge_boosting.models.pair import LargeModel
from knowledge_boosting.models.slots import StateSlots
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import HINT_ENCODINGS, Samples, decode_hint, encode_hints

SMALL = NetworkSize(channels=16, hidden=16)
TASKS: tuple[Literal["tse", "ss"], ...] = ("tse", "ss")
LARGE = NetworkSize(channels=64, hidden=64, heads=8, self_attention=True)


def measure(step: Callable[[], object], frames: int) -> dict[str, float]:
    """Return percentiles of the time of a call, ms, after a warm-up."""
    for _ in range(100):
        step()
    times = []
    for _ in range(frames):
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    names = {"p50": 50, "p95": 95, "p99": 99, "p99.9": 99.9}
    return {name: round(float(np.percentile(times, value)), 3) for name, value in names.items()}


class ImmediateHints:
    """Delivers the same hint for every frame, decoded from its message as in a real session."""

    def __init__(self, hint: Samples, config: Pair) -> None:
        self._buffer, self._encoding, self._shape = hint_buffer(config), HINT_ENCODINGS["f16"], hint.shape
        payload, scale = encode_hints(hint, self._encoding)
        self._message = pb.Hint(frame=0, payload=payload.tobytes(), scale=float(scale))

    def send(self, frame: int, samples: Samples, now: int) -> None:
        """Ignore the audio, and put the hint of the frame into the buffer."""
        self._buffer.put(frame, decode_hint(self._message, self._encoding, *self._shape), 0)

    def take(self, frame: int, now: int) -> list[Hint]:
        """Return the hints to use at a frame."""
        return self._buffer.take(frame, now)


def small_network(config: Pair, frames: int) -> dict[str, dict[str, float]]:
    """Measure the small network with fusion in both engines, and the frame loop of the device with the faster one."""
    torch.manual_seed(0)
    pair_config = config.model_copy(update={"large": config.small})  # the large network is not used, so it is small
    pair = build(pair_config)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "random"
        write_bundle(bundle, pair, pair_config, untrained=True, source="random", configuration="none")
        onnx, in_torch = OnnxModel(Bundle(bundle)), TorchModel(Bundle(bundle))
    speaker = np.random.default_rng(0).normal(0, 1 / 16, 256).astype(np.float32) if config.needs_speaker else None
    framing = config.framing
    window = np.random.default_rng(1).normal(0, 0.1, (config.microphones, framing.n_fft)).astype(np.float32)
    hint = np.random.default_rng(2).normal(0, 1, (config.hint_channels, framing.bins)).astype(np.float32)
    engines = {"ONNX Runtime": onnx.session(speaker), "torch": in_torch.session(speaker)}
    stream = BoostedStream(onnx.session(speaker), config, ImmediateHints(hint, config))

    def loop() -> None:
        """Process a frame as the device does: get the audio, decode a hint, get the hint that is due, run."""
        stream.fresh[:] = window[:, -stream.fresh.shape[1] :]
        stream.step(0)

    figures = {
        name: measure(partial(engine.step, window, [Hint(config.delay, hint)]), frames)
        for name, engine in engines.items()
    }
    return {
        f"small with fusion, {name}": row for name, row in {**figures, "the whole loop": measure(loop, frames)}.items()
    }


@torch.inference_mode()
def large_network(config: Pair, frames: int) -> dict[str, dict[str, float]]:
    """Measure the large network with its hint encoder as in the server, with states in slots: the time per session."""
    torch.manual_seed(0)
    large = LargeModel(config).eval()
    speaker = torch.randn(1, 256) if config.needs_speaker else None
    states = StateSlots(large, 16, speaker)
    states.prepare([1])
    for slot in range(16):
        states.put(slot, large.initial_state(1, speaker))

    def figures(sessions: int) -> dict[str, float]:
        slots = torch.randperm(16)[:sessions]
        window = torch.randn(sessions, config.microphones, config.framing.n_fft)

        times = measure(partial(states.step, window, slots), frames // sessions)
        return {name: round(value / sessions, 3) for name, value in times.items()}

    return {f"large with hint encoder, {count} sessions a step": figures(count) for count in (1, 8)}


def benchmark(task: Literal["tse", "ss"], frames: int) -> dict[str, dict[str, float]]:
    """Measure both networks of a task frame by frame."""
    config = Pair(task=task, small=SMALL, large=LARGE, boosting=FixedDelay(delay=6))
    figures = small_network(config, frames) | large_network(config, frames)
    budget = 1e3 * config.framing.chunk_seconds
    return {
        f"{task.upper()} {name}": {**row, "real_time_factor": round(row["p50"] / budget, 4)}
        for name, row in figures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path("out/frame_time.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: row for task in TASKS for name, row in benchmark(task, arguments.frames).items()}
    table = Table(
        "network", "p50 ms", "p95", "p99", "p99.9", "real-time factor", title="Time per 8 ms frame, one thread"
    )
    for name, row in results.items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    Console().print(table)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
    }
    arguments.json.write_text(
        json.dumps({"machine": machine, "frames": arguments.frames, "ms": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
