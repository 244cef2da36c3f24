"""Runs training, new or resumed, tests its checkpoints, and stores hints for it."""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateMonitor, ModelCheckpoint

from knowledge_boosting.common.cli import progress_bar
from knowledge_boosting.common.errors import Failure, InputError, reason
from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.models.checkpoint import apply_output_gains, read_checkpoint
from knowledge_boosting.models.compiled import use_for_whole_signals
from knowledge_boosting.models.config import Alone
from knowledge_boosting.models.tfgridnet import describe_lstms
from knowledge_boosting.training.config import (
    Data,
    DynamicData,
    FolderData,
    StoredData,
    TrainingConfig,
    read_training_config,
)
from knowledge_boosting.training.data.dynamic_mixing import DynamicMixing, render
from knowledge_boosting.training.data.layout import refuse_shared_speakers
from knowledge_boosting.training.data.loading import EpochOrder, Examples, Loader
from knowledge_boosting.training.data.mixture_folder import MixtureFolder
from knowledge_boosting.training.data.stored_hints import (
    SHARD_SIZE,
    STORED_LARGE,
    Record,
    StoredHints,
    first_missing_shard,
    large_digest,
    open_folder,
    shard_path,
    write_shard,
)
from knowledge_boosting.training.learning.memory import keep_freed_memory
from knowledge_boosting.training.learning.module import MONITOR, TrainingModule
from knowledge_boosting.training.learning.trainer import (
    Devices,
    Interruption,
    make_loggers,
    make_trainer,
    silence_lightning,
)
from knowledge_boosting.training.recipes import Recipe
from knowledge_boosting.training.weights import LAST, best_checkpoint


def read_settings(path: Path, *, stage: str | None, runs: Path, data: Path | None, large: str | None) -> TrainingConfig:
    """Read a configuration, and apply the values that the command line overrides.

    Args:
        path: a training configuration, or a recipe if the name ends in ``.toml``.
        stage: the stage of the recipe.
        runs: the folder with the runs of earlier stages of the recipe.
        data: the root of the rendered data; overrides that of the configuration.
        large: the initial weights of the large network; overrides those of the configuration.

    Raises:
        InputError: the file cannot be used, or a value of the command line does not fit it.
    """
    settings = _read(path, stage, runs)
    document = settings.model_dump(mode="json")
    if data is not None:
        for split in ("train", "validation", "test"):
            if isinstance(getattr(settings, split), FolderData):
                document[split]["root"] = str(data)
    if large is not None:
        if isinstance(settings.model, Alone):
            raise InputError(f"{path}: describes one network alone; leave out --large")
        document["large_checkpoint"] = large
    return TrainingConfig.model_validate_json(json.dumps(document))


def _read(path: Path, stage: str | None, runs: Path) -> TrainingConfig:
    if path.suffix != ".toml":
        if stage is not None:
            raise InputError(
                f"{path}: --stage is for recipes (.toml), but this is a single configuration; leave out --stage"
            )
        return read_training_config(path)
    recipe = Recipe(path)
    if stage is None:
        raise InputError(f"{path}: is a recipe; choose one of its stages with --stage: {', '.join(recipe.stages)}")
    return recipe.stage(stage, runs)


