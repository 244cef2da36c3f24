"""The ``kb-store-hints`` command."""

from pathlib import Path
from typing import Annotated

import typer

from knowledge_boosting.common import cli

app = cli.Application()


@app.command()
def store_hints(
    config: Annotated[
        Path,
        typer.Option("--config", help="Training configuration, or recipe, of a pair with a frozen large network."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make, or to go on with.")],
    items: Annotated[int, typer.Option("--items", min=1, help="Mixtures; for TSE each is kept for both speakers.")],
    stage: Annotated[str | None, typer.Option("--stage", help="Stage of the recipe.")] = None,
    runs: Annotated[
        Path, typer.Option("--runs", help="Folder with the runs of the recipe's stages, each under its name.")
    ] = Path("runs"),
    large: Annotated[
        str | None, typer.Option("--large", help="Checkpoint or bundle of the large network, for the configuration's.")
    ] = None,
) -> None:
    """Keep mixtures and what a large network makes of them. The same command goes on with an interrupted run."""
    # What trains is imported only now, so that --help and mistakes in the call answer at once.
    from knowledge_boosting.training.learning import run

    run.store_hints(run.read_settings(config, stage=stage, runs=runs, data=None, large=large), output, items)


def main() -> None:
    """Entry point of ``kb-store-hints``."""
    cli.run(app, "kb-store-hints", "train")


if __name__ == "__main__":
    main()
