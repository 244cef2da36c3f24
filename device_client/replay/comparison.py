"""The comparison of all networks on one mixture: sound files and a figure."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.common.pictures import literal_text
from knowledge_boosting.device_client.audio.files import write_audio
from knowledge_boosting.device_client.replay.plot import Spectrogram, draw_spectrogram
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.config import Pair
from knowledge_boosting.protos.codec import Samples

matplotlib.use("Agg")

from matplotlib import pyplot as plt

PICTURE = "comparison.png"
_MIXTURE = "mixture.wav"
System = Literal["alone", "boosted", "large", "reference"]
_TITLES: dict[System, str] = {
    "alone": "small network alone",
    "boosted": "boosted by late hints",
    "large": "large network",
    "reference": "reference: the true source",
}


@dataclass(frozen=True)
class Comparison:
    """The estimates of several systems for one mixture."""

    mixture: Samples  # [M, N]
    systems: Mapping[System, Samples]  # [S, M, N] each, with the speakers in the same order
    gains: Mapping[System, float]  # SI-SDRi in dB, for all systems except the reference
    rate: int  # Hz
    task: str  # the task of the bundle
    title: str


def file_names(sources: int) -> list[str]:
    """Return the names of all files that a comparison can write."""
    return [_MIXTURE, PICTURE, *(name for system in _TITLES for name in _speaker_files(system, sources))]


def _speaker_files(system: System, sources: int) -> list[str]:
    if sources == 1:
        return [f"{system}.wav"]
    return [f"{system}-speaker{number}.wav" for number in range(1, sources + 1)]


def write_comparison(folder: Path, comparison: Comparison) -> None:
    """Write ``mixture.wav``, a file for each system and speaker, and the figure.

    The figure also shows the quality by delay that is recorded in the shipped bundles of the same task.

    Raises:
        InputError: The folder cannot be created, or a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot create the folder ({reason(error)}); give another --compare") from None
    write_audio(folder / _MIXTURE, comparison.mixture, comparison.rate, "s16")
    for name, signals in comparison.systems.items():
        for file_name, signal in zip(_speaker_files(name, len(signals)), signals, strict=True):
            write_audio(folder / file_name, signal, comparison.rate, "s16")
    _draw(folder / PICTURE, comparison)


@literal_text()
def _draw(path: Path, comparison: Comparison) -> None:
    curve = _quality_by_delay(comparison.task)
    gains = comparison.gains
    shown = {"mixture": comparison.mixture[0]}
    for system, signals in comparison.systems.items():
        speaker = ", speaker 1" if len(signals) > 1 else ""
        gain = f": {gains[system]:+.1f} dB SI-SDRi{' (all speakers)' if speaker else ''}" if system in gains else ""
        shown[_TITLES[system] + speaker + gain] = signals[0, 0]
    levels = {title: _levels(samples, comparison.rate) for title, samples in shown.items()}
    top = max(float(level.max()) for level, _ in levels.values())
    rows = len(shown)
    figure = plt.figure(figsize=(15 if curve else 10, 1.75 * rows + 0.8), layout="constrained")
    try:
        grid = figure.add_gridspec(rows, 2 if curve else 1, width_ratios=(1.7, 1) if curve else (1,))
        first: Any = None
        for row, (heading, (level, extent)) in enumerate(levels.items()):
            first = axis = figure.add_subplot(grid[row, 0], sharex=first)
            draw_spectrogram(axis, heading, level, extent, top)
            axis.label_outer()
        axis.set_xlabel("time, s")
        if curve:
            _draw_curve(figure.add_subplot(grid[:, 1]), curve)
        figure.suptitle(comparison.title, fontsize=12)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=100)
    finally:
        plt.close(figure)


def _levels(samples: Samples, rate: int) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    spectrogram = Spectrogram(rate, len(samples))
    spectrogram.add(samples)
    return spectrogram.levels()


def _quality_by_delay(task: str) -> dict[str, list[tuple[float, float]]]:
    """Return the figures of the shipped bundles: for each system, pairs of delay in ms and SI-SDRi in dB."""
    curve: dict[str, list[tuple[float, float]]] = {}
    for bundle in Bundle.shipped():
        model, quality = bundle.model, bundle.manifest.quality
        if model.task != task or (isinstance(model, Pair) and model.boosting.compression != 1):
            continue
        delay = 1000 * model.delay * model.framing.chunk_seconds
        for system in ("alone", "boosted", "large"):
            if f"{system}_si_sdri" in quality:
                curve.setdefault(system, []).append((delay, quality[f"{system}_si_sdri"]))
    return {system: sorted(points) for system, points in curve.items()} if "boosted" in curve else {}


def _draw_curve(axis: Any, curve: Mapping[str, list[tuple[float, float]]]) -> None:
    colours = {"alone": "#CC79A7", "boosted": "#0072B2", "large": "#009E73"}
    for system, points in curve.items():
        if system == "boosted":
            axis.plot(*zip(*points, strict=True), "o-", color=colours[system], label="boosted")
            for delay, gain in points:
                axis.annotate(f"{gain:.1f}", (delay, gain), (0, 7), textcoords="offset points", ha="center")
        else:
            level = float(np.mean([gain for _, gain in points]))
            label = {"alone": "small network alone", "large": "large network"}[system]
            axis.axhline(level, color=colours[system], linestyle="--", label=f"{label}, {level:.1f} dB")
    axis.set_xlabel("delay of the hints, ms")
    axis.set_ylabel("SI-SDRi, dB")
    # The axis starts at a delay of 0, so that a single point is shown at the right position too.
    axis.set_xlim(-4, max(delay for delay, _ in curve["boosted"]) + 8)
    axis.set_ylim(bottom=0)
    axis.margins(y=0.15)
    axis.grid(color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    axis.set_title("quality by delay: validation set, as recorded in the shipped bundles", loc="left", fontsize=10)
