"""Imports configurations and checkpoints of the published research code.

A checkpoint is the state dict of one network, or a Lightning file with a ``state_dict``. The keys of the latter have
the prefixes ``joint_model.small.``, ``joint_model.big.`` and ``joint_model.gen_embedding.`` for a pair, and ``model.``
for one network.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.config import (
    SPEAKER_EMBEDDING_SIZE,
    Alone,
    FixedDelay,
    Framing,
    ModelConfig,
    NetworkSize,
    Pair,
)
from knowledge_boosting.models.manifest import first_fault
from knowledge_boosting.models.tasks import TASKS, TaskName

# The implemented values of arguments of the published constructors. Other values are refused.
_FIXED: dict[str, tuple[Any, str]] = {
    "I": (1, "the unfold kernel is 1 in every published configuration"),
    "J": (1, "the unfold hop is 1 in every published configuration"),
    "lookahead": (True, "frames include the lookahead"),
    "use_masked_attention": (True, "self-attention ignores frames before the start of a stream"),
    "use_alignment": (True, "delayed hints are aligned with their own frame"),
    "use_cross_attention": (True, "hints are fused by cross-attention"),
}
_SIZES = ("stft_chunk_size", "stft_pad_size", "num_ch", "D", "L", "B", "H", "use_attn", "local_atten_len")
_TASKS: dict[str, TaskName] = {
    "src.models.tfgridnet_TSE_causal_torch_stft_layernorm.net.Net": "tse",
    "src.models.tfgridnet_ssep_causal_torch_stft_layernorm.net.Net": "ss",
}
_PUBLISHED_KEYS = {
    "channels": "D",
    "hidden": "H",
    "blocks": "B",
    "heads": "L",
    "self_attention": "use_attn",
    "window": "local_atten_len",
}
# Keys whose values follow from the rest of the configuration.
_DERIVED = ("generate_embeddings", "delay", "compression")


def config_from_published(document: Mapping[str, Any], source: str) -> ModelConfig:
    """Convert a published JSON document to a configuration.

    Args:
        document: a whole training configuration with ``pl_module_args``, or only that part. For a pair it has
            ``small_model_params``, ``big_model_params`` and ``joint_model_params``, and for one network
            ``model_params``. The task follows from the import path of the network or from ``task``.
        source: the name of the document in error messages.

    Raises:
        InputError: a key is missing or unknown, or has a value that is not implemented.
    """
    if "pl_module" in document or "pl_module_args" in document:
        document = _section(document, "pl_module_args", source)
    network = str(document.get("small_model", document.get("model")))
    task: TaskName | None = document.get("task") or _TASKS.get(network)
    if not isinstance(task, str) or task not in TASKS:
        known = " or ".join(f'"{name}"' for name in TASKS)
        raise InputError(
            f'{source}: "task" must be {known}, because the import path of the network does not determine it'
        )
    if "model_params" in document:
        sections = {"small": "model_params"}
    else:
        sections = {"small": "small_model_params", "large": "big_model_params"}
    sizes, shapes = {}, {}
    for network, key in sections.items():
        sizes[network], shapes[network] = _network_size(_section(document, key, source), f"{source}: {key}")
    if len(set(shapes.values())) > 1:
        raise InputError(f"{source}: both networks must have the same stft_chunk_size, stft_pad_size and num_ch")
    chunk, lookahead, microphones = shapes["small"]
    framing = Framing(chunk=chunk, lookahead=lookahead)
    if "large" in sizes:
        joint = _section(document, "joint_model_params", source)
        delay = _value(joint, "delay", f"{source}: joint_model_params", int)
        if document["small_model_params"].get("delay", delay) != delay:
            raise InputError(f"{source}: small_model_params.delay and joint_model_params.delay must be equal")
        compression: Literal[1, 2, 4] = joint.get("compression", 1)
        return Pair(
            task=task,
            microphones=microphones,
            framing=framing,
            small=sizes["small"],
            large=sizes["large"],
            boosting=FixedDelay(delay=delay, compression=compression),
        )
    return Alone(task=task, microphones=microphones, framing=framing, network=sizes["small"])


def _section(document: Mapping[str, Any], key: str, source: str) -> Mapping[str, Any]:
    section = document.get(key)
    if not isinstance(section, dict):
        raise InputError(f'{source}: "{key}" is missing or not an object')
    return section


def _value(section: Mapping[str, Any], key: str, source: str, kind: type) -> Any:
    if key not in section:
        raise InputError(f'{source}: "{key}" is missing')
    if type(section[key]) is not kind:
        raise InputError(f'{source}: "{key}" must be of type {kind.__name__}, not {section[key]!r}')
    return section[key]


def _network_size(params: Mapping[str, Any], source: str) -> tuple[NetworkSize, tuple[int, int, int]]:
    for key, value in params.items():
        if key in _FIXED and value != _FIXED[key][0]:
            expected, why = _FIXED[key]
            raise InputError(f'{source}: "{key}" must be {expected!r}, not {value!r}: {why}')
        if key not in (*_FIXED, *_SIZES, *_DERIVED):
            raise InputError(f'{source}: unknown key "{key}"')
    try:
        size = NetworkSize(
            channels=_value(params, "D", source, int),
            hidden=_value(params, "H", source, int),
            blocks=_value(params, "B", source, int),
            heads=_value(params, "L", source, int) if "L" in params else 4,
            self_attention=_value(params, "use_attn", source, bool),
            window=_value(params, "local_atten_len", source, int) if "local_atten_len" in params else 50,
        )
    except ValidationError as error:
        fault = first_fault(error, lambda key: f'"{_PUBLISHED_KEYS[key]}"')
        raise InputError(f"{source}: {fault}") from None
    chunk = _value(params, "stft_chunk_size", source, int)
    return size, (chunk, _value(params, "stft_pad_size", source, int), _value(params, "num_ch", source, int))


def is_published_config(document: Mapping[str, Any]) -> bool:
    """Return whether a JSON document is a configuration of the published code."""
    return any(key in document for key in ("pl_module", "pl_module_args", "model_params", "small_model_params"))


def is_published(keys: Iterable[str]) -> bool:
    """Return whether the keys of a checkpoint are those of the published code."""
    return any(key.startswith(("tfgridnet.", "model.tfgridnet.", "joint_model.")) for key in keys)


def convert(published: Mapping[str, Tensor], config: ModelConfig, source: str) -> dict[str, Tensor]:
    """Convert a published state dict to our keys, ``small.…`` and, for a pair, ``large.…``.

    Args:
        published: the state dict of a pair or, if ``config`` describes one network alone, of one network.
        config: the configuration.
        source: the name of the checkpoint in error messages.

    Raises:
        InputError: a tensor is missing, unexpected, or has another shape than in ``config``. The message names the
            tensor.
    """
    tensors = _Tensors(published, source)
    ours: dict[str, Tensor] = {}
    if isinstance(config, Pair):
        _convert_network(tensors.under("joint_model.small."), config, config.small, ours, "small.network.")
        _convert_network(tensors.under("joint_model.big."), config, config.large, ours, "large.network.")
        _convert_encoder(tensors.under("joint_model.gen_embedding."), config, ours)
    else:
        prefix = "model." if any(key.startswith("model.") for key in published) else ""
        _convert_network(tensors.under(prefix), config, config.on_device, ours, "small.network.")
    tensors.finish()
    return ours


class _Tensors:
    """Takes tensors out of a published state dict by key and expected shape."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str, prefix: str = "") -> None:
        self._left = dict(tensors)
        self._source, self._prefix = source, prefix

    def under(self, prefix: str) -> "_Tensors":
        below = _Tensors({}, self._source, self._prefix + prefix)
        below._left = self._left
        return below

    def take(self, key: str, *shape: int) -> Tensor:
        name = self._prefix + key
        if name not in self._left:
            raise InputError(
                f"{self._source}: tensor {name} is missing; is this the checkpoint of the configuration given?"
            )
        tensor = self._left.pop(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{self._source}: tensor {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        return tensor

    def finish(self) -> None:
        if self._left:
            name = min(self._left)
            more = f" and {len(self._left) - 1} more" if len(self._left) > 1 else ""
            raise InputError(f"{self._source}: tensor {name}{more} has no place in the configuration given")


def _convert_network(
    tensors: _Tensors, config: ModelConfig, size: NetworkSize, ours: dict[str, Tensor], prefix: str
) -> None:
    net = tensors.under("tfgridnet.")
    channels, hidden, bins = size.channels, size.hidden, config.framing.bins
    inputs, outputs = 2 * config.microphones, config.spectrum_channels
    ours[f"{prefix}input_conv.conv.weight"] = net.take("conv.0.weight", channels, inputs, 3, 3)
    ours[f"{prefix}input_conv.conv.bias"] = net.take("conv.0.bias", channels)
    ours[f"{prefix}input_norm.weight"] = net.take("conv.1.weight", channels)
    ours[f"{prefix}input_norm.bias"] = net.take("conv.1.bias", channels)
    for index in range(size.blocks):
        block, target = net.under(f"blocks.{index}."), f"{prefix}blocks.{index}."
        for path, directions in (("intra", ("", "_reverse")), ("inter", ("",))):
            ours[f"{target}{path}_norm.weight"] = block.take(f"{path}_norm.gamma", 1, channels, 1, 1).flatten()
            ours[f"{target}{path}_norm.bias"] = block.take(f"{path}_norm.beta", 1, channels, 1, 1).flatten()
            for direction in directions:
                for name, shape in (
                    ("weight_ih", (4 * hidden, channels)),
                    ("weight_hh", (4 * hidden, hidden)),
                    ("bias_ih", (4 * hidden,)),
                    ("bias_hh", (4 * hidden,)),
                ):
                    key = f"{name}_l0{direction}"
                    ours[f"{target}{path}_lstm.{key}"] = block.take(f"{path}_rnn.{key}", *shape)
            features = hidden * len(directions)
            linear = block.take(f"{path}_linear.weight", features, channels, 1)
            ours[f"{target}{path}_linear.weight"] = linear.squeeze(2).T
            ours[f"{target}{path}_linear.bias"] = block.take(f"{path}_linear.bias", channels)
        if size.self_attention:
            _convert_self_attention(block, size, bins, ours, f"{target}attention.")
        if index == size.blocks - 1:
            break
        if config.needs_speaker:
            speaker = net.under(f"TSE_blocks.{index}.")
            weights, biases = [], []
            for half in ("weight", "bias"):
                # Published rows have the channel first; ours have the frequency first.
                weight = speaker.take(f"{half}.weight", channels * bins, SPEAKER_EMBEDDING_SIZE, 1)
                weights.append(weight.view(channels, bins, SPEAKER_EMBEDDING_SIZE).transpose(0, 1).flatten(0, 1))
                biases.append(speaker.take(f"{half}.bias", channels * bins).view(channels, bins).T.flatten())
            ours[f"{prefix}speaker.{index}.weight"] = torch.cat(weights)
            ours[f"{prefix}speaker.{index}.bias"] = torch.cat(biases)
        if prefix == "small.network." and isinstance(config, Pair):
            film = net.under(f"film_blocks.{index}.")
            cross = net.under(f"cross_attention_blocks.{index}.")
            _convert_fusion(film, cross, config, bins, ours, f"{prefix}fusion.{index}.")
    # A transposed convolution that is cropped to be causal equals a convolution with the flipped kernel.
    deconv = net.take("deconv.weight", channels, outputs, 3, 3)
    ours[f"{prefix}output_conv.conv.weight"] = deconv.flip(2, 3).transpose(0, 1)
    ours[f"{prefix}output_conv.conv.bias"] = net.take("deconv.bias", outputs)


def _convert_self_attention(
    block: _Tensors, size: NetworkSize, bins: int, ours: dict[str, Tensor], target: str
) -> None:
    channels = size.channels
    widths = {"Q": -(-512 // bins), "K": -(-512 // bins), "V": channels // size.heads}
    weights, biases, slopes = [], [], []
    scales: dict[str, list[Tensor]] = {kind: [] for kind in widths}
    shifts: dict[str, list[Tensor]] = {kind: [] for kind in widths}
    for kind, width in widths.items():
        for head in range(size.heads):
            layer = block.under(f"attn_conv_{kind}_{head}.")
            weights.append(layer.take("0.weight", width, channels, 1, 1).flatten(1))
            biases.append(layer.take("0.bias", width))
            slopes.append(layer.take("1.weight", 1))
            # Ours are flattened with the frequency first; published ones have the channel first.
            scales[kind].append(layer.take("2.gamma", 1, width, 1, bins)[0, :, 0].T.flatten())
            shifts[kind].append(layer.take("2.beta", 1, width, 1, bins)[0, :, 0].T.flatten())
    ours[f"{target}project.weight"], ours[f"{target}project.bias"] = torch.cat(weights), torch.cat(biases)
    ours[f"{target}slope_qk"] = torch.cat(slopes[: 2 * size.heads])
    ours[f"{target}slope_v"] = torch.cat(slopes[2 * size.heads :])
    for name, parts in (("scale", scales), ("shift", shifts)):
        ours[f"{target}{name}_qk"] = torch.stack(parts["Q"] + parts["K"])[:, None]
        ours[f"{target}{name}_v"] = torch.stack(parts["V"])[:, None]
    merge = block.under("attn_concat_proj.")
    ours[f"{target}merge.weight"] = merge.take("0.weight", channels, channels, 1, 1).flatten(1)
    ours[f"{target}merge.bias"] = merge.take("0.bias", channels)
    ours[f"{target}slope_merge"] = merge.take("1.weight", 1)
    ours[f"{target}norm_merge.weight"] = merge.take("2.gamma", 1, channels, 1, bins)[0, :, 0].T
    ours[f"{target}norm_merge.bias"] = merge.take("2.beta", 1, channels, 1, bins)[0, :, 0].T


def _convert_fusion(
    film: _Tensors, cross: _Tensors, config: Pair, bins: int, ours: dict[str, Tensor], target: str
) -> None:
    channels, heads = config.small.channels, config.small.heads
    key, value = -(-256 // bins), channels // heads
    ours[f"{target}film.weight"] = torch.cat(
        [film.take(f"{half}.weight", channels, config.hint_channels, 1, 1).flatten(1) for half in ("weight", "bias")]
    )
    ours[f"{target}film.bias"] = torch.cat([film.take(f"{half}.bias", channels) for half in ("weight", "bias")])
    weights, biases = {}, {}
    for kind, name, rows, width in (
        ("Q", "query", heads * key, key),
        ("K", "key", heads * key, key),
        ("V", "value", channels, value),
    ):
        layer = cross.under(f"attn_conv_{kind}.")
        weights[kind], biases[kind] = layer.take("0.weight", rows, channels), layer.take("0.bias", rows)
        ours[f"{target}slope_{name}"] = layer.take("1.weight", 1)
        ours[f"{target}norm_{name}.weight"] = layer.take("3.norm.weight", bins * width)
        ours[f"{target}norm_{name}.bias"] = layer.take("3.norm.bias", bins * width)
    ours[f"{target}query.weight"], ours[f"{target}query.bias"] = weights["Q"], biases["Q"]
    ours[f"{target}key_value.weight"] = torch.cat([weights["K"], weights["V"]])
    ours[f"{target}key_value.bias"] = torch.cat([biases["K"], biases["V"]])
    merge = cross.under("attn_concat_proj.")
    ours[f"{target}merge.weight"] = merge.take("0.weight", channels, channels)
    ours[f"{target}merge.bias"] = merge.take("0.bias", channels)
    ours[f"{target}slope_merge"] = merge.take("1.weight", 1)
    ours[f"{target}norm_merge.weight"] = merge.take("3.norm.weight", bins * channels).view(bins, channels)
    ours[f"{target}norm_merge.bias"] = merge.take("3.norm.bias", bins * channels).view(bins, channels)


def _convert_encoder(encoder: _Tensors, config: Pair, ours: dict[str, Tensor]) -> None:
    channels = config.spectrum_channels
    # The published kernel is (frequency, time), ours is (time, frequency).
    weight = encoder.take("conv1d.weight", config.hint_channels, channels, 3, 3)
    ours["large.encoder.conv.weight"] = weight.transpose(2, 3)
    ours["large.encoder.conv.bias"] = encoder.take("conv1d.bias", config.hint_channels)
