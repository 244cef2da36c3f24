"""Loads the initial weights of a run, and finds its best checkpoint."""

import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

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
    """Build the networks of a configuration and load the weights that it names. Other weights are random.

    Raises:
        InputError: a checkpoint or bundle cannot be used.
    """
    for path in map(Path, config.weight_sources()):
        if path.name == LAST and not path.exists():
            raise InputError(f"{path}: no such file; first train the run that makes it, with --run-dir {path.parent}")
    if config.initial_checkpoint is not None:
        model = _read(config.initial_checkpoint, config.model).train()
    else:
        model = build(config.model)
    if config.warm_start is not None:
        left = warm_start(model, Path(config.warm_start), config.model)
        print(
            f"{config.warm_start}: loaded, except for {len(left)} tensors, which keep their random values",
            file=sys.stderr,
        )
    if config.averaged_with is not None:
        average_with(model, Path(config.averaged_with))
    if config.large_checkpoint is not None:
        assert isinstance(model, BoostedPair)
        _start_large(model, config.large_checkpoint)
    return model


def initial_speakers(config: TrainingConfig) -> set[str]:
    """Return the training speakers of all weights that a configuration names, as far as they are recorded.

    Raises:
        InputError: a checkpoint or bundle cannot be used.
    """
    return {speaker for source in config.weight_sources() for speaker in _speakers(source)}


def _speakers(source: str) -> list[str]:
    if Path(source).is_file():
        return read_training_speakers(Path(source))
    return Bundle(source).manifest.provenance.training_speakers


def _read(source: str, config: ModelConfig) -> nn.Module:
    """Return a model with the weights of a checkpoint file, or of a bundle by name or path."""
    path = Path(source)
    return read_checkpoint(path, config) if path.is_file() or path.suffix else initial_weights(Bundle(source), config)


def _start_large(pair: BoostedPair, source: str) -> None:
    """Load the large network of a pair from a checkpoint file, or from a bundle by name or path."""
    path = Path(source)
    if path.is_file():
        _load_large_network(pair, path)
        return
    bundle = Bundle(source)
    load_exactly(pair.large.network, load_large(bundle).network.state_dict(), bundle.directory)


def _load_large_network(model: BoostedPair, path: Path) -> None:
    """Load the large network of a pair from a checkpoint of that network alone or of another pair.

    Raises:
        InputError: the file is no checkpoint, or its network has another size. The message names a tensor.
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
    """Load those weights of a related model that fit: of the other task, or of the small network without hints.

    Args:
        model: the result of :func:`build`.
        path: a checkpoint in the format of this project.
        config: the configuration of the model.

    Returns:
        The names of the tensors that are not loaded, because the checkpoint has none of that name and shape.

    Raises:
        InputError: the file is no checkpoint, or none of its tensors fits.
    """
    state, own = read_weights(path), model.state_dict()
    for name in [name for name in state if ".network.output_conv.conv." in name and name in own]:
        # A network that extracts one source starts with the mean of the outputs of one that separates two. This is the
        # mixture, which prefers neither source.
        axis = -own[name].dim()
        if config.sources == 1 and state[name].shape[axis] == 2 * config.spectrum_channels:
            state[name] = torch.stack(state[name].chunk(2, axis)).mean(0)
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        raise InputError(f"{path}: has no tensor that fits this configuration; is it a checkpoint of a related model?")
    load_exactly(model, own | fitting, path)
    return sorted(own.keys() - fitting.keys())


def load_if_it_fits(layers: nn.Module, state: Mapping[str, Tensor], path: Path) -> bool:
    """Load the weights of layers that only training has.

    Args:
        layers: the layers, whose weights change.
        state: weights by name, among them those of the layers.
        path: the checkpoint that they come from.

    Returns:
        Whether there are weights of all names and shapes. Otherwise nothing changes.

    Raises:
        InputError: a tensor is not finite.
    """
    own = layers.state_dict()
    if not all(name in state and state[name].shape == value.shape for name, value in own.items()):
        return False
    load_exactly(layers, {name: state[name] for name in own}, path)
    return True


def average_with(model: nn.Module, path: Path) -> None:
    """Replace the weights of a model by the mean of them and those of a checkpoint.

    If two networks were trained from the same weights, their mean is often better than either: Wortsman et al., "Model
    soups", ICML 2022. Tensors that the checkpoint lacks do not change; the small network alone, for example, has no
    fusion.

    Args:
        model: a model, whose weights change.
        path: a checkpoint in the format of this project.

    Raises:
        InputError: the file is no checkpoint, or one of its tensors is not finite, has another shape, or does not exist
            in the model. The message names the tensor.
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
    """Return the checkpoint of a run with the best validation figure, or its last one if no figure is recorded.

    Raises:
        InputError: the run has no checkpoint.
    """
    scored = {float(path.stem.partition("_")[2].removesuffix("dB")): path for path in run_dir.glob("best/*dB.ckpt")}
    if scored:
        return scored[max(scored)]
    if (run_dir / LAST).is_file():
        return run_dir / LAST
    raise InputError(f"{run_dir}: has no checkpoint; run kb-train first")
