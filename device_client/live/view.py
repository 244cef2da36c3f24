"""The display of a live session: a view for a terminal, and lines for logs."""

import math
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from rich.bar import Bar
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from knowledge_boosting.device_client.audio.live_audio import LiveAudio
from knowledge_boosting.device_client.audio.mixer import Play
from knowledge_boosting.device_client.hints.buffer import hint_words
from knowledge_boosting.device_client.hints.reconnecting import LiveHints
from knowledge_boosting.device_client.live.loop import RECENT_FRAMES, LiveLoop

_MIN_DB = -60.0  # lower limit of the meters, dB relative to full scale
_METER_FRAMES = 25  # a meter shows the peak of the last fifth of a second
_MAX_LOAD = 0.8  # a higher real-time factor gives a warning


@dataclass(frozen=True)
class Figures:
    """The figures of a live session at one moment."""

    seconds: float  # duration of the audio so far
    frames: int
    input_db: float  # peak of the last fifth of a second, dB relative to full scale
    output_db: float
    hints_on_time: int
    hints_late: int
    hints_missing: int
    hint_age_ms: float | None  # median of the last ten seconds
    compute_ms: float  # time for each frame, mean of the last ten seconds
    slowest_ms: float  # maximum time of all frames
    real_time_factor: float
    underruns: int
    overruns: int
    server: str | None  # address of the server from which hints come
    hints: bool  # whether hints are fused
    play: Play
    overflows: int = 0  # frames whose estimate was not finite, so that the input was played
    latency_ms: float | None = None  # from microphone to loudspeaker; None for files


def figures(loop: LiveLoop, hints: LiveHints | None, audio: LiveAudio, chunk_seconds: float) -> Figures:
    """Return the current figures of a session."""
    frames = loop.frames
    recent = loop.recent[:frames] if frames < RECENT_FRAMES else np.roll(loop.recent, -frames % RECENT_FRAMES)
    ages = recent["age_ms"][~np.isnan(recent["age_ms"])]
    compute_ms = float(recent["compute_ms"].mean()) if frames else 0.0
    late = min(hints.late, loop.stream.hints_due - loop.stream.hints_used) if hints is not None else 0
    return Figures(
        seconds=round(frames * chunk_seconds, 3),
        frames=frames,
        input_db=_decibels(recent["input_peak"]),
        output_db=_decibels(recent["output_peak"]),
        hints_on_time=loop.stream.hints_used,
        hints_late=late,
        hints_missing=loop.stream.hints_due - loop.stream.hints_used - late,
        hint_age_ms=round(float(np.median(ages)), 2) if ages.size else None,
        compute_ms=round(compute_ms, 3),
        slowest_ms=round(loop.slowest_ms, 3),
        real_time_factor=round(compute_ms / (1e3 * chunk_seconds), 4),
        underruns=audio.underruns,
        overruns=audio.overruns,
        server=hints.server if hints is not None else None,
        hints=loop.stream.hints_on,
        play=loop.play,
        overflows=loop.stream.engine.overflows,
        latency_ms=None if audio.latency_ms is None else round(audio.latency_ms, 1),
    )


def _decibels(peaks: "np.ndarray[tuple[int], np.dtype[np.float32]]") -> float:
    peak = float(peaks[-_METER_FRAMES:].max(initial=0))
    return round(max(_MIN_DB, 20 * math.log10(peak)), 1) if peak > 0 else _MIN_DB


def load_warning(now: Figures) -> str | None:
    """Return a warning if the device is too slow, otherwise None."""
    if now.real_time_factor > _MAX_LOAD:
        return "this device is too slow; close other programs, connect the power supply, or choose a smaller bundle"
    return None


def _xruns(now: Figures) -> str:
    counts = (now.underruns, "underrun"), (now.overruns, "overrun")
    return ", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts)


def _overflowed(frames: int) -> str:
    return f"the network overflowed at {frames} frame{'s' * (frames != 1)}, so that the input was played"


def log_line(now: Figures, *, on_arrival: bool) -> str:
    """Return the figures as one line for a log. ``on_arrival`` says whether hints are used on arrival."""
    used, unused = hint_words(on_arrival=on_arrival)
    age = f", {now.hint_age_ms:.1f} ms old" if now.hint_age_ms is not None else ""
    parts = [
        f"{_clock(now.seconds)} in {now.input_db:.0f} dB, out {now.output_db:.0f} dB",
        f"hints {now.hints_on_time} {used}, {now.hints_late} {unused}, {now.hints_missing} missing{age}",
        f"real-time factor {now.real_time_factor:.2f}",
        _xruns(now),
        f"server {now.server or 'none'}",
    ]
    if now.overflows:
        parts.append(_overflowed(now.overflows))
    return "; ".join(parts)


