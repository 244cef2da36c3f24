"""The figure of a replay: spectrograms of mixture and output, and the age of each hint."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.common.pictures import literal_text
from knowledge_boosting.device_client.hints.buffer import hint_words
from knowledge_boosting.device_client.replay.hint_log import HintLog
from knowledge_boosting.protos.codec import Samples

matplotlib.use("Agg")

from matplotlib import pyplot as plt

FORMATS = (".png", ".pdf", ".svg")
_MAX_COLUMNS = 1200  # about the width of a spectrogram in pixels
_BATCH = 256  # frames that are transformed at a time


def check_plot(path: Path) -> None:
    """Check that the suffix of a path is that of a supported image format.

    Raises:
        InputError: It is not.
    """
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: the name of a plot must end in one of {', '.join(FORMATS)}")


@literal_text()
def plot_replay(
    path: Path,
    title: str,
    signals: "dict[str, Spectrogram]",
    log: HintLog | None,
    ended_at: int,
    deadline_ms: float,
    *,
    on_arrival: bool,
) -> None:
    """Draw the figure and write it to a file. After an error there is no file.

    Args:
        path: The path of the file.
        title: The title of the figure.
        signals: The spectrograms, by their headings.
        log: The log of the hints. None for one network alone.
        ended_at: The stream time at which the run ended, ns.
        deadline_ms: The maximum age of a hint, ms.
        on_arrival: Whether hints are used on arrival.

    Raises:
        InputError: The file cannot be written.
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
        _plot_ages(axes[-1, 0], log, ended_at, deadline_ms, hint_words(on_arrival=on_arrival))
    axes[-1, 0].set_xlabel("time, s")
    figure.suptitle(title, fontsize=11)
    with atomic_file(path) as temporary:
        try:
            figure.savefig(temporary, dpi=110)
        except ValueError as error:
            raise InputError(f"{path}: cannot draw ({reason(error)})") from None
        finally:
            plt.close(figure)


def _plot_ages(axis: Any, log: HintLog, ended_at: int, deadline_ms: float, words: tuple[str, str]) -> None:
    seconds = log.captured_at / 1e9
    ages = log.ages_ms(ended_at)
    used, unused, missing = (np.flatnonzero(flags) for flags in log.classify(ended_at))
    for frames, word, size, colour in ((used, words[0], 2, "tab:green"), (unused, words[1], 4, "tab:orange")):
        label = f"{word} ({len(frames)})"
        axis.plot(seconds[frames], ages[frames], ".", markersize=size, color=colour, label=label)
    # A missing hint has no age, and is marked on the zero line.
    zero = np.zeros(len(missing))
    axis.plot(seconds[missing], zero, "|", markersize=8, color="tab:red", label=f"missing ({len(missing)})")
    max_age = np.nanmax(ages, initial=deadline_ms) if not np.isnan(ages).all() else deadline_ms
    top = 1.5 * max(max_age, 1)
    # The deadline is the edge of an area, which hints that arrive exactly then do not hide.
    axis.axhspan(deadline_ms, top, color="tab:orange", alpha=0.12, linewidth=0, zorder=0)
    axis.annotate(
        f"{words[1]}: after the deadline of {deadline_ms:g} ms",
        (0, deadline_ms),
        (4, 4),
        textcoords="offset points",
        fontsize=8,
    )
    axis.set_title("The age of the hints on arrival", loc="left", fontsize=10)
    axis.set_ylabel("ms")
    axis.set_ylim(0, top)
    axis.legend(loc="upper right", ncols=3, fontsize=8)


def draw_spectrogram(axis: Any, title: str, level: NDArray[np.float32], extent: tuple[float, ...], top: float) -> Any:
    """Draw a spectrogram with a range of 80 dB below ``top`` (dB), and return the matplotlib image.

    Args:
        axis: The matplotlib axis.
        title: The heading.
        level: The levels in dB, ``[F, T]``.
        extent: The first and last time in seconds, and the lowest and highest frequency in kHz.
        top: The highest level of the colour scale, dB.
    """
    image = axis.imshow(level, origin="lower", aspect="auto", extent=extent, vmin=top - 80, vmax=top, cmap="magma")
    axis.set_ylabel("kHz")
    axis.set_title(title, loc="left", fontsize=10)
    return image


class Spectrogram:
    """Computes the spectrogram of a signal block by block, with frames of 32 ms.

    For a long signal, each column of the spectrogram is the mean power of several frames.
    """

    def __init__(self, rate: int, length: int) -> None:
        """Create the spectrogram of a signal of ``length`` samples at ``rate`` Hz."""
        self._rate, self._size = rate, round(0.032 * rate)
        self._hop = self._size // 4
        self._length = max(length, self._size)
        frames = (self._length - self._size) // self._hop + 1
        self._frames_per_column = -(-frames // _MAX_COLUMNS)
        self._power = np.zeros((-(-frames // self._frames_per_column), self._size // 2 + 1))
        self._frames, self._frames_done = frames, 0
        self._pending = np.zeros(0, np.float32)

    def add(self, signal: Samples) -> None:
        """Add the next samples ``[n]`` of the signal."""
        self._pending = np.concatenate([self._pending, signal])
        if len(self._pending) >= self._size:
            frames = np.lib.stride_tricks.sliding_window_view(self._pending, self._size)[:: self._hop]
            for first in range(0, len(frames), _BATCH):
                self._accumulate(frames[first : first + _BATCH])
            self._pending = self._pending[len(frames) * self._hop :]

    def _accumulate(self, frames: NDArray[np.float32]) -> None:
        spectrum = np.abs(np.fft.rfft(frames.astype(np.float64) * np.hanning(self._size), axis=1)) / (self._size / 4)
        columns = np.arange(self._frames_done, self._frames_done + len(frames)) // self._frames_per_column
        np.add.at(self._power, columns, np.square(spectrum))
        self._frames_done += len(frames)

    def levels(self) -> tuple[NDArray[np.float32], tuple[float, ...]]:
        """Return the levels in dB, ``[F, T]``, and their extent for :func:`draw_spectrogram`."""
        if not self._frames_done:
            self.add(np.zeros(self._size - len(self._pending), np.float32))
        counts = np.bincount(np.arange(self._frames) // self._frames_per_column)
        level = 20 * np.log10(np.sqrt(self._power / counts[:, None]).T + 1e-7)
        return level.astype(np.float32), (0.0, self._length / self._rate, 0.0, self._rate / 2000)
