"""The comparison of all networks on one mixture: sound files and a figure."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.common.pictures import literal_text
from knowledge_boosting.device_client.audio.files import write_audio
from knowledge_boosting.device_client.replay.loudness import at_loudness, common_loudness
from knowledge_boosting.device_client.replay.plot import Spectrogram, draw_spectrogram
from knowledge_boosting.protos.codec import Samples

matplotlib.use("Agg")

from matplotlib import pyplot as plt

PICTURE = "comparison.png"
_MIXTURE = "mixture.wav"
System = Literal["alone", "boosted", "large", "reference"]
_TITLES: dict[System, str] = {
    "alone": "small network alone",
    "boosted": "small network with hints",
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

    All files have the same loudness, so that only what the systems do is heard.

    Raises:
        InputError: The folder cannot be created, or a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot create the folder ({reason(error)}); give another --compare") from None
    sounds = [comparison.mixture, *(signal for signals in comparison.systems.values() for signal in signals)]
    loudness = common_loudness(sounds)
    write_audio(folder / _MIXTURE, at_loudness(comparison.mixture, loudness), comparison.rate, "s16")
    for name, signals in comparison.systems.items():
        for file_name, signal in zip(_speaker_files(name, len(signals)), signals, strict=True):
            write_audio(folder / file_name, at_loudness(signal, loudness), comparison.rate, "s16")
    _draw(folder / PICTURE, comparison)


@literal_text()
def _draw(path: Path, comparison: Comparison) -> None:
    gains = comparison.gains
    shown = {"mixture": comparison.mixture[0]}
    for system, signals in comparison.systems.items():
        speaker = ", speaker 1" if len(signals) > 1 else ""
        gain = f": {gains[system]:+.1f} dB SI-SDRi{' (all speakers)' if speaker else ''}" if system in gains else ""
        shown[_TITLES[system] + speaker + gain] = signals[0, 0]
    levels = {title: _levels(samples, comparison.rate) for title, samples in shown.items()}
    top = max(float(level.max()) for level, _ in levels.values())
    rows = len(shown)
    figure, axes = plt.subplots(
        rows, 1, figsize=(10, 1.75 * rows + 0.9), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    try:
        for axis, (heading, (level, extent)) in zip(axes[:, 0], levels.items(), strict=True):
            draw_spectrogram(axis, heading, level, extent, top)
        axes[-1, 0].set_xlabel("time, s")
        figure.suptitle(f"How much of the other sound does each network remove?\n{comparison.title}", fontsize=11)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=100)
    finally:
        plt.close(figure)


def _levels(samples: Samples, rate: int) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    spectrogram = Spectrogram(rate, len(samples))
    spectrogram.add(samples)
    return spectrogram.levels()
