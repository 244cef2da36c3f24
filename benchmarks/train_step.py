"""Measures training on this CPU: ``python -m benchmarks.train_step``.

It runs a process for every instruction set of the processor, and measures our C++ library and torch on one core: the
GFLOP/s of the residual LSTM, counting only the products of the LSTM; and the seconds of audio that a training step
(forward, backward and optimiser, separation, 2 x 1 s of noise) processes in a second of processor time. Noise costs the
same as speech. Then it compares ``kb-train`` on two cores, with dynamic mixtures of 4 x 1 s, with its training step
alone. It prints tables and writes them as JSON.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.machine import instruction_sets, processor, run_in_process
from knowledge_boosting.models import cpu_attention, cpu_lstm
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.compiled import required_library
from knowledge_boosting.models.config import Alone, NetworkSize
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.pair import SmallModel
from knowledge_boosting.models.tfgridnet import torch_residual_lstm
from knowledge_boosting.training.learning.losses import negative_si_sdr
from knowledge_boosting.training.learning.memory import keep_freed_memory

NETWORKS = {
    "small": NetworkSize(channels=16, hidden=16),
    "compact": NetworkSize(channels=32, hidden=32, heads=4, self_attention=True),
    "full size": NetworkSize(channels=64, hidden=64, heads=8, self_attention=True),
}
BATCH, COMMAND_BATCH, SECONDS = 2, 4, 1


def step_of(size: NetworkSize, batch: int) -> Callable[[], None]:
    """Return a function that trains one network for a step on a batch of noise."""
    config = Alone(task="ss", network=size)
    model = build(config).get_submodule("small")
    assert isinstance(model, SmallModel)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    sources = torch.randn(batch, 2, 2, 16000 * SECONDS)
    mixture = sources.sum(1)

    def step() -> None:
        estimate, _ = model(pad_to_frames(mixture, config.framing), model.initial_state(batch))
        loss = negative_si_sdr(estimate[..., : mixture.shape[-1]], sources, "per_channel")
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    return step


def fastest(function: Callable[[], object], times: int) -> float:
    """Return the shortest processor time of a call, s."""
    function()  # the first call allocates memory
    taken = []
    for _ in range(times):
        started = time.process_time()
        function()
        taken.append(time.process_time() - started)
    return min(taken)


@contextmanager
def torch_only() -> Iterator[None]:
    with (
        mock.patch.object(cpu_lstm, "fits", lambda *_: False),
        mock.patch.object(cpu_attention, "fits", lambda *_: False),
    ):
        yield


def kernel_rates(implementation: cpu_lstm.ResidualLstm, size: int, times: int) -> dict[str, float]:
    """Return the GFLOP/s of the products of an LSTM along time, for 125 frames, 97 bins and two streams."""
    modules = nn.LayerNorm(size), nn.LSTM(size, size), nn.Linear(size, size)
    x, states = torch.randn(2, 125, 97, size, requires_grad=True), torch.zeros(2, 1, 194, size)
    gradient = torch.randn_like(x)

    def forward() -> torch.Tensor:
        return implementation(x, cpu_lstm.TIME, *modules, *states)[0]

    alone = fastest(forward, times)
    both = fastest(lambda: forward().backward(gradient), times)
    work = 2 * x.numel() * 8 * size / 1e9
    return {"forward": round(work / alone, 1), "backward": round(2 * work / max(both - alone, 1e-9), 1)}


def measure(times: int) -> dict[str, object]:
    """Measure everything with one instruction set on one core."""
    torch.set_num_threads(1)
    keep_freed_memory()
    torch.manual_seed(0)
    kernels: dict[str, object] = {}
    for size in (16, 32, 64):
        ours, torchs = (
            kernel_rates(implementation, size, times)
            for implementation in (cpu_lstm.residual_lstm, torch_residual_lstm)
        )
        kernels[str(size)] = {"ours": ours, "torch": torchs}
    steps: dict[str, object] = {}
    for name, size_of_network in NETWORKS.items():
        step = step_of(size_of_network, BATCH)
        ours_rate = BATCH * SECONDS / fastest(step, times)
        with torch_only():
            torch_rate = BATCH * SECONDS / fastest(step, times)
        steps[name] = {"ours": round(ours_rate, 2), "torch": round(torch_rate, 2)}
    instructions = required_library().instructions().decode()
    return {"instructions": instructions, "lstm_gflops": kernels, "audio_s_per_cpu_s": steps}


def step_rates(threads: int, steps: int) -> dict[str, float]:
    """Measure the training step of the command alone."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    step = step_of(NETWORKS["compact"], COMMAND_BATCH)
    step()
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    audio = steps * COMMAND_BATCH * SECONDS
    return {
        "audio_s_per_s": round(audio / (time.perf_counter() - started), 2),
        "audio_s_per_cpu_s": round(audio / (time.process_time() - cpu), 2),
    }


