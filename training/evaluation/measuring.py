"""The ``kb-evaluate`` command: what bundles and runs make of a dataset's mixtures, as a table.

Every model, a bundle or a run's checkpoint, is heard as each of these systems, on the same mixtures:

- ``alone``: a network that was never meant to have hints;

or, if it is a pair,

- ``small_without_hints``: the small network with zeros for every hint, as when all of them are late or lost;
- ``boosted``: with every hint on time, at the delay the pair was trained for, and at those of ``--delays``;
- ``boosted_wrong_hints``: with the hints of the next item's mixture. What these gain was not learned from this one;
- ``large``: the large network's own estimate.

``mixture`` is the mixture itself, from which improvements are counted.

A delay belongs to a pair. Its small network holds every frame's features back for ``delay`` frames until the hint is
there: one that comes sooner changes nothing, one that comes later is lost. Quality by delay is therefore measured on
several pairs, each trained for its delay. ``--delays`` asks something else: no weight depends on the delay, so a pair
can also run with features held back for another time than in training, and it says what that costs.
"""

import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from knowledge_boosting.common import cli
from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.models.manifest import MANIFEST_FILE, UNTRAINED_NOTICE, file_digest, find_bundle, read_manifest
from knowledge_boosting.training.data.corpus import refuse_shared_speakers
from knowledge_boosting.training.evaluation.results import (
    METRICS,
    RESULT_FILES,
    SYSTEMS,
    BootstrapRecord,
    DataRecord,
    Figure,
    ItemFigures,
    Metric,
    ModelRecord,
    Results,
    Row,
    StreamingRecord,
    System,
    Values,
    bootstrap,
    compare,
    output_folder,
    table,
    write_results,
)
from knowledge_boosting.training.workers import end_with_parent

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from knowledge_boosting.models.pair import LargeModel, SmallModel
    from knowledge_boosting.training.data.datasets import MixtureFolder

app = cli.Application()

_SLOW: tuple[Metric, ...] = ("stoi", "pesq")
_SHORTEST = 0.5  # s; in less, STOI and PESQ find no speech
_MOST_DELAY = 1000  # frames, 8 s
_QUEUE = 4  # estimates a worker that may wait
_FILE_WIDTH = 160  # of the table where it is no terminal's


class _Key(NamedTuple):
    """A system of a model, at a delay."""

    model: str | None
    system: System
    delay: int | None


_MIXTURE = _Key(None, "mixture", None)


@dataclass(frozen=True)
class Options:
    """The flags of ``kb-evaluate``, parsed; its help says what each means."""

    models: list[str]
    data: Path
    split: str
    items: int | None
    delays: list[int]
    metrics: list[Metric]
    streaming: bool
    workers: int | None
    device: str
    seed: int
    record: bool


@dataclass(frozen=True)
class _Model:
    """A model, loaded."""

    record: ModelRecord
    small: "SmallModel"
    large: "LargeModel | None"
    training_speakers: Collection[str]

    @property
    def config(self) -> ModelConfig:
        return self.small.config


# What is measured


def _load_models(given: Sequence[str]) -> list[_Model]:
    """The models, with names that differ.

    Raises:
        InputError: one cannot be used, is given twice, or is made for other signals than the first.
    """
    if len({Path(name).resolve() for name in given}) < len(given):
        raise InputError("a model is given twice; give each once")
    names = [Path(name).resolve().name for name in given]
    models = [
        _load_model(name, short if names.count(short) == 1 else name) for name, short in zip(given, names, strict=True)
    ]
    first = models[0]
    for model in models[1:]:
        for what in ("task", "microphones"):
            ours, theirs = getattr(model.config, what), getattr(first.config, what)
            if ours != theirs:
                raise InputError(
                    f"{model.record.given}: {what} is {ours}, of {first.record.given} {theirs}; cannot share a table"
                )
    return models


