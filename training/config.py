"""The configuration of a training run, in the schema of this project or as a published JSON file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from knowledge_boosting.common.errors import InputError, existing_file
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, Alone, ModelConfig, Strict
from knowledge_boosting.models.manifest import first_fault, read_json, validate
from knowledge_boosting.models.published import config_from_published, is_published_config

Permutation = Literal["per_channel", "joint"]
Name = Annotated[str, Field(min_length=1)]


class FolderData(Strict):
    """Rendered mixtures in the published layout, which ``kb-make-dataset`` makes."""

    kind: Literal["folder"] = "folder"
    root: Annotated[str, Field(min_length=1)]
    split: Annotated[str, Field(min_length=1)]
    items: Annotated[int | None, Field(ge=1, description="use only the first items")] = None


class DynamicData(Strict):
    """Dynamic mixing: new mixtures in every epoch, from speech and a bank of binaural room responses."""

    kind: Literal["dynamic"] = "dynamic"
    speech: Annotated[
        tuple[Name, ...],
        Field(
            min_length=1, description="folder of speech, or several; the speakers of a mixture come from the same one"
        ),
    ]
    responses: Annotated[
        str, Field(min_length=1, description="responses.safetensors of kb-make-dataset --responses-only")
    ]
    items: Annotated[int, Field(ge=1, description="mixtures in an epoch")]
    seconds: PositiveFloat = 4.0
    level_difference_db: Annotated[float, Field(ge=0, description="drawn from plus or minus this value")] = 5.0
    level_dbfs: Annotated[
        tuple[float, float], Field(description="RMS of the mixture, drawn between the two; reduced if it would clip")
    ] = (-35.0, -20.0)
    speed: Annotated[
        float, Field(ge=0, lt=0.5, description="playback speed is drawn from 1 plus or minus this value")
    ] = 0.0
    candidates: Annotated[
        int,
        Field(ge=1, description="TSE: candidates for the second speaker; the one least similar to the first is chosen"),
    ] = 1

    excluded_speakers: Annotated[
        str | None, Field(description="file with the names of speakers who are kept for validation, one a line")
    ] = None
    noise: Annotated[str | None, Field(min_length=1, description="folder of recordings without voices")] = None
    noise_db: Annotated[
        tuple[float, float], Field(description="level of the speech over the noise, drawn between the two")
    ] = (15.0, 40.0)
    pauses: Annotated[
        float, Field(ge=0, le=1, description="share of mixtures with a pause, of one speaker or of both at the start")
    ] = 0.0
    ear_difference_db: Annotated[
        float,
        Field(ge=0, description="left ear over right ear, drawn from plus or minus this value, small ones more often"),
    ] = 0.0
    level_change_db: Annotated[
        float, Field(ge=0, description="from the start to the end of a mixture, drawn from plus or minus this value")
    ] = 0.0

    @field_validator("speech", mode="before")
    @classmethod
    def _may_be_one_folder(cls, speech: Any) -> Any:
        return (speech,) if isinstance(speech, str) else tuple(speech) if isinstance(speech, list) else speech

    @field_validator("level_dbfs")
    @classmethod
    def _is_a_range(cls, level: tuple[float, float]) -> tuple[float, float]:
        if not -100 <= level[0] <= level[1] <= 0:
            raise ValueError("must be [LOW, HIGH] with -100 <= LOW <= HIGH <= 0")
        return level

    @field_validator("noise_db")
    @classmethod
    def _rises(cls, ratio: tuple[float, float]) -> tuple[float, float]:
        if ratio[0] > ratio[1]:
            raise ValueError("must be [LOW, HIGH] with LOW <= HIGH")
        return ratio


class StoredData(Strict):
    """Mixtures with the outputs of the large network, which ``kb-store-hints`` makes."""

    kind: Literal["stored"] = "stored"
    root: Annotated[str, Field(min_length=1)]
    items: Annotated[int | None, Field(ge=1, description="use only the first items")] = None


Data = Annotated[FolderData | DynamicData | StoredData, Field(discriminator="kind")]


class Schedule(Strict):
    """How the learning rate decreases."""

    kind: Literal["plateau", "cosine"] = "plateau"
    patience: Annotated[
        int, Field(ge=0, description="plateau: epochs without a better validation figure before a decrease")
    ] = 4
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    minimum: Annotated[float, Field(ge=0)] = 1e-6


WEIGHT_SOURCES = ("initial_checkpoint", "averaged_with", "warm_start", "large_checkpoint")


class TrainingConfig(Strict):
    """Everything that a run depends on, except the content of the files that it reads."""

    model: ModelConfig
    train: Data
    validation: FolderData
    test: FolderData | None = None
    permutation: Permutation = "per_channel"
    learning_rate: PositiveFloat = 1e-3
    schedule: Schedule = Schedule()
    gradient_clip: Annotated[float, Field(ge=0, description="norm; 0 does not clip")] = 1.0
    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=1, description="the sum over all devices")] = 8
    evaluation_batch_size: PositiveInt = 8
    workers: Annotated[int, Field(ge=0, description="processes that load data, for each device")] = 4
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    seed: Annotated[int, Field(ge=0)] = 42
    initial_checkpoint: Annotated[
        str | None, Field(description="initial weights of the whole model, a file or a bundle")
    ] = None
    averaged_with: Annotated[
        str | None,
        Field(
            description="checkpoint with the same origin; the initial weights are the mean of it and initial_checkpoint"
        ),
    ] = None
    large_checkpoint: Annotated[str | None, Field(description="initial weights of the large network")] = None
    freeze_large: bool = False
    warm_start: Annotated[
        str | None,
        Field(
            description="checkpoint of a related model, of the other task or without hints; tensors that fit are loaded"
        ),
    ] = None
    hint_dropout: Annotated[float, Field(ge=0, le=1, description="share of examples without hints")] = 0.0
    guidance: Annotated[
        float, Field(ge=0, description="weight of the guidance loss, which trains fusion or a network alone directly")
    ] = 0.0
    separation: Annotated[
        float,
        Field(ge=0, description="TSE: weight of the loss of an output layer for both speakers, of a network alone"),
    ] = 0.0
    level_weight: Annotated[
        float, Field(ge=0, description="weight of the level error of the estimates (dB) in the loss")
    ] = 0.0
    averaging: Annotated[
        float,
        Field(
            ge=0, lt=1, description="decay of a running mean of the weights, which is the result of the run; 0: no mean"
        ),
    ] = 0.0
    speaker_components: Annotated[
        int,
        Field(
            ge=0,
            lt=SPEAKER_EMBEDDING_SIZE,
            description="TSE: principal components of the embeddings that are whitened; 0: no whitening",
        ),
    ] = 0
    speaker_noise: Annotated[
        float,
        Field(ge=0, description="noise on these components in training, in standard deviations of the speakers"),
    ] = 0.0
    ideal_hints: Annotated[
        bool, Field(description="hints are computed from the true sources, not by the large network")
    ] = False

    @model_validator(mode="after")
    def _only_pairs_have_a_large_network(self) -> Self:
        if isinstance(self.model, Alone) and (self.large_checkpoint is not None or self.freeze_large):
            raise ValueError("large_checkpoint and freeze_large are for a pair, not for one network alone")
        if isinstance(self.model, Alone) and (self.hint_dropout or self.ideal_hints):
            raise ValueError("hint_dropout and ideal_hints are for a pair, not for one network alone")
        if not self.model.needs_speaker and self.speaker_components:
            raise ValueError("speaker_components are for target speech extraction")
        if self.separation and not (isinstance(self.model, Alone) and self.model.needs_speaker):
            raise ValueError("separation is for one network alone that extracts a target speaker")
        if self.speaker_noise and not self.speaker_components:
            raise ValueError("speaker_noise: set speaker_components too, because the noise is added to them")
        if isinstance(self.train, StoredData) and not self.freeze_large:
            raise ValueError("train: stored hints need a large network that does not change; set freeze_large")
        if self.ideal_hints and not self.freeze_large:
            raise ValueError("ideal_hints: set freeze_large too, the large network learns nothing from them")
        if self.warm_start is not None and self.initial_checkpoint is not None:
            raise ValueError("warm_start and initial_checkpoint: give only one of them")
        if self.averaged_with is not None and self.initial_checkpoint is None:
            raise ValueError("averaged_with: give an initial_checkpoint too, to take the mean of the two")
        return self

    def weight_sources(self) -> list[str]:
        """Return the checkpoints and bundles that provide the initial weights."""
        return [source for name in WEIGHT_SOURCES if (source := getattr(self, name)) is not None]

    def without_weight_sources(self) -> Self:
        """Return the same configuration without sources of initial weights."""
        return self.model_copy(update=dict.fromkeys(WEIGHT_SOURCES))


def read_training_config(path: Path) -> TrainingConfig:
    """Read a training configuration, in the schema of this project or a published one.

    Raises:
        InputError: the file cannot be read, or a key is missing, unknown or has an impossible value. The message names
            the key.
    """
    document = read_json(existing_file(path, "a training configuration"))
    if not is_published_config(document):
        return validate(TrainingConfig, document, path)
    try:
        return _from_published(document, str(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}") from None


# The place in a published file of values that have another name or another place in our schema.
_ARGUMENTS = "pl_module_args"
_DATA = {"train": "train_data_args", "validation": "val_data_args", "test": "test_data_args"}
_PUBLISHED_KEYS = {
    "learning_rate": f"{_ARGUMENTS}.optimizer_params.lr",
    "schedule.patience": f"{_ARGUMENTS}.scheduler_params.patience",
    "schedule.factor": f"{_ARGUMENTS}.scheduler_params.factor",
    "schedule.minimum": f"{_ARGUMENTS}.scheduler_params.min_lr",
    "initial_checkpoint": f"{_ARGUMENTS}.init_ckpt",
    "large_checkpoint": f"{_ARGUMENTS}.big_model_init_ckpt",
    "freeze_large": f"{_ARGUMENTS}.freeze_bm",
    "gradient_clip": "grad_clip",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "evaluation_batch_size": "eval_batch_size",
    "workers": "num_workers",
    **{
        f"{ours}.{key}": f"{theirs}.{name}"
        for ours, theirs in _DATA.items()
        for key, name in (("root", "mixtures_dir"), ("split", "dset"), ("items", "num_samples"))
    },
}
# Only these values are implemented.
_FIXED: dict[str, tuple[Any, ...]] = {
    f"{_ARGUMENTS}.sr": (16000,),
    f"{_ARGUMENTS}.optimizer": ("torch.optim.Adam",),
    f"{_ARGUMENTS}.scheduler": ("torch.optim.lr_scheduler.ReduceLROnPlateau",),
    f"{_ARGUMENTS}.scheduler_params.mode": ("max",),
    **{f"{section}.sr": (16000,) for section in _DATA.values()},
    **{f"{section}.resample_rate": (None, 16000) for section in _DATA.values()},
}
# Import paths of code that is not needed, and keys that `config_from_published` reads.
_IGNORED = {"pl_module", "pl_logger", "val_logger", "train_dataset", "val_dataset", "test_dataset"} | {
    f"{_ARGUMENTS}.{key}"
    for key in (
        *("task", "model", "small_model", "big_model", "joint_model"),
        *("model_params", "small_model_params", "big_model_params", "joint_model_params"),
    )
}
_MAX_WORKERS = 4  # the published files ask for 16, whatever the machine


def _from_published(document: Mapping[str, Any], source: str) -> TrainingConfig:
    if not isinstance(document.get(_ARGUMENTS), dict):
        raise InputError(f'{source}: "{_ARGUMENTS}" is missing or not an object')
    model = config_from_published(document, source)
    left = {"grad_clip": 0, **dict(_leaves(document))}
    loss = f"{_ARGUMENTS}.loss_params.name"
    for key, allowed in {**_FIXED, loss: ("sisdr" if model.sources == 1 else "pit_sisdr",)}.items():
        if left.pop(key, allowed[0]) not in allowed:
            raise InputError(f'{source}: "{key}" must be {allowed[0]!r}')
    values: dict[str, Any] = {"model": model}
    for ours, theirs in _PUBLISHED_KEYS.items():
        if theirs not in left:
            continue
        value = left.pop(theirs)
        section, _, key = ours.rpartition(".")
        within = values.setdefault(section, {"kind": "folder"} if section in _DATA else {}) if section else values
        within[key] = None if value == "" and key.endswith("checkpoint") else value
    if isinstance(values.get("workers"), int):
        values["workers"] = min(values["workers"], _MAX_WORKERS)
    if left:
        raise InputError(f'{source}: unknown key "{min(left)}"')
    try:
        return TrainingConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {first_fault(error, _published_key)}") from None


def _published_key(ours: str) -> str:
    key = ".".join(part for part in ours.split(".") if part != "folder")
    return _PUBLISHED_KEYS.get(key, _DATA.get(key, key))


def _leaves(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if path + key in _IGNORED:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield path + key, value
