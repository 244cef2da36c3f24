"""The shipped bundles are complete, and they improve the sample mixture."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from knowledge_boosting.models.bundle import DEFAULT_BUNDLE, PRETRAINED, Bundle
from knowledge_boosting.models.config import Pair
from tests.processes import run

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.name for path in PRETRAINED.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_bundle_is_complete_and_documented(name: str) -> None:
    result = run("kb-export", "--check", name)
    assert result.returncode == 0, result.stderr
    manifest = Bundle(name).manifest
    assert manifest.name == name
    assert not manifest.untrained
    system = "boosted" if isinstance(manifest.model, Pair) else "alone"
    assert manifest.quality[f"{system}_si_sdri"] > 0.5
    card = (Bundle(name).directory / "README.md").read_text()
    for word in ("LibriSpeech", "CC BY 4.0", "Gardner", "## Recipe", "## Limits", "## Measured"):
        assert word in card, word


def test_no_speaker_of_the_validation_speech_was_in_training() -> None:
    listed = (ROOT / "configs/compact/train-utterances.txt").read_text().split()
    librispeech = {utterance.split("-")[0] for utterance in listed}
    assert len(librispeech) == 251
    validation = {path.parent.name for path in (ROOT / "samples/speech").glob("valid*/*/*")}
    assert len(validation) == 43
    for manifest in (bundle.manifest for bundle in Bundle.shipped()):
        # Voices of kb-make-voices count as their speakers. Speakers with too little speech were left out of training.
        trained_on = {name.partition("~")[0] for name in manifest.provenance.training_speakers}
        assert len(trained_on) > 200
        assert not trained_on & validation
        assert {name for name in trained_on if not name.startswith("so")} <= librispeech


def test_the_tracked_tree_stays_small() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 40 * 2**20


@pytest.mark.parametrize("task", ["ss", "tse"])
def test_the_demo_improves_the_mixture_without_clipping_or_clicks(task: str, tmp_path: Path) -> None:
    """Run the commands of ``make demo``; for separation with all defaults."""
    samples = ROOT / "samples"
    flags: list[object] = ["--reference", samples / "source1.flac"]
    if task == "ss":
        flags += ["--reference", samples / "source2.flac"]
    else:
        flags += ["--bundle", "tse-48ms-compact", "--enrollment", samples / "enrollment.npy"]
    result = run(
        "kb-client",
        *("replay", samples / "mixture.flac", "-o", tmp_path / "out.wav", "--delay-ms", 48, *flags),
        *("--alone", f"{task}-alone", "--with-large"),
        *("--compare", tmp_path / "demo", "--report", tmp_path / "report.json"),
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bundle"]["name"] == (DEFAULT_BUNDLE if task == "ss" else "tse-48ms-compact")
    # Hints of the last frames would be used after the end.
    assert report["hints"]["on_time"] >= report["hints"]["due"] - 6 > 900
    assert report["hints"]["late"] == 0
    assert report["clipped_samples"] == 0
    gains = {name: quality["si_sdri"] for name, quality in report["quality"].items()}
    assert gains["large"] > gains["boosted"] > 1
    assert gains["alone"] > 1
    references = sorted((tmp_path / "demo").glob("reference*.wav"))
    assert len(references) == (2 if task == "ss" else 1)
    for path in references:
        reference, _ = soundfile.read(path)
        jump = np.abs(np.diff(reference, axis=0)).max()
        for system in ("alone", "boosted", "large"):
            estimate, _ = soundfile.read(path.with_name(path.name.replace("reference", system)))
            assert np.abs(estimate).max() < 1
            assert np.abs(np.diff(estimate, axis=0)).max() <= 1.5 * jump, (system, path)
