"""``kb-client bench``: measure how fast this device runs its networks."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from knowledge_boosting.common.cli import console, full_table
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.files import atomic_file, check_files, is_standard_output
from knowledge_boosting.device_client.boosted_stream import BoostedStream
from knowledge_boosting.device_client.engines.engine import Model
from knowledge_boosting.device_client.engines.loading import EngineName, load_model
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, Pair
from knowledge_boosting.protos.codec import Samples

if sys.platform != "win32":
    import resource

_WARM_UP = 100
_PERCENTILES = (50, 95, 99, 99.9)
# A live stream shares the processor with the audio driver and other programs, so half of the time must remain free.
_MAX_LIVE_LOAD = 0.5


def bench(bundles: Sequence[str], engine: EngineName, frames: int, output: Path | None) -> None:
    """Measure the time of each frame for the small network of each bundle, with all hints on time.

    Args:
        bundles: Names or paths of bundles. If empty, all installed bundles are measured.
        engine: The engine that runs the networks.
        frames: The number of frames to measure.
        output: The JSON file for the figures. None: no file.

    Raises:
        InputError: A bundle cannot be used, or there is none.
    """
    names = list(bundles) or [bundle.name for bundle in Bundle.shipped()]
    if not names:
        raise InputError("no bundle is installed; give the path of one with --bundle, or create one with kb-export")
    opened = {name: Bundle(name) for name in names}
    if output is not None:
        check_files([file for bundle in opened.values() for file in bundle.directory.iterdir()], [output])
    models = {name: load_model(bundle, engine) for name, bundle in opened.items()}
    title = f"Time per frame in ms, {frames} frames"
    columns = (f"p{percentile}" for percentile in _PERCENTILES)
    table = full_table("bundle", "engine", *columns, "real-time factor", title=title)
    figures, verdicts = {}, []
    for name, model in models.items():
        milliseconds = _times_ms(model, frames)
        chunk_ms = 1e3 * model.manifest.model.framing.chunk_seconds
        values = [float(np.percentile(milliseconds, percentile)) for percentile in _PERCENTILES]
        factor = float(milliseconds.mean()) / chunk_ms
        table.add_row(model.manifest.label, model.engine, *(f"{value:.2f}" for value in values), f"{factor:.3f}")
        verdicts.append(_verdict(model.manifest.label, factor, values[2] / chunk_ms))
        figures[name] = {
            **{f"p{percentile}_ms": round(value, 4) for percentile, value in zip(_PERCENTILES, values, strict=True)},
            "real_time_factor": round(factor, 4),
        }
    memory = _peak_memory_mib()
    terminal = console(stderr=output is not None and is_standard_output(output))
    terminal.print(table)
    if memory is not None:
        terminal.print(f"Peak memory of this process: {memory:.0f} MiB.")
    for verdict in verdicts:
        terminal.print(verdict)
    if output is not None:
        content = {"engine": engine, "frames": frames, "peak_memory_mib": memory, "bundles": figures}
        with atomic_file(output) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _times_ms(model: Model, frames: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    config, rng = model.manifest.model, np.random.default_rng(0)
    speaker = rng.normal(0, 1 / 16, SPEAKER_EMBEDDING_SIZE).astype(np.float32) if config.needs_speaker else None
    noise = rng.normal(0, 0.1, (config.microphones, config.framing.n_fft)).astype(np.float32)
    hints = None
    if isinstance(config, Pair):
        values = rng.normal(0, 1, (config.hint_channels, config.framing.bins)).astype(np.float32)
        hints = _ConstantHint(values, config.delay)
    stream = BoostedStream(model.session(speaker), config, hints)
    times = np.zeros(frames)
    for frame in range(-_WARM_UP, frames):
        started = time.perf_counter_ns()
        stream.fresh[:] = noise[:, -stream.fresh.shape[1] :]
        stream.step(started)
        # The negative indices of the warm-up address the end of the array, which is overwritten later.
        times[frame] = (time.perf_counter_ns() - started) / 1e6
    return times


class _ConstantHint:
    """A source that gives the same hint for every frame, always on time."""

    def __init__(self, hint: Samples, delay: int) -> None:
        self._hints = [Hint(delay, hint)]

    def send(self, frame: int, samples: Samples, now: int) -> None:
        """Discard the samples."""

    def take(self, frame: int, now: int) -> list[Hint]:
        return self._hints


def _verdict(label: str, factor: float, p99_factor: float) -> str:
    if factor < _MAX_LIVE_LOAD and p99_factor < 1:
        return f"This device runs {label} live, with {1 / factor:.0f}x headroom."
    cause = "most frames take too long" if factor >= _MAX_LIVE_LOAD else "one frame in a hundred takes too long"
    fix = "Close other programs, connect the power supply, or choose a smaller bundle."
    return f"This device is too slow for {label}: {cause}. {fix}"


def _peak_memory_mib() -> float | None:
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
