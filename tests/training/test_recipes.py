"""The stages of recipes, their initial weights, and the recipes that are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import read_checkpoint, read_training_speakers
from knowledge_boosting.models.manifest import validate
from knowledge_boosting.models.networks import initial_weights
from knowledge_boosting.training.config import DynamicData, StoredData, TrainingConfig
from knowledge_boosting.training.data.corpus import read_speaker_names
from knowledge_boosting.training.recipes import Recipe
from tests.processes import refusal_here

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
# The configurations of all stages from the time when each was a separate file.
STAGES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "stages.json").read_text())


def recipe(folder: str) -> Recipe:
    return Recipe(CONFIGS / folder / "recipe.toml")


def stage(folder: str, name: str) -> TrainingConfig:
    return recipe(folder).stage(name, Path("runs") / folder)


@pytest.mark.parametrize("folder", ["compact", "full_size"])
def test_stages_equal_their_former_configurations(folder: str) -> None:
    before = {name.partition("/")[2]: stage for name, stage in STAGES.items() if name.startswith(f"{folder}/")}
    assert recipe(folder).stages == tuple(before)
    for name, document in before.items():
        assert stage(folder, name) == validate(TrainingConfig, document, Path(name)), name


def test_the_recipes_are_short() -> None:
    recipes = list(CONFIGS.glob("*/recipe.toml"))
    assert len(recipes) <= 6
    assert sum(len(path.read_text().splitlines()) for path in recipes) <= 640


def test_initial_checkpoints_fit_their_stages() -> None:
    """Their training speakers do not include the speakers who are kept for validation."""
    kept = read_speaker_names(CONFIGS / "kept-for-validation.txt")
    assert len(kept) == 40
    for name in recipe("listeners").stages:
        config = stage("listeners", name)
        if isinstance(config.train, DynamicData):
            assert config.train.excluded_speakers == "configs/kept-for-validation.txt"
        for source in config.weight_sources():
            if not source.startswith("runs/"):  # an earlier stage
                speakers = (
                    read_training_speakers(ROOT / source)
                    if source.endswith(".pt")
                    else Bundle(source).manifest.provenance.training_speakers
                )
                assert speakers
                assert not kept & set(speakers)
        if (start := config.initial_checkpoint) is not None and not start.startswith("runs/"):
            if start.endswith(".pt"):
                read_checkpoint(ROOT / start, config.model)
            else:
                initial_weights(Bundle(start), config.model)


@pytest.mark.parametrize("folder", ["compact", "full_size"])
def test_stages_have_the_networks_of_the_stage_they_start_from(folder: str) -> None:
    for name in recipe(folder).stages:
        config = stage(folder, name)
        if config.initial_checkpoint is not None:
            assert stage(folder, config.initial_checkpoint.split("/")[2]).model == config.model


@pytest.mark.parametrize(
    ("folder", "alone", "pair"),
    [
        *((folder, f"{task}-alone", f"{task}-48ms") for folder in ("compact", "full_size") for task in ("ss", "tse")),
        ("listeners", "ss-alone", "ss-compact"),
        ("listeners", "ss-alone", "ss-48ms"),
        ("listeners", "tse-alone", "tse-48ms"),
    ],
)
def test_the_network_alone_has_at_least_as_many_updates_as_the_boosted_one(folder: str, alone: str, pair: str) -> None:
    def updates(name: str) -> dict[str, int]:
        """Return the updates of every stage whose weights are part of the small network."""
        config = stage(folder, name)
        data, targets = config.train, 1
        if isinstance(data, StoredData):
            data = stage(folder, f"{name.partition('-')[0]}-hints").train
            targets = 2 if config.model.needs_speaker else 1  # each speaker of a stored mixture is an example
        assert isinstance(data, DynamicData)
        seen = {name: data.items * targets // config.batch_size * config.epochs}
        for before in (config.initial_checkpoint, config.averaged_with, config.warm_start):
            seen |= updates(before.split("/")[2]) if before and f"runs/{folder}/" in before else {}
        return seen

    assert sum(updates(alone).values()) >= sum(updates(pair).values())


SMALL = """
[common]
model = { task = "ss", network = { channels = 4, hidden = 4 } }
train = { kind = "dynamic", speech = "s", responses = "r", items = 8, seconds = 2.0 }
validation = { root = "v", split = "val" }
epochs = 1
[bases.long]
train.seconds = 4.0
epochs = 2
[bases.longer]
epochs = 3
[stages.one]
[stages.two]
bases = ["long", "longer"]
train.items = 16
initial_checkpoint = { stage = "one" }
warm = 1
"""


def test_later_values_override_and_tables_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(SMALL.replace("warm = 1\n", ""))
    one, two = (Recipe(path).stage(name, tmp_path / "runs") for name in ("one", "two"))
    assert isinstance(one.train, DynamicData)
    assert isinstance(two.train, DynamicData)
    assert (one.train.seconds, one.train.items, one.epochs, one.initial_checkpoint) == (2, 8, 1, None)
    assert (two.train.seconds, two.train.items, two.epochs) == (4, 16, 3)
    assert two.initial_checkpoint == str(tmp_path / "runs" / "one" / "last.ckpt")
    assert two.train.speech == ("s",)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "has no stages"),
        ("[stages.one", "not readable as TOML"),
        ("a = " + "[" * 10_000, "nested too deep"),
        ("[stages.one]\n[basis.a]\n", 'unknown key "basis"'),
        ("stages = 5\n", "stages must be a table"),
        ("[stages]\none = 5\n", "one must be a table"),
        ('bases = "x"\n[stages.one]\n', "bases must be a table"),
        ("bases.a = 3\n[stages.one]\nbases = ['a']\n", "a must be a table"),
        ('[stages.one]\nbases = "a"\n', "stage one: bases must be a list"),
        ("[stages.one]\nbases = ['a']\n", "stage one: there is no base 'a'"),
        ("[stages.one]\nbases = [['a']]\n", "there is no base ['a']"),
        (
            "[stages.one]\nwarm_start = { stage = 'two' }\n[stages.two]\n",
            "warm_start: there is no stage 'two' before it",
        ),
        ("[stages.one]\nwarm_start = { stage = 'one' }\n", "warm_start: there is no stage 'one' before it"),
    ],
)
def test_recipes_that_cannot_be_used_are_refused(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        Recipe(path)
    assert why in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("stage", "change", "why"),
    [
        ("three", ("", ""), "has no stage 'three'; choose one of one, two"),
        ("two", ("", ""), "stage two: warm: Extra inputs are not permitted"),
        ("two", ("warm = 1", "seed = 2020-01-01"), "stage two: seed: "),
        ("two", ("warm = 1", "learning_rate = nan"), "stage two: learning_rate: "),
        ("two", ("warm = 1", "averaged_with = { stage = 5 }"), "stage two: averaged_with: "),
        ("two", ("warm = 1", "model.network = 5"), "stage two: model.network: "),
    ],
)
def test_stages_that_are_no_configurations_are_refused(
    stage: str, change: tuple[str, str], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(SMALL.replace(*change))
    with pytest.raises(InputError) as error:
        Recipe(path).stage(stage, tmp_path)
    assert why in str(error.value)
    assert str(path) in str(error.value)


def test_the_commands_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, run = tmp_path / "recipe.toml", tmp_path / "runs" / "two"
    path.write_text(SMALL.replace("warm = 1\n", ""))
    call = ("kb-train", "--config", path, "--run-dir", run)
    assert "is a recipe; choose one of its stages with --stage: one, two" in refusal_here("kb-train", capsys, *call[1:])
    line = refusal_here("kb-train", capsys, *call[1:], "--stage", "two")
    first = tmp_path / "runs" / "one"
    assert f"{first / 'last.ckpt'}: no such file; first train the run that makes it, with --run-dir {first}" in line
    export = refusal_here("kb-export", capsys, "--config", path, "--untrained", "-o", tmp_path / "bundle")
    assert "is a recipe; give the config.json in the folder of a stage's run" in export
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert "--stage is for recipes" in refusal_here(
        "kb-train", capsys, "--config", config, "--run-dir", run, "--stage", "two"
    )
    assert not run.exists()