def _load_model(given: str, name: str) -> _Model:
    from knowledge_boosting.training.evaluation.metrics import SAMPLE_RATE

    folder = Path(given)
    is_run = (folder / "config.json").is_file() and not (folder / MANIFEST_FILE).is_file()
    if folder.is_dir() and not is_run and not (folder / MANIFEST_FILE).is_file():
        raise InputError(f"{given}: has neither {MANIFEST_FILE} (a bundle) nor config.json (a run)")
    model = _load_run(folder, given, name) if is_run else _load_bundle(given, name)
    rate = model.config.framing.sample_rate
    if rate != SAMPLE_RATE:
        raise InputError(f"{given}: works at {rate} Hz; datasets have {SAMPLE_RATE} Hz")
    return model


def _load_bundle(given: str, name: str) -> _Model:
    from knowledge_boosting.models.bundle import load_large, load_small

    manifest = read_manifest(find_bundle(given))
    small, _ = load_small(given)
    large = load_large(given)[0] if manifest.model.large is not None else None
    record = _record(name, given, "bundle", manifest.id, None, manifest.model, untrained=manifest.untrained)
    return _Model(record, small, large, manifest.provenance.training_speakers)


def _load_run(folder: Path, given: str, name: str) -> _Model:
    from knowledge_boosting.models.checkpoint import read_checkpoint, read_training_speakers
    from knowledge_boosting.models.pair import BoostedPair
    from knowledge_boosting.training.config import read_training_config
    from knowledge_boosting.training.learning.run import best_checkpoint

    config = read_training_config(folder / "config.json").model
    path = best_checkpoint(folder)
    module = read_checkpoint(path, config).requires_grad_(False)
    record = _record(name, given, "run", file_digest(path), str(path.relative_to(folder)), config, untrained=False)
    small = cast("SmallModel", module.get_submodule("small"))
    large = module.large if isinstance(module, BoostedPair) else None
    return _Model(record, small, large, read_training_speakers(path))


def _record(
    name: str,
    given: str,
    kind: Literal["bundle", "run"],
    identity: str,
    checkpoint: str | None,
    config: ModelConfig,
    *,
    untrained: bool,
) -> ModelRecord:
    boosting = config.boosting
    return ModelRecord(
        name=name,
        given=given,
        kind=kind,
        id=identity,
        checkpoint=checkpoint,
        untrained=untrained,
        delay_frames=boosting.delay if boosting else None,
        delay_ms=_milliseconds(config, boosting.delay) if boosting else None,
        compression=boosting.compression if boosting else None,
    )


def _milliseconds(config: ModelConfig, frames: int) -> float:
    return round(1000 * frames * config.framing.chunk_seconds, 6)


def _open_data(root: Path, split: str, items: int | None, config: ModelConfig) -> "MixtureFolder":
    from knowledge_boosting.training.config import FolderData
    from knowledge_boosting.training.data.datasets import MixtureFolder

    data = MixtureFolder(
        FolderData(root=str(root), split=split, items=items), config, seed=0, training=False, skip_broken=False
    )
    if items is not None and len(data) < items:
        cli.warn(f"{root / split}: has {len(data)} items, fewer than --items {items}")
    return data


def _check_items(data: "MixtureFolder", metrics: Sequence[Metric]) -> int:
    """Read every item once, so that a broken one is found before hours of work; their samples, all together.

    Raises:
        InputError: an item cannot be used.
    """
    from knowledge_boosting.training.evaluation.metrics import SAMPLE_RATE

    total = 0
    for index, item in enumerate(data.items):
        sources = data.example((0, index))["sources"]
        length = sources.shape[-1]
        if not bool((sources.amax(-1) > sources.amin(-1)).all()):
            raise InputError(f"{item}: a source is silent at a microphone, nothing can be measured against it")
        if length < _SHORTEST * SAMPLE_RATE and set(metrics) & set(_SLOW):
            raise InputError(
                f"{item}: is shorter than {_SHORTEST:g} s, too short for STOI and PESQ; leave them out of --metrics"
            )
        total += length
    return total


# Estimates


