"""Tests for ``kb-client live`` with files as input and output, its recording, and the repetition of a session."""

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.device_client.live.recording import FrameLog, Recorder
from knowledge_boosting.models.manifest import read_manifest
from tests.golden_cases import Golden
from tests.processes import Server, environment, refusal_here, run

SS, TSE = "ss_delay6_compression2", "tse_delay6"
GetGolden = Callable[[str], Golden]
GetBundle = Callable[[str], Path]


@pytest.fixture(scope="module")
def recorded(
    golden: GetGolden, golden_bundle: GetBundle, ss_server: Server, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, object]]]:
    """Record a session of three seconds. Return its folder and the lines that it printed."""
    folder = tmp_path_factory.mktemp("live")
    samples = np.tile(golden(SS).mixture[0].numpy(), 3)
    soundfile.write(folder / "mixture.wav", samples.T, 16000, subtype="FLOAT")
    result = run(
        *("kb-client", "live", "--bundle", golden_bundle(SS), "--server", ss_server.address, "--json-lines"),
        *("--input", folder / "mixture.wav", "--output", folder / "played.wav", "--record", folder / "recording"),
        *("--play", "both"),
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return folder, [json.loads(line) for line in result.stdout.splitlines()]


def samples_of(path: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    samples: np.ndarray[tuple[int, int], np.dtype[np.float32]] = soundfile.read(path, dtype="float32", always_2d=True)[
        0
    ]
    return samples


def test_a_session_prints_its_figures(recorded: tuple[Path, list[dict[str, object]]], ss_server: Server) -> None:
    folder, lines = recorded
    frames = -(-len(samples_of(folder / "mixture.wav")) // 128)
    assert len(samples_of(folder / "played.wav")) == len(samples_of(folder / "mixture.wav"))
    assert any(line["event"] == "server" and line["server"] == ss_server.address for line in lines)
    last = lines[-1]
    assert (last["event"], last["frames"], last["play"]) == ("ended", frames, "both")
    counts = [last[name] for name in ("hints_on_time", "hints_late", "hints_missing")]
    assert sum(count for count in counts if isinstance(count, int)) == frames - 6
    with (folder / "recording" / "frames.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["frame"]) for row in rows] == list(range(frames))
    assert sum(int(row["hint"]) for row in rows) == last["hints_on_time"] > 10  # type: ignore[operator]
    assert all(bool(row["age_ms"]) == (row["hint"] == "1") for row in rows)


def test_a_recording_has_the_input_and_the_played_output(recorded: tuple[Path, list[dict[str, object]]]) -> None:
    folder, _ = recorded
    mixture = samples_of(folder / "mixture.wav")
    captured = samples_of(folder / "recording" / "input.wav")
    np.testing.assert_array_equal(captured[: len(mixture)], mixture)
    assert not captured[len(mixture) :].any()
    played = samples_of(folder / "recording" / "output.wav")
    np.testing.assert_array_equal(played[: len(mixture)], samples_of(folder / "played.wav"))


def test_a_repeated_session_is_bit_identical(
    recorded: tuple[Path, list[dict[str, object]]], golden_bundle: GetBundle, tmp_path: Path
) -> None:
    recording = recorded[0] / "recording"
    flags = ["--bundle", golden_bundle(SS), "--frame-log", recording / "frames.csv"]
    result = run("kb-client", "replay", recording / "input.wav", "-o", tmp_path / "again.wav", *flags)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again.wav").read_bytes() == (recording / "output.wav").read_bytes()
    # Other hints give another output, so the equality above is not trivial.
    changed = tmp_path / "changed"
    shutil.copytree(recording, changed)
    hints = np.fromfile(changed / "hints.f32", "<f4")
    (-hints).tofile(changed / "hints.f32")
    flags[-1] = changed / "frames.csv"
    result = run("kb-client", "replay", recording / "input.wav", "-o", tmp_path / "other.wav", *flags)
    assert result.returncode == 0, result.stderr
    assert np.abs(samples_of(tmp_path / "other.wav") - samples_of(tmp_path / "again.wav")).max() > 1e-3


def test_invalid_recordings_are_refused(
    recorded: tuple[Path, list[dict[str, object]]],
    golden_bundle: GetBundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recording, bundle = recorded[0] / "recording", golden_bundle(SS)
    source, log = recording / "input.wav", recording / "frames.csv"
    short = tmp_path / "short"
    shutil.copytree(recording, short)
    (short / "hints.f32").write_bytes((recording / "hints.f32").read_bytes()[:-4])
    (tmp_path / "text.csv").write_text("frame,hint\n0,yes\n")
    shutil.copy(recording / "session.json", tmp_path)
    # The number of hints is unchanged, but the first one is at a frame that cannot have a hint.
    early = tmp_path / "early"
    shutil.copytree(recording, early)
    lines = log.read_text().splitlines()
    last = max(number for number, line in enumerate(lines) if line.split(",")[1] == "1")
    lines[1], lines[last] = lines[1].replace("0,0,", "0,1,", 1) + "6", lines[last].replace(",1,", ",0,", 1)[:-1]
    (early / "frames.csv").write_text("\n".join(lines) + "\n")
    voice = tmp_path / "voice"
    shutil.copytree(recording, voice)
    session = json.loads((recording / "session.json").read_text()) | {"speaker_embedding": [0.1] * 256}
    (voice / "session.json").write_text(json.dumps(session))
    cases: list[tuple[list[object], str]] = [
        ([source, "--bundle", bundle, "--frame-log", voice / "frames.csv"], "no usable speaker embedding"),
        ([source, "--bundle", bundle, "--frame-log", short / "frames.csv"], "does not contain"),
        ([source, "--bundle", bundle, "--frame-log", early / "frames.csv"], "at frames that cannot have one"),
        ([source, "--bundle", bundle, "--frame-log", tmp_path / "text.csv"], "is not a frame log"),
        ([source, "--bundle", bundle, "--frame-log", tmp_path / "none.csv"], "no such file"),
        ([source, "--bundle", golden_bundle("ss_delay0"), "--frame-log", log], "give that bundle as --bundle"),
        (
            [recorded[0] / "mixture.wav", "--bundle", bundle, "--frame-log", log],
            "give the input.wav from the same folder",
        ),
        ([source, "--bundle", bundle, "--frame-log", log, "--delay-ms", 3], "give only"),
    ]
    before = sorted(tmp_path.iterdir())
    for flags, expected in cases:
        line = refusal_here("kb-client", capsys, "replay", *flags, "-o", tmp_path / "o.wav")
        assert expected in line, line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("embedding", "first", "then", "fault"),
    [
        ([0.1] * 256, "1", "bypass", None),
        (None, "1", "1", "no usable speaker embedding"),
        ([0.1] * 3, "1", "1", "no usable speaker embedding"),
        ([0.0] * 256, "1", "1", "no usable speaker embedding"),
        ([0.1] * 256, "both", "1", "plays a speaker that the bundle does not have"),
        ([0.1] * 256, "1", "2", "plays a speaker that the bundle does not have"),
    ],
)
def test_damaged_sessions_of_one_speaker_are_refused(
    embedding: list[float] | None,
    first: str,
    then: str,
    fault: str | None,
    golden_bundle: GetBundle,
    tmp_path: Path,
) -> None:
    manifest = read_manifest(golden_bundle(TSE))
    session = {"bundle_name": TSE, "bundle_id": manifest.id, "play": first, "speaker_embedding": embedding}
    (tmp_path / "session.json").write_text(json.dumps(session))
    (tmp_path / "frames.csv").write_text(f"frame,hint,age_ms,compute_ms,play,ages\n0,0,,1.000,{then},\n")
    (tmp_path / "hints.f32").touch()
    with pytest.raises(InputError, match=fault) if fault is not None else nullcontext():
        FrameLog(tmp_path / "frames.csv", manifest)


def test_a_recording_ends_before_a_wav_file_is_full(
    golden_bundle: GetBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knowledge_boosting.device_client.live.recording.LARGEST_WAV", 4 * 2 * 128 * 20)
    manifest = read_manifest(golden_bundle(SS))
    recorder = Recorder(tmp_path / "session", manifest, None, "1")
    chunk = np.full((2, 128), 0.5, np.float32)
    record = np.zeros(1, [("age_ms", "f8"), ("compute_ms", "f8")])[0]
    for frame in range(30):
        recorder.put(np.full((2, 192), 0.5, np.float32) if frame == 0 else chunk, chunk, [], record, "1")
    recorder.close()
    assert recorder.error is not None
    assert "is cut short after 19 frames (a WAV file holds at most 4 GiB)" in recorder.error
    assert len(samples_of(tmp_path / "session" / "output.wav")) == 19 * 128
    assert len(samples_of(tmp_path / "session" / "input.wav")) == 19 * 128 + 64


def test_invalid_calls_are_refused(
    golden_bundle: GetBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "in.wav", np.zeros((1600, 2)), 16000)
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copy(golden_bundle(SS) / "bundle.json", tmp_path / "bare")
    files: list[object] = ["--input", tmp_path / "in.wav", "--output", tmp_path / "out.wav"]
    ss, tse = golden_bundle(SS), golden_bundle(TSE)
    cases: list[tuple[list[object], str]] = [
        ([*files, "--bundle", tmp_path / "bare"], "small.onnx: no such file"),
        ([*files, "--bundle", "ss-alone", "--server", "a:1"], "leave out --server"),
        ([*files, "--bundle", ss, "--server", "nowhere"], "must be HOST:PORT"),
        ([*files, "--bundle", ss, "--speaker", "anna"], "leave out --speaker"),
        ([*files, "--bundle", tse], "give --speaker"),
        ([*files, "--bundle", tse, "--speaker", "nobody"], "not enrolled"),
        ([*files, "--bundle", tse, "--speaker", "../x"], "can contain only letters"),
        ([*files, "--bundle", ss, "--record", tmp_path / "bare"], "exists already"),
        ([*files, "--bundle", ss, "--rate", 48000], "--rate is the rate of devices"),
        ([*files[:2], "--bundle", ss], "is a file; give a file as --output too"),
        ([*files[:2], "--bundle", ss, "--output", tmp_path / "o.ogg"], "must end in .wav"),
        (["--bundle", ss, "--virtual-mic", "m", "--output", "x"], "leave out --output"),
        (["--bundle", ss, "--input", "x.mp3"], "--input x.mp3: is a file; give a file as --output too"),
        (["--bundle", ss, "--input", "x.mp3", "--output", "y.wav"], "x.mp3: no such file"),
        (["--bundle", ss, "--output", "y.wav"], "--output y.wav: is a file; give a sound file as --input too"),
        ([*files[:2], "--output", tmp_path / "in.wav", "--bundle", ss], "would overwrite an input"),
        ([*files, "--bundle", ss, "--record", tmp_path / "in.wav"], "exists already"),
        (
            [*files[:2], "--output", tmp_path / "empty/output.wav", "--record", tmp_path / "empty", "--bundle", ss],
            "two outputs have this name",
        ),
        ([*files[:2], "--output", tmp_path / "no" / "o.wav", "--bundle", ss], "no folder"),
        ([*files[:2], "--output", tmp_path / f"{'o' * 260}.wav", "--bundle", ss], "File name too long"),
        (["--input", f"{'i' * 300}.wav", *files[2:], "--bundle", ss], "File name too long"),
    ]
    before = sorted(tmp_path.iterdir())
    for flags, expected in cases:
        line = refusal_here("kb-client", capsys, "live", *flags)
        assert expected in line, line
    assert sorted(tmp_path.iterdir()) == before


def call_without(module: str, tmp_path: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run kb-client on a system where sounddevice or PortAudio is missing."""
    broken = {"sounddevice": "raise ImportError('no')", "portaudio": "raise OSError('PortAudio library not found')"}
    (tmp_path / "sounddevice.py").write_text(broken[module] + "\n")
    call = [sys.executable, "-m", "knowledge_boosting.device_client.main", *map(str, arguments)]
    path = f"{tmp_path}:{Path(__file__).parents[2]}"
    return subprocess.run(
        call, env={**environment(), "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("missing", "fix"), [("portaudio", "apt-get install libportaudio2"), ("sounddevice", "pip install")]
)
def test_without_a_sound_system_the_error_says_what_to_install(
    missing: str, fix: str, golden_bundle: GetBundle, tmp_path: Path
) -> None:
    for call in (["devices"], ["live", "--bundle", golden_bundle(SS)]):
        result = call_without(missing, tmp_path, *call)
        assert result.returncode == 2
        assert fix in result.stderr
        assert len(result.stderr.splitlines()) == 1
    # With files, no sound system is needed.
    soundfile.write(tmp_path / "in.wav", np.zeros((1600, 2)), 16000)
    files = ["--input", tmp_path / "in.wav", "--output", tmp_path / "out.wav"]
    result = call_without(missing, tmp_path, "live", "--bundle", golden_bundle(SS), *files)
    assert result.returncode == 0, result.stderr
    assert len(samples_of(tmp_path / "out.wav")) == 1600
