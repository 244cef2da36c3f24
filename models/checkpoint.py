"""Loads checkpoints of this project and published ones into models, always with ``weights_only``."""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.models.config import ModelConfig, Pair
from knowledge_boosting.models.manifest import first_fault, read_json, validate_model
from knowledge_boosting.models.pair import BoostedPair, LargeModel, SmallModel
from knowledge_boosting.models.published import config_from_published, convert, is_published, is_published_config

# Keys in the checkpoint of a training run.
TRAINING_SPEAKERS = "training_speakers"
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OUTPUT_GAIN = "output_gain"  # the gains of each part, for every source and microphone
# Tensors in the checkpoint of a run that whitens speaker embeddings.
WHITENING_MATRIX, WHITENING_MEAN = "whitening.matrix", "whitening.mean"


def read_config(path: Path) -> ModelConfig:
    """Read a model configuration, in the schema of this project or a published JSON file.

    Raises:
        InputError: the file cannot be read, or a key is missing, unknown or has an impossible value.
    """
    if path.suffix == ".toml":
        raise InputError(f"{path}: is a recipe; give the config.json in the folder of a stage's run")
    document = read_json(existing_file(path, "a model configuration"))
    if is_published_config(document):
        try:
            return config_from_published(document, str(path))
        except ValidationError as error:
            raise InputError(f"{path}: {first_fault(error)}") from None
    # A training configuration includes the model configuration.
    model = document.get("model")
    return validate_model(model if isinstance(model, dict) else document, path)


def read_checkpoint(path: Path, config: ModelConfig) -> nn.Module:
    """Build the model of a configuration and load its weights from a checkpoint.

    Args:
        path: a published checkpoint or one of this project. The latter is the checkpoint of a training run, or a state
            dict for the result of :func:`build`, directly or under the key ``state_dict``.
        config: the configuration.

    Returns:
        A module with ``small`` and, for a pair, ``large``.

    Raises:
        InputError: the file is no checkpoint, or a tensor is missing, unexpected or of a wrong shape. The message names
            the tensor.
    """
    state = read_weights(path)
    if is_published(state):
        state = convert(state, config, str(path))
    model = build(config)
    load_exactly(model, state, path)
    return model.eval()


def read_training_speakers(path: Path) -> list[str]:
    """Return the training speakers of a checkpoint. Published checkpoints do not record them, so the list is empty.

    Raises:
        InputError: the file is no checkpoint.
    """
    content = _content(path)
    speakers = content.get(TRAINING_SPEAKERS, []) if isinstance(content, dict) else []
    if not isinstance(speakers, list) or not all(isinstance(speaker, str) for speaker in speakers):
        raise InputError(f"{path}: its list of training speakers is damaged; give another checkpoint of the run")
    return speakers


def apply_output_gains(model: nn.Module, path: Path) -> None:
    """Scale the outputs of a model by the gains in its training checkpoint, to the energy and sign of the sources.

    The loss does not depend on energy and sign, so networks have arbitrary ones after training, for every source and
    microphone. Hints do not change.

    Raises:
        InputError: the file is no checkpoint, or its gains do not fit the model.
    """
    content = _content(path)
    gains = content.get(OUTPUT_GAIN, {}) if isinstance(content, dict) else {}
    damaged = InputError(f"{path}: its output gains are damaged; give another checkpoint of the run")
    if not isinstance(gains, dict):
        raise damaged
    for part, gain in gains.items():
        module = getattr(model, str(part), None)
        if not isinstance(module, SmallModel | LargeModel):
            raise damaged
        try:
            each = torch.tensor(gain, dtype=torch.float32).repeat_interleave(2)  # for real and imaginary parts
        except (TypeError, ValueError, RuntimeError):
            raise damaged from None
        conv = module.network.output_conv.conv
        assert conv.bias is not None
        if each.shape != conv.bias.shape or not (each.isfinite() & (each != 0)).all():
            raise damaged
        with torch.no_grad():
            conv.weight *= each[:, None, None, None]
            conv.bias *= each
            if isinstance(module, LargeModel):
                module.encoder.conv.weight /= each[:, None, None]


