"""The ``kb-train`` command: trains or tests a network or a pair."""

import os
from pathlib import Path
from typing import Annotated

import typer

from knowledge_boosting.common import cli
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.files import check_folder

app = cli.Application()


@app.command()
def train(
    config: Annotated[
        Path,
        typer.Option("--config", help="Training configuration (JSON), also a published one, or recipe (TOML)."),
    ],
    run_dir: Annotated[
        Path,
        typer.Option("--run-dir", "--run_dir", help="Folder of this run, for checkpoints, logs and the configuration."),
    ],
    stage: Annotated[
        str | None,
        typer.Option(
            "--stage", help="Stage of the recipe. Runs of earlier stages must be in the parent folder of RUN_DIR."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in RUN_DIR.")] = False,
    ckpt: Annotated[
        Path | None,
        typer.Option("--ckpt", help="Checkpoint to continue from or to test. The default is the last or the best."),
    ] = None,
    test: Annotated[bool, typer.Option("--test", help="Test instead of training.")] = False,
    frac: Annotated[float, typer.Option("--frac", min=0.0, max=1.0, help="Share of every epoch to use.")] = 1.0,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="Stop after so many minutes of training, as on Ctrl-C; --resume continues."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Root of the rendered dataset; overrides that of the configuration.")
    ] = None,
    large: Annotated[
        str | None, typer.Option("--large", help="Initial weights of the large network: a checkpoint or a bundle.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option("--devices", min=1, help="Number of GPUs, or of processes on the CPU. The default is every GPU."),
    ] = None,
    nodes: Annotated[
        int, typer.Option("--nodes", min=1, help="Number of machines. Each of them runs this command.")
    ] = 1,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Skip broken items, with a warning.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log to Weights & Biases too, if it is installed.")] = False,
) -> None:
    """Train one network, or a pair for its small network. Figures and sounds are logged to RUN_DIR/tensorboard."""
    if frac == 0:
        raise InputError("--frac: must be more than 0")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise InputError("--minutes: must be more than 0")
    if test and (resume or minutes is not None):
        raise InputError("--test: leave out --resume and --minutes, which are for training")
    last = run_dir / "last.ckpt"
    # Only the first process checks the folder. Processes that it or torchrun started later find the folder in use.
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if first and not resume and not test and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise InputError(f"{run_dir}: holds a run already; give --resume to continue it, or another --run_dir")
    if first and not test:
        check_folder(run_dir)
    if resume and ckpt is None and not last.is_file():
        raise InputError(f"{run_dir}: has no last.ckpt to resume from; leave out --resume to start")
    if ckpt is not None and not ckpt.is_file():
        raise InputError(f"{ckpt}: no such file; give a checkpoint of this configuration")

    # By default, the threads of torch busy-wait for each other for milliseconds. That takes most of the processor time
    # if another program runs. The variable is read when torch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # Importing torch takes seconds, so it happens only after the flags have been checked.
    from knowledge_boosting.training.learning.run import read_settings, run_test, run_training
    from knowledge_boosting.training.learning.trainer import Devices

    runs = (run_dir.resolve() if run_dir.name in ("", "..") else run_dir).parent
    settings = read_settings(config, stage=stage, runs=runs, data=data, large=large)
    machines = Devices(devices, nodes)
    if test:
        run_test(settings, run_dir, ckpt, machines, frac=frac, skip_broken=skip_broken)
    else:
        start = ckpt or (last if resume else None)
        run_training(
            settings, run_dir, start, machines, frac=frac, minutes=minutes, skip_broken=skip_broken, wandb=wandb
        )


def main() -> None:
    """Entry point of ``kb-train``."""
    cli.run(app, "kb-train", "train")


if __name__ == "__main__":
    main()
