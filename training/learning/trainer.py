"""Lightning's trainer as runs use it: devices, logs, whole checkpoints, and an end that loses nothing."""

import logging
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO

from knowledge_boosting.common.cli import termination_signals
from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.training.config import TrainingConfig


@dataclass(frozen=True)
class Devices:
    """Where a run runs."""

    per_node: int | None  # GPUs, or processes on the CPU; None: every GPU, else one process
    nodes: int


def make_trainer(
    settings: TrainingConfig,
    run_dir: Path,
    devices: Devices,
    frac: float,
    *,
    loggers: list[Logger],
    callbacks: list[Callback],
) -> lightning.Trainer:
    """A trainer as a configuration and the command line want it.

    Args:
        frac: share of every epoch that is used.

    Raises:
        InputError: these devices cannot be had.
    """
    if sys.stderr.isatty():
        callbacks = [*callbacks, RichProgressBar()]
    per_node = devices.per_node or (torch.cuda.device_count() or 1)
    try:
        return lightning.Trainer(
            accelerator="auto",
            devices=per_node,
            num_nodes=devices.nodes,
            strategy="ddp" if per_node * devices.nodes > 1 else "auto",
            precision=settings.precision,
            max_epochs=settings.epochs,
            gradient_clip_val=settings.gradient_clip or None,
            limit_train_batches=frac,
            limit_val_batches=frac,
            limit_test_batches=frac,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            log_every_n_steps=10,
            default_root_dir=run_dir,
            logger=loggers,
            callbacks=callbacks,
            plugins=[_WholeCheckpoints()],
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=sys.stderr.isatty(),
        )
    except (ValueError, RuntimeError, lightning.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise InputError(f"--devices, --nodes: {reason(error)}") from None


def make_loggers(run_dir: Path, *, wandb: bool) -> list[Logger]:
    """TensorBoard's logger and perhaps that of Weights & Biases.

    Raises:
        InputError: Weights & Biases is not installed.
    """
    loggers: list[Logger] = [TensorBoardLogger(run_dir, name="tensorboard", version="")]
    if wandb:
        try:
            from lightning.pytorch.loggers import WandbLogger

            loggers.append(WandbLogger(name=run_dir.name, save_dir=run_dir, project="knowledge-boosting"))
        except ImportError:
            raise InputError("--wandb: Weights & Biases is not installed; pip install wandb") from None
    return loggers


class _WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints written beside their place and renamed: whoever is killed while writing leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class Interruption(Callback):
    """On SIGTERM, SIGHUP or Ctrl-C: finish the step, save, end. A second signal ends at once."""

    def __init__(self, checkpoint: Path) -> None:
        self.number: int | None = None
        self._checkpoint = checkpoint
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._handlers = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, *termination_signals())
        }

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any, **__: Any) -> None:
        # Every process must stop at the same step.
        if trainer.strategy.reduce_boolean_decision(self.number is not None, all=False):
            self.number = self.number or int(signal.SIGTERM)
            trainer.save_checkpoint(self._checkpoint)
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        signal.signal(number, self._handlers[number])


def quiet() -> None:
    """Keep Lightning's own remarks off the terminal; what a user must know, this project says."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
