"""Malformed and malicious files are refused with one line, before they can cost memory or run code."""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper
from torch import nn

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.device_client.engines.onnx_engine import OnnxModel
from knowledge_boosting.device_client.speakers import read_embedding
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import build, read_checkpoint, read_config
from knowledge_boosting.models.config import MODEL, Alone, NetworkSize
from knowledge_boosting.models.manifest import bundle_id, file_digest, read_manifest
from knowledge_boosting.models.networks import load_large
from knowledge_boosting.remote_server.core.access import Access
from knowledge_boosting.training.data.responses import check_sofa

SS = "ss_delay6_compression2"
CONFIG = Alone(task="ss", network=NetworkSize(channels=4, hidden=4))
SOFA = next((Path(__file__).parents[2] / "samples" / "hrtf").glob("*.sofa"))
DOCUMENT: dict[str, Any] = {"task": "tse", "network": {"channels": 16, "hidden": 16}}


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"network": {"channels": 10**9, "hidden": 16}},
            "network.channels: Input should be less than or equal to 4096",
        ),
        ({"network": {"channels": 16, "hidden": 10**9}}, "network.hidden: "),
        ({"network": {"channels": 16, "hidden": 16, "blocks": 10**9}}, "network.blocks: "),
        ({"network": {"channels": 16, "hidden": 16, "window": 10**9}}, "network.window: "),
        ({"framing": {"chunk": 10**9, "lookahead": 10**9}}, "framing.chunk: "),
        ({"microphones": 10**9}, "microphones: "),
        ({"network": {"channels": 4096, "hidden": 4096, "blocks": 64}}, "network would have about 5e+10 values"),
        (
            {"network": {"channels": 4, "hidden": 1, "blocks": 8, "self_attention": True, "window": 10_000}},
            "network would have about 5e+08 values",
        ),
        (
            {"network": {"channels": 1024, "hidden": 8}, "framing": {"chunk": 2048, "lookahead": 2048}},
            "network would have",
        ),
    ],
)
def test_excessive_sizes_are_refused_before_memory_is_allocated(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps(DOCUMENT))
    read_config(path)
    path.write_text(json.dumps(DOCUMENT | changes))
    assert why in refused(lambda: read_config(path))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ('{"model": ' + "[" * 900 + "]" * 900 + "}", ""),
        ('"' + "x" * 5_000_000 + '"', "is larger than the 4 MiB"),
        ('{"task": "\\ud800", "small": {}}', ""),
        ("1" * 10_000, "not readable as JSON"),
    ],
)
def test_malformed_json_is_refused(content: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    path.write_text(content)
    assert why in refused(lambda: read_config(path))
    assert why in refused(lambda: read_manifest(tmp_path))


@pytest.mark.parametrize("content", ["a = " + "[" * 100_000, "#" * 300_000])
def test_malformed_toml_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(content)
    path.chmod(0o600)
    assert str(path) in refused(lambda: Access(path))


def changed(state: dict[str, Any], value: Any) -> dict[str, Any]:
    name = next(iter(state))
    return state | {name: value(state[name])}


CHECKPOINTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "other keys": (lambda state: state | {1: torch.zeros(1)}, "holds no state dict"),
    "sparse": (lambda state: changed(state, lambda t: t.to_sparse()), "is no plain tensor"),
    "without values": (lambda state: changed(state, lambda t: t.to("meta")), "is no plain tensor"),
    "quantised": (
        lambda state: changed(state, lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        "is no plain tensor",
    ),
    "of eight bits": (lambda state: changed(state, lambda t: t.to(torch.float8_e4m3fn)), "is of float8_e4m3fn"),
    "whole numbers": (lambda state: changed(state, lambda t: t.to(torch.int32)), "is of int32"),
    "truths": (lambda state: changed(state, lambda t: t.bool()), "is of bool"),
    "complex": (lambda state: changed(state, lambda t: t.to(torch.complex64)), "is of complex64"),
    "one value for many": (lambda state: state | {"x": torch.zeros(1).expand(10**10)}, "is no plain tensor"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_with_unusual_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    spoil, why = CHECKPOINTS[kind]
    path, state = tmp_path / "run.ckpt", dict(build(CONFIG).state_dict())
    torch.save(state, path)
    assert isinstance(read_checkpoint(path, CONFIG), nn.Module)
    torch.save(spoil(state), path)
    assert why in refused(lambda: read_checkpoint(path, CONFIG))


def test_a_compressed_checkpoint_is_not_opened(tmp_path: Path) -> None:
    path, packed = tmp_path / "run.pt", tmp_path / "packed.pt"
    torch.save(build(CONFIG).state_dict(), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert "it is compressed" in refused(lambda: read_checkpoint(packed, CONFIG))


def with_matching_digests(bundle: Path) -> Path:
    """Update the digests in the manifest of a bundle, so that its changed files match them."""
    manifest = bundle / "bundle.json"
    document = json.loads(manifest.read_text())
    document["digests"] = {part: file_digest(bundle / f"{part}.safetensors") for part in document["digests"]}
    document["graph_digest"] = file_digest(bundle / "small.onnx")
    document["id"] = bundle_id(MODEL.validate_python(document["model"]), document["digests"])
    manifest.write_text(json.dumps(document))
    return bundle


@pytest.fixture
def bundle(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bundle that a test can change."""
    return Path(shutil.copytree(golden_bundle(SS), tmp_path / "bundle"))


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.complex64])
def test_weights_are_no_integers_nor_complex(kind: torch.dtype, bundle: Path) -> None:
    path = bundle / "large.safetensors"
    state = {name: value.to(kind) for name, value in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(state, path)
    assert f"is of {str(kind).removeprefix('torch.')}" in refused(
        lambda: load_large(Bundle(with_matching_digests(bundle)))
    )


def dynamic_shape(graph: onnx.ModelProto) -> None:
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"


def excessive_input(graph: onnx.ModelProto) -> None:
    graph.graph.input.append(helper.make_tensor_value_info("new", TensorProto.FLOAT, [2**20, 2**20]))


def other_graph(graph: onnx.ModelProto) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("a", "b")]
    made = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "other", value[:1], value[1:])
    graph.graph.CopyFrom(made)


def failing_node(graph: onnx.ModelProto) -> None:
    """Add a node with an index that does not exist, which is found only when the graph runs."""
    nodes = graph.graph.node
    index = helper.make_tensor("far", TensorProto.INT64, [1], [10**6])
    graph.graph.initializer.append(index)
    first = graph.graph.input[0].name
    nodes.insert(0, helper.make_node("Gather", [first, "far"], ["taken"]))
    graph.graph.output.append(helper.make_tensor_value_info("taken", TensorProto.FLOAT, None))


@pytest.mark.parametrize("spoil", [dynamic_shape, excessive_input, other_graph, failing_node])
def test_graphs_that_do_not_fit_the_bundle_are_refused(spoil: Callable[[onnx.ModelProto], None], bundle: Path) -> None:
    path = bundle / "small.onnx"
    graph = onnx.load(path)
    spoil(graph)
    path.write_bytes(graph.SerializeToString())
    line = refused(lambda: OnnxModel(Bundle(with_matching_digests(bundle))))
    assert "small.onnx: not " in line


def test_embeddings_are_read_by_what_their_header_says(tmp_path: Path) -> None:
    path = tmp_path / "voice.npy"
    voice = np.full(256, 1 / 16, np.float64)
    np.save(path, voice)
    np.testing.assert_array_equal(read_embedding(path), voice.astype(np.float32))
    good = path.read_bytes()
    huge = good.replace(b"(256,), }       ", b"(25600000000,),}")
    assert len(huge) == len(good)
    assert huge != good
    for content in (b"", good[:40], good[:200], huge, good.replace(b"(256,)", b"((((((")):
        path.write_bytes(content)
        assert str(path) in refused(lambda: read_embedding(path))
    for array in (np.zeros(256, "c8"), np.zeros(256, [("a", "f4")]), np.zeros(256, "U4"), np.full(256, 1e300)):
        np.save(path, array)
        assert str(path) in refused(lambda: read_embedding(path))
    np.savez(tmp_path / "voices.npz", voice)
    (tmp_path / "voices.npz").replace(path)
    assert str(path) in refused(lambda: read_embedding(path))


def test_a_damaged_sofa_file_is_refused_or_read(tmp_path: Path) -> None:
    path, content = tmp_path / "head.sofa", SOFA.read_bytes()
    for at in (10, 100, 1000, 5000, len(content) // 2):
        path.write_bytes(content[:at] + b"\xff" * 100 + content[at + 100 :])
        try:
            check_sofa(path)
        except InputError as error:
            assert str(path) in str(error)
