"""Measures every system of every model on every mixture of a dataset."""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch

from knowledge_boosting.common import cli
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.links import NetworkConditions, parse_conditions
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.compiled import use_for_whole_signals
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.models.device import pick_device
from knowledge_boosting.models.manifest import UNTRAINED_NOTICE
from knowledge_boosting.training.config import FolderData
from knowledge_boosting.training.data.layout import refuse_shared_speakers
from knowledge_boosting.training.data.mixture_folder import MixtureFolder
from knowledge_boosting.training.evaluation.metrics import METRICS, SAMPLE_RATE, MetricName
from knowledge_boosting.training.evaluation.results import (
    BootstrapRecord,
    DataRecord,
    Figure,
    ItemFigures,
    ModelRecord,
    Results,
    Row,
    StreamingRecord,
    bootstrap,
    compare,
)
from knowledge_boosting.training.evaluation.scores import Scores, quick_figures
from knowledge_boosting.training.evaluation.systems import MIXTURE, Key, Model, load_models, milliseconds, run_systems

_MIN_SECONDS = 0.5  # STOI, PESQ and WER find no speech in shorter signals


@dataclass(frozen=True)
class Options:
    """The parsed flags of ``kb-evaluate``. Its help describes them."""

    models: list[str]
    data: Path
    split: str
    items: int | None
    delays: list[int]
    networks: list[str]
    metrics: list[MetricName]
    streaming: bool
    workers: int | None
    device: str
    seed: int
    record: bool


