"""Bundles with torch: write one from a model, load its small or its large part."""

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
from knowledge_boosting.models.checkpoint import build, check_shapes, load_exactly
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.models.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    UNTRAINED_NOTICE,
    Manifest,
    Part,
    Provenance,
    bundle_id,
    file_digest,
    find_bundle,
    read_manifest,
    verify_part,
)
from knowledge_boosting.models.onnx_graph import check_graph, frame_graph
from knowledge_boosting.models.pair import BoostedPair, LargeModel, SmallModel
from knowledge_boosting.models.tasks import TASKS

Model = TypeVar("Model", bound=nn.Module)


def load_small(name_or_path: str) -> tuple[SmallModel, Manifest]:
    """The device's network of a bundle, ready for inference.

    Raises:
        InputError: no such bundle, the part is missing, or its digest is wrong.
    """
    directory = find_bundle(name_or_path)
    manifest = read_manifest(directory)
    return _load(SmallModel, directory, manifest, "small"), manifest


def load_large(name_or_path: str) -> tuple[LargeModel, Manifest]:
    """The server's network and hint encoder of a bundle, ready for inference.

    Raises:
        InputError: no such bundle, the part is missing, or its digest is wrong.
    """
    directory = find_bundle(name_or_path)
    manifest = read_manifest(directory)
    return _load(LargeModel, directory, manifest, "large"), manifest


def load_pair(name_or_path: str) -> tuple[BoostedPair, Manifest]:
    """Both networks of a bundle, ready for offline inference.

    Raises:
        InputError: no such bundle, a part is missing, or a digest is wrong.
    """
    large, manifest = load_large(name_or_path)
    pair = BoostedPair(manifest.model)
    pair.small, pair.large = load_small(name_or_path)[0], large
    return pair.eval().requires_grad_(False), manifest


def read_bundle(name_or_path: str, config: ModelConfig) -> nn.Module:
    """The model of a configuration with the weights of a bundle, to train on.

    Returns:
        What :func:`models.checkpoint.build` makes: of the bundle's own configuration, or of its large network alone.

    Raises:
        InputError: no such bundle, it cannot be used, or it is of other networks.
    """
    directory = find_bundle(name_or_path)
    bundled, model = read_manifest(directory).model, build(config)
    small = model.get_submodule("small")
    if bundled == config and isinstance(model, BoostedPair):
        load_exactly(model, load_pair(name_or_path)[0].state_dict(), directory)
    elif bundled == config:
        load_exactly(small, load_small(name_or_path)[0].state_dict(), directory)
    elif bundled.large is not None and config == bundled.model_copy(
        update={"small": bundled.large, "large": None, "boosting": None}
    ):
        large = load_large(name_or_path)[0].network.state_dict()
        load_exactly(small.get_submodule("network"), large, directory)
    else:
        raise InputError(f"{directory}: is of other networks than the configuration's model")
    return model


def _load(kind: Callable[[ModelConfig], Model], directory: Path, manifest: Manifest, part: Part) -> Model:
    path = verify_part(directory, manifest, part)
    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except Exception as error:
        raise InputError(f"{path}: not a readable safetensors file ({reason(error)})") from None
    # The sizes that a manifest claims cost no memory before the file has shown that it has weights of these sizes.
    with torch.device("meta"):
        check_shapes(kind(manifest.model), shapes, path)
    state = safetensors.torch.load_file(path)
    model = kind(manifest.model)
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
    """Write a bundle; the directory's name is the bundle's.

    Args:
        model: with ``small`` and, for a pair, ``large``.
        untrained: whether the weights are random; the bundle is then called so wherever it is shown.
        source: where the weights come from.
        configuration: the file the sizes were read from.
        training_speakers: whom the weights were trained on.
        note: Markdown for the model card.
        half_speaker: whether the speaker layers, most of a TSE network, are stored as float16.

    Raises:
        InputError: the directory exists already or cannot be written, or its name is no bundle name.
        Failure: the graph does not compute what the network does.
    """
    parts: tuple[Part, ...] = ("small",) if config.large is None else ("small", "large")
    with atomic_directory(directory) as temporary:
        digests: dict[Part, str] = {}
        for part in parts:
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
            raise InputError(f"{directory}: cannot name a bundle ({reason(error)})") from None
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
    for part, size in (("small", model.small), ("large", model.large)):
        if size is not None:
            attention = "yes" if size.self_attention else "no"
            lines.append(f"| {part} | {size.channels} | {size.hidden} | {size.blocks} | {size.heads} | {attention} |")
    lines.append("")
    if model.boosting is not None:
        milliseconds = 1000 * model.delay * framing.chunk_seconds
        lines += [
            f"Hints may be {model.delay} frames ({milliseconds:g} ms) late; each has {model.hint_channels} x "
            f"{framing.bins} values (compression {model.boosting.compression}).",
            "",
        ]
    if note:
        lines += [note.strip(), ""]
    lines += [f"Weights: {manifest.provenance.source}. Bundle id: `{manifest.id}`.", ""]
    return "\n".join(lines)


_MEASURED = "\n## Measured\n"


def record_quality(directory: Path, quality: Mapping[str, float], table: str) -> None:
    """Put measured figures into a bundle's manifest, and a table of them at the end of its card, for any there were.

    Args:
        quality: figures by name.
        table: in Markdown.

    Raises:
        InputError: the bundle cannot be read or written.
    """
    manifest = read_manifest(directory).model_copy(update={"quality": dict(quality)})
    card = directory / "README.md"
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {manifest.name}\n"
    except (OSError, ValueError) as error:
        raise InputError(f"{card}: not readable ({reason(error)})") from None
    with atomic_file(directory / MANIFEST_FILE) as temporary:
        temporary.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    with atomic_file(card) as temporary:
        temporary.write_text(f"{text.partition(_MEASURED)[0]}{_MEASURED}\n{table}\n", encoding="utf-8")