@dataclass(frozen=True)
class Layout:
    """The constant parts of the view."""

    title: str
    latency: str
    deadline_ms: float | None  # maximum age of a hint; None if there are no hints
    choices: Sequence[Play]
    on_arrival: bool = False  # whether hints are used on arrival


_PLAYING: dict[Play, str] = {
    "bypass": "the input (bypass)",
    "1": "speaker 1",
    "2": "speaker 2",
    "both": "speaker 1 left, speaker 2 right",
}


def view(now: Figures, layout: Layout, last_event: str) -> RenderableType:
    """Return the view of a session for a terminal."""
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column(ratio=1)
    grid.add_row("input", _meter(now.input_db))
    grid.add_row("output", _meter(now.output_db))
    grid.add_row("playing", _PLAYING[now.play])
    if layout.deadline_ms is not None:
        due = now.hints_on_time + now.hints_late + now.hints_missing
        share = f" ({100 * now.hints_on_time / due:.1f} %)" if due else ""
        used, unused = hint_words(on_arrival=layout.on_arrival)
        counts = f"{now.hints_on_time} {used}{share}, {now.hints_late} {unused}, {now.hints_missing} missing"
        grid.add_row("hints", Text(counts) if now.hints else Text(f"OFF; {counts}", style="yellow"))
        age = f"{now.hint_age_ms:.1f} ms" if now.hint_age_ms is not None else "none came"
        grid.add_row("hint age", f"{age}; deadline {layout.deadline_ms:g} ms")
        grid.add_row("server", now.server or Text("none: the small network runs without hints", style="yellow"))
    load = f"{now.compute_ms:.2f} ms per frame, maximum {now.slowest_ms:.1f} ms; real-time factor"
    grid.add_row("device", f"{load} {now.real_time_factor:.2f}")
    sound = Text(_xruns(now))
    if now.underruns + now.overruns:
        sound = Text(f"{sound}; if you hear crackling, increase --buffer-ms", style="yellow")
    grid.add_row("sound", sound)
    grid.add_row("latency", layout.latency)
    keys = ["space bypass"]
    if len(layout.choices) > 2:
        keys.append("1 2 speaker")
    if "both" in layout.choices:
        keys.append("b both")
    if layout.deadline_ms is not None:
        keys.append("h hints")
    parts: list[RenderableType] = [Text(f" {layout.title}   {_clock(now.seconds)} ", style="reverse"), Text(), grid]
    if (warning := load_warning(now)) is not None:
        parts.append(Text(warning, style="bold red"))
    if now.overflows:
        parts.append(Text(_overflowed(now.overflows), style="bold red"))
    return Group(*parts, Text(), Text(last_event, style="dim"), Text("   ".join([*keys, "q quit"]), style="bold"))


def _meter(decibels: float) -> Table:
    bar = Table.grid(expand=True, padding=(0, 1))
    bar.add_column(ratio=1)
    bar.add_column(width=7, justify="right")
    colour = "red" if decibels > -1 else "green"
    bar.add_row(Bar(-_MIN_DB, 0, decibels - _MIN_DB, color=colour), f"{decibels:.0f} dB")
    return bar


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds))


@contextmanager
def keyboard() -> Iterator[Callable[[float], str]]:
    """Read single keys from the terminal in this block.

    Yields:
        A function that waits up to a number of seconds for a key, and returns it, or an empty string.
    """
    if sys.platform == "win32":
        import msvcrt

        def key_windows(seconds: float) -> str:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if msvcrt.kbhit():
                    return msvcrt.getwch()
                time.sleep(0.02)
            return ""

        yield key_windows
    else:
        import termios
        import tty

        original = termios.tcgetattr(sys.stdin)

        def key(seconds: float) -> str:
            if select.select([sys.stdin], [], [], seconds)[0]:
                with suppress(OSError):  # the terminal was closed
                    if pressed := os.read(sys.stdin.fileno(), 1):
                        return pressed.decode(errors="replace")
                time.sleep(seconds)
            return ""

        try:
            tty.setcbreak(sys.stdin)
            yield key
        finally:
            with suppress(termios.error):
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, original)
