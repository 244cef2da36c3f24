"""Tests for ``kb-client live`` with files as input and output: rates, formats, very short files, and its end."""

import fcntl
import os
import pty
import signal
import subprocess
import termios
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.processes import call_here, command, environment, run

ALONE = ("--bundle", "ss-alone")
Samples = np.ndarray[tuple[int, int], np.dtype[np.float32]]


def noise(seconds: float, rate: int) -> Samples:
    walk = np.cumsum(np.random.default_rng(0).normal(0, 1, (round(seconds * rate), 2)), axis=0)
    scaled: Samples = (0.5 * walk / np.abs(walk).max()).astype(np.float32)
    return scaled


def samples_of(path: Path) -> Samples:
    samples: Samples = soundfile.read(path, dtype="float32", always_2d=True)[0]
    return samples


@pytest.mark.parametrize(
    ("rate", "name", "subtype", "target", "written"),
    [
        (44100, "in.wav", "FLOAT", "out.wav", "FLOAT"),
        (48000, "in.flac", "PCM_16", "out.flac", "PCM_16"),
    ],
)
def test_live_writes_what_replay_writes(
    rate: int, name: str, subtype: str, target: str, written: str, tmp_path: Path
) -> None:
    soundfile.write(tmp_path / name, noise(0.7, rate), rate, subtype=subtype)
    result = run("kb-client", "live", "--input", tmp_path / name, "--output", tmp_path / target, *ALONE)
    assert result.returncode == 0, result.stderr
    info = soundfile.info(tmp_path / target)
    assert (info.samplerate, info.subtype, info.frames) == (rate, written, round(0.7 * rate))
    flags = ["--output-format", "float"] if written == "FLOAT" else []
    result = run("kb-client", "replay", tmp_path / name, "-o", tmp_path / target, *ALONE, *flags)
    assert result.returncode == 0, result.stderr
    replayed = tmp_path / target.replace(".", "-speaker1.")
    np.testing.assert_array_equal(samples_of(tmp_path / target), samples_of(replayed))


@pytest.mark.parametrize("command_name", ["live", "replay"])
def test_very_short_files_keep_their_length(
    command_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rate in (16000, 44100, 48000, 192_000):
        for count in (1, 5):
            source, target = tmp_path / "in.wav", tmp_path / "out.wav"
            soundfile.write(source, np.full((count, 2), 0.25), rate)
            flags = ["--input", source, "--output", target] if command_name == "live" else [source, "-o", target]
            assert call_here("kb-client", command_name, *flags, *ALONE) == 0, capsys.readouterr().err
            written = target if command_name == "live" else tmp_path / "out-speaker1.wav"
            info = soundfile.info(written)
            assert (info.frames, info.samplerate) == (count, rate)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A recording of one minute. No test waits for its end."""
    soundfile.write(tmp_path / "in.wav", np.tile(noise(4, 16000), (15, 1)), 16000, subtype="FLOAT")
    return tmp_path / "in.wav"


def assert_complete(folder: Path, min_frames: int) -> None:
    """Check that all files of a session are complete and have the same length, and that there are no other files."""
    recording = folder / "recording"
    assert sorted(path.name for path in folder.iterdir()) == ["in.wav", "out.wav", "recording"]
    rows = (recording / "frames.csv").read_text().splitlines()[1:]
    assert len(rows) >= min_frames
    assert all(len(row.split(",")) == 6 for row in rows)
    played = samples_of(recording / "output.wav")
    assert len(played) == 128 * len(rows)
    assert len(samples_of(recording / "input.wav")) == 128 * len(rows) + 64
    np.testing.assert_array_equal(samples_of(folder / "out.wav"), played)


@pytest.mark.parametrize(
    "number",
    [signal.SIGHUP, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT))],
)
def test_a_signal_ends_a_session_with_complete_files(number: int, source: Path, tmp_path: Path) -> None:
    flags = ["--input", source, "--output", tmp_path / "out.wav", "--record", tmp_path / "recording", "--json-lines"]
    with subprocess.Popen(
        command("kb-client", "live", *flags, *ALONE), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert b"figures" in process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert_complete(tmp_path, 100)


def test_a_closed_terminal_ends_a_session_with_complete_files(source: Path, tmp_path: Path) -> None:
    """When the window of a terminal is closed, the process gets SIGHUP, and all streams give errors."""
    ours, theirs = pty.openpty()
    flags = ["--input", source, "--output", tmp_path / "out.wav", "--record", tmp_path / "recording"]

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command("kb-client", "live", *flags, *ALONE),
        env={**environment(), "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=own_terminal,
    )
    os.close(theirs)
    try:
        shown = b""
        while b"speaker 1" not in shown:
            shown += os.read(ours, 4096)
        os.close(ours)
        process.wait(timeout=120)
    finally:
        process.kill()
    assert_complete(tmp_path, 1)


@pytest.mark.slow
def test_under_nohup_a_session_continues(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "in.wav", noise(2, 16000), 16000, subtype="FLOAT")
    flags = ["--input", tmp_path / "in.wav", "--output", tmp_path / "out.wav", "--json-lines"]
    with subprocess.Popen(
        command("kb-client", "live", *flags, *ALONE),
        env=environment(),
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as process:
        assert process.stdout is not None
        assert b"figures" in process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        process.communicate()
    assert process.returncode == 0
    assert len(samples_of(tmp_path / "out.wav")) == 32000
