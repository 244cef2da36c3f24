"""kb-train trains tiny networks: runs are interrupted, resumed, shared by processes, and fitted to data."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import redirect_stderr, redirect_stdout
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.arrival_fusion import NEVER
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import build, read_checkpoint
from knowledge_boosting.models.config import MODEL, Alone
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.networks import load_pair, write_bundle
from knowledge_boosting.models.pair import BoostedPair, SmallModel
from knowledge_boosting.training.config import FolderData, read_training_config
from knowledge_boosting.training.data.loading import Batch
from knowledge_boosting.training.data.mixture_folder import MixtureFolder
from knowledge_boosting.training.evaluation.metrics import si_sdr_improvement
from knowledge_boosting.training.evaluation.si_sdr import permuted_si_sdr, si_sdr
from knowledge_boosting.training.learning import trainer
from knowledge_boosting.training.learning.module import TrainingModule
from tests.processes import PATIENCE, call_here, command, environment, refusal, refusal_here, run

SAMPLES = Path(__file__).parents[2] / "samples"
PAIR: dict[str, Any] = {
    "task": "ss",
    "small": {"channels": 8, "hidden": 8, "blocks": 2},
    "large": {"channels": 8, "hidden": 8, "blocks": 2, "self_attention": True},
    "boosting": {"delay": 6},
}


def write_dataset(root: Path, items: int, seconds: float, splits: tuple[str, ...] = ("train", "val")) -> Path:
    """Cut the sample sources into items in the published layout."""
    sources = [soundfile.read(SAMPLES / f"source{number}.flac")[0] for number in (1, 2)]
    length = round(16000 * seconds)
    for split in splits:
        for item in range(items):
            folder = root / split / f"{item:03d}"
            folder.mkdir(parents=True)
            for number, source in enumerate(sources):
                start = 4000 + item * (110000 // items)
                soundfile.write(folder / f"source{number:02d}.wav", source[start : start + length], 16000)
                torch.save(torch.full((1, 256), 0.1 * (number + 1)), folder / f"spk_id{number:02d}.pt")
    return root


def write_config(folder: Path, data: Path, **changes: Any) -> Path:
    document = {
        "model": PAIR,
        "train": {"root": str(data), "split": "train"},
        "validation": {"root": str(data), "split": "val", "items": 2},
        "test": {"root": str(data), "split": "val", "items": 2},
        "epochs": 3,
        "batch_size": 2,
        "workers": 0,
    }
    for split in ("train", "validation", "test"):
        document[split] = {"kind": "folder", **document[split]}  # type: ignore[dict-item]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**document, **changes}))
    return path


def weights(checkpoint: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def largest_difference(first: Path, second: Path) -> float:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def train(*flags: object) -> None:
    if "--devices" in flags:  # several processes, which this one cannot be one of
        result = run("kb-train", *flags)
        code, errors = result.returncode, result.stderr
    else:
        with redirect_stderr(io.StringIO()) as printed, redirect_stdout(io.StringIO()):
            code = call_here("kb-train", *flags)
        errors = printed.getvalue()
    assert code == 0, errors
    assert re.fullmatch(r"kb-train: (LSTMs of \d+ units by (the C\+\+ library|torch)[^\n;]*(; )?)+\n", errors)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), 7, 0.25)


@pytest.fixture(scope="module")
def whole_run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 epochs of 3 steps without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder, dataset, epochs=10)
    train("--config", config, "--run_dir", folder / "run")
    return folder


def test_a_run_leaves_checkpoints_logs_and_its_configuration(
    whole_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = whole_run / "run"
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 30
    assert 1 <= len(list((folder / "best").glob("*.ckpt"))) <= 5
    assert list((folder / "tensorboard").glob("events*"))
    assert read_training_config(folder / "config.json") == read_training_config(whole_run / "config.json")
    line = refusal_here("kb-train", capsys, "--config", whole_run / "config.json", "--run_dir", folder)
    assert "holds a run already" in line


@pytest.mark.parametrize(("minutes", "steps"), [(2, 5), (1.25, 3)])  # in an epoch, and at the end of the first one
def test_a_run_stops_when_its_time_is_over(
    minutes: float,
    steps: int,
    whole_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # It looks at the time when training starts, and then after every update: 0, 25, 50, ... seconds.
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=count(0, 25).__next__))
    call = ["--config", whole_run / "config.json", "--run_dir", tmp_path / "run"]
    assert call_here("kb-train", *call, "--minutes", minutes) == 0
    assert capsys.readouterr().err.endswith(f"kb-train: stopped at step {steps}; --resume continues from there\n")
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == steps


def test_a_device_with_too_little_memory_is_named(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def training_step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(TrainingModule, "training_step", training_step)
    call = ["--config", whole_run / "config.json", "--run_dir", tmp_path / "run"]
    line = refusal_here("kb-train", capsys, *call, code=1)
    expected = "not enough memory on cpu (CUDA out of memory. Tried to allocate 2.00 GiB.); lower batch_size or"
    assert line.startswith(expected)


def test_an_interrupted_run_continues_exactly(whole_run: Path, tmp_path: Path) -> None:
    """SIGTERM can arrive at the start, during an epoch or never; the weights after the same steps are the same."""
    document = json.loads((whole_run / "config.json").read_text()) | {"workers": 1}
    (tmp_path / "config.json").write_text(json.dumps(document))
    call = ["--config", tmp_path / "config.json", "--run_dir", tmp_path / "run"]
    process = subprocess.Popen(
        command("kb-train", *call), env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE
    while not list((tmp_path / "run").glob("best/epoch*")):  # wait for the second epoch
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)  # to the worker too, like a service manager or a terminal
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    stopped = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"]
    assert 3 <= stopped <= 30
    assert (f"stopped at step {stopped}" in errors) == (stopped < 30)
    train(*call, "--resume")
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 30
    assert largest_difference(tmp_path / "run" / "last.ckpt", whole_run / "run" / "last.ckpt") < 1e-6


def test_a_run_continues_without_its_initial_weights(dataset: Path, tmp_path: Path) -> None:
    """Another machine has only the repository, the data and one checkpoint file."""
    first = tmp_path / "first"
    torch.manual_seed(0)
    alone = MODEL.validate_python({"task": "ss", "small": PAIR["small"]})
    torch.save(build(alone).state_dict(), tmp_path / "small.pt")
    config = write_config(first, dataset, epochs=1, warm_start=str(tmp_path / "small.pt"))
    result = run("kb-train", "--config", config, "--run_dir", first / "run")
    assert result.returncode == 0, result.stderr
    assert "small.pt: loaded, except for" in result.stderr
    (tmp_path / "small.pt").unlink()
    other = tmp_path / "other"
    config = write_config(other, dataset, epochs=2, warm_start=str(tmp_path / "small.pt"))
    train("--config", config, "--run_dir", other / "run", "--ckpt", first / "run" / "last.ckpt")
    assert torch.load(other / "run" / "last.ckpt", weights_only=True)["global_step"] == 6
    assert "small.pt: no such file" in refusal("kb-train", "--config", config, "--run_dir", tmp_path / "third")


def test_training_speakers_are_recorded_and_never_measured_on(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    write_speakers(data / "train", "19", "26")
    write_speakers(data / "val", "26", "27")
    config = write_config(tmp_path, data, epochs=1)
    line = refusal_here("kb-train", capsys, "--config", config, "--run_dir", tmp_path / "run")
    assert "val: speaker 26 was in the training data too" in line
    write_speakers(data / "val", "27", "28")
    train("--config", config, "--run_dir", tmp_path / "run")
    last = tmp_path / "run" / "last.ckpt"
    assert torch.load(last, weights_only=True)["training_speakers"] == ["19", "26"]

    # A run that starts from these weights has these training speakers too.
    write_speakers(data / "train", "30", "31")
    other = torch.load(last, weights_only=True) | {"training_speakers": ["50"]}
    torch.save(other, tmp_path / "other.ckpt")
    sources = {"initial_checkpoint": str(last), "averaged_with": str(tmp_path / "other.ckpt")}
    config = write_config(tmp_path / "next", data, epochs=1, **sources)
    train("--config", config, "--run_dir", tmp_path / "next" / "run")
    last = tmp_path / "next" / "run" / "last.ckpt"
    assert torch.load(last, weights_only=True)["training_speakers"] == ["19", "26", "30", "31", "50"]

    bundle = tmp_path / "bundle"
    assert run("kb-export", "--config", config, "--checkpoint", last, "-o", bundle).returncode == 0
    assert json.loads((bundle / "bundle.json").read_text())["provenance"]["training_speakers"][0] == "19"
    write_speakers(data / "val", "31", "32")
    for model in (bundle, tmp_path / "next" / "run"):
        line = refusal("kb-evaluate", model, "--data", data, "--split", "val", "-o", tmp_path / "out")
        assert "val: speaker 31 was in the training data too" in line
    line = refusal("kb-train", "--config", config, "--run_dir", tmp_path / "next" / "run", "--test")
    assert "val: speaker 31 was in the training data too" in line


def write_speakers(split: Path, *speakers: str) -> None:
    (split / "metadata.csv").write_text(f"item,speaker00,speaker01\n000000,{speakers[0]},{speakers[1]}\n")


def test_a_run_can_start_from_a_bundle(dataset: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    pair = build(MODEL.validate_python(PAIR))
    assert isinstance(pair, BoostedPair)
    bundle = tmp_path / "pair"
    write_bundle(bundle, pair, pair.config, untrained=True, source="test", configuration="config.json")

    def started(name: str, model: dict[str, Any]) -> dict[str, Tensor]:
        config = write_config(tmp_path / name, dataset, model=model, initial_checkpoint=str(bundle))
        return TrainingModule(read_training_config(config)).model.state_dict()

    expected = pair.state_dict()
    for level in (False, True):  # which has no weights
        whole = started(f"whole-{level}", {**PAIR, "running_level": level})
        assert whole.keys() == expected.keys()
        assert all(torch.equal(whole[name], expected[name]) for name in expected)
    alone = started("alone", {"task": "ss", "small": PAIR["large"], "running_level": True})
    for name, value in pair.large.network.state_dict().items():
        assert torch.equal(alone[f"small.network.{name}"], value)
    for other in ({"task": "ss", "small": PAIR["small"]}, {"task": "tse", "small": PAIR["large"]}):
        with pytest.raises(InputError, match="other networks"):
            started(f"other-{other['task']}", other)


@pytest.mark.slow
def test_a_guided_run_continues_and_becomes_a_pair_without_guidance(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, dataset, epochs=2, guidance=5.0, ideal_hints=True, freeze_large=True)
    whole, half = tmp_path / "whole", tmp_path / "half"
    train("--config", config, "--run_dir", whole)
    shorter = write_config(tmp_path / "shorter", dataset, epochs=1, guidance=5.0, ideal_hints=True, freeze_large=True)
    train("--config", shorter, "--run_dir", half)
    train("--config", config, "--run_dir", tmp_path / "on", "--ckpt", half / "last.ckpt")
    assert largest_difference(whole / "last.ckpt", tmp_path / "on" / "last.ckpt") < 1e-6
    assert any(name.startswith("guidance.") for name in weights(whole / "last.ckpt"))
    pair = read_checkpoint(whole / "last.ckpt", read_training_config(config).model)
    assert isinstance(pair, BoostedPair)
    begun = weights(half / "last.ckpt")
    for name, value in weights(whole / "last.ckpt").items():
        if name.startswith("model.large.network."):
            assert torch.equal(value, begun[name]), name  # frozen


def test_a_run_with_whitening_becomes_a_model_without_whitening(dataset: Path, tmp_path: Path) -> None:
    model = {**PAIR, "task": "tse"}
    changes = {"model": model, "speaker_components": 1, "speaker_noise": 0.2, "guidance": 5.0, "learning_rate": 0.01}
    config = write_config(tmp_path, dataset, epochs=2, **changes)
    train("--config", config, "--run_dir", tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    module = TrainingModule(read_training_config(config))
    module.load_state_dict(state)
    assert module.whitening is not None
    embeddings = torch.stack([torch.full((256,), 0.1), torch.full((256,), 0.2)])
    whitened = module.whitening(embeddings)
    # Two speakers differ in one component, by one standard deviation on each side of the mean.
    assert sorted(whitened.norm(dim=1).tolist()) == pytest.approx([1, 1], abs=1e-3)
    torch.testing.assert_close(whitened[0], -whitened[1], rtol=0, atol=1e-3)
    for training in (False, True):
        module.train(training)
        batch = module.on_after_batch_transfer({"names": [], "speaker_embedding": embeddings[:1].repeat(2000, 1)}, 0)
        noise = (batch["speaker_embedding"] - whitened[0]).std(0)
        assert noise[:-1].max() == 0
        assert noise[-1].item() == pytest.approx(0.2 * training, rel=0.1)

    mixture = 0.1 * torch.randn(2, 2, 4000, generator=torch.Generator().manual_seed(0))
    pair = read_checkpoint(tmp_path / "run" / "last.ckpt", read_training_config(config).model)
    module.eval()
    expected = module.estimates({"names": [], "mixture": mixture, "speaker_embedding": whitened})
    found = pair(mixture, embeddings)
    assert not torch.equal(found.small[0], found.small[1])
    for name in ("small", "large"):
        torch.testing.assert_close(getattr(found, name), expected[name], rtol=1e-3, atol=1e-4)

    # A run that starts from the checkpoint computes the same, and a resumed run equals one without interruption.
    again = write_config(
        tmp_path / "again", dataset, **{**changes, "initial_checkpoint": str(tmp_path / "run" / "last.ckpt")}
    )
    started = TrainingModule(read_training_config(again))
    started.whiten_speakers(embeddings)
    started.eval()
    torch.testing.assert_close(
        started.estimates({"names": [], "mixture": mixture, "speaker_embedding": whitened})["small"],
        expected["small"],
        rtol=1e-3,
        atol=1e-4,
    )
    shorter = write_config(tmp_path / "shorter", dataset, **{**changes, "epochs": 1})
    train("--config", shorter, "--run_dir", tmp_path / "half")
    train("--config", config, "--run_dir", tmp_path / "on", "--ckpt", tmp_path / "half" / "last.ckpt")
    assert largest_difference(tmp_path / "run" / "last.ckpt", tmp_path / "on" / "last.ckpt") < 1e-6


def test_dropped_hints_are_no_hints(dataset: Path, tmp_path: Path) -> None:
    """If all hints are dropped, the loss is that of the small network with zeros; else it is that of the pair."""
    batch: Batch = {"names": ["a"], "sources": torch.randn(1, 2, 2, 4000, generator=torch.Generator().manual_seed(0))}
    batch["mixture"] = batch["sources"].sum(1)
    losses = {}
    for dropout in (0.0, 1.0):
        torch.manual_seed(0)
        config = read_training_config(write_config(tmp_path, dataset, hint_dropout=dropout, permutation="joint"))
        module = TrainingModule(config)
        assert isinstance(module.model, BoostedPair)
        for fusion in module.model.small.network.fusion:
            torch.nn.init.ones_(
                fusion.get_submodule("norm_merge").get_parameter("weight")
            )  # its initial value is almost zero
        losses[dropout] = float(module.training_step(batch, 0).detach())
        for kept in (1.0, 0.0):
            estimate = module.model(batch["mixture"], None, torch.full((1, 1), 0 if kept else NEVER)).small
            expected = -permuted_si_sdr(estimate, batch["sources"], "joint").mean()
            assert (losses[dropout] == pytest.approx(float(expected.detach()), abs=1e-4)) == (dropout == 1 - kept)
    assert losses[0.0] != losses[1.0]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", 10, 0.25)
    for devices in (1, 2):
        config = write_config(tmp_path / f"{devices}", data, epochs=1)
        train("--config", config, "--run_dir", tmp_path / f"{devices}" / "run", "--devices", devices)
    one, two = (tmp_path / f"{devices}" / "run" / "last.ckpt" for devices in (1, 2))
    assert torch.load(two, weights_only=True)["global_step"] == 5
    assert largest_difference(one, two) < 1e-4


def test_killing_a_run_at_any_moment_leaves_readable_checkpoints(dataset: Path, tmp_path: Path) -> None:
    config, folder = write_config(tmp_path, dataset, epochs=1000), tmp_path / "run"
    for kill in range(2):
        # A run that is killed in its first minute has no last checkpoint, so its best ones are used.
        known = set(folder.glob("best/epoch*.ckpt"))
        flags = ["--resume", "--ckpt", max(known, key=lambda path: path.stat().st_mtime)] if kill else []
        call = command("kb-train", "--config", config, "--run_dir", folder, *flags)
        process = subprocess.Popen(call, env=environment(), stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE
        # Every epoch has three steps, so checkpoints are written all the time.
        while not set(folder.glob("best/epoch*.ckpt")) - known:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.1 * kill)
        process.kill()
        process.wait()
        found = [path for path in folder.rglob("*.ckpt") if not path.name.startswith(".")]
        assert found
        for checkpoint in found:
            assert torch.load(checkpoint, weights_only=True)["global_step"] > 0


def test_a_loss_that_is_nan_stops_with_the_names_of_its_batch(dataset: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, dataset, learning_rate=1e30, gradient_clip=0.0)
    result = run("kb-train", "--config", config, "--run_dir", tmp_path / "run")
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith("kb-train: error: the loss is nan at step ")
    assert str(dataset / "train") in line
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_hints_of_a_fitted_large_network_help_the_small_one(tmp_path: Path) -> None:
    """A reduced pair is fitted to four mixtures in the published way, the large network first."""
    data = write_dataset(tmp_path / "data", 4, 0.5, ("train",))
    large = {"channels": 32, "hidden": 32, "blocks": 1}
    small = {"channels": 4, "hidden": 4, "blocks": 2}
    pair = {"task": "ss", "small": small, "large": large, "boosting": {"delay": 1}}
    everything = {"kind": "folder", "root": str(data), "split": "train"}

    def fit(name: str, model: dict[str, Any], *flags: object, **changes: Any) -> Path:
        changes |= {"model": model, "validation": everything, "permutation": "joint", "batch_size": 1, "epochs": 45}
        changes |= {"learning_rate": 1e-2, "schedule": {"kind": "cosine"}}
        config = write_config(tmp_path / name, data, **changes)
        train("--config", config, "--run_dir", tmp_path / name / "run", *flags)
        return tmp_path / name / "run" / "last.ckpt"

    fitted = fit("large", {"task": "ss", "small": large})
    alone = fit("small", {"task": "ss", "small": small})
    boosted = fit("pair", pair, "--large", fitted, freeze_large=True)

    settings = read_training_config(boosted.parent / "config.json")
    assert isinstance(settings.validation, FolderData)
    examples = MixtureFolder(settings.validation, settings.model, seed=0, training=False, skip_broken=False)
    batch = [examples.example((0, index)) for index in range(4)]
    mixture, sources = (torch.stack([example[key] for example in batch]) for key in ("mixture", "sources"))

    def figure(estimate: Tensor) -> float:
        return float(si_sdr_improvement(estimate[..., : mixture.shape[-1]], sources, mixture).mean())

    model = read_checkpoint(boosted, settings.model)
    other = read_checkpoint(alone, Alone(task="ss", network=settings.model.on_device)).get_submodule("small")
    assert isinstance(model, BoostedPair)
    assert isinstance(other, SmallModel)
    with torch.inference_mode():
        with_hints, without = model(mixture), model(mixture, ready_at=torch.full((63,), NEVER))
        unaided, _ = other(pad_to_frames(mixture, settings.model.framing), other.initial_state(4))
    assert figure(with_hints.large) > 8
    assert figure(with_hints.small) > figure(unaided)
    assert figure(with_hints.small) > figure(without.small)


def test_a_run_becomes_a_bundle_and_is_tested(whole_run: Path, tmp_path: Path) -> None:
    folder = whole_run / "run"
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps(config["model"]))
    flags = ["--config", tmp_path / "model.json", "--checkpoint", folder / "last.ckpt", "-o", tmp_path / "bundle"]
    result = run("kb-export", *flags)
    assert result.returncode == 0, result.stderr
    bundle = Bundle(tmp_path / "bundle")
    pair, manifest = load_pair(bundle), bundle.manifest
    assert not manifest.untrained

    # The networks and hints are the same, but the outputs have the energy and the sign of the sources.
    settings = read_training_config(whole_run / "config.json")
    trained = read_checkpoint(folder / "last.ckpt", settings.model)
    items = MixtureFolder(settings.validation, settings.model, seed=0, training=False, skip_broken=False)
    examples = [items.example((0, index)) for index in range(len(items))]
    mixture, sources = (torch.stack([example[key] for example in examples]) for key in ("mixture", "sources"))
    with torch.inference_mode():
        before, after = trained(mixture), pair(mixture)
    torch.testing.assert_close(after.hints, before.hints, rtol=1e-4, atol=1e-6)
    for name in ("small", "large"):
        unlevel, level = getattr(before, name), getattr(after, name)
        for source, microphone in product(range(2), range(2)):
            one, other = unlevel[:, source, microphone], level[:, source, microphone]
            gain = float((one * other).sum() / one.square().sum())
            torch.testing.assert_close(other, gain * one, rtol=0, atol=1e-5)
            kept = si_sdr(level, sources).mean((1, 2)) > si_sdr(level.flip(1), sources).mean((1, 2))
            wanted = torch.where(kept[:, None], sources[:, source, microphone], sources[:, 1 - source, microphone])
            assert float(wanted.square().sum() / other.square().sum()) == pytest.approx(1, abs=1e-2)
            assert float((other * wanted).sum()) > 0

    result = run("kb-train", "--config", whole_run / "config.json", "--run_dir", folder, "--test")
    assert result.returncode == 0, result.stderr
    figures = json.loads((folder / "test.json").read_text())
    assert {"checkpoint", "test/small_si_sdri", "test/small_pesq", "test/large_stoi"} <= figures.keys()
    best = max(float(path.stem.partition("_")[2].removesuffix("dB")) for path in (folder / "best").glob("*.ckpt"))
    assert figures["test/small_si_sdri"] == pytest.approx(best, abs=0.01)
    # These networks have learned nothing, but their outputs are measured at the level of the sources.
    assert figures["test/small_snri"] > -8


def test_calls_that_cannot_be_used(
    dataset: Path, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, dataset)
    other = write_config(tmp_path / "other", dataset, model={**PAIR, "small": {"channels": 12, "hidden": 8}})
    odd = write_config(tmp_path / "odd", dataset, batch_size=100)
    new = tmp_path / "new"
    np.save(tmp_path / "x.ckpt.npy", np.zeros(3))
    cases: list[tuple[list[object], str]] = [
        (["--config", tmp_path / "no.json", "--run_dir", new], "no.json: no such file"),
        (["--config", config, "--run_dir", new, "--resume"], "has no last.ckpt"),
        (["--config", config, "--run_dir", new, "--test"], "has no checkpoint"),
        (["--config", config, "--run_dir", new, "--frac", "0"], "--frac"),
        (["--config", config, "--run_dir", new, "--data", tmp_path / "nowhere"], "no such folder"),
        (["--config", config, "--run_dir", new, "--large", "nothing"], "nothing: no bundle"),
        (["--config", config, "--run_dir", new, "--large", tmp_path / "x.ckpt.npy"], "not a readable checkpoint"),
        (["--config", odd, "--run_dir", new], "fewer than one batch"),
        (["--config", other, "--run_dir", whole_run / "run", "--resume"], "checkpoint"),
    ]
    for flags, expected in cases:
        assert expected in refusal_here("kb-train", capsys, *flags)
    assert not new.exists()


def test_skipped_items_give_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data", 4, 0.25)
    (data / "train" / "002" / "source01.wav").write_bytes(b"no audio")
    config = write_config(tmp_path, data, epochs=1)
    line = refusal_here("kb-train", capsys, "--config", config, "--run_dir", tmp_path / "run")
    assert "002/source01.wav: not readable as audio" in line
    result = run("kb-train", "--config", config, "--run_dir", tmp_path / "run2", "--skip-broken")
    assert result.returncode == 0, result.stderr
    assert "warning: skipped: " in result.stderr
