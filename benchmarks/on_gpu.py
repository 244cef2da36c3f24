"""Checks, measures and trains on a GPU: ``benchmarks/on_gpu.sh PART OUT``.

- ``check`` runs the tests of the networks and of the server's engine on the device, and measures what each precision
  costs in quality.
- ``serve`` measures the server's step with the large network of the published size, by the number of sessions, then
  what takes the time in it, and at last a whole server with devices that send in real time.
- ``train`` trains a stage of a recipe on the data of ``benchmarks.gpu_data``, for some minutes. It continues from the
  checkpoint that it left before.

Every part takes at most ``--minutes``. It writes each result to the folder OUT as soon as there is one. ``--small`` is
for a rehearsal on a CPU.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_data import unpack
from knowledge_boosting.common.cli import warn
from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.common.files import atomic_file, check_folder
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import FixedDelay, NetworkSize, Pair
from knowledge_boosting.models.device import pick_device, pick_precision
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.networks import load_large
from knowledge_boosting.models.pair import LargeModel
from knowledge_boosting.models.slots import StateSlots
from knowledge_boosting.training.evaluation.metrics import si_sdr_improvement
from knowledge_boosting.training.recipes import Recipe
from tests.load import SIZES

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "samples"
RECIPE, STAGE = ROOT / "configs/listeners/recipe.toml", "ss-large-full-size"
PRECISIONS = ("float32", "tf32", "float16", "bfloat16")
TESTS = ("tests/models/test_devices.py", "tests/remote_server/test_engine.py")
CHECKPOINT = "last.ckpt"
_RESERVE = 20.0  # seconds at the end of a part, for what it must still write
_STEPS = 300  # timed steps of each size


class Part:
    """One part: its device, its results and its time."""

    def __init__(self, name: str, out: Path, device: str, minutes: float, *, small: bool) -> None:
        """Start the clock.

        Raises:
            InputError: the device does not exist, the folder cannot be written, or the time is no number.
        """
        if not 0 <= minutes < float("inf"):
            raise InputError("--minutes: must be a number of minutes")
        check_folder(out)
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.small = out, small
        self.device = pick_device(device)
        self._file = out / f"{name}.json"
        self._deadline = time.monotonic() + 60 * minutes
        self._results: dict[str, Any] = {"device": describe(self.device), "torch": torch.__version__}

    @property
    def seconds_left(self) -> float:
        """The time that is left for measurements."""
        return self._deadline - _RESERVE - time.monotonic()

    def save(self, name: str, value: object) -> None:
        """Add a result to the file of the part."""
        self._results[name] = value
        with atomic_file(self._file) as temporary:
            temporary.write_text(json.dumps(self._results, indent=2) + "\n", encoding="utf-8")

    def earlier(self, name: str) -> dict[str, Any]:
        """Return a result that an earlier call of the part has saved, or an empty one."""
        try:
            return dict(json.loads(self._file.read_text(encoding="utf-8"))[name])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def precisions(self) -> Iterator[str]:
        """Select every precision of the device in turn."""
        for name in PRECISIONS if self.device.type != "cpu" else PRECISIONS[:1]:
            pick_precision(name, self.device)
            yield name

    def run(self, *command: object, log: str) -> int:
        """Run a command in the time that is left, with its output in a file. Return its exit code, or 124."""
        with (self.out / log).open("a") as file:
            try:
                call = [sys.executable, "-m", *map(str, command)]
                return subprocess.run(
                    call, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=max(self.seconds_left, 1)
                ).returncode
            except subprocess.TimeoutExpired:
                return 124


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def check(part: Part) -> None:
    tests = TESTS[:1] if part.small else TESTS
    code = part.run("pytest", "-q", "--device", part.device, *tests, log="check.log")
    part.save("tests", "passed" if code == 0 else f"failed with exit code {code}, see check.log")
    part.save("si_sdri_db", {name: quality(part, name) for name in part.precisions()})
    if code:
        raise Failure(f"the tests failed; see {part.out / 'check.log'}")


@torch.inference_mode()
def quality(part: Part, precision: str) -> float:
    """Return the SI-SDRi of the shipped large network on the sample mixture, dB."""
    large = load_large(Bundle("ss-compact")).to(part.device)
    large.network.to(pick_precision(precision, part.device))
    names = ("mixture", "source1", "source2")
    signals = [torch.from_numpy(soundfile.read(SAMPLES / f"{name}.flac", dtype="float32")[0].T) for name in names]
    mixture, sources = signals[0][None].to(part.device), torch.stack(signals[1:])[None].to(part.device)
    _, embedding, _ = large(pad_to_frames(mixture, large.config.framing), large.initial_state(1))
    estimate = large.estimate(embedding)[..., : mixture.shape[-1]]
    return round(float(si_sdr_improvement(estimate, sources, mixture).mean()), 4)


@torch.inference_mode()
def serve(part: Part) -> None:
    size = SIZES["tiny" if part.small else "full-size"][1]
    config = Pair(task="ss", small=NetworkSize(channels=16, hidden=16), large=size, boosting=FixedDelay(delay=6))
    torch.manual_seed(0)
    large = LargeModel(config).eval().to(part.device)
    results: dict[str, dict[int, object]] = {}
    for precision in part.precisions():
        model = deepcopy(large)
        model.network.to(pick_precision(precision, part.device))
        sessions = 1
        while sessions <= (4 if part.small else 1024) and part.seconds_left > 60 * (not part.small):
            try:
                results.setdefault(precision, {})[sessions] = step_times(model, sessions, 20 if part.small else _STEPS)
            except torch.OutOfMemoryError:
                results.setdefault(precision, {})[sessions] = "not enough memory"
                break
            finally:
                part.save("steps", results)
            sessions *= 2
    pick_precision("float32", part.device)
    part.save("profile", profile_step(large, 4 if part.small else 256))
    flags: list[object] = ["--tiny" if part.small else "--full-size", "--most", 2 if part.small else 512]
    flags += ["--seconds", 1 if part.small else 4, "--server-option=--device", f"--server-option={part.device}"]
    flags += ["--json", part.out / "sessions.json", "--plot", part.out / "sessions.png"]
    code = part.run("benchmarks.server_sessions", *flags, log="serve.log")
    part.save("sessions", "sessions.json" if code == 0 else f"failed with exit code {code}, see serve.log")


def step_of(model: LargeModel, sessions: int, *, prepared: bool) -> Callable[[], object]:
    """Return a step of so many sessions, with all transfers."""
    slots = StateSlots(model, sessions)
    if prepared:
        slots.prepare([1])
    for slot in range(sessions):
        slots.put(slot, model.initial_state(1))
    samples = 0.1 * torch.randn(sessions, model.config.microphones, model.config.framing.n_fft)
    return partial(slots.step, samples, torch.randperm(sessions))


def step_times(model: LargeModel, sessions: int, steps: int) -> dict[str, float]:
    """Measure a step of so many sessions."""
    step, times = step_of(model, sessions, prepared=True), []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - began))
    result = {f"p{q}_ms": round(float(np.percentile(times[steps // 10 :], q)), 3) for q in (50, 99)}
    if torch.cuda.is_available():
        result["mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        torch.cuda.reset_peak_memory_stats()
    return result


def profile_step(model: LargeModel, sessions: int) -> list[str]:
    """Return the operations that take most of the time of a step, one line each."""
    step = step_of(model, sessions, prepared=False)  # a graph would be a single operation
    step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiled:
        for _ in range(3):
            step()
    by = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table = profiled.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)
    return str(table).splitlines()


def train(part: Part, packed: Path, stage: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, run = Path(folder) / "data", Path(folder) / "run"
        unpack(packed, data)
        settings = training_settings(stage, data, small=part.small)
        if settings["model"]["task"] != "ss":
            raise InputError(f"--stage {stage}: needs speaker embeddings, which the packed data do not have")
        earlier = part.earlier("curve")
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(settings))
        start = part.out / CHECKPOINT
        done = global_step(start) if start.exists() else 0
        flags: list[object] = ["--ckpt", start] if done else []
        minutes = (part.seconds_left - _RESERVE) / 60
        began = time.monotonic()
        code = part.run(
            *("knowledge_boosting.training.trainer", "--config", config, "--run-dir", run, "--devices", 1),
            *("--minutes", max(minutes, 0.001), *flags),
            log="train.log",
        )
        seconds = time.monotonic() - began
        if not (run / CHECKPOINT).exists():
            raise Failure(f"no update was made; see {part.out / 'train.log'}")
        with atomic_file(start) as temporary:
            shutil.copyfile(run / CHECKPOINT, temporary)
        steps = global_step(start)
        audio = (steps - done) * settings["batch_size"] * settings["train"]["seconds"]
        part.save("updates", {"before": done, "now": steps})
        part.save("audio_seconds_a_second", round(audio / seconds, 1))
        part.save("curve", {name: [*earlier.get(name, []), *values] for name, values in curve(run).items()})
        if code:
            raise Failure(f"training ended with exit code {code}; see {part.out / 'train.log'}")


def training_settings(stage: str, data: Path, *, small: bool) -> dict[str, Any]:
    """Return the configuration of a stage, with its data in the folder ``data``."""
    settings = Recipe(RECIPE).stage(stage, ROOT).model_dump(mode="json")
    settings["train"] |= {
        "speech": sorted(str(corpus) for corpus in (data / "speech").iterdir()),
        "responses": str(data / "responses.safetensors"),
        "noise": str(data / "noise"),
        "excluded_speakers": None,
    }
    settings["validation"] |= {"root": str(data / "valid"), "split": "val"}
    if small:
        settings["model"]["network"] = {"channels": 8, "hidden": 8, "blocks": 2}
        settings["train"] |= {"items": 8, "seconds": 0.5}
        settings["validation"]["items"] = 2
        settings |= {"batch_size": 2, "evaluation_batch_size": 2, "workers": 0}
    return settings


def global_step(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


def curve(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the logged figures of a run, as pairs of update and value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, round(e.value, 4)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("check", "serve", "train"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--small", action="store_true", help="tiny networks and little data")
    parser.add_argument("--data", type=Path, help="train: a folder of benchmarks.gpu_data pack")
    parser.add_argument("--stage", default=STAGE, help=f"train: stage of {RECIPE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if arguments.part == "train" and arguments.data is None:
        parser.error("train: give --data")
    parts: dict[str, Callable[[Part], None]] = {
        "check": check,
        "serve": serve,
        "train": lambda part: train(part, arguments.data, arguments.stage),
    }
    try:
        part = Part(arguments.part, arguments.out, arguments.device, arguments.minutes, small=arguments.small)
        parts[arguments.part](part)
    except (InputError, Failure) as error:
        warn(str(error))
        sys.exit(2 if isinstance(error, InputError) else 1)
    except torch.OutOfMemoryError as error:
        warn(f"not enough memory on the device ({str(error).splitlines()[0]})")
        sys.exit(1)
    with suppress(FileNotFoundError):
        print((arguments.out / f"{arguments.part}.json").read_text())


if __name__ == "__main__":
    main()
