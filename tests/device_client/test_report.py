"""Tests for the report of a replay: its documented schema, its figures and its table."""

import json
import os
import pty
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import soundfile
import torch
from pydantic import BaseModel
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from knowledge_boosting.device_client.hints.stream import StreamEnd
from knowledge_boosting.device_client.replay.hint_log import HintLog
from knowledge_boosting.device_client.replay.loop import Run
from knowledge_boosting.device_client.replay.report import Report, lost_report
from tests.golden_cases import Golden
from tests.processes import Server, command, refusal_here, run

ROOT = Path(__file__).parents[2]
SS = "ss_delay6_compression2"


def field_paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the dotted paths of all fields that are not records."""
    paths = []
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        records = [kind for kind in kinds if issubclass(kind, BaseModel)]
        between = "*." if name == "quality" else ""
        paths += field_paths(records[0], f"{prefix}{name}.{between}") if records else [prefix + name]
    return paths


def test_every_field_is_documented() -> None:
    page = (ROOT / "docs/report.md").read_text()
    missing = [path for path in field_paths(Report) if f"`{path}`" not in page]
    # The four percentiles of a field have one common row.
    assert not [path for path in missing if f"`{path.rpartition('.')[0]}`" not in page]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained separation bundle."""
    folder = tmp_path_factory.mktemp("untrained")
    (folder / "config.json").write_text(
        json.dumps(
            {
                "task": "ss",
                "small": {"channels": 8, "hidden": 8, "blocks": 2},
                "large": {"channels": 16, "hidden": 16, "blocks": 2, "self_attention": True},
                "boosting": {"delay": 6},
            }
        )
    )
    result = run("kb-export", "--untrained", "--config", folder / "config.json", "-o", folder / "random")
    assert result.returncode == 0, result.stderr
    return folder / "random"


