"""Tests for a bundle of one large network alone with self-attention, in all commands."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import soundfile
import torch

from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.networks import load_small
from knowledge_boosting.training.evaluation.results import Results
from tests.processes import call_here

ROOT = Path(__file__).parents[2]
RATE, SECONDS = 16000, 1  # 125 frames
TINY = {"channels": 8, "hidden": 4, "blocks": 2, "heads": 2, "self_attention": True, "window": 7}


def write_data(root: Path) -> Path:
    """Write a data set of two mixtures of the sample speakers, and each mixture as a file in the same folder."""
    for item in (0, 1):
        folder = root / "data" / "test" / str(item)
        folder.mkdir(parents=True)
        stretch = slice(16000 + 32000 * item, 16000 + 32000 * item + RATE * SECONDS)
        for number in (0, 1):
            speech, _ = soundfile.read(ROOT / f"samples/source{number + 1}.flac")
            soundfile.write(folder / f"source{number:02d}.wav", speech[stretch], RATE, "FLOAT")
            torch.save(torch.randn(1, 256) / 16, folder / f"spk_id{number:02d}.pt")
        mixture, _ = soundfile.read(ROOT / "samples/mixture.flac")
        soundfile.write(root / f"mixture{item}.wav", mixture[stretch], RATE, "FLOAT")
    return root / "data"


@pytest.mark.parametrize(
    ("task", "published"),
    [
        ("ss", None),
        ("tse", None),
        pytest.param("ss", "BM-BS-500", marks=pytest.mark.slow),
        pytest.param("tse", "BM-TSE-500", marks=pytest.mark.slow),
    ],
)
def test_it_is_exported_replayed_and_evaluated(
    task: Literal["ss", "tse"], published: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, bundle, data = tmp_path / "config.json", tmp_path / "large", write_data(tmp_path)
    config.write_text(json.dumps({"task": task, "small": TINY}))
    if published is not None:
        config = ROOT / f"configs/baselines/{published}.json"
    assert call_here("kb-export", "--config", config, "--untrained", "-o", bundle) == 0

    # Without a server, ONNX Runtime must give the output of torch for the whole signal.
    replay = ["kb-client", "replay", tmp_path / "mixture0.wav", "-o", tmp_path / "out.wav", "--output-format", "float"]
    sources = [data / f"test/0/source{number:02d}.wav" for number in range(2 if task == "ss" else 1)]
    for source in sources:
        replay += ["--reference", source]
    embedding = ROOT / "samples/enrollment.npy"
    replay += ["--enrollment", embedding] if task == "tse" else []
    capsys.readouterr()
    assert call_here(*map(str, replay), "--bundle", bundle) == 0
    shown = capsys.readouterr().out
    assert "this network" in shown
    assert "small" not in shown
    opened = Bundle(bundle)
    network, manifest = load_small(opened), opened.manifest
    assert manifest.model.on_device.self_attention
    samples, _ = soundfile.read(tmp_path / "mixture0.wav", dtype="float32")
    padded = pad_to_frames(torch.from_numpy(samples.T)[None], manifest.model.framing)
    speaker = torch.from_numpy(np.load(embedding)).view(1, 256) if task == "tse" else None
    with torch.inference_mode():
        expected = network(padded, network.initial_state(1, speaker))[0][0, ..., : len(samples)].numpy()
    names = ["out-speaker1", "out-speaker2"] if task == "ss" else ["out"]
    for name, estimate in zip(names, expected, strict=True):
        output, _ = soundfile.read(tmp_path / f"{name}.wav", dtype="float32")
        np.testing.assert_allclose(output.T, estimate, rtol=0, atol=1e-4 * np.abs(expected).max())

    results = tmp_path / "results"
    arguments = ("--data", data, "--streaming", "--metrics", "si_sdri", "--workers", 1, "-o", results)
    assert call_here("kb-evaluate", bundle, *arguments) == 0
    measured = Results.model_validate_json((results / "results.json").read_text())
    assert [row.system for row in measured.rows] == ["mixture", "alone"]
    assert measured.streaming is not None
    assert measured.streaming.largest_difference_db < 0.05