def measure(options: Options) -> tuple[Results, list[str], list[ItemFigures]]:
    """Return the results, the names of the items, and every figure of every item.

    Raises:
        InputError: a model, the data or a flag cannot be used. This is found before the first measurement.
        Failure: an output is not finite, or a worker process died.
    """
    device = pick_device(options.device)
    if options.record:
        for given in options.models:
            Bundle(given)  # raises for runs, which have no manifest to write to
    # TF32 has a shorter mantissa. With it, a GPU and a CPU would differ by more than streaming and whole signals do.
    torch.backends.cudnn.allow_tf32 = False
    use_for_whole_signals()
    models = load_models(options.models)
    if options.delays and all(model.large is None for model in models):
        raise InputError("--delays: is for pairs, but every given model is one network alone; leave out --delays")
    if options.networks and all(model.large is None for model in models):
        raise InputError("--networks: is for pairs, but every given model is one network alone; leave out --networks")
    networks = {name: parse_conditions(name) for name in options.networks}
    data = _open_data(options.data, options.split, options.items, models[0].config)
    for model in models:
        refuse_shared_speakers(model.training_speakers, options.data / options.split)
    samples = _check_items(data, options.metrics)
    names = [item.name for item in data.items]

    workers, cores = options.workers, os.cpu_count() or 1
    if not any(METRICS[metric].slow for metric in options.metrics):
        workers = 0
    elif workers is None:
        workers = min(len(names), max(1, cores // 2 if device.type == "cpu" else cores - 1))
    if workers:
        # Networks and workers share the cores. More threads than cores would make both slower.
        torch.set_num_threads(max(1, cores - workers))
    with closing(Scores(options.metrics, names, workers)) as scores:
        worst = _measure_all(models, data, options.delays, networks, device, scores, streaming=options.streaming)

    by_name: dict[str | None, Model] = {model.record.name: model for model in models}
    figures = [
        ItemFigures(
            _row(key, by_name, {metric: bootstrap(of_items, options.seed) for metric, of_items in values.items()}),
            values,
        )
        for key, values in scores.figures.items()
    ]
    records = [model.record for model in models]
    results = Results(
        notice=_notice(records),
        task=models[0].config.task,
        data=DataRecord(
            root=str(options.data), split=options.split, items=len(names), seconds=round(samples / SAMPLE_RATE, 3)
        ),
        path="streaming" if options.streaming else "offline",
        streaming=worst,
        bootstrap=BootstrapRecord(seed=options.seed),
        metrics=options.metrics,
        models=records,
        rows=[row for row, _ in figures],
        comparisons=compare(figures, options.seed),
    )
    return results, names, figures


def _open_data(root: Path, split: str, items: int | None, config: ModelConfig) -> MixtureFolder:
    data = MixtureFolder(
        FolderData(root=str(root), split=split, items=items), config, seed=0, training=False, skip_broken=False
    )
    if items is not None and len(data) < items:
        cli.warn(f"{root / split}: has {len(data)} items, fewer than --items {items}")
    return data


def _check_items(data: MixtureFolder, metrics: Sequence[MetricName]) -> int:
    """Read every item once, so that a broken one is found before hours of measurement.

    Returns:
        The total number of samples of all items.

    Raises:
        InputError: an item cannot be used.
    """
    total = 0
    for index, item in enumerate(data.items):
        sources = data.example((0, index))["sources"]
        length = sources.shape[-1]
        if not bool((sources.amax(-1) > sources.amin(-1)).all()):
            raise InputError(
                f"{item}: a source is silent at a microphone, so nothing can be compared with it; make the item again"
            )
        if length < _MIN_SECONDS * SAMPLE_RATE and any(METRICS[metric].slow for metric in metrics):
            raise InputError(
                f"{item}: is shorter than {_MIN_SECONDS:g} s, too short for STOI, PESQ and WER; leave them "
                "out of --metrics"
            )
        total += length
    return total


def _measure_all(
    models: Sequence[Model],
    data: MixtureFolder,
    delays: Sequence[int],
    networks: Mapping[str, NetworkConditions],
    device: torch.device,
    scores: Scores,
    *,
    streaming: bool,
) -> StreamingRecord | None:
    """Measure every system of every model on every item.

    Returns:
        With ``streaming``, the largest difference from whole signals.
    """
    worst: StreamingRecord | None = None
    with cli.progress_bar(len(models) * len(data)) as advance:
        for model in models:
            own = model.record.delay_frames
            wanted = [] if own is None else sorted({own, *delays})
            measured = run_systems(model, data, wanted, networks, device, streaming=streaming)
            whole = run_systems(model, data, wanted, networks, device, streaming=False) if streaming else repeat(None)
            for index, ((item, estimates), offline) in enumerate(zip(measured, whole, strict=False)):
                if model is models[0]:
                    scores.add(MIXTURE, index, item.mixture[:, None].expand_as(item.sources), item)
                for key, estimate in estimates.items():
                    decibels = scores.add(key, index, estimate, item)
                    if offline is None:
                        continue
                    reference = quick_figures(offline[1][key], item)
                    difference = max(abs(decibels[metric] - reference[metric]) for metric in decibels)
                    if worst is None or difference > worst.largest_difference_db:
                        worst = StreamingRecord(
                            largest_difference_db=difference,
                            item=scores.items[index],
                            model=model.record.name,
                            system=key.system,
                        )
                advance()
        scores.finish()
    return worst


def _row(key: Key, models: Mapping[str | None, Model], figures: dict[MetricName, Figure]) -> Row:
    model = models.get(key.model)
    return Row(
        model=key.model,
        system=key.system,
        untrained=model is not None and model.record.untrained,
        delay_frames=key.delay,
        delay_ms=milliseconds(model.config, key.delay) if model is not None and key.delay is not None else None,
        trained_delay=_is_trained(model.config, key.delay) if model is not None and key.delay is not None else None,
        network=key.network,
        figures=figures,
    )


def _is_trained(config: ModelConfig, delay: int) -> bool:
    return config.on_arrival or delay == config.delay


def _notice(models: Sequence[ModelRecord]) -> str | None:
    untrained = [model.name for model in models if model.untrained]
    if len(untrained) in (0, len(models)):
        return UNTRAINED_NOTICE if untrained else None
    return f"UNTRAINED: {', '.join(untrained)} (random weights; their figures say nothing about a trained model)"
