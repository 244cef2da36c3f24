"""Tests for invalid calls and files: one line with the fix, exit code 2, and no output file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.golden_cases import NAMES
from tests.processes import Server, refusal_here

Bundle = Callable[[str], Path]


def leftovers(folder: Path) -> list[str]:
    """Return the names of all files in a folder, including hidden temporary files."""
    return sorted(path.name for path in folder.iterdir())


SS, TSE = "ss_delay6_compression2", "tse_delay6"


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    path = tmp_path / "mixture.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (16000, 2)), 16000)
    return path


def write_raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_input_files_that_cannot_be_used(
    golden_bundle: Bundle, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = mixture.read_bytes()
    silence = np.zeros((0, 2))
    not_finite = np.full((100, 2), 0.1)
    not_finite[50, 1] = np.nan
    soundfile.write(tmp_path / "empty.wav", silence, 16000)
    soundfile.write(tmp_path / "nan.wav", not_finite, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "three.wav", np.zeros((100, 3)), 16000)
    soundfile.write(tmp_path / "whole.flac", np.random.default_rng(0).uniform(-1, 1, (16000, 2)), 16000)
    cases = {
        tmp_path / "none.wav": "no such file",
        tmp_path: "is a folder",
        write_raw(tmp_path / "text.wav", b"this is no audio at all"): "not readable as audio",
        write_raw(tmp_path / "zero.wav", b""): "not readable as audio",
        write_raw(tmp_path / "cut.wav", whole[:-4000]): "cut short, only 60044 of 64044 bytes",
        write_raw(tmp_path / "header.wav", whole[:44]): "cut short, only 44 of 64044 bytes",
        write_raw(tmp_path / "cut.flac", (tmp_path / "whole.flac").read_bytes()[:20000]): "",
        tmp_path / "empty.wav": "holds no samples",
        tmp_path / "nan.wav": "NaN or infinite",
        tmp_path / "three.wav": "has 3 channels; give 2",
    }
    before = leftovers(tmp_path)
    for path, expected in cases.items():
        line = refusal_here(
            "kb-client",
            capsys,
            "replay",
            path,
            "-o",
            tmp_path / "out.wav",
            "--bundle",
            golden_bundle(SS),
            "--server",
            "127.0.0.1:1",
        )
        assert line.startswith(f"{path}: "), line
        assert expected in line
    assert leftovers(tmp_path) == before


def test_flags_that_cannot_be_used(
    golden_bundle: Bundle, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_raw(tmp_path / "trace.csv", b"up_ms,down_ms\n1,2\n3,-4\n")
    good = write_raw(tmp_path / "good.csv", b"up_ms,down_ms\n1,2\n")
    out, ss, tse, other = tmp_path / "out.wav", golden_bundle(SS), golden_bundle(TSE), golden_bundle("ss_delay0")
    np.save(tmp_path / "short.npy", np.zeros(255, np.float32))
    np.save(tmp_path / "zeros.npy", np.zeros(256, np.float32))
    (tmp_path / "sub").mkdir()
    soundfile.write(tmp_path / "long.wav", np.zeros(31 * 8000), 8000)
    cases: list[tuple[list[object], str]] = [
        (["--bundle", ss], "Missing"),
        (["-o", out, "--bundle", ss, "--alone", ss], "--alone: needs the true sources; give --reference"),
        (
            ["-o", out, "--bundle", ss, "--compare", tmp_path / "both"],
            "--compare: needs the true sources; give --reference",
        ),
        (
            ["-o", out, "--bundle", ss, "--compare", tmp_path, "--reference", mixture, "--reference", mixture],
            "mixture.wav: would overwrite an input",
        ),
        (["-o", out, "--bundle", "nobody"], "nobody: no bundle of that name or path"),
        (["-o", out, "--bundle", tmp_path], "has no bundle.json"),
        (["-o", tmp_path / "out.xyz", "--bundle", ss], "must end in .wav or .flac"),
        (["-o", tmp_path / "out.flac", "--bundle", ss, "--output-format", "float"], "cannot hold float"),
        (["-o", tmp_path / "no" / "out.wav", "--bundle", ss], "no folder"),
        (["-o", mixture, "--bundle", tse, "--enrollment", "x.npy"], "would overwrite an input"),
        (["-o", out, "--bundle", ss, "--report", tmp_path / "no" / "r.json"], "no folder"),
        (["-o", out, "--bundle", ss, "--plot", tmp_path / "p.doc"], "the name of a plot must end in"),
        (["-o", out, "--bundle", ss, "--network", "pigeon"], "must be one of lan, wifi"),
        (["-o", out, "--bundle", ss, "--delay-ms", "-1"], "--delay-ms"),
        (["-o", out, "--bundle", ss, "--loss", "1"], "--loss"),
        (["-o", out, "--bundle", ss, "--jitter-ms", "x"], "--jitter-ms"),
        (["-o", out, "--bundle", ss, "--clock", "sun"], "--clock"),
        (["-o", out, "--bundle", ss, "--clock", "real", "--server-ms", "3"], "--server-ms"),
        (["-o", out, "--bundle", ss, "--trace", trace, "--loss", "0.1"], "--trace defines all network conditions"),
        (["-o", out, "--bundle", ss, "--trace", trace], "trace.csv: line 3"),
        (["-o", out, "--bundle", ss, "--enrollment", mixture], "leave out --enrollment"),
        (["-o", out, "--bundle", tse], "give --enrollment"),
        (["-o", out, "--bundle", tse, "--enrollment", tmp_path / "short.npy"], "256 finite numbers"),
        (
            ["-o", out, "--bundle", tse, "--enrollment", tmp_path / "zeros.npy"],
            "256 finite numbers, not all of them zero",
        ),
        (["-o", out, "--bundle", tse, "--enrollment", tmp_path / "long.wav"], "31.0 s; give 1 to 30 s"),
        (["-o", out, "--bundle", ss, "--reference", mixture], "give it 2 times"),
        (["-o", out, "--bundle", ss, "--server", "nowhere"], "must be HOST:PORT"),
        (["-o", out, "--bundle", ss, "--wrong"], "--wrong"),
        (["-o", out, "--bundle", ss, "--report", tmp_path / "out-speaker1.wav"], "two outputs have this name"),
        (
            ["-o", out, "--bundle", ss, "--report", tmp_path / "p.png", "--plot", tmp_path / "p.png"],
            "two outputs have this name",
        ),
        (["-o", out, "--bundle", ss, "--report", good, "--trace", good], "would overwrite an input"),
        (["-o", out, "--bundle", ss, "--report", ss / "bundle.json"], "would overwrite an input"),
        (
            [
                *("-o", out, "--bundle", ss, "--report", other / "bundle.json", "--alone", other),
                *("--reference", mixture, "--reference", mixture),
            ],
            "would overwrite an input",
        ),
        (["-o", out, "--bundle", ss, "--report", tmp_path], "is a folder"),
        (["-o", tmp_path / f"{'o' * 260}.wav", "--bundle", ss], "File name too long"),
        (["-o", out, "--bundle", "b" * 300], "File name too long"),
        (
            [
                *("-o", tmp_path / "sub/alone.wav", "--bundle", ss, "--compare", tmp_path / "sub"),
                *("--reference", mixture, "--reference", mixture, "--report", tmp_path / "sub/boosted-speaker2.wav"),
            ],
            "alone-speaker1.wav: two outputs have this name",
        ),
    ]
    before = leftovers(tmp_path)
    for flags, expected in cases:
        line = refusal_here("kb-client", capsys, "replay", mixture, *flags)
        assert expected in line, line
    assert leftovers(tmp_path) == before


def test_references_that_cannot_be_used(
    golden_bundle: Bundle, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "short.wav", np.ones((100, 2)), 16000)
    soundfile.write(tmp_path / "rate.wav", np.ones((16000, 2)), 8000)
    soundfile.write(tmp_path / "silent.wav", np.zeros((16000, 2)), 16000)
    for name, expected in (("short", "length of"), ("rate", "sample rate"), ("silent", "is silent")):
        path = tmp_path / f"{name}.wav"
        flags = ["-o", tmp_path / "o.wav", "--bundle", golden_bundle(SS), "--reference", mixture, "--reference", path]
        line = refusal_here("kb-client", capsys, "replay", mixture, *flags)
        assert line.startswith(f"{path}: ")
        assert expected in line


@pytest.mark.parametrize("part", ["small.onnx", "small.safetensors", "bundle.json", "schema", "id"])
def test_a_changed_bundle_is_refused(
    part: str, golden_bundle: Bundle, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in golden_bundle(SS).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    manifest = copy / "bundle.json"
    document = json.loads(manifest.read_text())
    flags: list[object] = ["-o", tmp_path / "o.wav", "--bundle", copy, "--server", "127.0.0.1:1"]
    if part.startswith("small"):
        weights = bytearray((copy / part).read_bytes())
        weights[-1] ^= 1
        (copy / part).write_bytes(weights)
        expected = "digest differs"
        # Each engine checks only the file that it reads.
        flags += ["--engine", "onnx" if part == "small.onnx" else "torch"]
    elif part == "bundle.json":
        manifest.write_text("{")
        expected = "not readable as JSON"
    elif part == "schema":
        manifest.write_text(json.dumps({**document, "schema_version": 3}))
        expected = "schema_version is 3"
    else:
        document["model"]["boosting"]["delay"] = 5
        manifest.write_text(json.dumps(document))
        expected = "id does not match"
    assert expected in refusal_here("kb-client", capsys, "replay", mixture, *flags)


def test_a_server_that_does_not_answer(
    golden_bundle: Bundle, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-o", tmp_path / "o.wav", "--bundle", golden_bundle(SS), "--server", "127.0.0.1:1"]
    line = refusal_here("kb-client", capsys, "replay", mixture, *flags)
    assert line == "--server 127.0.0.1:1: no answer; check that kb-server runs there and that the port is open"


def test_a_server_with_another_bundle(
    golden_bundle: Bundle, mixture: Path, tmp_path: Path, ss_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    other = next(name for name in NAMES if name.startswith("ss") and name != SS)
    flags = ["-o", tmp_path / "o.wav", "--bundle", golden_bundle(other), "--server", ss_server.address]
    line = refusal_here("kb-client", capsys, "replay", mixture, *flags)
    assert "FAILED_PRECONDITION" in line
    assert "config.bundle_id" in line
    assert not list(tmp_path.glob("o*"))
