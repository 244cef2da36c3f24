"""Measures the time of a frame on one core: ``python -m benchmarks.frame_time``.

It runs a process for every instruction set of the processor. Each measures a product of matrices, which shows what the
core can do; the large network with its hint encoder in the server's slots, compiled and in torch; and the device's
network with fusion in every engine, and in the whole frame loop. All sizes are for separation, with random weights,
which do not affect the time. ``--published FOLDER`` also times the published code, from a checkout in that folder. It
prints a table and writes it as JSON.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import instruction_sets, processor, run_in_process
from knowledge_boosting.device_client.boosted_stream import BoostedStream
from knowledge_boosting.device_client.engines.loading import EngineName, load_model
from knowledge_boosting.device_client.hints.buffer import hint_buffer
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import FixedDelay, NetworkSize, Pair
from knowledge_boosting.models.networks import write_bundle
from knowledge_boosting.models.pair import LargeModel
from knowledge_boosting.models.slots import CompiledStep, StateSlots
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import HINT_ENCODINGS, Samples, decode_hint, encode_hints

SMALL = NetworkSize(channels=16, hidden=16)
LARGE = {
    "full size": NetworkSize(channels=64, hidden=64, heads=8, self_attention=True),
    "compact": NetworkSize(channels=32, hidden=32, heads=4, self_attention=True),
    "4 channels": NetworkSize(channels=4, hidden=4, blocks=1),
}
ENGINES: tuple[EngineName, ...] = ("compiled", "onnx", "torch")
SESSIONS = 1, 8
_MATRIX = 1024  # rows and columns

Figures = dict[str, float]


def measure(step: Callable[[], object], frames: int) -> Figures:
    """Return percentiles of the time of a call, ms, after a warm-up."""
    for _ in range(frames // 10):
        step()
    times = []
    for _ in range(frames):
        started = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - started))
    return {f"p{q}": float(np.percentile(times, q)) for q in (50, 95, 99)}


def product_gflops() -> float:
    """Return the GFLOP/s of a product of matrices, the fastest of some."""
    a, b = torch.randn(_MATRIX, _MATRIX), torch.randn(_MATRIX, _MATRIX)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2e-9 * _MATRIX**3 / min(times)


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


def small_network(frames: int) -> dict[str, Figures]:
    """Measure the device's network in every engine, and the frame loop of the device."""
    config = Pair(task="ss", small=SMALL, large=SMALL, boosting=FixedDelay(delay=6))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "random"
        write_bundle(bundle, build(config), config, untrained=True, source="random", configuration="none")
        models = {engine: load_model(Bundle(bundle), engine) for engine in (*ENGINES, "auto")}
    framing, rng = config.framing, np.random.default_rng(1)
    window = rng.normal(0, 0.1, (config.microphones, framing.n_fft)).astype(np.float32)
    hint = rng.normal(0, 1, (config.hint_channels, framing.bins)).astype(np.float32)
    stream = BoostedStream(models["auto"].session(None), config, ImmediateHints(hint, config))

    def loop() -> None:
        """Process a frame as the device does: get the audio, decode a hint, get the hint that is due, run."""
        stream.fresh[:] = window[:, -stream.fresh.shape[1] :]
        stream.step(0)

    steps = {engine: partial(models[engine].session(None).step, window, [Hint(6, hint)]) for engine in ENGINES}
    figures = {f"device, {engine}": measure(step, frames) for engine, step in steps.items()}
    return {**figures, f"device, the whole loop ({models['auto'].engine})": measure(loop, frames)}


