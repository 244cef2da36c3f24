"""Graphs of networks with self-attention equal torch, for more frames than the window of attention."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.device_client.engines.onnx_engine import OnnxModel
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import Alone, FixedDelay, ModelConfig, NetworkSize, Pair
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.manifest import GRAPH_FILE, MANIFEST_FILE, file_digest
from knowledge_boosting.models.networks import write_bundle
from knowledge_boosting.models.onnx_graph import check_graph, frame_graph
from knowledge_boosting.models.onnx_stream import OnnxStream, load_graph
from knowledge_boosting.models.pair import SmallModel
from tests.golden_cases import FOLDER, TOLERANCE, Golden, worst
from tests.processes import call_here

Samples = NDArray[np.float32]
TINY = NetworkSize(channels=8, hidden=4, blocks=2, heads=2, self_attention=True, window=7)
FRAMES = 30


def one_network(config: ModelConfig) -> SmallModel:
    """Build a network with random affine parts and slopes, which are initialised to constants otherwise."""
    torch.manual_seed(0)
    network = build(config).get_submodule("small").eval().requires_grad_(False)
    assert isinstance(network, SmallModel)
    for weight in network.parameters():
        weight.add_(0.2 * torch.randn_like(weight))
    return network


def noise(config: ModelConfig, frames: int = FRAMES) -> Samples:
    framing, rng = config.framing, np.random.default_rng(0)
    return rng.normal(0, 0.1, (config.microphones, framing.chunk * frames + framing.lookahead)).astype(np.float32)


def windows(mixture: Samples, config: ModelConfig) -> list[Samples]:
    framing = config.framing
    starts = range(0, mixture.shape[1] - framing.lookahead, framing.chunk)
    return [np.ascontiguousarray(mixture[:, start : start + framing.n_fft]) for start in starts]


def speaker_inputs(network: SmallModel, speaker: torch.Tensor | None) -> dict[str, Samples]:
    if speaker is None:
        return {}
    modulations = network.initial_state(1, speaker).network.speaker
    return {
        f"speaker_{part}_{index}": getattr(modulation, part)[0, 0].numpy()
        for index, modulation in enumerate(modulations)
        for part in ("weight", "bias")
    }


@pytest.mark.parametrize("boosting", [None, FixedDelay(delay=2)], ids=["alone", "with fusion"])
@pytest.mark.parametrize("running_level", [False, True])
@pytest.mark.parametrize("task", ["ss", "tse"])
@torch.inference_mode()
def test_self_attention_over_more_frames_than_its_window(
    task: Literal["ss", "tse"], running_level: bool, boosting: FixedDelay | None
) -> None:
    config: ModelConfig = Alone(task=task, network=TINY, running_level=running_level)
    if boosting is not None:
        config = Pair(task=task, small=TINY, large=TINY, boosting=boosting, running_level=running_level)
    network, mixture = one_network(config), noise(config)
    speaker = torch.randn(1, 256) / 16 if config.needs_speaker else None
    hints = np.random.default_rng(1).normal(0, 1, (FRAMES, config.hint_channels, 97)).astype(np.float32)
    given = torch.from_numpy(hints)[None] if boosting is not None else None
    expected = network(torch.from_numpy(mixture)[None], network.initial_state(1, speaker), given)[0][0]

    stream = OnnxStream(load_graph(frame_graph(network)), config, speaker_inputs(network, speaker))
    # The second run follows a reset, which must clear the rings.
    for _ in range(2):
        used = [[Hint(config.delay, hint)] for hint in hints]
        estimates = [stream.step(window, each) for window, each in zip(windows(mixture, config), used, strict=True)]
        assert worst(np.concatenate(estimates, axis=-1), expected) < TOLERANCE * float(expected.abs().max())
        stream.reset()


@pytest.mark.parametrize("case_name", ["ss_delay1_compression4", "tse_delay6"])
def test_a_large_network_alone_gives_what_the_published_computation_gives(
    case_name: str, golden: Callable[[str], Golden], tmp_path: Path
) -> None:
    """The bundle is made from the published configuration and checkpoint, if the case has one."""
    case = golden(case_name)
    checkpoint, config, bundle = FOLDER / case_name / "large.pt", tmp_path / "alone.json", tmp_path / "large-alone"
    published = json.loads((FOLDER / case_name / "config.json").read_text())
    config.write_text(json.dumps({"task": published["task"], "model_params": published["big_model_params"]}))
    if checkpoint.exists():
        assert call_here("kb-export", "--config", config, "--checkpoint", checkpoint, "-o", bundle) == 0
    else:
        model = case.pair.config.large_alone()
        network = build(model).eval()
        network.get_submodule("small.network").load_state_dict(case.pair.large.network.state_dict())
        write_bundle(bundle, network, model, untrained=False, source="parity vectors", configuration="config.json")
    onnx = OnnxModel(Bundle(bundle))
    framing, length = onnx.manifest.model.framing, case.mixture.shape[-1]
    for item, mixture in enumerate(pad_to_frames(case.mixture, framing).numpy()):
        engine = onnx.session(None if case.speaker_embedding is None else case.speaker_embedding[item].numpy())
        frames = windows(mixture, onnx.manifest.model)
        assert len(frames) > onnx.manifest.model.on_device.window
        estimate = np.concatenate([engine.step(window) for window in frames], axis=-1)
        assert worst(estimate[..., :length], case.large_output[item]) < TOLERANCE


def test_a_graph_that_lacks_the_network_s_self_attention_is_refused(tmp_path: Path) -> None:
    config, bundle = Alone(task="ss", network=TINY), tmp_path / "bundle"
    write_bundle(bundle, build(config), config, untrained=True, source="random", configuration="none")
    plain = config.model_copy(update={"network": TINY.model_copy(update={"self_attention": False})})
    (bundle / GRAPH_FILE).write_bytes(frame_graph(one_network(plain)))
    manifest = json.loads((bundle / MANIFEST_FILE).read_text())
    manifest["graph_digest"] = file_digest(bundle / GRAPH_FILE)
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match=r"not the graph of this bundle's network \(.*self_keys_0.*export the bundle again"
    ):
        OnnxModel(Bundle(bundle))


def test_rings_that_are_too_large_for_a_device_are_refused() -> None:
    size = NetworkSize(channels=4, hidden=1, blocks=1, heads=4, self_attention=True, window=10_000)
    network = one_network(Alone(task="ss", network=size))
    with pytest.raises(InputError, match=r"too large to run on a device: self_keys_0 has .* shorter window"):
        check_graph(frame_graph(network), network)
