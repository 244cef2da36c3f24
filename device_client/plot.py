"""The picture of a replay: spectrograms of mixture and output, and every hint's age."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from common.errors import InputError, reason
from common.files import atomic_file
from device_client.hint_buffer import HintLog
from protos.codec import Samples

matplotlib.use("Agg")

from matplotlib import pyplot as plt

FORMATS = (".png", ".pdf", ".svg")


def check_plot(path: Path) -> None:
    """Whether a picture of that name can be written.

    Raises:
        InputError: the suffix is none of ``FORMATS``, or the folder does not exist.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: a plot must end in {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: no folder {path.parent}; make it first")


def plot_replay(
    path: Path,
    title: str,
    signals: dict[str, Samples],
    rate: int,
    log: HintLog | None,
    ended_at: int,
    budget_ms: float,
) -> None:
    """Draw and write the picture, whole or not at all.

    Args:
        signals: by name, ``[M, N]`` each; the first microphone is drawn.
        log: of the hints; None for a network alone.
        budget_ms: age at which a hint is due.

    Raises:
        InputError: the file cannot be written.
    """
    rows = len(signals) + (log is not None)
    figure, axes = plt.subplots(
        rows, 1, figsize=(11, 2.3 * rows + 0.6), sharex=True, layout="constrained", squeeze=False
    )
    levels = {name: spectrogram(samples[0], rate) for name, samples in signals.items()}
    top = max(float(level.max()) for level, _ in levels.values())
    for axis, (name, (level, extent)) in zip(axes[:, 0], levels.items(), strict=False):
        image = draw_spectrogram(axis, name, level, extent, top)
    figure.colorbar(image, ax=axes[: len(signals), 0].tolist(), label="dB", aspect=30, pad=0.01)
    if log is not None:
        _plot_ages(axes[-1, 0], log, ended_at, budget_ms)
    axes[-1, 0].set_xlabel("time, s")
    figure.suptitle(title, fontsize=11)
    with atomic_file(path) as temporary:
        try:
            figure.savefig(temporary, dpi=110)
        except ValueError as error:
            raise InputError(f"{path}: cannot draw ({reason(error)})") from None
        finally:
            plt.close(figure)


def _plot_ages(axis: Any, log: HintLog, ended_at: int, budget_ms: float) -> None:
    seconds = log.captured_at / 1e9
    ages = log.ages_ms(ended_at)
    on_time, late, missing = (np.flatnonzero(flags) for flags in log.classify(ended_at))
    axis.axhline(budget_ms, color="black", linewidth=0.8, linestyle="--", label=f"due after {budget_ms:g} ms")
    axis.plot(seconds[on_time], ages[on_time], ".", markersize=3, color="tab:green", label=f"on time ({len(on_time)})")
    axis.plot(seconds[late], ages[late], ".", markersize=4, color="tab:orange", label=f"late ({len(late)})")
    # A missing hint has no age: it is marked on the zero line.
    zero = np.zeros(len(missing))
    axis.plot(seconds[missing], zero, "|", markersize=8, color="tab:red", label=f"missing ({len(missing)})")
    axis.set_title("age of hints on arrival", loc="left", fontsize=10)
    axis.set_ylabel("ms")
    highest = np.nanmax(ages, initial=budget_ms) if not np.isnan(ages).all() else budget_ms
    axis.set_ylim(0, 1.35 * max(highest, 1))
    axis.legend(loc="upper right", ncols=4, fontsize=8)


def draw_spectrogram(axis: Any, title: str, level: NDArray[np.float64], extent: tuple[float, ...], top: float) -> Any:
    """Draw a spectrogram, 80 dB down from ``top``; returns the image."""
    image = axis.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top, cmap="magma")
    axis.set_ylabel("kHz")
    axis.set_title(title, loc="left", fontsize=10)
    return image


def spectrogram(signal: NDArray[np.float32], rate: int) -> tuple[NDArray[np.float64], tuple[float, ...]]:
    """Level in dB ``[F, T]`` of 32 ms frames, and its extent in seconds and kHz."""
    size = round(0.032 * rate)
    padded = np.pad(signal.astype(np.float64), (0, max(size - len(signal), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[:: size // 4]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)) / (size / 4)
    return 20 * np.log10(spectrum.T + 1e-7), (0.0, len(padded) / rate, 0.0, rate / 2000)