def _content(path: Path) -> Any:
    existing_file(path, "a checkpoint")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # torch does not compress its files. A compressed file could expand to any size.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises exceptions of many types for files that it did not write
        raise InputError(f"{path}: not a readable checkpoint ({reason(error).split('. ')[0]})") from None


def read_weights(path: Path, part: str = "model") -> dict[str, Tensor]:
    """Return the weights of a checkpoint by name.

    Those of a published checkpoint are returned unchanged. From a checkpoint of a training run, only those of the model
    are returned.

    Args:
        path: the checkpoint.
        part: ``model``, or another part of a training run, which other checkpoints do not have.

    Raises:
        InputError: the file is no checkpoint, or a tensor is not a plain one. The message names the tensor.
    """
    content = _content(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items())
    ):
        raise InputError(
            f"{path}: holds no state dict of tensors; give a .ckpt or .pt file with the weights of a network"
        )
    for name, value in state.items():
        _check_plain(value, name, path)
    if part != "model":
        return {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
    if is_published(state):
        return state
    # The checkpoint of a training run also has tensors that only training needs.
    model = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    if WHITENING_MATRIX in state and WHITENING_MEAN in state:
        _fold_in_whitening(model, state[WHITENING_MATRIX], state[WHITENING_MEAN], path)
    return model or state


def _check_plain(tensor: Tensor, name: str, source: Path) -> None:
    """Check that a tensor is dense, is on the CPU, and has all its values in the file.

    Raises:
        InputError: it is not. The message names the tensor.
    """
    plain = tensor.layout is torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
    if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(
            f"{source}: tensor {name} is no plain tensor ({_describe_type(tensor)}); save it as a dense CPU tensor"
        )


def _describe_type(tensor: Tensor) -> str:
    words = [str(kind).removeprefix("torch.") for kind in (tensor.dtype, tensor.layout)]
    return " ".join(word for word in (*words, tensor.device.type) if word not in ("strided", "cpu"))


def _fold_in_whitening(model: dict[str, Tensor], matrix: Tensor, mean: Tensor, path: Path) -> None:
    """Change speaker layers, which were trained on ``matrix (e - mean)``, so that they accept embeddings ``e``."""
    for name in [name for name in model if ".network.speaker." in name and name.endswith(".weight")]:
        bias = name.removesuffix("weight") + "bias"
        try:
            weight = model[name].double() @ matrix.double()
            model[bias] = (model[bias].double() - weight @ mean.double()).float()
            model[name] = weight.float()
        except (KeyError, RuntimeError, NotImplementedError):
            raise InputError(f"{path}: its speaker layers are damaged; give another checkpoint of the run") from None


def build(config: ModelConfig) -> nn.Module:
    """Build the networks of a configuration with random weights: ``small`` and, for a pair, ``large``."""
    if isinstance(config, Pair):
        return BoostedPair(config)
    alone = nn.Module()
    alone.small = SmallModel(config)
    return alone


def check_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]], source: Path) -> None:
    """Check that names and shapes of tensors are those of a model. The model can be on the meta device.

    Raises:
        InputError: a tensor is missing, unexpected or has a wrong shape. The message names the tensor.
    """
    own = model.state_dict()
    for name in own:
        if name not in shapes:
            raise InputError(f"{source}: tensor {name} is missing; is this the checkpoint of the configuration given?")
    for name, shape in shapes.items():
        if name not in own:
            raise InputError(f"{source}: tensor {name} has no place in the configuration given")
        if tuple(shape) != tuple(own[name].shape):
            expected = list(own[name].shape)
            raise InputError(f"{source}: tensor {name} has shape {list(shape)}, expected {expected}")


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], source: Path) -> None:
    """Load a state dict, whose keys and shapes must be exactly those of the model, and whose values must be finite.

    Raises:
        InputError: a tensor is missing, unexpected, not finite, or has a wrong shape. The message names the tensor.
    """
    check_shapes(model, {name: tensor.shape for name, tensor in state.items()}, source)
    for name, tensor in state.items():
        _check_plain(tensor, name, source)
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise InputError(
                f"{source}: tensor {name} is of {_describe_type(tensor)}; weights must be float16, 32, 64 or bfloat16"
            )
        if not torch.isfinite(tensor).all():
            raise InputError(f"{source}: tensor {name} has values that are not finite")
    model.load_state_dict(state)
