"""Published configurations and checkpoints are imported, and bad ones are refused with a reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.checkpoint import read_checkpoint, read_config
from knowledge_boosting.models.config import Alone, ModelConfig
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.published import config_from_published
from tests.golden_cases import FOLDER, TOLERANCE, Golden, worst

CASE = "ss_delay1_compression4"


def published(name: str = CASE) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / name / "config.json").read_text())
    return document


def test_a_whole_published_training_configuration_is_read(tmp_path: Path) -> None:
    """The document also has import paths, optimiser and data fields. The task follows from the import path."""
    sizes = published("tse_delay6")
    del sizes["task"]
    network = "src.models.tfgridnet_TSE_causal_torch_stft_layernorm.net.Net"
    arguments = {"sr": 16000, "small_model": network, "big_model": network, "optimizer_params": {"lr": 1e-3}, **sizes}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"pl_module": "src.x.PLModule", "pl_module_args": arguments, "epochs": 20}))
    assert read_config(path) == config_from_published(published("tse_delay6"), "golden")
    baseline = {"pl_module_args": {"model": network, "init_ckpt": None, "model_params": sizes["big_model_params"]}}
    path.write_text(json.dumps(baseline))
    alone = read_config(path)
    assert isinstance(alone, Alone)
    assert (alone.task, alone.network.channels) == ("tse", 16)


def baseline_config() -> ModelConfig:
    document = published()
    return config_from_published({"task": "ss", "model_params": document["big_model_params"]}, "baseline.json")


@torch.inference_mode()
def test_the_bare_checkpoint_of_one_network_loads(golden: Callable[[str], Golden]) -> None:
    case = golden(CASE)
    model = read_checkpoint(FOLDER / CASE / "large.pt", baseline_config()).get_submodule("small")
    samples = pad_to_frames(case.mixture, case.pair.config.framing)
    estimate, _ = model(samples, model.initial_state(len(samples)))  # type: ignore[operator]
    assert worst(estimate[..., : case.mixture.shape[-1]], case.large_output) < TOLERANCE


def test_the_lightning_checkpoint_of_a_baseline_is_the_bare_one_with_a_prefix(tmp_path: Path) -> None:
    bare = torch.load(FOLDER / CASE / "large.pt", weights_only=True)
    path = tmp_path / "baseline.ckpt"
    torch.save({"state_dict": {f"model.{key}": value for key, value in bare.items()}, "epoch": 3}, path)
    expected = read_checkpoint(FOLDER / CASE / "large.pt", baseline_config()).state_dict()
    actual = read_checkpoint(path, baseline_config()).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_our_own_checkpoint_loads(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    pair = golden(CASE).pair
    path = tmp_path / "own.ckpt"
    torch.save({"state_dict": pair.state_dict()}, path)
    again = read_checkpoint(path, pair.config).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in pair.state_dict().items())


def broken(tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    checkpoint = torch.load(FOLDER / CASE / "joint.ckpt", weights_only=True)
    change(checkpoint["state_dict"])
    path = tmp_path / "broken.ckpt"
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    "key",
    [
        "joint_model.small.tfgridnet.film_blocks.1.bias.weight",
        "joint_model.big.tfgridnet.blocks.2.attn_conv_K_3.2.gamma",
        "joint_model.gen_embedding.conv1d.bias",
    ],
)
def test_a_missing_or_misshaped_tensor_is_named(key: str, tmp_path: Path) -> None:
    config = read_config(FOLDER / CASE / "config.json")
    with pytest.raises(InputError, match=rf"broken.ckpt: tensor {key} is missing"):
        read_checkpoint(broken(tmp_path, lambda state: state.pop(key)), config)
    misshaped = broken(tmp_path, lambda state: state.update({key: state[key][..., :-1]}))
    with pytest.raises(InputError, match=rf"tensor {key} has shape .* expected"):
        read_checkpoint(misshaped, config)


def test_a_left_over_tensor_is_named(tmp_path: Path) -> None:
    config = read_config(FOLDER / CASE / "config.json")
    path = broken(tmp_path, lambda state: state.update({"joint_model.small.extra": torch.zeros(1)}))
    with pytest.raises(InputError, match=r"tensor joint_model\.small\.extra has no place"):
        read_checkpoint(path, config)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    config = read_config(FOLDER / CASE / "config.json")
    path = broken(tmp_path, lambda state: state["joint_model.gen_embedding.conv1d.bias"].fill_(float("nan")))
    with pytest.raises(InputError, match=r"encoder\.conv\.bias has values that are not finite"):
        read_checkpoint(path, config)


class MaliciousObject:
    """An object that runs code if it is unpickled without ``weights_only``."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


def test_a_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": MaliciousObject()}, tmp_path / "evil.ckpt")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "evil.ckpt", read_config(FOLDER / CASE / "config.json"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"])
def test_other_files_are_no_checkpoints(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.ckpt: not a readable checkpoint"):
        read_checkpoint(path, read_config(FOLDER / CASE / "config.json"))


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("small_model_params", "I", 4, '"I" must be 1, not 4'),
        ("big_model_params", "J", 2, '"J" must be 1, not 2'),
        ("big_model_params", "use_masked_attention", False, "must be True, not False"),
        ("small_model_params", "dropout", 0.1, 'unknown key "dropout"'),
        ("small_model_params", "D", "8", '"D" must be of type int'),
        ("big_model_params", "L", 5, "multiple of heads"),
        ("big_model_params", "stft_pad_size", 32, "same stft_chunk_size"),
        ("joint_model_params", "delay", 2, "must be equal"),
        ("joint_model_params", "compression", 3, "compression"),
    ],
)
def test_a_published_configuration_with_another_meaning_is_refused(
    section: str, key: str, value: Any, message: str, tmp_path: Path
) -> None:
    document = published()
    document[section][key] = value
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "asr"}, "task"),
        ({"chunk": 1}, "chunk"),
        ({"small": {"channels": 16}}, "small.hidden"),
        ({"small": {"channels": 16, "hidden": -1}}, "small.hidden"),
        ({"boosting": None}, "large and boosting"),
        ({"boosting": {"delay": -1}}, "boosting.delay"),
        ({"boosting": {"delay": 6, "compression": 3}}, "boosting.compression"),
    ],
)
def test_a_bad_configuration_of_ours_is_refused_naming_the_key(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    document = json.loads((Path(__file__).parents[2] / "configs/demo/ss-48ms.json").read_text()) | change
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
