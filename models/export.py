"""The ``kb-export`` command: a checkpoint, or random weights, to a bundle."""

from pathlib import Path
from typing import Annotated

import typer

import common.cli
from common.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def export(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to make; its name is the bundle's.")],
    config: Annotated[Path, typer.Option("--config", help="Model configuration (JSON), ours or a published one.")],
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Weights: a published checkpoint or one of ours.")
    ] = None,
    untrained: Annotated[bool, typer.Option("--untrained", help="Random weights, and labelled so.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the random weights.")] = 0,
) -> None:
    """Make a bundle that kb-server and kb-client can run."""
    if untrained == (checkpoint is not None):
        raise InputError("give either --checkpoint FILE or --untrained")
    import torch

    from models.bundle import write_bundle
    from models.checkpoint import build, read_checkpoint, read_config
    from models.manifest import UNTRAINED_NOTICE, file_digest

    sizes = read_config(config)
    if checkpoint is None:
        torch.manual_seed(seed)
        model, source = build(sizes), f"random, seed {seed}"
    else:
        model = read_checkpoint(checkpoint, sizes)
        source = f"{checkpoint.name}, {file_digest(checkpoint)}"
    manifest = write_bundle(output, model, sizes, untrained=untrained, source=source, configuration=config.name)
    print(f"{output}: bundle {manifest.label}, id {manifest.id}")
    if untrained:
        common.cli.warn(UNTRAINED_NOTICE)


def main() -> None:
    """Entry point of ``kb-export``."""
    common.cli.run(app, "kb-export")


if __name__ == "__main__":
    main()
