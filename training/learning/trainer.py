"""The Lightning trainer of a run: its devices, its logs, atomic checkpoints, and a clean end on signals."""

import logging
import math
import signal
import sys
import time
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
    """The devices of a run."""

    per_node: int | None  # GPUs, or processes on the CPU; None means every GPU, or one process without a GPU
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
    """Make the trainer of a run.

    Args:
        settings: the configuration.
        run_dir: the folder of the run.
        devices: the devices to run on.
        frac: the share of every epoch to use.
        loggers: the loggers.
        callbacks: the callbacks, to which a progress bar is added on a terminal.

    Raises:
        InputError: these devices are not available.
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
            plugins=[_AtomicCheckpoints()],
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=sys.stderr.isatty(),
        )
    except (ValueError, RuntimeError, lightning.fabric.utilities.exceptions.MisconfigurationException) as error:
        raise InputError(f"--devices, --nodes: {reason(error)}") from None


def make_loggers(run_dir: Path, *, wandb: bool) -> list[Logger]:
    """Make the TensorBoard logger and, if ``wandb``, that of Weights & Biases.

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


class _AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints under a temporary name and renames them, so that a killed run keeps the previous one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class Interruption(Callback):
    """Ends a run on SIGTERM, SIGHUP or Ctrl-C, or after some minutes: finishes the step and saves.

    A second signal ends the run at once.
    """

    def __init__(self, checkpoint: Path, minutes: float | None) -> None:
        """Save to ``checkpoint``. ``minutes`` is the time after the start of training, or None for no limit."""
        self.stopped = False
        self._checkpoint, self._minutes = checkpoint, minutes
        self._deadline = math.inf
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if self._minutes is not None:
            self._deadline = time.monotonic() + 60 * self._minutes
        self._handlers = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, *termination_signals())
        }

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any, **__: Any) -> None:
        # Every process must stop at the same step.
        wanted = self.stopped or time.monotonic() >= self._deadline
        if trainer.strategy.reduce_boolean_decision(wanted, all=False):
            self.stopped = True
            trainer.save_checkpoint(self._checkpoint)
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.stopped = True
        signal.signal(number, self._handlers[number])


def silence_lightning() -> None:
    """Hide the messages and warnings of Lightning. This project reports what a user must know."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