def run_training(
    settings: TrainingConfig,
    run_dir: Path,
    start: Path | None,
    devices: Devices,
    *,
    frac: float,
    minutes: float | None,
    skip_broken: bool,
    wandb: bool,
) -> None:
    """Train from the beginning or from a checkpoint, until the last epoch or an interruption.

    Args:
        settings: the configuration.
        run_dir: the folder for checkpoints, logs and the configuration.
        start: the checkpoint to continue from, or None.
        devices: the devices to train on.
        frac: the share of every epoch to use.
        minutes: the time of training after which the run stops and saves, as on an interruption; None for no limit.
        skip_broken: whether broken items are skipped.
        wandb: whether to log to Weights & Biases too.

    Raises:
        InputError: the configuration, the data or the checkpoint cannot be used.
        Failure: the loss is not finite, or the device has not enough memory.
    """
    silence_lightning()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TF32, as for LSTMs and convolutions by default
    else:
        keep_freed_memory()
        use_for_whole_signals()
    lightning.seed_everything(settings.seed, verbose=False)
    done = _steps_of(start, settings) if start is not None else 0
    # A resumed run takes its weights from its own checkpoint. The files of its initial weights may not exist any more.
    module = TrainingModule(settings.without_weight_sources() if start is not None else settings)
    if start is not None:
        module.stored_large = _content(start).get(STORED_LARGE)
    train = _examples(settings.train, settings, module.stored_large, training=True, skip_broken=skip_broken)
    validation = _examples(settings.validation, settings, None, training=False, skip_broken=skip_broken)
    refuse_shared_speakers(train.speakers, Path(settings.validation.root) / settings.validation.split)
    module.training_speakers |= train.speakers
    if start is None and module.whitening is not None:
        module.whiten_speakers(train.speaker_embeddings())
    if len(train) < settings.batch_size:
        raise InputError(
            f"the training data has {len(train)} items, fewer than one batch of {settings.batch_size}; lower batch_size"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run_dir}: cannot make the folder ({reason(error)})") from None

    interruption = Interruption(run_dir / LAST, minutes)
    trainer = make_trainer(
        settings,
        run_dir,
        devices,
        frac,
        loggers=make_loggers(run_dir, wandb=wandb),
        callbacks=[
            # A killed run loses at most the last minute.
            ModelCheckpoint(
                run_dir,
                filename=Path(LAST).stem,
                train_time_interval=timedelta(minutes=1),
                enable_version_counter=False,
            ),
            ModelCheckpoint(
                run_dir / "best",
                filename="epoch{epoch:03d}_{" + MONITOR + ":.2f}dB",
                auto_insert_metric_name=False,
                monitor=MONITOR,
                mode="max",
                save_top_k=5,
            ),
            LearningRateMonitor("step"),
            *([EMAWeightAveraging(decay=settings.averaging, use_buffers=False)] if settings.averaging else []),
            interruption,
        ],
    )
    if trainer.is_global_zero:
        with atomic_file(run_dir / "config.json") as temporary:
            temporary.write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
    batch_size = settings.batch_size
    if batch_size % trainer.world_size:
        raise InputError(f"batch_size {batch_size} cannot be shared by {trainer.world_size} devices; choose a multiple")
    if trainer.is_global_zero and not torch.cuda.is_available():
        print(f"kb-train: {describe_lstms(module)}", file=sys.stderr)
    order = EpochOrder(
        len(train), batch_size, seed=settings.seed, shuffle=True, rank=trainer.global_rank, devices=trainer.world_size
    )
    order.first_batch = done % max(int(len(order) * frac), 1)
    try:
        trainer.fit(
            module,
            Loader(train, order, settings.workers),
            _evaluation_loader(validation, settings, trainer),
            ckpt_path=start,
            weights_only=True,
        )
    except torch.OutOfMemoryError as error:
        text = f"not enough memory on {module.device} ({str(error).splitlines()[0]})"
        raise Failure(f"{text}; lower batch_size or train.seconds") from None
    if interruption.stopped:
        print(f"kb-train: stopped at step {trainer.global_step}; --resume continues from there", file=sys.stderr)
    else:
        trainer.save_checkpoint(run_dir / LAST)


