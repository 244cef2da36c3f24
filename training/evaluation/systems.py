"""Loads bundles and runs, and computes the estimates of each of their systems.

A model is a bundle or the checkpoint of a run. If it is one network alone, it has one system:

- ``alone``: the network, which was trained without hints.

If it is a pair, it has these systems:

- ``small_without_hints``: the small network with zeros for every hint, as when all hints are late or lost.
- ``boosted``: the small network with every hint on time, at the delay of the pair and at those of ``--delays``. With
  ``--networks`` also with hints that arrive over simulated networks.
- ``boosted_wrong_hints``: the small network with the hints of another mixture, that of the next item. A gain with wrong
  hints does not come from information about this mixture.
- ``large``: the large network itself.

All systems are measured on the same mixtures. ``mixture`` is the mixture itself, which improvements are relative to.

A pair that uses hints on arrival can run at any delay. Otherwise the delay is a property of a pair. Its small network
holds back the features of every frame for ``delay`` frames, until the hint arrives. An earlier hint changes nothing,
and a later one is lost. So quality by delay is measured with several pairs, each trained for its delay. ``--delays``
answers another question. No weight depends on the delay, so a pair can also run with a delay that it was not trained
for, and the difference shows what that costs.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.links import NetworkConditions
from knowledge_boosting.models.arrival_fusion import NEVER
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import apply_output_gains, read_checkpoint, read_training_speakers
from knowledge_boosting.models.config import ModelConfig, Pair
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.manifest import MANIFEST_FILE, file_digest
from knowledge_boosting.models.networks import load_large, load_small
from knowledge_boosting.models.pair import (
    USUAL_DELAY,
    BoostedPair,
    LargeModel,
    SmallModel,
    part_of,
    small_hints,
)
from knowledge_boosting.training.config import read_training_config
from knowledge_boosting.training.data.hint_arrivals import simulate_arrivals
from knowledge_boosting.training.evaluation.metrics import SAMPLE_RATE
from knowledge_boosting.training.evaluation.results import ModelRecord, System
from knowledge_boosting.training.weights import best_checkpoint


class Key(NamedTuple):
    """A system of a model, at a delay in frames or over a simulated network."""

    model: str | None
    system: System
    delay: int | None
    network: str | None = None


MIXTURE = Key(None, "mixture", None)


@dataclass(frozen=True)
class Model:
    """A loaded model."""

    record: ModelRecord
    small: SmallModel
    large: LargeModel | None
    training_speakers: Collection[str]

    @property
    def config(self) -> ModelConfig:
        return self.small.config


def load_models(given: Sequence[str]) -> list[Model]:
    """Load models from bundles and runs, and give them different names.

    Raises:
        InputError: a model cannot be used, is given twice, or has another task or number of microphones than the first.
    """
    if len({Path(name).resolve() for name in given}) < len(given):
        raise InputError("a model is given twice; give each model once")
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
                    f"{model.record.given}: {what} is {ours}, but {theirs} in {first.record.given}; give one kind"
                )
    return models


def _load_model(given: str, name: str) -> Model:
    folder = Path(given)
    is_run = (folder / "config.json").is_file() and not (folder / MANIFEST_FILE).is_file()
    if folder.is_dir() and not is_run and not (folder / MANIFEST_FILE).is_file():
        raise InputError(f"{given}: has neither {MANIFEST_FILE} (a bundle) nor config.json (a run); give one of these")
    model = _load_run(folder, given, name) if is_run else _load_bundle(given, name)
    rate = model.config.framing.sample_rate
    if rate != SAMPLE_RATE:
        raise InputError(f"{given}: works at {rate} Hz, but datasets have {SAMPLE_RATE} Hz; give another model")
    return model


def _load_bundle(given: str, name: str) -> Model:
    bundle = Bundle(given)
    manifest, small = bundle.manifest, load_small(bundle)
    large = load_large(bundle) if isinstance(bundle.model, Pair) else None
    record = _record(name, given, "bundle", manifest.id, None, manifest.model, untrained=manifest.untrained)
    return Model(record, small, large, manifest.provenance.training_speakers)


def _load_run(folder: Path, given: str, name: str) -> Model:
    config = read_training_config(folder / "config.json").model
    path = best_checkpoint(folder)
    module = read_checkpoint(path, config).requires_grad_(False)
    apply_output_gains(module, path)
    record = _record(name, given, "run", file_digest(path), str(path.relative_to(folder)), config, untrained=False)
    small = cast(SmallModel, module.get_submodule("small"))
    large = module.large if isinstance(module, BoostedPair) else None
    return Model(record, small, large, read_training_speakers(path))


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
    delay = usual_delay(config) if isinstance(config, Pair) else None
    return ModelRecord(
        name=name,
        given=given,
        kind=kind,
        id=identity,
        checkpoint=checkpoint,
        untrained=untrained,
        delay_frames=delay,
        delay_ms=milliseconds(config, delay) if delay is not None else None,
        compression=config.boosting.compression if isinstance(config, Pair) else None,
    )


def usual_delay(config: ModelConfig) -> int:
    """Return the delay at which a pair is compared with others, frames: that of its training, if it has one."""
    return USUAL_DELAY if config.on_arrival else config.delay


def milliseconds(config: ModelConfig, frames: int) -> float:
    """Return the duration of a number of frames, ms."""
    return round(1000 * frames * config.framing.chunk_seconds, 6)


@dataclass(frozen=True)
class EvaluationItem:
    """An item of the dataset, with the outputs of the large network if the model is a pair."""

    mixture: Tensor  # [1, M, N]
    sources: Tensor  # [1, S, M, N]
    samples: Tensor  # [1, M, chunk T + lookahead], on the device
    speaker: Tensor | None  # [1, 256], on the device
    hints: Tensor | None  # [1, T, hint channels, F], on the device
    large: Tensor | None  # [1, S, M, N]


class Examples(Protocol):
    """Mixtures by index, such as a ``MixtureFolder``."""

    def __len__(self) -> int: ...

    def example(self, address: tuple[int, int]) -> Mapping[str, Any]:
        """Return an example by epoch and index."""
        ...


def run_systems(
    model: Model,
    data: Examples,
    delays: Sequence[int],
    networks: Mapping[str, NetworkConditions],
    device: torch.device,
    *,
    streaming: bool,
) -> Iterator[tuple[EvaluationItem, dict[Key, Tensor]]]:
    """Yield every item in order, with the estimates ``[1, S, M, N]`` of each system of the model.

    Args:
        model: the model.
        data: the items.
        delays: the delays of boosted systems, frames; empty for one network alone.
        networks: the networks of boosted systems by name. The index of an item is the seed of its losses.
        device: the device that the networks run on.
        streaming: whether the networks run frame by frame, or over all frames at once.
    """
    name, config = model.record.name, model.config
    chunk, lookahead = config.framing.chunk, config.framing.lookahead
    large = model.large.to(device) if model.large is not None else None
    small = {config.delay: model.small.to(device)}
    for delay in delays:
        if isinstance(config, Pair) and config.on_arrival:
            small[delay] = small[config.delay]
        if delay not in small:
            assert isinstance(config, Pair)
            boosting = config.boosting.model_copy(update={"delay": delay})
            retimed = SmallModel(config.model_copy(update={"boosting": boosting})).eval().requires_grad_(False)
            retimed.load_state_dict(model.small.state_dict())
            small[delay] = retimed.to(device)

    def calls(samples: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the frames of each call of a network, and their samples."""
        frames = (samples.shape[-1] - lookahead) // chunk
        step = 1 if streaming else frames
        for first in range(0, frames, step):
            yield slice(first, first + step), samples[..., first * chunk : (first + step) * chunk + lookahead]

    @torch.inference_mode()
    def run_large(index: int) -> EvaluationItem:
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
        return EvaluationItem(mixture, example["sources"][None], samples, speaker, hints, estimate)

    def run_small(
        network: SmallModel, item: EvaluationItem, hints: Tensor | None = None, ready_at: Tensor | None = None
    ) -> Tensor:
        given = None
        if hints is not None:
            assert isinstance(network.config, Pair)
            given = small_hints(network.config, hints, ready_at)
        state = network.initial_state(1, item.speaker)
        estimates = []
        for frames, stretch in calls(item.samples):
            part = None if given is None else part_of(given, frames.start, frames.stop)
            estimate, state = network(stretch, state, part)
            estimates.append(estimate)
        return torch.cat(estimates, dim=-1)[..., : item.mixture.shape[-1]].cpu()

    @torch.inference_mode()
    def run_all(index: int, item: EvaluationItem, other: EvaluationItem | None) -> dict[Key, Tensor]:
        """Run all systems of the model. ``other`` is the item that provides the wrong hints."""
        own, hints, trained = usual_delay(config), item.hints, small[config.delay]
        if hints is None or item.large is None:
            return {Key(name, "alone", None): run_small(trained, item)}
        frames = torch.arange(hints.shape[1])

        def run_boosted(network: SmallModel, hints: Tensor, delay: int) -> Tensor:
            return run_small(network, item, hints, frames + max(delay, network.config.delay))

        never = torch.full_like(frames, NEVER)
        outputs = {Key(name, "small_without_hints", None): run_small(trained, item, hints, never)}
        for delay in delays:
            outputs[Key(name, "boosted", delay)] = run_boosted(small[delay], hints, delay)
        for network, conditions in networks.items():
            ready_at = simulate_arrivals(conditions, index, len(frames), config)
            outputs[Key(name, "boosted", None, network)] = run_small(trained, item, hints, ready_at)
        if other is not None and other.hints is not None:
            wrong_hints = torch.zeros_like(hints)
            shared = min(hints.shape[1], other.hints.shape[1])
            wrong_hints[:, :shared] = other.hints[:, :shared]
            outputs[Key(name, "boosted_wrong_hints", own)] = run_boosted(trained, wrong_hints, own)
        outputs[Key(name, "large", None)] = item.large
        return outputs

    first = current = run_large(0)
    for index in range(len(data)):
        following = run_large(index + 1) if index + 1 < len(data) else first
        yield current, run_all(index, current, following if len(data) > 1 else None)
        current = following
