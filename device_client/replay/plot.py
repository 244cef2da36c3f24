"""The picture of a replay: spectrograms of mixture and output, and every hint's age."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.common.pictures import literal_text
from knowledge_boosting.device_client.replay.hint_log import HintLog
from knowledge_boosting.protos.codec import Samples

matplotlib.use("Agg")

from matplotlib import pyplot as plt

FORMATS = (".png", ".pdf", ".svg")
_MOST_COLUMNS = 1200  # about as many as the picture has points
_FRAMES_AT_ONCE = 256


def check_plot(path: Path) -> None:
    """Whether a picture of that name can be written.

    Raises:
        InputError: the suffix is none of ``FORMATS``.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: a plot must end in {', '.join(FORMATS)}")


@literal_text()
def plot_replay(
    path: Path,
    title: str,
    signals: "dict[str, Spectrogram]",
    log: HintLog | None,
    ended_at: int,
    budget_ms: float,
) -> None:
    """Draw and write the picture, whole or not at all.

    Args:
        signals: by name.
        log: of the hints; None for a network alone.
        budget_ms: age at which a hint is due.

    Raises:
        InputError: the file cannot be written.
    """
    rows = len(signals) + (log is not None)
    figure, axes = plt.subplots(
        rows, 1, figsize=(11, 2.3 * rows + 0.6), sharex=True, layout="constrained", squeeze=False
    )
    levels = {name: signal.levels() for name, signal in signals.items()}
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


def draw_spectrogram(axis: Any, title: str, level: NDArray[np.float32], extent: tuple[float, ...], top: float) -> Any:
    """Draw a spectrogram, 80 dB down from ``top``; returns the image."""
    image = axis.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top, cmap="magma")
    axis.set_ylabel("kHz")
    axis.set_title(title, loc="left", fontsize=10)
    return image


class Spectrogram:
    """Level of 32 ms frames, of a signal that comes in pieces; long ones are drawn by the mean power of several."""

    def __init__(self, rate: int, length: int) -> None:
        """A picture of a signal of ``length`` samples."""
        self._rate, self._size = rate, round(0.032 * rate)
        self._hop = self._size // 4
        self._length = max(length, self._size)
        frames = (self._length - self._size) // self._hop + 1
        self._frames_each = -(-frames // _MOST_COLUMNS)
        self._power = np.zeros((-(-frames // self._frames_each), self._size // 2 + 1))
        self._frames, self._done = frames, 0
        self._rest = np.zeros(0, np.float32)

    def add(self, signal: Samples) -> None:
        """The next samples ``[n]``."""
        self._rest = np.concatenate([self._rest, signal])
        if len(self._rest) >= self._size:
            frames = np.lib.stride_tricks.sliding_window_view(self._rest, self._size)[:: self._hop]
            for first in range(0, len(frames), _FRAMES_AT_ONCE):
                self._count(frames[first : first + _FRAMES_AT_ONCE])
            self._rest = self._rest[len(frames) * self._hop :]

    def _count(self, frames: NDArray[np.float32]) -> None:
        spectrum = np.abs(np.fft.rfft(frames.astype(np.float64) * np.hanning(self._size), axis=1)) / (self._size / 4)
        columns = np.arange(self._done, self._done + len(frames)) // self._frames_each
        np.add.at(self._power, columns, np.square(spectrum))
        self._done += len(frames)

    def levels(self) -> tuple[NDArray[np.float32], tuple[float, ...]]:
        """Level in dB ``[F, T]``, and its extent in seconds and kHz."""
        if not self._done:
            self.add(np.zeros(self._size - len(self._rest), np.float32))
        counts = np.bincount(np.arange(self._frames) // self._frames_each)
        level = 20 * np.log10(np.sqrt(self._power / counts[:, None]).T + 1e-7)
        return level.astype(np.float32), (0.0, self._length / self._rate, 0.0, self._rate / 2000)
