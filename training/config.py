"""A training run, in numbers: our own schema, and the published JSON files as they are."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from knowledge_boosting.common.errors import InputError, existing_file
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, Alone, ModelConfig, Strict
from knowledge_boosting.models.manifest import first_fault, read_json, validate
from knowledge_boosting.models.published import config_from_published, is_published_config

Permutation = Literal["per_channel", "joint"]


class FolderData(Strict):
    """Mixtures rendered beforehand, in the published layout (``kb-make-dataset``)."""

    kind: Literal["folder"] = "folder"
    root: Annotated[str, Field(min_length=1)]
    split: Annotated[str, Field(min_length=1)]
    items: Annotated[int | None, Field(ge=1, description="use only the first ones")] = None


class DynamicData(Strict):
    """Mixtures made anew every epoch from speech and a bank of binaural room responses."""

    kind: Literal["dynamic"] = "dynamic"
    speech: Annotated[str, Field(min_length=1)]
    responses: Annotated[
        str, Field(min_length=1, description="responses.safetensors of kb-make-dataset --responses-only")
    ]
    items: Annotated[int, Field(ge=1, description="mixtures an epoch")]
    seconds: PositiveFloat = 4.0
    level_difference_db: Annotated[float, Field(ge=0, description="drawn within plus or minus")] = 5.0
    level_dbfs: Annotated[
        tuple[float, float], Field(description="RMS of the mixture, drawn between the two; lowered where it would clip")
    ] = (-35.0, -20.0)
    speed: Annotated[float, Field(ge=0, lt=0.5, description="playback speed drawn within 1 plus or minus")] = 0.0
    candidates: Annotated[
        int, Field(ge=1, description="TSE: speakers drawn, of whom the one least like the first is the second")
    ] = 1

    excluded_speakers: Annotated[
        str | None, Field(description="file of names, a line each, of speakers who are kept for validation")
    ] = None
    noise: Annotated[str | None, Field(min_length=1, description="folder of recordings without voices")] = None
    noise_db: Annotated[
        tuple[float, float], Field(description="of the mixture of voices over the noise, drawn between the two")
    ] = (15.0, 40.0)
    pauses: Annotated[
        float, Field(ge=0, le=1, description="share of mixtures in which one speaker, or both at first, are silent")
    ] = 0.0
    ear_difference_db: Annotated[
        float, Field(ge=0, description="of the left ear over the right one, drawn within plus or minus, mostly small")
    ] = 0.0
    level_change_db: Annotated[
        float, Field(ge=0, description="from the start to the end of a mixture, drawn within plus or minus")
    ] = 0.0

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
    """Mixtures with what the large network makes of them (``kb-store-hints``)."""

    kind: Literal["stored"] = "stored"
    root: Annotated[str, Field(min_length=1)]
    items: Annotated[int | None, Field(ge=1, description="use only the first ones")] = None


Data = Annotated[FolderData | DynamicData | StoredData, Field(discriminator="kind")]


class Schedule(Strict):
    """How the learning rate falls."""

    kind: Literal["plateau", "cosine"] = "plateau"
    patience: Annotated[int, Field(ge=0, description="plateau: epochs without a better validation figure")] = 4
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    minimum: Annotated[float, Field(ge=0)] = 1e-6


WEIGHT_SOURCES = ("initial_checkpoint", "averaged_with", "warm_start", "large_checkpoint")


class TrainingConfig(Strict):
    """Everything that a run depends on, but for the files it reads."""

    model: ModelConfig
    train: Data
    validation: FolderData
    test: FolderData | None = None
    permutation: Permutation = "per_channel"
    learning_rate: PositiveFloat = 1e-3
    schedule: Schedule = Schedule()
    gradient_clip: Annotated[float, Field(ge=0, description="norm; 0 does not clip")] = 1.0
    epochs: PositiveInt
    batch_size: Annotated[int, Field(ge=1, description="over all devices together")] = 8
    evaluation_batch_size: PositiveInt = 8
    workers: Annotated[int, Field(ge=0, description="processes that read data, for each device")] = 4
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    seed: Annotated[int, Field(ge=0)] = 42
    initial_checkpoint: Annotated[
        str | None, Field(description="weights of the whole model to start from, a file or a bundle")
    ] = None
    averaged_with: Annotated[
        str | None,
        Field(description="checkpoint that came from the same weights: to start at the mean of it and the initial one"),
    ] = None
    large_checkpoint: Annotated[str | None, Field(description="weights of the large network to start from")] = None
    freeze_large: bool = False
    warm_start: Annotated[
        str | None,
        Field(description="checkpoint of a related model, of the other task or without hints: what fits is taken"),
    ] = None
    hint_dropout: Annotated[float, Field(ge=0, le=1, description="share of examples without any hint")] = 0.0
    guidance: Annotated[
        float, Field(ge=0, description="weight of what tells fusion, or a network alone, what to listen for")
    ] = 0.0
    level_weight: Annotated[
        float, Field(ge=0, description="weight in the loss of what an estimate's level is wrong by, dB")
    ] = 0.0
    averaging: Annotated[
        float,
        Field(ge=0, lt=1, description="decay of a running mean of the weights, which is what a run gives; 0: none"),
    ] = 0.0
    speaker_components: Annotated[
        int,
        Field(
            ge=0, lt=SPEAKER_EMBEDDING_SIZE, description="differences of speakers that TSE learns by; 0: as they come"
        ),
    ] = 0
    speaker_noise: Annotated[
        float,
        Field(ge=0, description="of these differences in training, in standard deviations of the speakers"),
    ] = 0.0
    ideal_hints: Annotated[
        bool, Field(description="hints are made from the true sources, not by the large network")
    ] = False

    @model_validator(mode="after")
    def _only_pairs_have_a_large_network(self) -> Self:
        if isinstance(self.model, Alone) and (self.large_checkpoint is not None or self.freeze_large):
            raise ValueError("large_checkpoint and freeze_large are for a pair, not for one network alone")
        if isinstance(self.model, Alone) and (self.hint_dropout or self.ideal_hints):
            raise ValueError("hint_dropout and ideal_hints are for a pair, not for one network alone")
        if not self.model.needs_speaker and self.speaker_components:
            raise ValueError("speaker_components are for target speech extraction")
        if self.speaker_noise and not self.speaker_components:
            raise ValueError("speaker_noise: set speaker_components too, it is noise of theirs")
        if isinstance(self.train, StoredData) and not self.freeze_large:
            raise ValueError("train: stored hints are of a pair whose large network stays as it is; set freeze_large")
        if self.ideal_hints and not self.freeze_large:
            raise ValueError("ideal_hints: set freeze_large too, the large network learns nothing from them")
        if self.warm_start is not None and self.initial_checkpoint is not None:
            raise ValueError("warm_start and initial_checkpoint: give one of them")
        if self.averaged_with is not None and self.initial_checkpoint is None:
            raise ValueError("averaged_with: give an initial_checkpoint too, to take the mean of the two")
        return self

    def weight_sources(self) -> list[str]:
        """The checkpoints and bundles that weights start from."""
        return [source for name in WEIGHT_SOURCES if (source := getattr(self, name)) is not None]

    def without_weight_sources(self) -> Self:
        """The same configuration for weights that come from elsewhere."""
        return self.model_copy(update=dict.fromkeys(WEIGHT_SOURCES))


def read_training_config(path: Path) -> TrainingConfig:
    """A training configuration, ours or a published one.

    Raises:
        InputError: it cannot be read, or a key is missing, unknown or impossible; it is named.
    """
    document = read_json(existing_file(path, "a training configuration"))
    if not is_published_config(document):
        return validate(TrainingConfig, document, path)
    try:
        return _from_published(document, str(path))
    except ValidationError as error:
        raise InputError(f"{path}: {first_fault(error)}") from None


# Where a published file has what we call otherwise or keep elsewhere.
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
# What must be one of these values, because nothing else is implemented.
_FIXED: dict[str, tuple[Any, ...]] = {
    f"{_ARGUMENTS}.sr": (16000,),
    f"{_ARGUMENTS}.optimizer": ("torch.optim.Adam",),
    f"{_ARGUMENTS}.scheduler": ("torch.optim.lr_scheduler.ReduceLROnPlateau",),
    f"{_ARGUMENTS}.scheduler_params.mode": ("max",),
    **{f"{section}.sr": (16000,) for section in _DATA.values()},
    **{f"{section}.resample_rate": (None, 16000) for section in _DATA.values()},
}
# Import paths of code we do not need, and what `config_from_published` reads.
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
