"""Where the weights of a run start from, and which of its checkpoints is the best."""

import sys
from pathlib import Path

import torch
from torch import nn

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import (
    build,
    load_exactly,
    read_checkpoint,
    read_training_speakers,
    read_weights,
)
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.models.networks import initial_weights, load_large
from knowledge_boosting.models.pair import BoostedPair
from knowledge_boosting.models.published import convert, is_published
from knowledge_boosting.training.config import TrainingConfig

LAST = "last.ckpt"


def initial_model(config: TrainingConfig) -> nn.Module:
    """The networks of a configuration with the weights that it names; what it names none for starts at random.

    Raises:
        InputError: a checkpoint or bundle cannot be used.
    """
    if config.initial_checkpoint is not None:
        model = _read(config.initial_checkpoint, config.model).train()
    else:
        model = build(config.model)
    if config.warm_start is not None:
        left = warm_start(model, Path(config.warm_start), config.model)
        print(f"{config.warm_start}: taken over, but for {len(left)} tensors that start anew", file=sys.stderr)
    if config.averaged_with is not None:
        average_with(model, Path(config.averaged_with))
    if config.large_checkpoint is not None:
        assert isinstance(model, BoostedPair)
        _start_large(model, config.large_checkpoint)
    return model


def initial_speakers(config: TrainingConfig) -> set[str]:
    """The speakers that the weights which a configuration names were trained on, as far as they tell.

    Raises:
        InputError: a checkpoint or bundle cannot be used.
    """
    return {speaker for source in config.weight_sources() for speaker in _speakers(source)}


def _speakers(source: str) -> list[str]:
    if Path(source).is_file():
        return read_training_speakers(Path(source))
    return Bundle(source).manifest.provenance.training_speakers


def _read(source: str, config: ModelConfig) -> nn.Module:
    """A model with the weights of a checkpoint file, or of a bundle by name or path."""
    path = Path(source)
    return read_checkpoint(path, config) if path.is_file() or path.suffix else initial_weights(Bundle(source), config)


def _start_large(pair: BoostedPair, source: str) -> None:
    """Give the large network the weights of a bundle, by name or path, or of a checkpoint file."""
    path = Path(source)
    if path.is_file():
        _load_large_network(pair, path)
        return
    bundle = Bundle(source)
    load_exactly(pair.large.network, load_large(bundle).network.state_dict(), bundle.directory)


def _load_large_network(model: BoostedPair, path: Path) -> None:
    """Give a pair's large network the weights of a checkpoint: of that network alone, or of another pair.

    Raises:
        InputError: the file is no checkpoint, or of a network of another size; a tensor is named.
    """
    state = read_weights(path)
    if is_published(state):
        prefix = "joint_model.big."
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        state = convert(state, model.config.large_alone(), str(path))
    part = "large" if any(key.startswith("large.") for key in state) else "small"
    prefix = f"{part}.network."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    load_exactly(model.large.network, own, path)


def warm_start(model: nn.Module, path: Path, config: ModelConfig) -> list[str]:
    """Give a model what fits it of a related one: of the other task, or of the small network without hints.

    Args:
        model: of :func:`build`.
        path: a checkpoint of ours.
        config: the model's.

    Returns:
        The tensors that keep their own values, because the checkpoint has none of that name and shape.

    Raises:
        InputError: the file is no checkpoint, or has nothing that fits.
    """
    state, own = read_weights(path), model.state_dict()
    for name in [name for name in state if ".network.output_conv.conv." in name and name in own]:
        # Of two separated voices, the first one's output layer serves to extract one.
        axis = -own[name].dim()
        if config.sources == 1 and state[name].shape[axis] == 2 * config.spectrum_channels:
            state[name] = state[name].narrow(axis, 0, config.spectrum_channels)
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        raise InputError(f"{path}: has no tensor that fits this configuration; is it a checkpoint of a related model?")
    load_exactly(model, own | fitting, path)
    return sorted(own.keys() - fitting.keys())


def average_with(model: nn.Module, path: Path) -> None:
    """Move a model's weights halfway to those of a checkpoint that came from the same ones, where that has them.

    Of networks that were trained further from the same weights, the mean is often better than each: Wortsman et al.,
    "Model soups", ICML 2022. What the checkpoint lacks, as the small network alone lacks fusion, stays as it is.

    Args:
        model: with the weights of the one.
        path: a checkpoint of ours with those of the other.

    Raises:
        InputError: the file is no checkpoint, or has a tensor that the model lacks, or that differs in shape or is not
            finite; it is named.
    """
    state, own = read_weights(path), model.state_dict()
    mean = {
        name: torch.lerp(own[name], value.to(own[name]), 0.5)
        if name in own and value.shape == own[name].shape
        else value
        for name, value in state.items()
    }
    load_exactly(model, own | mean, path)


def best_checkpoint(run_dir: Path) -> Path:
    """The checkpoint of a run with the best validation figure, or else its last.

    Raises:
        InputError: the run has none.
    """
    scored = {float(path.stem.partition("_")[2].removesuffix("dB")): path for path in run_dir.glob("best/*dB.ckpt")}
    if scored:
        return scored[max(scored)]
    if (run_dir / LAST).is_file():
        return run_dir / LAST
    raise InputError(f"{run_dir}: has no checkpoint; train first")