def test_all_outputs_of_an_untrained_bundle_are_marked(untrained: Path, tmp_path: Path) -> None:
    sources = [ROOT / "samples" / f"source{number}.flac" for number in (1, 2)]
    result = run(
        *(
            "kb-client",
            "replay",
            ROOT / "samples/mixture.flac",
            "-o",
            "out.wav",
            "--bundle",
            untrained,
            "--delay-ms",
            40,
        ),
        *("--jitter-ms", 10, "--reference", sources[0], "--reference", sources[1], "--with-large"),
        *("--report", "report.json", "--plot", "plot.svg"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "UNTRAINED" in result.stdout
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    assert report.bundle.untrained
    assert report.bundle.notice
    assert report.bundle.notice.startswith("UNTRAINED")
    assert "UNTRAINED" in (tmp_path / "plot.svg").read_text() or "UNTRAINED" in _svg_comment(tmp_path / "plot.svg")
    for path in report.outputs:
        with soundfile.SoundFile(tmp_path / path) as file:
            assert (file.frames, file.samplerate, file.channels) == (128000, 16000, 2)
            assert "UNTRAINED" in file.comment
    assert report.hints is not None
    assert report.hints.late > 0
    assert report.hints.bytes_up == 128064 * 2 * 2
    assert report.hints.bytes_down == 1000 * 8 * 97
    assert sum(report.hints.age_histogram_ms.values()) <= 1000

    # The expected SI-SDR of the mixture comes from another library.
    mixture, *references = (soundfile.read(path)[0].T for path in (ROOT / "samples/mixture.flac", *sources))
    expected = scale_invariant_signal_distortion_ratio(
        torch.tensor(np.stack([mixture, mixture])), torch.tensor(np.stack(references)), zero_mean=True
    ).mean()
    assert report.quality["mixture"].si_sdr == pytest.approx(float(expected), abs=0.01)
    assert set(report.quality) == {"mixture", "small_without_hints", "boosted", "large"}
    boosted = np.stack([soundfile.read(tmp_path / path)[0].T for path in report.outputs])
    scores = [
        float(
            scale_invariant_signal_distortion_ratio(
                torch.tensor(boosted[order]), torch.tensor(np.stack(references)), zero_mean=True
            ).mean()
        )
        for order in ([0, 1], [1, 0])
    ]
    assert report.quality["boosted"].si_sdr == pytest.approx(max(scores), abs=0.05)


def test_all_networks_side_by_side(untrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The comparison has the mixture, the references and all estimates, with the speakers in the references' order."""
    document = json.loads((untrained / "bundle.json").read_text())["model"]
    config = tmp_path / "alone.json"
    config.write_text(json.dumps({"task": "ss", "small": document["small"]}))
    assert run("kb-export", "--untrained", "--config", config, "-o", tmp_path / "alone").returncode == 0
    samples = {name: ROOT / "samples" / f"{name}.flac" for name in ("mixture", "source1", "source2")}
    call = ["kb-client", "replay", samples["mixture"], "-o", tmp_path / "out.wav", "--bundle", untrained]
    call += ["--alone", tmp_path / "alone", "--compare", tmp_path / "compared"]
    line = refusal_here("kb-client", capsys, *call[1:])
    assert "--alone: needs the true sources; give --reference" in line
    call += ["--reference", samples["source1"], "--reference", samples["source2"], "--with-large"]
    result = run(*map(str, call), "--report", tmp_path / "report.json")
    assert result.returncode == 0, result.stderr
    names = [f"{system}-speaker{number}" for system in ("alone", "boosted", "large", "reference") for number in (1, 2)]
    files = {path.stem: path for path in (tmp_path / "compared").glob("*.wav")}
    assert sorted(files) == sorted(["mixture", *names])
    assert (tmp_path / "compared" / "comparison.png").stat().st_size > 10_000
    sound = {name: soundfile.read(path)[0] for name, path in files.items()}
    for name, path in samples.items():
        written = name.replace("source", "reference-speaker")
        original = soundfile.read(path)[0]
        gain = np.sum(sound[written] * original) / np.sum(np.square(original))
        assert np.abs(sound[written] - gain * original).max() < 1e-4
    levels = [20 * np.log10(np.sqrt(np.mean(np.square(own)))) for own in sound.values()]
    assert -40 < levels[0] <= -22.9
    assert levels == pytest.approx([levels[0]] * len(levels), abs=0.1)  # all are equally loud
    assert all(np.abs(own).max() < 0.99 for own in sound.values())

    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    gained = report.quality["boosted"].si_sdri - report.quality["alone"].si_sdri
    first_row = next(line for line in result.stdout.splitlines() if "gain of hints" in line or "SI-SDR" in line)
    assert f"gain of hints  │ {gained:+.2f} dB over the network alone" in first_row
    for system in ("alone", "boosted", "large"):
        # The expected figure comes from another library, for the files in this order.
        score = scale_invariant_signal_distortion_ratio(
            torch.tensor(np.stack([sound[f"{system}-speaker{number}"].T for number in (1, 2)])),
            torch.tensor(np.stack([sound[f"reference-speaker{number}"].T for number in (1, 2)])),
            zero_mean=True,
        ).mean()
        assert report.quality[system].si_sdr == pytest.approx(float(score), abs=0.05)

    assert "is a pair; give --alone" in refusal_here("kb-client", capsys, *call[1:], "--alone", untrained)


@pytest.mark.parametrize(("delay", "age", "expected"), [(6, 6, 506), (1, 1, 501), (1, 50, 550)])
def test_hints_of_a_lost_server_are_in_use_until_the_last_one_has_come(delay: int, age: int, expected: int) -> None:
    """Hints on arrival can be used at an age of more than the smallest delay."""
    log = HintLog(frames=600, delay=delay)
    log.used[:500] = True
    log.age_used[:500] = age
    lost = lost_report(Run(log, hints_received=500, lost=StreamEnd("UNAVAILABLE", "gone")))
    assert lost is not None
    assert (lost.first_lost_hint, lost.first_frame_without) == (500, expected)


def _svg_comment(path: Path) -> str:
    """Return the text of a plot. matplotlib draws it as outlines, and repeats it in comments."""
    return " ".join(re.findall(r"<!--(.*?)-->", path.read_text(), re.DOTALL))


def test_a_long_run_shows_a_progress_bar_on_a_terminal(
    golden: Callable[[str], Golden], golden_bundle: Callable[[str], Path], ss_server: Server, tmp_path: Path
) -> None:
    samples = np.tile(golden(SS).mixture[0].numpy(), 4).T
    soundfile.write(tmp_path / "in.wav", samples, 16000, subtype="FLOAT")
    call: list[Any] = ["kb-client", "replay", tmp_path / "in.wav", "-o", tmp_path / "out.wav", "--clock", "real"]
    call += ["--bundle", golden_bundle(SS), "--server", ss_server.address]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(command(*call), stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as client:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert client.returncode == 0, shown
    assert b"replay" in shown
    assert b"%" in shown
