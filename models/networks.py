"""Loads the networks of bundles into torch, and writes bundles."""

import datetime
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import nn

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_directory, atomic_file
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import build, check_shapes, load_exactly
from knowledge_boosting.models.config import ModelConfig, Pair
from knowledge_boosting.models.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    UNTRAINED_NOTICE,
    Manifest,
    Part,
    Provenance,
    bundle_id,
    file_digest,
    parts_of,
)
from knowledge_boosting.models.onnx_graph import check_graph, frame_graph
from knowledge_boosting.models.pair import BoostedPair, LargeModel, SmallModel
from knowledge_boosting.models.tasks import TASKS

Model = TypeVar("Model", bound=nn.Module)


def load_small(bundle: Bundle) -> SmallModel:
    """Load the device's network of a bundle for inference.

    Raises:
        InputError: the part is missing or damaged, or belongs to another network.
    """
    return _load(lambda: SmallModel(bundle.model), bundle.weights("small"))


def load_large(bundle: Bundle) -> LargeModel:
    """Load the server's network and the hint encoder of a bundle for inference.

    Raises:
        InputError: the bundle holds one network alone, or the part is missing, damaged, or of another network.
    """
    path = bundle.weights("large")
    return _load(lambda: LargeModel(_pair(bundle)), path)


def load_pair(bundle: Bundle) -> BoostedPair:
    """Load both networks of a bundle for offline inference.

    Raises:
        InputError: see :func:`load_large`.
    """
    large = load_large(bundle)
    pair = BoostedPair(_pair(bundle))
    pair.small, pair.large = load_small(bundle), large
    return pair.eval().requires_grad_(False)


def _pair(bundle: Bundle) -> Pair:
    assert isinstance(bundle.model, Pair)  # because the bundle has a large part
    return bundle.model


def initial_weights(bundle: Bundle, config: ModelConfig) -> nn.Module:
    """Build the model of a configuration with the weights of a bundle, for further training.

    The configuration must be that of the bundle, or that of its large network alone. Only the running level may differ,
    because it has no weights.

    Returns:
        A model as from :func:`models.checkpoint.build`.

    Raises:
        InputError: a part is missing, or the bundle has other networks.
    """
    model = build(config)
    small = model.get_submodule("small")
    own = bundle.model.model_copy(update={"running_level": config.running_level})
    if own == config and isinstance(model, BoostedPair):
        load_exactly(model, load_pair(bundle).state_dict(), bundle.directory)
    elif own == config:
        load_exactly(small, load_small(bundle).state_dict(), bundle.directory)
    elif isinstance(own, Pair) and config == own.large_alone():
        large = load_large(bundle).network.state_dict()
        load_exactly(small.get_submodule("network"), large, bundle.directory)
    else:
        raise InputError(
            f"{bundle.directory}: has other networks than the configuration; give a bundle with the same networks"
        )
    return model


def _load(make: Callable[[], Model], path: Path) -> Model:
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:
        raise InputError(f"{path}: not a readable safetensors file ({reason(error)})") from None
    # The model is first built on the meta device. So a manifest with wrong, large sizes does not cost memory.
    with torch.device("meta"):
        check_shapes(make(), shapes, path)
    state = safetensors.torch.load_file(path)
    model = make()
    load_exactly(model, state, path)
    return model.eval().requires_grad_(False)


