"""Tests for the view of a live session in a terminal, and for its keys."""

import csv
import io
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from knowledge_boosting.device_client.live.view import Figures, Layout, load_warning, log_line, view
from tests.processes import PATIENCE, command, environment

SS = "ss_delay6_compression2"
NOW = Figures(
    seconds=3723.4,
    frames=465_425,
    input_db=-12.3,
    output_db=-60.0,
    hints_on_time=900,
    hints_late=70,
    hints_missing=30,
    hint_age_ms=14.2,
    compute_ms=0.61,
    slowest_ms=2.1,
    real_time_factor=0.076,
    underruns=0,
    overruns=0,
    server="gpu-host:50051",
    hints=True,
    play="1",
)
LAYOUT = Layout("kb-client live   bundle", "38 ms", 48.0, ("bypass", "1", "2", "both"))


def shown(now: Figures, layout: Layout = LAYOUT, width: int = 80) -> str:
    console = Console(width=width, height=24, record=True, file=io.StringIO())
    console.print(view(now, layout, "last event"))
    text = console.export_text()
    lines = text.splitlines()
    assert len(lines) <= 24
    assert all(len(line) <= width for line in lines)
    return text


@pytest.mark.parametrize("width", [80, 120])
def test_everything_is_in_the_view(width: int) -> None:
    text = shown(NOW, width=width)
    for words in (
        *("01:02:03", "speaker 1", "900 on time (90.0 %), 70 late, 30 missing", "14.2 ms; deadline 48 ms"),
        *("gpu-host:50051", "real-time factor 0.08", "0 underruns", "38 ms", "last event", "-12 dB", "-60 dB"),
        *("space bypass", "h hints", "q quit"),
    ):
        assert words in text
    line = log_line(NOW, on_arrival=False)
    assert "900 on time, 70 late, 30 missing" in line
    assert len(line.splitlines()) == 1


def test_hints_that_are_used_on_arrival_are_not_called_late() -> None:
    layout = replace(LAYOUT, on_arrival=True)
    for text in (shown(NOW, layout), log_line(NOW, on_arrival=True)):
        assert "900 used" in text
        assert "70 too old" in text
        assert "late," not in text


def test_missing_parts_are_not_shown() -> None:
    alone = shown(NOW, replace(LAYOUT, deadline_ms=None, choices=("bypass", "1")))
    for words in ("hint", "server", "1 2 speaker", "both"):
        assert words not in alone
    assert "none: the small network runs without hints" in shown(replace(NOW, server=None))
    assert "OFF" in shown(replace(NOW, hints=False))


def test_problems_are_explained() -> None:
    assert load_warning(NOW) is None
    assert "this device is too slow" in shown(replace(NOW, real_time_factor=0.9))
    assert "--buffer-ms" in shown(replace(NOW, underruns=3))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_keys_change_what_is_played(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "in.wav", np.zeros((16000 * 60, 2)), 16000)
    ours, theirs = os.openpty()
    files = ["--input", tmp_path / "in.wav", "--output", tmp_path / "out.wav", "--record", tmp_path / "recording"]
    call = command("kb-client", "live", "--bundle", golden_bundle(SS), *files)
    screen = bytearray()

    def read() -> None:
        while True:
            try:
                screen.extend(os.read(ours, 4096))
            except OSError:  # the other end of the terminal is closed
                return

    process = subprocess.Popen(
        call, env={**environment(), "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
    )
    os.close(theirs)
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for key, words in ((None, b"speaker 1"), (b" ", b"the input"), (b"2", b"speaker 2"), (b"b", b"left, speaker")):
            before = len(screen)
            if key is not None:
                os.write(ours, key)
            deadline = time.monotonic() + PATIENCE
            while words not in screen[before:]:
                assert time.monotonic() < deadline, screen
                assert process.poll() is None, screen
                time.sleep(0.02)
            time.sleep(0.5)  # the view shows the new mix at once; some frames must be played with it too
        os.write(ours, b"q")
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    reader.join(timeout=10)
    os.close(ours)
    assert process.returncode == 0, errors
    with (tmp_path / "recording" / "frames.csv").open() as file:
        played = [row["play"] for row in csv.DictReader(file)]
    changes = [name for name, before in zip(played, ["", *played], strict=False) if name != before]
    assert changes == ["1", "bypass", "2", "both"]
