"""``kb-client bench``: how fast this device runs its networks."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from knowledge_boosting.common.cli import console
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.files import atomic_file, check_files, is_standard_output
from knowledge_boosting.device_client.boosted_stream import BoostedStream
from knowledge_boosting.device_client.engines.engine import Model
from knowledge_boosting.device_client.engines.loading import EngineName, load_model
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, Pair
from knowledge_boosting.protos.codec import Samples

if sys.platform != "win32":
    import resource

_WARM_UP = 100
_PERCENTILES = (50, 95, 99, 99.9)
# A live stream shares the processor with its audio driver and everything else: half of every frame must be left.
_LIVE = 0.5


def bench(bundles: Sequence[str], engine: EngineName, frames: int, output: Path | None) -> None:
    """Time every frame of a stream through each bundle's small network, hints on time, and say what it means.

    Args:
        bundles: names or paths; none for all that are installed.
        output: JSON file to write the figures to.

    Raises:
        InputError: a bundle cannot be used, or there is none.
    """
    names = list(bundles) or [bundle.name for bundle in Bundle.shipped()]
    if not names:
        raise InputError("no bundle is installed; give --bundle a path, or make one with kb-export")
    opened = {name: Bundle(name) for name in names}
    if output is not None:
        check_files([file for bundle in opened.values() for file in bundle.directory.iterdir()], [output])
    models = {name: load_model(bundle, engine) for name, bundle in opened.items()}
    title = f"Time per frame in ms, {frames} frames, {engine} engine"
    table = Table("bundle", *(f"p{percentile}" for percentile in _PERCENTILES), "real-time factor", title=title)
    figures, verdicts = {}, []
    for name, model in models.items():
        milliseconds = _times_ms(model, frames)
        budget = 1e3 * model.manifest.model.framing.chunk_seconds
        values = [float(np.percentile(milliseconds, percentile)) for percentile in _PERCENTILES]
        factor = float(milliseconds.mean()) / budget
        table.add_row(model.manifest.label, *(f"{value:.2f}" for value in values), f"{factor:.3f}")
        verdicts.append(_verdict(model.manifest.label, factor, values[2] / budget))
        figures[name] = {
            **{f"p{percentile}_ms": round(value, 4) for percentile, value in zip(_PERCENTILES, values, strict=True)},
            "real_time_factor": round(factor, 4),
        }
    memory = _peak_memory_mib()
    terminal = console(stderr=output is not None and is_standard_output(output))
    terminal.print(table)
    if memory is not None:
        terminal.print(f"Most memory this process has had: {memory:.0f} MiB.")
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
        hints = _OneHint(rng.normal(0, 1, (config.hint_channels, config.framing.bins)).astype(np.float32))
    stream = BoostedStream(model.session(speaker), config, hints)
    times = np.zeros(frames)
    for frame in range(-_WARM_UP, frames):
        began = time.perf_counter_ns()
        stream.fresh[:] = noise[:, -stream.fresh.shape[1] :]
        stream.step(began)
        times[frame] = (time.perf_counter_ns() - began) / 1e6  # the warm-up's are overwritten
    return times


class _OneHint:
    """The same hint for every frame, always on time."""

    def __init__(self, hint: Samples) -> None:
        self._hint = hint

    def send(self, frame: int, samples: Samples, now: int) -> None:
        """Nobody listens."""

    def take(self, frame: int, now: int) -> Samples | None:
        return self._hint


def _verdict(label: str, factor: float, slow_frames: float) -> str:
    if factor < _LIVE and slow_frames < 1:
        return f"This device runs {label} live, with {1 / factor:.0f}x headroom."
    what = "most frames take too long" if factor >= _LIVE else "one frame in a hundred takes longer than it may"
    return (
        f"This device is too slow for {label}: {what}. Close other programs, plug in power, or choose a smaller bundle."
    )


def _peak_memory_mib() -> float | None:
    if sys.platform == "win32":
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