@dataclass(frozen=True)
class _Heard:
    """An item as the large network, if there is one, has heard it."""

    mixture: "Tensor"  # [1, M, N]
    sources: "Tensor"  # [1, S, M, N]
    samples: "Tensor"  # [1, M, chunk T + lookahead], on the device
    speaker: "Tensor | None"  # [1, 256], on the device
    hints: "Tensor | None"  # [1, T, hint channels, F], on the device
    large: "Tensor | None"  # [1, S, M, N]


def _listen(
    model: _Model, data: "MixtureFolder", delays: Sequence[int], device: "torch.device", *, streaming: bool
) -> Iterator[tuple[_Heard, dict[_Key, "Tensor"]]]:
    """Every item in order, with what each system of the model makes of it, ``[1, S, M, N]``.

    Args:
        delays: frames, of boosted systems; for one network alone, none.
        streaming: whether the networks run frame by frame, or over all frames at once.
    """
    import torch
    from torch import Tensor

    from knowledge_boosting.models.framing import pad_to_frames
    from knowledge_boosting.models.pair import SmallModel, delay_hints

    name, config = model.record.name, model.config
    chunk, lookahead = config.framing.chunk, config.framing.lookahead
    large = model.large.to(device) if model.large is not None else None
    small = {config.delay: model.small.to(device)}
    for delay in delays:
        if delay not in small:
            assert config.boosting is not None
            boosting = config.boosting.model_copy(update={"delay": delay})
            retimed = SmallModel(config.model_copy(update={"boosting": boosting})).eval().requires_grad_(False)
            retimed.load_state_dict(model.small.state_dict())
            small[delay] = retimed.to(device)

    def calls(samples: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The frames of each call, and their samples."""
        frames = (samples.shape[-1] - lookahead) // chunk
        step = 1 if streaming else frames
        for first in range(0, frames, step):
            yield slice(first, first + step), samples[..., first * chunk : (first + step) * chunk + lookahead]

    @torch.inference_mode()
    def hear(index: int) -> _Heard:
        example = data.example((0, index))
        mixture, speaker = example["mixture"][None], example.get("speaker_embedding")
        samples = pad_to_frames(mixture.to(device), config.framing)
        speaker = speaker[None].to(device) if speaker is not None else None
        hints = estimate = None
        if large is not None:
            state = large.initial_state(1, speaker)
            encoded, embeddings = [], []
            for _, stretch in calls(samples):
                hint, embedding, state = large(stretch, state)
                encoded.append(hint)
                embeddings.append(embedding)
            hints = torch.cat(encoded, dim=1)
            estimate = large.estimate(torch.cat(embeddings, dim=1))[..., : mixture.shape[-1]].cpu()
        return _Heard(mixture, example["sources"][None], samples, speaker, hints, estimate)

    def run(network: SmallModel, heard: _Heard, late: Tensor | None) -> Tensor:
        state = network.initial_state(1, heard.speaker)
        estimates = []
        for frames, stretch in calls(heard.samples):
            estimate, state = network(stretch, state, late[:, frames] if late is not None else None)
            estimates.append(estimate)
        return torch.cat(estimates, dim=-1)[..., : heard.mixture.shape[-1]].cpu()

    @torch.inference_mode()
    def estimates(heard: _Heard, other: _Heard | None) -> dict[_Key, Tensor]:
        """The systems of a model; ``other`` is the item whose hints serve as another mixture's."""
        own, hints = config.delay, heard.hints
        if hints is None or heard.large is None:
            return {_Key(name, "alone", None): run(small[own], heard, None)}
        found = {_Key(name, "small_without_hints", None): run(small[own], heard, torch.zeros_like(hints))}
        for delay in delays:
            found[_Key(name, "boosted", delay)] = run(small[delay], heard, delay_hints(hints, delay))
        if other is not None and other.hints is not None:
            strange = torch.zeros_like(hints)
            shared = min(hints.shape[1], other.hints.shape[1])
            strange[:, :shared] = other.hints[:, :shared]
            found[_Key(name, "boosted_wrong_hints", own)] = run(small[own], heard, delay_hints(strange, own))
        found[_Key(name, "large", None)] = heard.large
        return found

    first = current = hear(0)
    for index in range(len(data)):
        following = hear(index + 1) if index + 1 < len(data) else first
        yield current, estimates(current, following if len(data) > 1 else None)
        current = following


# Figures


def _decibels(estimates: "Tensor", heard: _Heard) -> dict[Metric, float]:
    from knowledge_boosting.training.evaluation.metrics import si_sdr_improvement, snr_improvement

    return {
        "si_sdri": float(si_sdr_improvement(estimates, heard.sources, heard.mixture)),
        "snri": float(snr_improvement(estimates, heard.sources, heard.mixture)),
    }


def _slow_figures(
    metrics: Sequence[Metric], estimates: npt.NDArray[np.float32], sources: npt.NDArray[np.float32]
) -> dict[Metric, float]:
    """STOI and PESQ as far as asked for, of arrays ``[1, S, M, N]``; NaN where there is no speech to measure."""
    import torch

    from knowledge_boosting.training.evaluation.metrics import pesq, stoi

    measures: dict[Metric, Callable[[Tensor, Tensor], Tensor]] = {"stoi": stoi, "pesq": pesq}
    figures: dict[Metric, float] = {}
    for metric in metrics:
        with warnings.catch_warnings():
            # pystoi warns, and returns a made-up figure, where less than 0.4 s is left without the silence.
            warnings.simplefilter("error", RuntimeWarning)
            try:
                figures[metric] = float(measures[metric](torch.from_numpy(estimates), torch.from_numpy(sources)))
            except RuntimeWarning:
                figures[metric] = math.nan
    return figures


class _Scores:
    """Every figure of every system and item; the slow ones computed in worker processes."""

    def __init__(self, metrics: Sequence[Metric], items: Sequence[str], workers: int) -> None:
        self.items = items
        self.figures: dict[_Key, dict[Metric, Values]] = {}
        self._metrics = metrics
        self._slow = [metric for metric in metrics if metric in _SLOW]
        self._most = _QUEUE * workers
        self._running: dict[Future[dict[Metric, float]], tuple[_Key, int]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if workers and self._slow:
            self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)

    def add(self, key: _Key, index: int, estimates: "Tensor", heard: _Heard) -> dict[Metric, float]:
        """Measure a system's estimates of an item; returns the figures in dB.

        Raises:
            Failure: the estimates are not finite.
        """
        if not bool(estimates.isfinite().all()):
            raise Failure(
                f"{key.model}: the output of {SYSTEMS[key.system]} for item {self.items[index]} is not finite"
            )
        nothing = np.full(len(self.items), np.nan)
        self.figures.setdefault(key, {metric: nothing.copy() for metric in self._metrics})
        decibels = _decibels(estimates, heard)
        self._put(key, index, decibels)
        if self._slow:
            arguments = (self._slow, estimates.numpy(), heard.sources.numpy())
            if self._pool is None:
                self._put(key, index, _slow_figures(*arguments))
            else:
                self._collect(self._most - 1)
                self._running[self._pool.submit(_slow_figures, *arguments)] = key, index
        return decibels

    def finish(self) -> None:
        """Wait for the workers."""
        self._collect(0)

    def close(self) -> None:
        """End the workers, their work done or not."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _put(self, key: _Key, index: int, figures: Mapping[Metric, float]) -> None:
        for metric, value in figures.items():
            if metric in self._metrics:
                self.figures[key][metric][index] = value

    def _collect(self, most: int) -> None:
        """Take what workers have done, until at most so many are left to do."""
        while len(self._running) > most:
            done, _ = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    self._put(*self._running.pop(future), future.result())
                except BrokenProcessPool:
                    raise Failure("a worker process died (out of memory?); try fewer --workers") from None


def _start_worker() -> None:
    import torch

    torch.set_num_threads(1)
    end_with_parent()


# The command


def _measure(
    models: Sequence[_Model],
    data: "MixtureFolder",
    delays: Sequence[int],
    device: "torch.device",
    scores: _Scores,
    *,
    streaming: bool,
) -> StreamingRecord | None:
    """Measure every system of every model on every item; with ``streaming``, how far that is from whole signals."""
    worst: StreamingRecord | None = None
    with _progress(len(models) * len(data)) as advance:
        for model in models:
            own = model.record.delay_frames
            wanted = [] if own is None else sorted({own, *delays})
            asked = _listen(model, data, wanted, device, streaming=streaming)
            whole = _listen(model, data, wanted, device, streaming=False) if streaming else repeat(None)
            for index, ((heard, estimates), offline) in enumerate(zip(asked, whole, strict=False)):
                if model is models[0]:
                    scores.add(_MIXTURE, index, heard.mixture[:, None].expand_as(heard.sources), heard)
                for key, estimate in estimates.items():
                    decibels = scores.add(key, index, estimate, heard)
                    if offline is None:
                        continue
                    reference = _decibels(offline[1][key], heard)
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


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A function to call once an item and model; a bar appears on a terminal only."""
    console = cli.console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)
        yield lambda: progress.advance(bar)


