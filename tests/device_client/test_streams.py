"""Tests for audio through standard streams and named pipes, and for output that cannot be written or printed."""

import json
import os
import resource
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.processes import Server, command, environment

SECONDS = 1.5
ALONE = ("--bundle", "ss-alone")


def call(
    *arguments: object,
    stdin: bytes = b"",
    stdout: int | None = None,
    max_file_bytes: int | None = None,
    variables: dict[str, str] | None = None,
    closed: Sequence[int] = (),
) -> "subprocess.CompletedProcess[bytes]":
    """Run kb-client to its end.

    Args:
        arguments: The arguments of the command line.
        stdin: The content of standard input.
        stdout: The descriptor for standard output. None: the output is captured.
        max_file_bytes: The maximum size of a file, to simulate a full disk.
        variables: Additional environment variables.
        closed: Descriptors that are closed when it starts.
    """

    def prepare() -> None:
        if max_file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        for descriptor in closed:
            os.close(descriptor)

    return subprocess.run(
        command("kb-client", *arguments),
        input=stdin,
        stdout=stdout if stdout is not None else subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**environment(), **(variables or {})},
        preexec_fn=prepare,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture at 48 kHz with 16-bit samples."""
    path = tmp_path_factory.mktemp("streams") / "mixture.wav"
    noise = np.cumsum(np.random.default_rng(0).normal(0, 1, (round(48000 * SECONDS), 2)), axis=0)
    soundfile.write(path, 0.5 * noise / np.abs(noise).max(), 48000)
    return path


@pytest.fixture(scope="module")
def estimates(mixture: Path) -> tuple[bytes, bytes]:
    """The contents of the two files that a replay of the mixture writes."""
    result = call("replay", mixture, "-o", mixture.with_name("out.wav"), *ALONE)
    assert result.returncode == 0, result.stderr
    first, second = (mixture.with_name(f"out-speaker{number}.wav").read_bytes() for number in (1, 2))
    return first, second


def joined(estimates: tuple[bytes, bytes], folder: Path) -> "np.ndarray[tuple[int, int], np.dtype[np.int16]]":
    """Return the samples with the channels of both speakers side by side."""
    for number, content in enumerate(estimates):
        (folder / f"{number}").write_bytes(content)
    return np.hstack([soundfile.read(folder / f"{number}", dtype="int16")[0] for number in range(2)])


@pytest.mark.parametrize(
    "names", [("-", "-"), pytest.param(("/dev/stdin", "/dev/stdout"), marks=pytest.mark.slow)], ids=["-", "/dev"]
)
def test_sound_comes_from_standard_input_and_goes_to_standard_output(
    names: tuple[str, str], mixture: Path, estimates: tuple[bytes, bytes], tmp_path: Path
) -> None:
    result = call("replay", names[0], "-o", names[1], *ALONE, stdin=mixture.read_bytes())
    assert result.returncode == 0, result.stderr
    (tmp_path / "out.wav").write_bytes(result.stdout)
    samples, rate = soundfile.read(tmp_path / "out.wav", dtype="int16")
    assert rate == 48000
    np.testing.assert_array_equal(samples, joined(estimates, tmp_path))
    assert b"real-time factor" in result.stderr


def test_sound_goes_through_named_pipes(mixture: Path, estimates: tuple[bytes, bytes], tmp_path: Path) -> None:
    for name in ("in.wav", "out-speaker1.wav", "out-speaker2.wav"):
        os.mkfifo(tmp_path / name)
    with (
        ThreadPoolExecutor() as others,
        # Opening a pipe blocks until its other end is open.
        subprocess.Popen(["sh", "-c", 'cat "$0" >"$1"', mixture, tmp_path / "in.wav"]),
    ):
        read = [others.submit((tmp_path / f"out-speaker{number}.wav").read_bytes) for number in (1, 2)]
        result = call("replay", tmp_path / "in.wav", "-o", tmp_path / "out.wav", *ALONE)
        assert result.returncode == 0, result.stderr
        assert tuple(future.result() for future in read) == estimates
    assert (tmp_path / "out-speaker1.wav").is_fifo()


def test_live_runs_between_standard_streams(mixture: Path, tmp_path: Path) -> None:
    result = call("live", "--input", "-", "--output", "-", "--json-lines", *ALONE, stdin=mixture.read_bytes())
    assert result.returncode == 0, result.stderr
    (tmp_path / "out.wav").write_bytes(result.stdout)
    assert soundfile.info(tmp_path / "out.wav").frames == round(48000 * SECONDS)
    assert json.loads(result.stderr.splitlines()[-1])["event"] == "ended"


def test_live_runs_without_a_standard_input(mixture: Path, tmp_path: Path) -> None:
    result = call("live", "--input", mixture, "--output", tmp_path / "out.wav", *ALONE, closed=[0])
    assert result.returncode == 0, result.stderr
    assert soundfile.info(tmp_path / "out.wav").frames == round(48000 * SECONDS)


def test_invalid_audio_from_a_pipe_is_refused(mixture: Path) -> None:
    cases = ((b"", b"not readable"), (b"no sound", b"not readable"), (mixture.read_bytes()[:-9], b"cut"))
    for content, message in cases:
        result = call("replay", "-", "-o", "-", *ALONE, stdin=content)
        assert result.returncode == 2
        assert result.stderr.startswith(b"kb-client: error: -: ")
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not result.stdout


@pytest.mark.parametrize(
    ("command_name", "fault"),
    [
        *(("replay", "full"), ("replay", "closed"), ("live", "closed pipe")),
        pytest.param("replay", "closed pipe", marks=pytest.mark.slow),
        pytest.param("live", "full", marks=pytest.mark.slow),
        pytest.param("live", "closed", marks=pytest.mark.slow),
    ],
)
def test_an_unwritable_standard_output_loses_no_file(
    command_name: str, fault: str, mixture: Path, estimates: tuple[bytes, bytes], tmp_path: Path
) -> None:
    flags = ["replay", mixture, "-o", tmp_path / "out.wav", "--report", tmp_path / "report.json"]
    if command_name == "live":
        flags = ["live", "--input", mixture, "--output", tmp_path / "out.wav", "--json-lines"]
    if fault == "full":
        target = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, target = os.pipe()
        os.close(reading)
    try:
        result = call(*flags, *ALONE, stdout=target, closed=[1] if fault == "closed" else [])
    finally:
        os.close(target)
    if command_name == "replay":
        assert ((tmp_path / "out-speaker1.wav").read_bytes(), (tmp_path / "out-speaker2.wav").read_bytes()) == estimates
        assert json.loads((tmp_path / "report.json").read_text())["sample_rate"] == 48000
    else:
        (tmp_path / "replayed.wav").write_bytes(estimates[0])
        played, expected = (soundfile.read(tmp_path / name)[0] for name in ("out.wav", "replayed.wav"))
        np.testing.assert_array_equal(played, expected)
    if fault == "closed":  # this is normal for a daemon
        assert (result.returncode, result.stderr) == (0, b"")
    else:
        assert result.returncode == 1
        assert result.stderr.startswith(b"kb-client: error: standard output: cannot write (")
        assert len(result.stderr.splitlines()) == 1


def test_a_full_disk_is_reported_and_a_replay_leaves_no_file(mixture: Path, tmp_path: Path) -> None:
    for name in ("out.wav", "out.flac"):
        result = call("replay", mixture, "-o", tmp_path / name, *ALONE, max_file_bytes=20_000)
        assert result.returncode == 2
        assert b"-speaker1.wav: cannot write (File too large)" in result.stderr.replace(b".flac", b".wav")
        assert not list(tmp_path.iterdir())
    result = call("replay", mixture, "-o", "/dev/full", *ALONE)
    assert (result.returncode, b"No space left" in result.stderr) == (2, True)


def test_a_full_disk_keeps_the_part_that_was_played_live(
    mixture: Path, estimates: tuple[bytes, bytes], tmp_path: Path
) -> None:
    result = call("live", "--input", mixture, "--output", tmp_path / "out.wav", *ALONE, max_file_bytes=60_000)
    assert result.returncode == 1
    assert b"out.wav: cannot write (File too large); the part that was played before is kept" in result.stderr
    (tmp_path / "replayed.wav").write_bytes(estimates[0])
    played, expected = (soundfile.read(tmp_path / name)[0] for name in ("out.wav", "replayed.wav"))
    assert 8000 < len(played) < 16000
    np.testing.assert_array_equal(played, expected[: len(played)])


def test_a_recording_that_fills_the_disk_loses_no_output_and_can_be_repeated(
    golden_bundle: Callable[[str], Path], ss_server: Server, mixture: Path, tmp_path: Path
) -> None:
    samples, _ = soundfile.read(mixture)
    soundfile.write(tmp_path / "in.wav", samples[:24000], 8000)  # at this rate, the output is smaller than a recording
    bundle = ["--bundle", golden_bundle("ss_delay6_compression2")]
    flags = ["--input", tmp_path / "in.wav", "--output", tmp_path / "out.wav", "--record", tmp_path / "recording"]
    result = call("live", *flags, *bundle, "--server", ss_server.address, max_file_bytes=300_000)
    assert result.returncode == 1
    assert b"recording: the recording is cut short after " in result.stderr
    assert b"File too large" in result.stderr
    assert soundfile.info(tmp_path / "out.wav").frames == 24000
    assert (tmp_path / "recording" / "hints.f32").stat().st_size > 0
    log = ["--frame-log", tmp_path / "recording" / "frames.csv"]
    again = call("replay", tmp_path / "recording" / "input.wav", "-o", tmp_path / "again.wav", *bundle, *log)
    assert again.returncode == 0, again.stderr
    assert soundfile.info(tmp_path / "again.wav").frames >= 128 * 50
    assert (tmp_path / "again.wav").read_bytes() == (tmp_path / "recording" / "output.wav").read_bytes()


@pytest.mark.parametrize("encoding", [pytest.param("utf-8", marks=pytest.mark.slow), "ascii"])
def test_any_file_name_can_be_read_written_and_printed(
    encoding: str, mixture: Path, estimates: tuple[bytes, bytes], tmp_path: Path
) -> None:
    name = os.fsdecode(b"b\xff[take 2][b]$x_{$\xe6\x97\xa5\xf0\x9f\x8e\xa4:mic:\x1b[31m.wav")
    (tmp_path / name).write_bytes(mixture.read_bytes())
    result = call(
        *("replay", tmp_path / name, "-o", tmp_path / f"out {name}", *ALONE),
        *("--report", tmp_path / f"{name}.json", "--plot", tmp_path / f"{name}.png"),
        variables={"PYTHONIOENCODING": encoding, "COLUMNS": "400"},
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    written = tmp_path / f"out {name.removesuffix('.wav')}-speaker1.wav"
    assert written.read_bytes() == estimates[0]
    assert r"\xff[take 2][b]$x_{$" in json.loads((tmp_path / f"{name}.json").read_text())["input"]
    output = result.stdout.decode(encoding)
    assert r"b\xff[take 2][b]$x_{$" in output
    assert ":mic:" in output
    assert "\x1b" not in output