def write_bundle(
    directory: Path,
    model: nn.Module,
    config: ModelConfig,
    *,
    untrained: bool,
    source: str,
    configuration: str,
    training_speakers: Sequence[str] = (),
    note: str = "",
    half_speaker: bool = False,
) -> Manifest:
    """Write a bundle.

    Args:
        directory: the directory to make; its name becomes the name of the bundle.
        model: a module with ``small`` and, for a pair, ``large``.
        config: the configuration of the model.
        untrained: whether the weights are random; then all output about the bundle says so.
        source: the origin of the weights.
        configuration: the file with the sizes.
        training_speakers: the speakers of the training data.
        note: Markdown for the model card.
        half_speaker: whether to store the speaker layers, most of a TSE network, as float16.

    Raises:
        InputError: the directory exists already or cannot be written, or its name is not allowed for a bundle.
        Failure: the graph and the network compute different samples.
    """
    with atomic_directory(directory) as temporary:
        digests: dict[Part, str] = {}
        for part in parts_of(config):
            path = temporary / f"{part}.safetensors"
            state = {name: tensor.contiguous() for name, tensor in model.get_submodule(part).state_dict().items()}
            if half_speaker:
                state = {name: tensor.half() if ".speaker." in name else tensor for name, tensor in state.items()}
            path.write_bytes(safetensors.torch.save(state))
            digests[part] = file_digest(path)
        small = model.get_submodule("small")
        assert isinstance(small, SmallModel)
        graph = frame_graph(small)
        check_graph(graph, small)
        (temporary / GRAPH_FILE).write_bytes(graph)
        try:
            manifest = Manifest(
                name=directory.resolve().name,
                id=bundle_id(config, digests),
                untrained=untrained,
                model=config,
                digests=digests,
                graph_digest=file_digest(temporary / GRAPH_FILE),
                provenance=Provenance(
                    created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                    software=f"knowledge-boosting {importlib.metadata.version('knowledge-boosting')}",
                    torch=torch.__version__,
                    source=source,
                    configuration=configuration,
                    training_speakers=list(training_speakers),
                ),
            )
        except ValueError as error:
            raise InputError(f"{directory}: is no name for a bundle ({reason(error)}); give another --output") from None
        (temporary / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(_card(manifest, note), encoding="utf-8")
    return manifest


def _card(manifest: Manifest, note: str) -> str:
    model, framing = manifest.model, manifest.model.framing
    task = TASKS[model.task].label
    lines = [f"# {manifest.name}", ""]
    if manifest.untrained:
        lines += [f"**{UNTRAINED_NOTICE}.**", ""]
    lines += [
        f"A knowledge-boosting bundle for {task}, {framing.sample_rate} Hz, {model.microphones} microphones, frames of "
        f"{framing.chunk} samples with {framing.lookahead} of lookahead.",
        "",
        "| | channels | LSTM units | blocks | heads | self-attention |",
        "|---|---|---|---|---|---|",
    ]
    for name, size in model.networks.items():
        attention = "yes" if size.self_attention else "no"
        lines.append(f"| {name} | {size.channels} | {size.hidden} | {size.blocks} | {size.heads} | {attention} |")
    lines.append("")
    if isinstance(model, Pair):
        frames = f"{model.max_age} frames ({model.max_age_ms:g} ms)"
        use = f"are used on arrival, up to an age of {frames}" if model.on_arrival else f"have a delay of {frames}"
        shape = f"each has {model.hint_channels} x {framing.bins} values (compression {model.boosting.compression})"
        lines += [f"Hints {use}; {shape}.", ""]
    if note:
        lines += [note.strip(), ""]
    lines += [f"Weights: {manifest.provenance.source}. Bundle id: `{manifest.id}`.", ""]
    return "\n".join(lines)


_MEASURED = "\n## Measured\n"


def record_quality(bundle: Bundle, quality: Mapping[str, float], table: str) -> None:
    """Write measured figures into the manifest of a bundle, and a table of them at the end of its card.

    Earlier figures are replaced.

    Args:
        bundle: the bundle.
        quality: the figures by name.
        table: a table in Markdown.

    Raises:
        InputError: the bundle cannot be read or written.
    """
    directory, manifest = bundle.directory, bundle.manifest.model_copy(update={"quality": dict(quality)})
    card = directory / "README.md"
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {manifest.name}\n"
    except (OSError, ValueError) as error:
        raise InputError(f"{card}: not readable ({reason(error)})") from None
    with atomic_file(directory / MANIFEST_FILE) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    with atomic_file(card) as temporary:
        temporary.write_text(f"{text.partition(_MEASURED)[0]}{_MEASURED}\n{table}\n", encoding="utf-8")
