"""Training with stored hints equals training without, and hints of another large network are refused."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import soundfile
import torch

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import MODEL
from knowledge_boosting.training.config import StoredData, TrainingConfig
from knowledge_boosting.training.data.dynamic_mixing import DynamicMixing, render
from knowledge_boosting.training.data.loading import Batch, Examples
from knowledge_boosting.training.data.responses import write_bank
from knowledge_boosting.training.data.stored_hints import StoredHints, large_digest
from knowledge_boosting.training.learning.module import TrainingModule
from knowledge_boosting.training.learning.run import store_hints
from tests.processes import refusal, run

SPEECH = Path(__file__).parent / "speech"
SIZE = {"channels": 8, "hidden": 8, "blocks": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank, and a checkpoint of a large network for each task."""
    folder = tmp_path_factory.mktemp("stored")
    rng = np.random.default_rng(0)
    responses = rng.normal(0, 1, (3, 2, 2, 200)) * np.exp(-np.arange(200) / 30)
    write_bank(folder / "responses.safetensors", responses.astype(np.float32), ["head"] * 3)
    for task in ("ss", "tse"):
        torch.manual_seed(3)
        state = build(settings(folder, task).model).get_submodule("large").state_dict()
        torch.save({f"large.{name}": value for name, value in state.items()}, folder / f"{task}.pt")
    return folder


def settings(folder: Path, task: str, **changes: Any) -> TrainingConfig:
    document = {
        "model": {"task": task, "small": SIZE, "large": SIZE, "boosting": {"delay": 2}, "running_level": True},
        "train": {
            "kind": "dynamic",
            "speech": str(SPEECH),
            "responses": str(folder / "responses.safetensors"),
            "items": 8,
            "seconds": 0.5,
            "level_dbfs": [-60.0, -6.0],
        },
        "validation": {"kind": "folder", "root": str(folder), "split": "val"},
        "large_checkpoint": str(folder / f"{task}.pt"),
        "freeze_large": True,
        "epochs": 1,
        "batch_size": 2,
        "workers": 0,
        "guidance": 20.0,
    }
    return TrainingConfig.model_validate_json(json.dumps({**document, **changes}))


@pytest.fixture(scope="module")
def stored(folder: Path) -> Path:
    """Forty mixtures for separation, in one full file and one that is not full."""
    store_hints(settings(folder, "ss"), folder / "ss", 40)
    return folder / "ss"


def from_stored(folder: Path, root: Path, task: str, **changes: Any) -> TrainingConfig:
    return settings(folder, task, train={"kind": "stored", "root": str(root)}, **changes)


def opened(config: TrainingConfig) -> tuple[TrainingModule, StoredHints]:
    module = TrainingModule(config)
    assert isinstance(config.train, StoredData)
    return module, StoredHints(config.train, config.model, module.stored_large)


def batch_of(examples: Examples, indices: list[int]) -> Batch:
    found = [examples.example((0, index)) for index in indices]
    batch = {key: torch.stack([example[key] for example in found]) for key in found[0].keys() - {"names"}}
    return render(cast("Batch", {"names": [example["names"] for example in found], **batch}))


@pytest.mark.parametrize(
    ("task", "policy"), [("ss", {"delay": 2}), ("tse", {"delay": 2}), ("ss", {"policy": "arrival"})]
)
def test_a_step_learns_the_same_from_stored_hints(
    folder: Path, stored: Path, task: str, policy: dict[str, object]
) -> None:
    model = {**settings(folder, task).model.model_dump(mode="json"), "boosting": policy}
    root, live = stored, settings(folder, task, model=model)
    indices = [3, 33]
    if task == "tse":
        root = folder / "tse"
        store_hints(live, root, 4)
        indices = [1]
    config = from_stored(folder, root, task, model=model)
    module, examples = opened(config)
    assert examples.speakers == {path.name.split("-")[0] for path in SPEECH.iterdir() if path.suffix == ".ogg"}
    other = TrainingModule(live)
    other.load_state_dict(module.state_dict())
    mixing = DynamicMixing(live.train, live.model, seed=live.seed, skip_broken=False)  # type: ignore[arg-type]
    expected = batch_of(mixing, indices)
    # For extraction, both speakers of a mixture are stored, one after the other.
    found = batch_of(examples, indices if task == "ss" else [2, 3])
    for key in ("mixture", "sources", *(["speaker_embedding"] if task == "tse" else [])):
        tolerance = 1e-3 * float(expected[key].abs().max())  # type: ignore[literal-required]
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=tolerance)  # type: ignore[literal-required]
    loss, live_loss = module.training_step(found, 0).detach(), other.training_step(expected, 0).detach()
    assert float(loss) == pytest.approx(float(live_loss), abs=0.02)
    # The order of the sources in a batch does not matter, also for guidance, which follows the order of the hints.
    swapped = dict(found, sources=found["sources"].flip(1))
    torch.testing.assert_close(module.training_step(swapped, 0).detach(), module.training_step(found, 0).detach())  # type: ignore[arg-type]
    # The step depends on the hints.
    changed = dict(found, embedding=torch.randn_like(found["embedding"]))
    assert abs(float(module.training_step(changed, 0) - module.training_step(found, 0))) > 1e-4  # type: ignore[arg-type]


