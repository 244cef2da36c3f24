"""The twenty published training configurations in both forms, their networks, and the errors of bad ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import soundfile
import torch
from torch import Tensor, nn

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, ModelConfig, Pair
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.pair import BoostedPair, SmallModel
from knowledge_boosting.training.config import FolderData, TrainingConfig, read_training_config
from knowledge_boosting.training.learning.losses import negative_si_sdr
from knowledge_boosting.training.recipes import Recipe

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
Document = dict[str, Any]
Task = Literal["tse", "ss"]
CODES: tuple[tuple[str, Task], ...] = (("BS", "ss"), ("TSE", "tse"))

# The published configurations, with the values that differ between them.
BASELINES: dict[str, tuple[Task, str]] = {
    f"baselines/{prefix}-{code}-{number}": (task, size)
    for prefix, number, size in (("BM", 500, "large"), ("MM", 37, "medium"), ("SM", 25, "small"))
    for code, task in CODES
}
PAIRS: dict[str, tuple[Task, int, int]] = {
    **{f"SS_joint/B{delay}-SS": ("ss", delay, 1) for delay in (0, 1, 3, 6)},
    **{f"TSE_joint/B{delay}-TSE": ("tse", delay, 1) for delay in (0, 1, 3, 6)},
    **{f"compression/B{delay}-CMP{factor}-SS": ("ss", delay, factor) for delay in (0, 1, 6) for factor in (2, 4)},
}
NAMES = [*BASELINES, *PAIRS]
SIZES = {
    "small": {"D": 16, "H": 16, "L": 4, "use_attn": False},
    "medium": {"D": 26, "H": 18, "L": 4, "use_attn": False},
    "large": {"D": 64, "H": 64, "L": 8, "use_attn": True, "use_masked_attention": True},
}
NETWORKS = {
    "ss": "src.models.tfgridnet_ssep_causal_torch_stft_layernorm.net.Net",
    "tse": "src.models.tfgridnet_TSE_causal_torch_stft_layernorm.net.Net",
}


def network_params(size: str, **more: object) -> Document:
    params = {"stft_chunk_size": 128, "stft_pad_size": 64, "num_ch": 2, "I": 1, "J": 1, "B": 3}
    return params | {"lookahead": True, "local_atten_len": 50, "generate_embeddings": False} | SIZES[size] | more


def published(name: str) -> Document:
    """Return a configuration in the published form."""
    task = BASELINES[name][0] if name in BASELINES else PAIRS[name][0]
    arguments: Document = {
        "loss_params": {"name": "sisdr" if task == "tse" else "pit_sisdr"},
        "sr": 16000,
        "scheduler": "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "scheduler_params": {"mode": "max", "patience": 4, "factor": 0.5, "min_lr": 1e-6},
        "optimizer": "torch.optim.Adam",
        "optimizer_params": {"lr": 1e-3},
    }
    if name in BASELINES:
        arguments |= {"model": NETWORKS[task], "init_ckpt": None, "model_params": network_params(BASELINES[name][1])}
    else:
        _, delay, compression = PAIRS[name]
        fusion = {"use_alignment": True, "use_cross_attention": True, "delay": delay}
        arguments |= {
            "small_model": NETWORKS[task],
            "small_model_params": network_params("small", **fusion),
            "big_model": NETWORKS[task],
            "big_model_params": network_params("large", generate_embeddings=True),
            "big_model_init_ckpt": "",
            "joint_model": "src.models.joint_model.JointModel",
            "joint_model_params": {"compression": compression, "delay": delay},
            "freeze_bm": False,
        }
    return {
        "pl_module": "src.hl_modules.hl_module.PLModule",
        "pl_module_args": arguments,
        "pl_logger": "src.logging.Logger",
        "val_logger": "src.logging.Logger",
        "epochs": 100 if name in BASELINES else 20,
        "batch_size": 8,
        "eval_batch_size": 8,
        "num_workers": 16,
        "grad_clip": 1,
        **{
            key: value
            for split, items in (("train", 100_000), ("val", 5_000), ("test", 5_000))
            for key, value in (
                (f"{split}_dataset", "src.datasets.MixturesDataset"),
                (f"{split}_data_args", data_args(task, split, items)),
            )
        },
    }


def data_args(task: str, split: str, items: int) -> Document:
    mixtures = f"mixtures/{task}"
    return {"mixtures_dir": mixtures, "dset": split, "num_samples": items, "sr": 16000, "resample_rate": None}


def ours(name: str) -> TrainingConfig:
    return read_training_config(CONFIGS / f"{name}.json")


def write(path: Path, document: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(document))
    return path


def with_root(config: TrainingConfig, root: str) -> TrainingConfig:
    splits = {split: getattr(config, split) for split in ("train", "validation", "test")}
    assert all(isinstance(data, FolderData) for data in splits.values())
    return config.model_copy(update={split: data.model_copy(update={"root": root}) for split, data in splits.items()})


def test_the_published_configurations_are_all_there() -> None:
    found = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*/*.json")}
    published_folders = {name.partition("/")[0] for name in NAMES}
    assert {name for name in found if name.partition("/")[0] in published_folders} == set(NAMES)
    assert len(NAMES) == 20


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_of_ours_is_the_published_one_of_its_name(name: str, tmp_path: Path) -> None:
    theirs = read_training_config(write(tmp_path / "published.json", published(name)))
    config = ours(name)
    assert with_root(config, "") == with_root(theirs, "")
    assert {config.train.root, config.validation.root} == {  # type: ignore[union-attr]
        f"data/binaural_{config.model.task.upper()}"
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_values_of_training_are_the_published_ones(name: str) -> None:
    """Check values that could be wrong in both forms."""
    config = ours(name)
    pair = name in PAIRS
    assert (config.epochs, config.batch_size, config.seed) == (20 if pair else 100, 8, 42)
    assert (config.learning_rate, config.gradient_clip, config.precision) == (1e-3, 1.0, "32-true")
    schedule = config.schedule
    assert (schedule.kind, schedule.patience, schedule.factor, schedule.minimum) == ("plateau", 4, 0.5, 1e-6)
    assert config.test is not None
    splits = (config.train, config.validation, config.test)
    assert [(data.split, data.items) for data in splits if isinstance(data, FolderData)] == [
        ("train", 100_000),
        ("val", 5_000),
        ("test", 5_000),
    ]
    assert config.permutation == "per_channel"
    assert not config.freeze_large
    assert (config.initial_checkpoint, config.large_checkpoint) == (None, None)
    task, delay, compression = PAIRS[name] if pair else (BASELINES[name][0], 0, 1)
    assert (config.model.task, config.model.delay) == (task, delay)
    assert config.model.hint_channels == ((8 if task == "ss" else 4) // compression if pair else 0)


def parameters(module: nn.Module, layers: str = "") -> int:
    """Return the number of parameters of a network, or of one kind of layer."""
    return sum(weight.numel() for name, weight in module.named_parameters() if layers in name)


@pytest.mark.parametrize("name", NAMES)
def test_networks_have_their_published_sizes(name: str) -> None:
    """They have about 23 k (35 k with fusion), 37 k and 517 k parameters, without those of the speaker layers."""
    config = ours(name).model
    model = build(config)
    parts = {"small": BASELINES[name][1]} if name in BASELINES else {"small": "small", "large": "large"}
    assert [part for part, _ in model.named_children()] == list(parts)
    for part, size in parts.items():
        network = model.get_submodule(part)
        fusion, encoder, speaker = (parameters(network, layers) for layers in ("fusion.", "encoder.", "speaker."))
        alone = {"small": 23_000, "medium": 37_000, "large": 517_000}[size]
        assert parameters(network) - fusion - encoder - speaker == pytest.approx(alone, rel=0.05)
        assert fusion == (pytest.approx(12_000, rel=0.05) if name in PAIRS and part == "small" else 0)
        assert (encoder > 0) == (part == "large")
        speakers = {"small": 1.6e6, "medium": 2.6e6, "large": 6.4e6}[size]
        assert speaker == (pytest.approx(speakers, rel=0.05) if config.task == "tse" else 0)


@pytest.fixture(scope="module")
def voices() -> Tensor:
    """Two items with half a second of both sample speakers, ``[B, S, M, N]``."""
    clips = []
    for start in (1, 4):
        pair = [
            soundfile.read(ROOT / f"samples/source{number}.flac", 8000, 16000 * start, dtype="float32")[0].T
            for number in (1, 2)
        ]
        clips.append(torch.stack([torch.from_numpy(voice.copy()) for voice in pair]))
    return torch.stack(clips)


def estimate(model: nn.Module, config: ModelConfig, mixture: Tensor, speaker: Tensor | None) -> Tensor:
    """Return the estimate of the trained network for a mixture."""
    if isinstance(model, BoostedPair):
        small: Tensor = model(mixture, speaker).small
        return small
    alone = model.get_submodule("small")
    assert isinstance(alone, SmallModel)
    samples, _ = alone(pad_to_frames(mixture, config.framing), alone.initial_state(len(mixture), speaker))
    assert isinstance(samples, Tensor)
    return samples[..., : mixture.shape[-1]]


@pytest.mark.parametrize("name", NAMES)
def test_an_optimiser_step_moves_every_weight(name: str, voices: Tensor) -> None:
    """The loss of a pair is that of its small network. Its gradients reach the large network through the hints."""
    torch.manual_seed(0)
    config = ours(name)
    model = build(config.model)
    speaker, sources = None, voices
    if config.model.task == "tse":
        speaker, sources = nn.functional.normalize(torch.rand(2, SPEAKER_EMBEDDING_SIZE)), voices[:, :1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimiser = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    loss = negative_si_sdr(estimate(model, config.model, voices.sum(1), speaker), sources, config.permutation)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
    assert torch.isfinite(loss)
    assert torch.isfinite(norm)
    optimiser.step()
    for key, weight in model.named_parameters():
        assert torch.isfinite(weight).all(), key
        assert not torch.equal(weight, before[key]), key


# A change to a good document, and a text that its error must contain. Keys are paths; ABSENT removes the key.
ABSENT = object()
Change = tuple[str, object, str]


def changed(document: Document, path: str, value: object) -> Document:
    document = json.loads(json.dumps(document))
    *sections, key = path.split(".")
    target = document
    for section in sections:
        target = target[section]
    if value is ABSENT:
        del target[key]
    else:
        target[key] = value
    return document


def assert_refused(document: Document, expected: str, path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_training_config(write(path, document))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message.removeprefix(f"{path}: ")
    assert "\n" not in message
    assert "Value error" not in message


OURS_UNUSABLE: list[Change] = [
    ("averaged_with", "other.ckpt", "averaged_with: give an initial_checkpoint too"),
    ("optimiser", "adam", "optimiser"),
    ("model.small.width", 16, "model.small.width"),
    ("model.boosting.jitter", 1, "model.boosting.jitter"),
    ("schedule.step", 3, "schedule.step"),
    ("train.shuffle", True, "shuffle"),
    ("epochs", "20", "epochs"),
    ("epochs", True, "epochs"),
    ("epochs", None, "epochs"),
    ("learning_rate", "0.001", "learning_rate"),
    ("freeze_large", 1, "freeze_large"),
    ("large_checkpoint", 3, "large_checkpoint"),
    ("model", "SM-BS-25", "model"),
    ("train", "data", "train"),
    ("epochs", 0, "epochs"),
    ("batch_size", 0, "batch_size"),
    ("evaluation_batch_size", -8, "evaluation_batch_size"),
    ("workers", -1, "workers"),
    ("seed", -1, "seed"),
    ("learning_rate", 0, "learning_rate"),
    ("learning_rate", float("nan"), "learning_rate"),
    ("learning_rate", float("inf"), "learning_rate"),
    ("gradient_clip", -1.0, "gradient_clip"),
    ("permutation", "per_source", "permutation"),
    ("precision", "fp8", "precision"),
    ("schedule.kind", "step", "schedule.kind"),
    ("schedule.factor", 1.0, "schedule.factor"),
    ("schedule.patience", -1, "schedule.patience"),
    ("schedule.minimum", -1e-6, "schedule.minimum"),
    ("train.kind", "tar", "train"),
    ("train.items", 0, "items"),
    ("train.root", "", "root"),
    ("validation.kind", "dynamic", "validation.kind"),
    ("model.task", "asr", "model.task"),
    ("model.small.hidden", -1, "model.small.hidden"),
    ("model.small.heads", 5, "small.heads"),
    ("model.large.heads", 5, "heads"),
    ("model.boosting.delay", -1, "model.boosting.delay"),
    ("model.boosting.compression", 3, "model.boosting.compression"),
    ("model.boosting", ABSENT, "boosting"),
    ("model", ABSENT, "model"),
    ("model.small", ABSENT, "model.small"),
    ("model.small.channels", ABSENT, "model.small.channels"),
    ("model.boosting.delay", ABSENT, "model.boosting.delay"),
    ("train", ABSENT, "train"),
    ("train.kind", ABSENT, "kind"),
    ("train.root", ABSENT, "root"),
    ("train.split", ABSENT, "split"),
    ("validation", ABSENT, "validation"),
    ("epochs", ABSENT, "epochs"),
]


@pytest.mark.parametrize(("path", "value", "key"), OURS_UNUSABLE)
def test_an_unusable_configuration_of_ours_is_refused_naming_the_key(
    path: str, value: object, key: str, tmp_path: Path
) -> None:
    document = json.loads((CONFIGS / "SS_joint/B6-SS.json").read_text())
    assert_refused(changed(document, path, value), key, tmp_path / "config.json")


DYNAMIC = {"kind": "dynamic", "speech": "data/speech", "responses": "data/responses", "items": 10}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("items", ABSENT),
        ("items", 0),
        ("speech", ABSENT),
        ("speech", ""),
        ("responses", 3),
        ("seconds", 0),
        ("seconds", float("inf")),
        ("speed", 0.5),
        ("level_difference_db", -1),
        ("level_dbfs", [-20, -30]),
        ("level_dbfs", [-20, 3]),
        ("root", "data"),
    ],
)
def test_unusable_dynamic_data_is_refused_naming_the_key(key: str, value: object, tmp_path: Path) -> None:
    document = json.loads((CONFIGS / "SS_joint/B6-SS.json").read_text()) | {"train": DYNAMIC}
    assert_refused(changed(document, f"train.{key}", value), f"train.dynamic.{key}", tmp_path / "config.json")


@pytest.mark.parametrize(
    ("key", "value"), [("large_checkpoint", "large.pt"), ("freeze_large", True), ("hint_dropout", 0.1)]
)
def test_options_of_pairs_are_refused_for_one_network_alone(key: str, value: object, tmp_path: Path) -> None:
    document = json.loads((CONFIGS / "baselines/SM-BS-25.json").read_text()) | {key: value}
    assert_refused(document, key, tmp_path / "config.json")


def test_speaker_noise_needs_speaker_components(tmp_path: Path) -> None:
    stage = Recipe(CONFIGS / "compact/recipe.toml").stage("tse-large", tmp_path)
    document = stage.model_dump(mode="json") | {"speaker_noise": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_training_config(tmp_path / "config.json").speaker_noise == 0.5
    assert_refused(document | {"speaker_components": 0}, "speaker_noise", tmp_path / "config.json")


@pytest.mark.parametrize("config", ["baselines/SM-BS-25", "TSE_joint/B6-TSE"])
def test_separation_is_for_one_network_that_extracts(config: str, tmp_path: Path) -> None:
    document = json.loads((CONFIGS / f"{config}.json").read_text())
    expected = "separation is for one network alone that extracts"
    assert_refused(document | {"separation": 1.0}, expected, tmp_path / "config.json")
    document = json.loads((CONFIGS / "baselines/SM-TSE-25.json").read_text()) | {"separation": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_training_config(tmp_path / "config.json").separation == 1.0


PAIR, BASELINE = "SS_joint/B6-SS", "baselines/BM-TSE-500"
ARGUMENTS = "pl_module_args"
PUBLISHED_UNUSABLE: list[tuple[str, str, object, str]] = [
    (PAIR, "accelerator", "gpu", "accelerator"),
    (PAIR, f"{ARGUMENTS}.ema", 0.999, "ema"),
    (PAIR, f"{ARGUMENTS}.optimizer_params.weight_decay", 0.1, "optimizer_params.weight_decay"),
    (PAIR, f"{ARGUMENTS}.scheduler_params.cooldown", 1, "scheduler_params.cooldown"),
    (PAIR, f"{ARGUMENTS}.loss_params.alpha", 1, "alpha"),
    (PAIR, f"{ARGUMENTS}.small_model_params.dropout", 0.1, "dropout"),
    (PAIR, "train_data_args.noise", True, "noise"),
    (PAIR, "epochs", "20", "epochs"),
    (PAIR, "batch_size", 8.5, "batch_size"),
    (PAIR, "eval_batch_size", "8", "eval_batch_size"),
    (PAIR, "num_workers", "16", "num_workers"),
    (PAIR, "grad_clip", "1", "grad_clip"),
    (PAIR, ARGUMENTS, [], ARGUMENTS),
    (PAIR, f"{ARGUMENTS}.optimizer_params", "lr", "optimizer_params"),
    (PAIR, f"{ARGUMENTS}.optimizer_params.lr", "1e-3", "optimizer_params.lr"),
    (PAIR, f"{ARGUMENTS}.scheduler_params", [4], "scheduler_params"),
    (PAIR, f"{ARGUMENTS}.scheduler_params.min_lr", "0", "scheduler_params.min_lr"),
    (PAIR, f"{ARGUMENTS}.loss_params", "pit_sisdr", "loss_params"),
    (PAIR, f"{ARGUMENTS}.freeze_bm", "no", "freeze_bm"),
    (PAIR, f"{ARGUMENTS}.big_model_init_ckpt", 3, "big_model_init_ckpt"),
    (PAIR, f"{ARGUMENTS}.big_model_params", None, "big_model_params"),
    (PAIR, f"{ARGUMENTS}.big_model_params.H", "64", '"H"'),
    (PAIR, "train_data_args", [], "train_data_args"),
    (PAIR, "train_data_args.num_samples", "all", "train_data_args.num_samples"),
    (PAIR, "epochs", 0, "epochs"),
    (PAIR, "grad_clip", -1, "grad_clip"),
    (PAIR, "val_data_args.num_samples", 0, "val_data_args.num_samples"),
    (PAIR, "test_data_args.sr", 8000, "test_data_args"),
    (PAIR, "train_data_args.resample_rate", 8000, "train_data_args"),
    (PAIR, f"{ARGUMENTS}.sr", 8000, "sr"),
    (PAIR, f"{ARGUMENTS}.optimizer", "torch.optim.SGD", "optimizer"),
    (PAIR, f"{ARGUMENTS}.optimizer_params.lr", 0, "optimizer_params.lr"),
    (PAIR, f"{ARGUMENTS}.scheduler", "torch.optim.lr_scheduler.StepLR", "scheduler"),
    (PAIR, f"{ARGUMENTS}.scheduler_params.mode", "min", "scheduler_params.mode"),
    (PAIR, f"{ARGUMENTS}.scheduler_params.factor", 2.0, "scheduler_params.factor"),
    (PAIR, f"{ARGUMENTS}.loss_params.name", "sisdr", "loss_params.name"),
    (BASELINE, f"{ARGUMENTS}.loss_params.name", "pit_sisdr", "loss_params.name"),
    (BASELINE, f"{ARGUMENTS}.freeze_bm", True, "freeze_large"),
    (PAIR, f"{ARGUMENTS}.small_model_params.H", -1, '"H"'),
    (PAIR, f"{ARGUMENTS}.small_model_params.I", 4, '"I"'),
    (PAIR, f"{ARGUMENTS}.joint_model_params.delay", 1, "delay"),
    (PAIR, f"{ARGUMENTS}.joint_model_params.compression", 3, "compression"),
    (PAIR, f"{ARGUMENTS}.small_model", "src.models.other.Net", "task"),
    (PAIR, ARGUMENTS, ABSENT, ARGUMENTS),
    (PAIR, "epochs", ABSENT, "epochs"),
    (PAIR, "train_data_args", ABSENT, "train_data_args"),
    (PAIR, "val_data_args", ABSENT, "val_data_args"),
    (PAIR, "train_data_args.mixtures_dir", ABSENT, "train_data_args.mixtures_dir"),
    (PAIR, "val_data_args.dset", ABSENT, "val_data_args.dset"),
    (PAIR, f"{ARGUMENTS}.small_model", ABSENT, "task"),
    (PAIR, f"{ARGUMENTS}.small_model_params", ABSENT, "small_model_params"),
    (PAIR, f"{ARGUMENTS}.small_model_params.D", ABSENT, '"D"'),
    (PAIR, f"{ARGUMENTS}.joint_model_params", ABSENT, "joint_model_params"),
    (PAIR, f"{ARGUMENTS}.joint_model_params.delay", ABSENT, "delay"),
    (BASELINE, f"{ARGUMENTS}.model_params", ABSENT, "model_params"),
    (BASELINE, f"{ARGUMENTS}.model_params.use_attn", ABSENT, "use_attn"),
]


@pytest.mark.parametrize(("name", "path", "value", "key"), PUBLISHED_UNUSABLE)
def test_an_unusable_published_configuration_is_refused_naming_its_key(
    name: str, path: str, value: object, key: str, tmp_path: Path
) -> None:
    assert_refused(changed(published(name), path, value), key, tmp_path / "config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_a_file_that_is_no_json_object_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: "):
        read_training_config(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        read_training_config(tmp_path / "none.json")
    with pytest.raises(InputError, match="is a folder"):
        read_training_config(tmp_path)


def test_changed_values_of_a_published_configuration_are_used(tmp_path: Path) -> None:
    document = published(PAIR)
    for path, value in (
        ("epochs", 3),
        ("batch_size", 2),
        ("eval_batch_size", 5),
        ("num_workers", 1),
        ("grad_clip", 0.5),
        ("val_data_args.num_samples", 7),
        ("train_data_args.resample_rate", 16000),
        (f"{ARGUMENTS}.optimizer_params.lr", 5e-4),
        (f"{ARGUMENTS}.scheduler_params", {"mode": "max", "patience": 1, "factor": 0.25, "min_lr": 0}),
        (f"{ARGUMENTS}.big_model_init_ckpt", "large.pt"),
        (f"{ARGUMENTS}.freeze_bm", True),
    ):
        document = changed(document, path, value)
    config = read_training_config(write(tmp_path / "config.json", document))
    assert (config.epochs, config.batch_size, config.evaluation_batch_size, config.workers) == (3, 2, 5, 1)
    assert (config.gradient_clip, config.learning_rate, config.validation.items) == (0.5, 5e-4, 7)
    assert (config.schedule.patience, config.schedule.factor, config.schedule.minimum) == (1, 0.25, 0.0)
    assert (config.large_checkpoint, config.freeze_large) == ("large.pt", True)


def test_published_training_without_a_gradient_clip_does_not_clip(tmp_path: Path) -> None:
    document = changed(published(BASELINE), "grad_clip", ABSENT)
    assert read_training_config(write(tmp_path / "config.json", document)).gradient_clip == 0


def test_the_demo_trains_a_pair_of_the_networks_it_trains_alone() -> None:
    large, small, joint = (ours(f"demo/train-ss-{name}") for name in ("large", "small", "joint"))
    assert isinstance(joint.model, Pair)
    assert (joint.model.large, joint.model.small) == (large.model.on_device, small.model.on_device)
    assert joint.model.delay == 6
    for config in (large, small, joint):
        assert config.train == joint.train
        assert config.schedule.kind == "cosine"
        build(config.model)
