"""The ``kb-export`` command: makes a bundle from a checkpoint or from random weights."""

from pathlib import Path
from typing import Annotated

import typer

from knowledge_boosting.common import cli
from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.common.files import check_new_folder

app = cli.Application()


@app.command()
def export(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to make; its name becomes the name of the bundle.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Model or training configuration (JSON), also a published one.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Weights: a checkpoint of kb-train or a published one.")
    ] = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Use random weights, and mark the bundle as untrained.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of random weights.")] = 0,
    note: Annotated[Path | None, typer.Option("--note", help="Markdown file to include in the model card.")] = None,
    half_speaker: Annotated[
        bool, typer.Option("--half-speaker", help="Store the speaker layers of TSE, most of its size, as float16.")
    ] = False,
    check: Annotated[
        str | None, typer.Option("--check", help="Check the digests and weights of this bundle (name or path) instead.")
    ] = None,
) -> None:
    """Make a bundle that kb-server and kb-client can run, or check one."""
    if check is not None:
        if output or config or checkpoint or untrained or note or half_speaker:
            raise InputError("--check: checks an existing bundle; leave out the flags that make one")
        _check(check)
        return
    if output is None or config is None:
        raise InputError("give --config FILE and --output DIRECTORY to make a bundle, or --check BUNDLE")
    if untrained == (checkpoint is not None):
        raise InputError("give either --checkpoint FILE or --untrained")
    check_new_folder(output)
    import torch

    from knowledge_boosting.models.checkpoint import (
        apply_output_gains,
        build,
        read_checkpoint,
        read_config,
        read_training_speakers,
    )
    from knowledge_boosting.models.manifest import UNTRAINED_NOTICE, file_digest
    from knowledge_boosting.models.networks import write_bundle

    # The graph is checked frame by frame, and a frame is too little work for several threads.
    torch.set_num_threads(1)
    sizes = read_config(config)
    text, speakers = _read_note(note) if note is not None else "", []
    if checkpoint is None:
        torch.manual_seed(seed)
        model, source = build(sizes), f"random, seed {seed}"
    else:
        model = read_checkpoint(checkpoint, sizes)
        apply_output_gains(model, checkpoint)
        source, speakers = f"{checkpoint.name}, {file_digest(checkpoint)}", read_training_speakers(checkpoint)
    manifest = write_bundle(
        output,
        model,
        sizes,
        untrained=untrained,
        source=source,
        configuration=config.name,
        training_speakers=speakers,
        note=text,
        half_speaker=half_speaker,
    )
    print(f"{output}: bundle {manifest.label}, id {manifest.id}")
    if untrained:
        cli.warn(UNTRAINED_NOTICE)


def _read_note(path: Path) -> str:
    try:
        return existing_file(path, "a note in Markdown").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as text ({reason(error)})") from None


def _check(bundle: str) -> None:
    """Compute every digest, and load every part.

    Raises:
        InputError: the bundle differs from its manifest, or lacks a part.
    """
    from knowledge_boosting.models.bundle import Bundle
    from knowledge_boosting.models.networks import load_large, load_small

    opened = Bundle(bundle)
    manifest = opened.manifest
    load_small(opened)
    if "large" in manifest.digests:
        load_large(opened)
    if manifest.graph_digest is not None:
        opened.graph()
    for part, digest in manifest.digests.items():
        print(f"{opened.directory / part}.safetensors: {digest}")
    print(f"{bundle}: bundle {manifest.label}, id {manifest.id}, as its manifest says")


def main() -> None:
    """Entry point of ``kb-export``."""
    cli.run(app, "kb-export", "server")


if __name__ == "__main__":
    main()