def _row(key: _Key, models: Mapping[str | None, _Model], figures: dict[Metric, Figure]) -> Row:
    model = models.get(key.model)
    return Row(
        model=key.model,
        system=key.system,
        untrained=model is not None and model.record.untrained,
        delay_frames=key.delay,
        delay_ms=_milliseconds(model.config, key.delay) if model is not None and key.delay is not None else None,
        trained_delay=key.delay == model.config.delay if model is not None and key.delay is not None else None,
        figures=figures,
    )


def _notice(models: Sequence[ModelRecord]) -> str | None:
    untrained = [model.name for model in models if model.untrained]
    if len(untrained) in (0, len(models)):
        return UNTRAINED_NOTICE if untrained else None
    return f"UNTRAINED: {', '.join(untrained)} (random weights, whose figures say nothing of a trained model)"


def _parse_metrics(text: str) -> list[Metric]:
    """The metrics named, in the order of the table; SI-SDRi is always among them.

    Raises:
        InputError: one is unknown.
    """
    names = {name.strip() for name in text.split(",")}
    unknown = sorted(names - set(METRICS))
    if unknown:
        raise InputError(f"--metrics: {unknown[0]!r} is none of {', '.join(METRICS)}")
    return [metric for metric in METRICS if metric in names or metric == "si_sdri"]