@torch.inference_mode()
def large_network(name: str, frames: int, *, compiled: bool) -> dict[str, Figures]:
    """Measure a large network with its hint encoder as in the server, with states in slots: the time per session."""
    config = Pair(task="ss", small=SMALL, large=LARGE[name], boosting=FixedDelay(delay=6))
    torch.manual_seed(0)
    large = LargeModel(config).eval()
    states = StateSlots(large, 16)
    with mock.patch.object(CompiledStep, "supports", CompiledStep.supports if compiled else lambda _: False):
        states.prepare([1])
    for slot in range(16):
        states.put(slot, large.initial_state(1))

    def figures(sessions: int) -> Figures:
        slots = torch.randperm(16)[:sessions]
        window = torch.randn(sessions, config.microphones, config.framing.n_fft)
        times = measure(partial(states.step, window, slots), frames // sessions)
        return {percentile: value / sessions for percentile, value in times.items()}

    how = "compiled" if compiled else "torch"
    return {f"{name}, {count} session{'s' * (count > 1)}, {how}": figures(count) for count in SESSIONS}


@torch.inference_mode()
def published_network(folder: Path, frames: int) -> dict[str, Figures]:
    """Measure the large network of the published code, whose repository lies in ``folder``, frame by frame."""
    arguments = json.loads((folder / "configs/baselines/BM-BS-500.json").read_text())["pl_module_args"]
    parameters = arguments["model_params"] | {"use_masked_attention": False}  # which does not support streams
    sys.path.insert(0, str(folder))
    if importlib.util.find_spec("espnet2") is None:
        _replace_espnet()
    module, _, name = arguments["model"].rpartition(".")
    network = getattr(importlib.import_module(module), name)(**parameters).eval()
    window = 0.1 * torch.randn(1, 2, parameters["stft_chunk_size"] + parameters["stft_pad_size"])
    state: Any = network.init_buffers(1, "cpu")

    def step() -> None:
        nonlocal state
        state = network({"mixture": window}, current_state=state, pad=False)["next_state"]

    return {"full size, 1 session, published code": measure(step, frames)}


def _replace_espnet() -> None:
    """Replace the two things that the published code takes from the large package espnet2."""
    for name in ("enh.separator.abs_separator", "torch_utils.get_layer_from_string"):
        parts = ["espnet2", *name.split(".")]
        for end in range(1, len(parts) + 1):
            whole = ".".join(parts[:end])
            sys.modules.setdefault(whole, ModuleType(whole))
    vars(sys.modules["espnet2.enh.separator.abs_separator"])["AbsSeparator"] = nn.Module
    vars(sys.modules["espnet2.torch_utils.get_layer_from_string"])["get_layer"] = {"prelu": nn.PReLU}.__getitem__


def measure_all(frames: int, published: Path | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    results: dict[str, Figures] = {}
    for name in LARGE:
        for compiled in (True, False):
            results |= large_network(name, frames, compiled=compiled)
    results |= small_network(frames)
    if published is not None:
        results |= published_network(published, frames // 4)
    rounded = {name: {key: round(value, 3) for key, value in row.items()} for name, row in results.items()}
    return {"product_gflops": round(product_gflops(), 1), "ms": rounded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--published", type=Path, help="folder with a checkout of the published code")
    parser.add_argument("--json", type=Path, default=Path("out/frame_time.json"))
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(measure_all(arguments.frames, arguments.published)))
        return
    flags: list[object] = ["--part", "--frames", arguments.frames]
    flags += ["--published", arguments.published.resolve()] if arguments.published is not None else []
    sets: dict[str, Any] = {name: run_in_process(__file__, *flags, instructions=name) for name in instruction_sets()}
    table = Table("network", title=f"Time of an 8 ms frame on one core of {processor()}, ms: p50 / p99")
    for name, part in sets.items():
        table.add_column(f"{name}\n{part['product_gflops']:g} GFLOP/s", justify="right")
    for row in next(iter(sets.values()))["ms"]:
        table.add_row(row, *("{p50:.2f} / {p99:.2f}".format(**part["ms"][row]) for part in sets.values()))
    Console(width=120).print(table)
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "onnxruntime": version("onnxruntime"),
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine, "frames": arguments.frames, "instruction_sets": sets}
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