def command_rates(steps: int, threads: int) -> dict[str, float]:
    """Measure ``steps`` steps of ``kb-train``, without its start and end."""
    scripts = Path(sys.executable).parent
    make = [scripts / "kb-make-dataset", "--sofa", "samples/hrtf/mit_kemar_normal_pinna.sofa", "--anechoic", 1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run([*make, "-o", folder / "rooms", "--responses-only", "--rooms", 8])
        item = ["--speech", "tests/training/speech", "--task", "ss", "--val", 1, "--seconds", 1]
        run([*make, "-o", folder / "data", *item])
        taken = []
        for count in (5, 5 + steps):
            document = {
                "model": {"task": "ss", "small": NETWORKS["compact"].model_dump()},
                "train": {
                    "kind": "dynamic",
                    "speech": "samples/speech/valid",
                    "responses": str(folder / "rooms" / "responses.safetensors"),
                    "items": COMMAND_BATCH * count,
                    "seconds": SECONDS,
                    "speed": 0.1,
                },
                "validation": {"kind": "folder", "root": str(folder / "data"), "split": "val"},
                "epochs": 1,
                "batch_size": COMMAND_BATCH,
                "workers": 1,
                "seed": 1,
            }
            config = folder / f"{count}.json"
            config.write_text(json.dumps(document))
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            run([scripts / "kb-train", "--config", config, "--run_dir", folder / f"run{count}"], threads=threads)
            wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            taken.append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    audio = steps * COMMAND_BATCH * SECONDS
    return {
        "audio_s_per_s": round(audio / (taken[1][0] - taken[0][0]), 2),
        "audio_s_per_cpu_s": round(audio / (taken[1][1] - taken[0][1]), 2),
    }


def run(call: list[object], *, threads: int = 1) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    result = subprocess.run([str(part) for part in call], env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(result.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=4, help="number of measurements, of which the fastest is reported")
    parser.add_argument("--steps", type=int, default=160, help="number of steps of kb-train")
    parser.add_argument("--json", type=Path, default=Path("out/train_step.json"))
    parser.add_argument("--part", choices=["measure", "bare"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is not None:
        part = measure(arguments.times) if arguments.part == "measure" else step_rates(2, arguments.steps)
        print(json.dumps(part))
        return
    sets = [
        run_in_process(__file__, "--part", "measure", "--times", arguments.times, instructions=name)
        for name in instruction_sets()
    ]
    bare = run_in_process(__file__, "--part", "bare", "--steps", arguments.steps // 2)
    command = command_rates(arguments.steps, 2)
    results: dict[str, object] = {
        "torch": torch.__version__,
        "processor": processor(),
        "cores": os.cpu_count(),
        "instruction_sets": sets,
        "two_cores_compact": {"bare_step": bare, "kb_train": command},
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print_tables(results)


def print_tables(results: dict[str, object]) -> None:
    console = Console()
    table = Table("with", "what", "ours", "torch", title=f"Training on one core of {results['processor']}")
    sets = results["instruction_sets"]
    assert isinstance(sets, list)
    for each in sets:
        for size, rates in each["lstm_gflops"].items():
            cells = (
                f"{rates[implementation]['forward']} / {rates[implementation]['backward']}"
                for implementation in ("ours", "torch")
            )
            table.add_row(each["instructions"], f"LSTM of {size}, GFLOP/s forward / backward", *cells)
        for name, rates in each["audio_s_per_cpu_s"].items():
            cells = (str(rates[implementation]) for implementation in ("ours", "torch"))
            table.add_row(each["instructions"], f"{name} step, audio s a CPU second", *cells)
    console.print(table)
    table = Table("compact, 4 x 1 s, two cores", "audio s a second", "audio s a CPU second")
    both = results["two_cores_compact"]
    assert isinstance(both, dict)
    for name, rates in both.items():
        table.add_row(name.replace("_", " "), *(str(rate) for rate in rates.values()))
    console.print(table)


if __name__ == "__main__":
    main()
