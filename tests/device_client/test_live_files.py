"""``kb-client live`` from file to file: rates and formats, the shortest files, and how it ends."""

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


@pytest.mark.parametrize("way", ["live", "replay"])
def test_the_shortest_files_come_out_as_long_as_they_went_in(
    way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rate in (16000, 44100, 48000, 192_000):
        for count in (1, 5):
            source, target = tmp_path / "in.wav", tmp_path / "out.wav"
            soundfile.write(source, np.full((count, 2), 0.25), rate)
            flags = ["--input", source, "--output", target] if way == "live" else [source, "-o", target]
            assert call_here("kb-client", way, *flags, *ALONE) == 0, capsys.readouterr().err
            written = target if way == "live" else tmp_path / "out-speaker1.wav"
            info = soundfile.info(written)
            assert (info.frames, info.samplerate) == (count, rate)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A minute, which no test waits for."""
    soundfile.write(tmp_path / "in.wav", np.tile(noise(4, 16000), (15, 1)), 16000, subtype="FLOAT")
    return tmp_path / "in.wav"


def assert_whole(folder: Path, frames_at_least: int) -> None:
    """All that a session leaves is there, whole and of the same length, and nothing else."""
    recording = folder / "recording"
    assert sorted(path.name for path in folder.iterdir()) == ["in.wav", "out.wav", "recording"]
    rows = (recording / "frames.csv").read_text().splitlines()[1:]
    assert len(rows) >= frames_at_least
    assert all(len(row.split(",")) == 5 for row in rows)
    played = samples_of(recording / "output.wav")
    assert len(played) == 128 * len(rows)
    assert len(samples_of(recording / "input.wav")) == 128 * len(rows) + 64
    np.testing.assert_array_equal(samples_of(folder / "out.wav"), played)


@pytest.mark.parametrize(
    "number",
    [signal.SIGHUP, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT))],
)
def test_signals_end_a_session_in_good_order(number: int, source: Path, tmp_path: Path) -> None:
    flags = ["--input", source, "--output", tmp_path / "out.wav", "--record", tmp_path / "recording", "--json-lines"]
    with subprocess.Popen(
        command("kb-client", "live", *flags, *ALONE), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert b"figures" in process.stdout.readline()
        process.send_signal(number)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    assert_whole(tmp_path, 100)


def test_a_terminal_that_is_closed_ends_a_session_in_good_order(source: Path, tmp_path: Path) -> None:
    """The view's terminal goes away as it does when its window is closed: SIGHUP, and errors on every stream."""
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
    assert_whole(tmp_path, 1)


@pytest.mark.slow
def test_under_nohup_a_session_goes_on(tmp_path: Path) -> None:
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