def test_an_interrupted_folder_can_be_continued(folder: Path, stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "again")
    (tmp_path / "again" / "000001.safetensors").unlink()
    before = (tmp_path / "again" / "000000.safetensors").stat().st_mtime_ns
    config = from_stored(folder, tmp_path / "again", "ss")
    with pytest.raises(InputError, match=r"000001\.safetensors: no such file; the same kb-store-hints command"):
        opened(config)
    store_hints(settings(folder, "ss"), tmp_path / "again", 40)
    assert (tmp_path / "again" / "000000.safetensors").stat().st_mtime_ns == before
    for name in ("000001.safetensors", "hints.json"):
        assert (tmp_path / "again" / name).read_bytes() == (stored / name).read_bytes()
    assert len(opened(config)[1]) == 40


def test_hints_of_another_large_network_are_refused(folder: Path, stored: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "ss.pt", weights_only=True)
    state["large.network.input_norm.weight"][0] += 1e-6
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(InputError, match="hints of another large network"):
        opened(from_stored(folder, stored, "ss", large_checkpoint=str(tmp_path / "other.pt")))
    changed = settings(folder, "ss", large_checkpoint=str(tmp_path / "other.pt"))
    with pytest.raises(InputError, match="other mixtures or of another large network"):
        store_hints(changed, stored, 40)
    with pytest.raises(InputError, match="other mixtures or of another large network"):
        store_hints(settings(folder, "ss"), stored, 41)


def test_the_digest_depends_on_the_input_of_the_large_network() -> None:
    def digest(**changes: Any) -> str:
        torch.manual_seed(0)
        document = {"task": "ss", "small": SIZE, "large": SIZE, "boosting": {"delay": 2}, **changes}
        model = MODEL.validate_python(document)
        return large_digest(model, build(model).get_submodule("large.network"))

    assert digest() == digest(boosting={"delay": 6}) != digest(running_level=True)


def test_unsuitable_configurations_and_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set freeze_large"):
        from_stored(folder, tmp_path, "ss", freeze_large=False)
    with pytest.raises(InputError, match="give the configuration of a pair with freeze_large"):
        store_hints(settings(folder, "ss", freeze_large=False), tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already and holds no stored hints"):
        store_hints(settings(folder, "ss"), tmp_path / "full", 4)


def test_damaged_files_give_one_line(folder: Path, stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored, tmp_path / "cut")
    (tmp_path / "cut" / "000000.safetensors").write_bytes(b"no tensors")
    _, examples = opened(from_stored(folder, tmp_path / "cut", "ss"))
    with pytest.raises(InputError, match=r"000000\.safetensors: not a readable file of stored hints"):
        examples.example((0, 0))
    for text in ("no JSON", "{}", '{"large": 1}'):
        (tmp_path / "cut" / "hints.json").write_text(text)
        with pytest.raises(InputError, match=r"hints\.json: "):
            opened(from_stored(folder, tmp_path / "cut", "ss"))


@pytest.mark.slow
def test_the_commands_run_and_resume(folder: Path, tmp_path: Path) -> None:
    item = tmp_path / "val" / "000000"
    item.mkdir(parents=True)
    for number in (1, 2):
        source = soundfile.read(SPEECH.parents[2] / "samples" / f"source{number}.flac")
        soundfile.write(item / f"source0{number - 1}.wav", *source)
    config = tmp_path / "config.json"
    validation = {"kind": "folder", "root": str(tmp_path), "split": "val"}
    config.write_text(settings(folder, "ss", validation=validation).model_dump_json())
    made = run("kb-store-hints", "--config", config, "--output", tmp_path / "hints", "--items", 4)
    assert made.returncode == 0, made.stderr
    assert f"{tmp_path / 'hints'}: 4 examples with hints" in made.stdout
    train = from_stored(folder, tmp_path / "hints", "ss", validation=validation)
    config.write_text(train.model_dump_json())
    trained = run("kb-train", "--config", config, "--run_dir", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    # A resumed run knows the large network of its hints.
    longer = train.model_copy(update={"epochs": 2, "large_checkpoint": "gone.pt"})
    config.write_text(longer.model_dump_json())
    resumed = run("kb-train", "--config", config, "--run_dir", tmp_path / "run", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 4
    record = json.loads((tmp_path / "hints" / "hints.json").read_text())
    (tmp_path / "hints" / "hints.json").write_text(json.dumps({**record, "large": "sha256:0"}))
    assert "another large network" in refusal("kb-train", "--config", config, "--run_dir", tmp_path / "run", "--resume")