def _parse_delays(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) <= _MOST_DELAY for word in words):
        raise InputError(f"--delays {text}: give frames, 0 to {_MOST_DELAY}, with commas between, such as 0,1,3,6")
    return [int(word) for word in words]


def _check_installed(metrics: Sequence[Metric]) -> None:
    packages = {"stoi": "pystoi", "pesq": "pesq"}
    wanted = (packages[metric] for metric in metrics if metric in packages)
    cli.check_installed("torchmetrics", "matplotlib", *wanted)


def _evaluate(options: Options) -> tuple[Results, list[str], list[ItemFigures]]:
    """The results, the items' names, and every figure of every item.

    Raises:
        InputError: a model, the data or a flag is at fault; found before anything is measured.
        Failure: an output is not finite, or a worker died.
    """
    import torch

    from knowledge_boosting.models.device import pick_device
    from knowledge_boosting.training.evaluation.metrics import SAMPLE_RATE

    device = pick_device(options.device)
    if options.record:
        for given in options.models:
            find_bundle(given)  # runs are refused before anything is measured
    # With its shorter mantissa a GPU would differ from a CPU by more than streaming differs from whole signals.
    torch.backends.cudnn.allow_tf32 = False
    models = _load_models(options.models)
    if options.delays and all(model.large is None for model in models):
        raise InputError("--delays: is for pairs, and every model given is one network alone; leave it out")
    data = _open_data(options.data, options.split, options.items, models[0].config)
    for model in models:
        refuse_shared_speakers(model.training_speakers, options.data / options.split)
    samples = _check_items(data, options.metrics)
    names = [item.name for item in data.items]

    workers, cores = options.workers, os.cpu_count() or 1
    if not set(options.metrics) & set(_SLOW):
        workers = 0
    elif workers is None:
        workers = min(len(names), max(1, cores // 2 if device.type == "cpu" else cores - 1))
    if workers:
        # Networks and workers share the cores; threads beyond them make both slower.
        torch.set_num_threads(max(1, cores - workers))
    with closing(_Scores(options.metrics, names, workers)) as scores:
        worst = _measure(models, data, options.delays, device, scores, streaming=options.streaming)

    by_name: dict[str | None, _Model] = {model.record.name: model for model in models}
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


def _record_quality(results: Results) -> None:
    """Write every bundle's own figures into its manifest and its card."""
    from knowledge_boosting.models.bundle import record_quality

    data = f"{results.data.items} mixtures of {Path(results.data.root).name}/{results.data.split}"
    for model in results.models:
        quality: dict[str, float] = {}
        lines = ["| system | " + " | ".join(METRICS[metric].heading for metric in results.metrics) + " |"]
        lines.append("|---" * (1 + len(results.metrics)) + "|")
        for row in results.rows:
            if row.model != model.name or row.trained_delay is False:
                continue
            cells = []
            for metric, figure in row.figures.items():
                digits = METRICS[metric].digits
                if figure.mean is not None:
                    quality[f"{row.system}_{metric}"] = figure.mean
                interval = "" if figure.low is None else f" ({figure.low:.{digits}f}…{figure.high:.{digits}f})"
                cells.append("-" if figure.mean is None else f"{figure.mean:.{digits}f}{interval}")
            lines.append(f"| {SYSTEMS[row.system]} | {' | '.join(cells)} |")
        lines += [
            f"| {SYSTEMS[gain.system]}, over {gain.over} | {gain.si_sdri.mean:+.2f} "
            f"({gain.si_sdri.low:+.2f}…{gain.si_sdri.high:+.2f}) |" + " |" * (len(results.metrics) - 1)
            for gain in results.comparisons
            if gain.model == model.name and gain.si_sdri.low is not None
        ]
        lines += ["", f"On {data}, with {100 * results.bootstrap.confidence:g} % bootstrap intervals."]
        record_quality(find_bundle(model.given), quality, "\n".join(lines))


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
            "--delays", help="Frames: run every pair at these delays too, besides the one it was trained for."
        ),
    ] = None,
    items: Annotated[int | None, typer.Option("--items", min=1, help="Use only the first ones.")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Run frame by frame, and tell how far that is from whole signals.")
    ] = False,
    metrics: Annotated[
        str, typer.Option("--metrics", help="What to measure; STOI and PESQ take most of the time.")
    ] = ",".join(METRICS),
    workers: Annotated[
        int | None, typer.Option("--workers", min=0, help="Processes for STOI and PESQ; 0: this one.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:INDEX.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")] = 0,
    record: Annotated[
        bool, typer.Option("--record", help="Write what was measured into the bundles: bundle.json and model card.")
    ] = False,
) -> None:
    """Measure what models make of a dataset's mixtures: alone, boosted, with wrong hints, and the large network.

    Quality by delay takes several bundles, each trained for its delay; --delays runs each also at others.
    """
    options = Options(
        models=models,
        data=data,
        split=split,
        items=items,
        delays=_parse_delays(delays) if delays is not None else [],
        metrics=_parse_metrics(metrics),
        streaming=streaming,
        workers=workers,
        device=device,
        seed=seed,
        record=record,
    )
    _check_installed(options.metrics)
    with output_folder(output):
        results, names, figures = _evaluate(options)
        write_results(output, results, names, figures)
        if record:
            _record_quality(results)
    terminal = cli.console()
    if not terminal.is_terminal:
        terminal = cli.console(width=_FILE_WIDTH)
    terminal.print(table(results, terminal.width))
    print(f"{output}: {', '.join(RESULT_FILES)}")


def main() -> None:
    """Entry point of ``kb-evaluate``."""
    cli.run(app, "kb-evaluate", "train")


if __name__ == "__main__":
    main()