def store_hints(settings: TrainingConfig, output: Path, items: int) -> None:
    """Draw mixtures, and store them with the outputs of the large network (:mod:`training.data.stored_hints`).

    Args:
        settings: the configuration.
        output: the folder to make or to continue.
        items: the number of mixtures.

    Raises:
        InputError: the configuration is not that of a pair with a frozen large network and dynamic mixing, its data or
            checkpoints cannot be used, or the folder has other content.
    """
    silence_lightning()
    data = settings.train
    if not isinstance(data, DynamicData) or not settings.freeze_large:
        raise InputError("--config: give the configuration of a pair with freeze_large and dynamic mixing")
    if not torch.cuda.is_available():
        keep_freed_memory()
        use_for_whole_signals()
    module = TrainingModule(settings).to("cuda" if torch.cuda.is_available() else "cpu")
    examples = DynamicMixing(data, settings.model, seed=settings.seed, skip_broken=False)
    targets = 2 if settings.model.needs_speaker else 1  # each speaker of a mixture is the target once
    record = Record(
        large=large_digest(settings.model, module.pair.large.network),
        mixtures=f"{items} of seed {settings.seed}, {data.model_dump_json(exclude={'items'})}",
        shards=-(-items * targets // SHARD_SIZE),
        examples=items * targets,
        speakers=sorted(examples.speakers | module.training_speakers),
    )
    open_folder(output, record)
    order = EpochOrder(items, SHARD_SIZE // targets, seed=settings.seed, shuffle=False)
    order.first_batch = first_missing_shard(output, record)
    print(f"{output}: {record.shards - order.first_batch} of {record.shards} files to make", flush=True)
    with progress_bar(record.shards, done=order.first_batch) as advance:
        for shard, batch in enumerate(Loader(examples, order, settings.workers), start=order.first_batch):
            write_shard(shard_path(output, shard), module.pair, render(move_data_to_device(batch, module.device)))
            advance()
    print(f"{output}: {record.examples} examples with hints, {record.examples * data.seconds / 3600:.2g} h")


def run_test(
    settings: TrainingConfig,
    run_dir: Path,
    checkpoint: Path | None,
    devices: Devices,
    *,
    frac: float,
    skip_broken: bool,
) -> None:
    """Test a checkpoint on the test split, and write the figures to ``RUN_DIR/test.json``.

    Args:
        settings: the configuration.
        run_dir: the folder of the run.
        checkpoint: the checkpoint, or None for the best.
        devices: the devices to run on.
        frac: the share of the test data to use.
        skip_broken: whether broken items are skipped.

    Raises:
        InputError: the checkpoint or the test data do not exist or cannot be used.
    """
    silence_lightning()
    if settings.test is None:
        raise InputError('the configuration has no test data; add "test" to it')
    path = checkpoint or best_checkpoint(run_dir)
    module = TrainingModule(settings.without_weight_sources().model_copy(update={"initial_checkpoint": str(path)}))
    apply_output_gains(module.model, path)
    refuse_shared_speakers(module.training_speakers, Path(settings.test.root) / settings.test.split)
    test = _examples(settings.test, settings, None, training=False, skip_broken=skip_broken)
    trainer = make_trainer(settings, run_dir, devices, frac, loggers=[], callbacks=[])
    figures = trainer.test(module, _evaluation_loader(test, settings, trainer))
    if trainer.is_global_zero:
        with atomic_file(run_dir / "test.json") as temporary:
            result = {"checkpoint": path.name, **{name: round(value, 4) for name, value in figures[0].items()}}
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _examples(
    data: Data, settings: TrainingConfig, large: str | None, *, training: bool, skip_broken: bool
) -> Examples:
    """Open examples of any kind. ``large`` is the digest that the large network of stored hints must have."""
    if isinstance(data, StoredData):
        return StoredHints(data, settings.model, large)
    if isinstance(data, DynamicData):
        return DynamicMixing(data, settings.model, seed=settings.seed, skip_broken=skip_broken)
    return MixtureFolder(data, settings.model, seed=settings.seed, training=training, skip_broken=skip_broken)


def _evaluation_loader(examples: Examples, settings: TrainingConfig, trainer: lightning.Trainer) -> Loader:
    order = EpochOrder(
        len(examples),
        settings.evaluation_batch_size * trainer.world_size,
        seed=settings.seed,
        shuffle=False,
        rank=trainer.global_rank,
        devices=trainer.world_size,
    )
    return Loader(examples, order, settings.workers)


def _steps_of(checkpoint: Path, settings: TrainingConfig) -> int:
    """Return the number of training steps of a checkpoint.

    Raises:
        InputError: the file is no checkpoint of a run, or its model has another size.
    """
    read_checkpoint(checkpoint, settings.model)
    return int(_content(checkpoint)["global_step"])


def _content(checkpoint: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        int(content["global_step"])
    except Exception as error:  # torch raises exceptions of many types for files that it did not write
        raise InputError(f"{checkpoint}: not a readable checkpoint of a run ({reason(error).split('. ')[0]})") from None
    return content
