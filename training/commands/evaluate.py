"""The ``kb-evaluate`` command: measures bundles and runs on the mixtures of a dataset, and prints a table."""

from pathlib import Path
from typing import Annotated

import typer

from knowledge_boosting.common import cli
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.links import parse_conditions
from knowledge_boosting.training.evaluation.metrics import METRICS, USUAL_METRICS, MetricName

app = cli.Application()

_MAX_DELAY = 1000  # frames, 8 s
_FILE_WIDTH = 160  # of the table, if the output is no terminal


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="BUNDLE_OR_RUN...", help="Bundles by name or path, and folders of runs.")
    ],
    data: Annotated[Path, typer.Option("--data", help="Root of a dataset in the published layout.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for results.json, .csv, .png and items.csv.")],
    split: Annotated[str, typer.Option("--split", help="Folder of the dataset to measure on.")] = "test",
    delays: Annotated[
        str | None,
        typer.Option(
            "--delays",
            help="In frames, such as 0,1,3: run every pair also at these delays, which it was not trained for.",
        ),
    ] = None,
    networks: Annotated[
        str | None,
        typer.Option(
            "--networks",
            help="Such as wifi,lte,delay=48+jitter=20+loss=0.01: run every pair also with hints that arrive over these "
            "simulated networks.",
        ),
    ] = None,
    items: Annotated[int | None, typer.Option("--items", min=1, help="Use only the first items.")] = None,
    streaming: Annotated[
        bool,
        typer.Option("--streaming", help="Run frame by frame, and report the largest difference from whole signals."),
    ] = False,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics", help=f"Figures to measure, of {', '.join(METRICS)}. WER, STOI and PESQ take most of the time."
        ),
    ] = ",".join(USUAL_METRICS),
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Processes for STOI, PESQ and WER; 0 uses this one.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
    record: Annotated[
        bool, typer.Option("--record", help="Write the results into the bundles: into bundle.json and the model card.")
    ] = False,
) -> None:
    """Measure the outputs of models for the mixtures of a dataset: alone, boosted, with wrong hints, large network.

    To compare delays, give several bundles, each trained for its delay. --delays runs each of them also at others.
    """
    retimed = _parse_delays(delays) if delays is not None else []
    over = [name.strip() for name in networks.split(",")] if networks is not None else []
    for name in over:
        parse_conditions(name)
    wanted = _parse_metrics(metrics)
    packages = [package for metric in wanted if (package := METRICS[metric].package) is not None]
    cli.check_installed("torchmetrics", "matplotlib", *packages)
    # Importing torch takes seconds, so it happens only after the flags have been checked.
    from knowledge_boosting.training.evaluation.files import (
        RESULT_FILES,
        output_folder,
        record_in_bundles,
        write_results,
    )
    from knowledge_boosting.training.evaluation.measuring import Options, measure
    from knowledge_boosting.training.evaluation.table import table

    options = Options(
        models=models,
        data=data,
        split=split,
        items=items,
        delays=retimed,
        networks=over,
        metrics=wanted,
        streaming=streaming,
        workers=workers,
        device=device,
        seed=seed,
        record=record,
    )
    with output_folder(output):
        results, names, figures = measure(options)
        write_results(output, results, names, figures)
        if record:
            record_in_bundles(results)
    terminal = cli.console()
    if not terminal.is_terminal:
        terminal = cli.console(width=_FILE_WIDTH)
    terminal.print(table(results, terminal.width))
    print(f"{output}: {', '.join(RESULT_FILES)}")


def _parse_metrics(text: str) -> list[MetricName]:
    """Return the metrics that a list names, in the order of the table. SI-SDRi is always included.

    Raises:
        InputError: a metric is unknown.
    """
    names = {name.strip() for name in text.split(",")}
    unknown = sorted(names - set(METRICS))
    if unknown:
        raise InputError(f"--metrics: {unknown[0]!r} is unknown; choose from {', '.join(METRICS)}")
    return [metric for metric in METRICS if metric in names or metric == "si_sdri"]


def _parse_delays(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) <= _MAX_DELAY for word in words):
        raise InputError(
            f"--delays {text}: give numbers of frames from 0 to {_MAX_DELAY}, separated by commas, such as 0,1,3,6"
        )
    return [int(word) for word in words]


def main() -> None:
    """Entry point of ``kb-evaluate``."""
    cli.run(app, "kb-evaluate", "train")


if __name__ == "__main__":
    main()
