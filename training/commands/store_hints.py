"""The ``kb-store-hints`` command: stores mixtures with the outputs of a large network."""

from pathlib import Path
from typing import Annotated

import typer

from knowledge_boosting.common import cli

app = cli.Application()


@app.command()
def store_hints(
    config: Annotated[
        Path,
        typer.Option("--config", help="Training configuration or recipe of a pair with a frozen large network."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make, or to continue.")],
    items: Annotated[
        int, typer.Option("--items", min=1, help="Number of mixtures; for TSE each is stored for both speakers.")
    ],
    stage: Annotated[str | None, typer.Option("--stage", help="Stage of the recipe.")] = None,
    runs: Annotated[
        Path,
        typer.Option(
            "--runs", help="Folder with the runs of the stages of the recipe, each under the name of its stage."
        ),
    ] = Path("runs"),
    large: Annotated[
        str | None,
        typer.Option("--large", help="Checkpoint or bundle of the large network; overrides that of the configuration."),
    ] = None,
) -> None:
    """Store mixtures and the outputs of a large network. The same command continues an interrupted run."""
    # Importing torch takes seconds, so it happens only after the flags have been checked.
    from knowledge_boosting.training.learning import run

    run.store_hints(run.read_settings(config, stage=stage, runs=runs, data=None, large=large), output, items)


def main() -> None:
    """Entry point of ``kb-store-hints``."""
    cli.run(app, "kb-store-hints", "train")


if __name__ == "__main__":
    main()
