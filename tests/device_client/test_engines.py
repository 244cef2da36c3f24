"""Tests for the engines without torch against the published computation, and against torch at full size."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.device_client.engines.compiled_engine import CompiledModel
from knowledge_boosting.device_client.engines.engine import Engine, Model
from knowledge_boosting.device_client.engines.onnx_engine import OnnxModel
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.checkpoint import build, read_config
from knowledge_boosting.models.config import Alone, Framing, Pair
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.manifest import bundle_id, file_digest
from knowledge_boosting.models.networks import write_bundle
from knowledge_boosting.models.pair import SmallModel
from tests.golden_cases import NAMES, TOLERANCE, Golden, worst

CONFIGS = Path(__file__).parent.parent.parent / "configs"
Samples = NDArray[np.float32]


def run(engine: Engine, mixture: Samples, hints: list[Samples | None], framing: Framing, delay: int) -> Samples:
    """Return the estimate ``[S, M, N]`` of a padded mixture ``[M, N]``, with one hint or None for each frame."""
    starts = [framing.chunk * frame for frame in range(len(hints))]
    windows = [np.ascontiguousarray(mixture[:, start : start + framing.n_fft]) for start in starts]
    given = [[] if hint is None else [Hint(delay, hint)] for hint in hints]
    return np.concatenate([engine.step(window, used) for window, used in zip(windows, given, strict=True)], axis=-1)


ENGINES = pytest.mark.parametrize("engine", [OnnxModel, CompiledModel])


@ENGINES
@pytest.mark.parametrize("name", NAMES)
def test_the_output_is_that_of_the_published_computation(
    name: str, engine: Callable[[Bundle], Model], golden: Callable[[str], Golden], golden_bundle: Callable[[str], Path]
) -> None:
    case, model = golden(name), engine(Bundle(golden_bundle(name)))
    framing = case.pair.config.framing
    mixture = pad_to_frames(case.mixture, framing).numpy()
    delay, length = case.pair.config.delay, case.mixture.shape[-1]
    for item in range(len(mixture)):
        speaker = case.speaker_embedding[item].numpy() if case.speaker_embedding is not None else None
        encoded = list(case.hint[item].numpy())
        late = [None] * delay + encoded[: len(encoded) - delay]
        boosted = run(model.session(speaker), mixture[item], late, framing, delay)
        assert worst(boosted[..., :length], case.small_output[item]) < TOLERANCE
        alone = run(model.session(speaker), mixture[item], [None] * len(encoded), framing, delay)
        assert worst(alone[..., :length], case.small_output_without_hints[item]) < TOLERANCE


@ENGINES
@pytest.mark.parametrize(
    "name",
    [
        *("TSE_joint/B6-TSE", "SS_joint/B6-SS", "SS_joint/B0-SS", "baselines/SM-BS-25"),
        *(pytest.param(f"baselines/{name}", marks=pytest.mark.long) for name in ("BM-BS-500", "BM-TSE-500")),
    ],
)
def test_ten_seconds_at_full_size_equal_torch(name: str, engine: Callable[[Bundle], Model], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = read_config(CONFIGS / f"{name}.json")
    # The large network does not run in this test, and a tiny one is written faster.
    if isinstance(config, Pair):
        config = config.model_copy(update={"large": config.small})
    network = build(config).eval().requires_grad_(False)
    for weight in network.parameters():
        weight.add_(0.05 * torch.randn_like(weight))  # so that initially equal parameters differ too
    write_bundle(tmp_path / "b", network, config, untrained=True, source="random", configuration=name)
    small, model = network.get_submodule("small"), engine(Bundle(tmp_path / "b"))
    assert isinstance(small, SmallModel)

    rng = np.random.default_rng(0)
    frames = 1250
    mixture = rng.normal(0, 0.1, (2, 128 * frames + 64)).astype(np.float32)
    speaker = rng.normal(0, 1 / 16, 256).astype(np.float32) if config.task == "tse" else None
    values = np.zeros((frames, config.hint_channels, 97), np.float32)
    states = [1.0] if isinstance(config, Alone) else [1.0, 0.0, 0.5]
    for share in states:
        present = rng.random(frames) < share
        values[:] = rng.normal(0, 1, values.shape) * present[:, None, None]
        received = [hint if on else None for hint, on in zip(values, present, strict=True)]
        output = run(model.session(speaker), mixture, received, config.framing, config.delay)
        with torch.inference_mode():
            state = small.initial_state(1, torch.from_numpy(speaker)[None] if speaker is not None else None)
            hints = torch.from_numpy(values)[None] if isinstance(config, Pair) else None
            expected = small(torch.from_numpy(mixture)[None], state, hints)[0][0]
        assert worst(output, expected) < TOLERANCE * max(1.0, float(expected.abs().max()))


@ENGINES
def test_sessions_of_one_model_do_not_affect_each_other(
    engine: Callable[[Bundle], Model], golden: Callable[[str], Golden], golden_bundle: Callable[[str], Path]
) -> None:
    model = engine(Bundle(golden_bundle("ss_delay1_compression4")))
    framing = model.manifest.model.framing
    chunk, n_fft = framing.chunk, framing.n_fft
    mixture = pad_to_frames(golden("ss_delay1_compression4").mixture, framing).numpy()[0]
    undisturbed = run(model.session(None), mixture, [None] * 60, framing, model.manifest.model.delay)
    one, other = model.session(None), model.session(None)
    for start in range(0, 60 * chunk, chunk):
        window = np.ascontiguousarray(mixture[:, start : start + n_fft])
        np.testing.assert_array_equal(one.step(window), undisturbed[..., start : start + chunk])
        other.step(np.full_like(window, np.nan))


@ENGINES
def test_a_later_step_does_not_overwrite_an_estimate(
    engine: Callable[[Bundle], Model], golden_bundle: Callable[[str], Path]
) -> None:
    model = engine(Bundle(golden_bundle("ss_delay1_compression4")))
    session = model.session(None)
    window = np.ones((2, model.manifest.model.framing.n_fft), np.float32)
    first = session.step(window)
    kept = first.copy()
    session.step(2 * window)
    np.testing.assert_array_equal(first, kept)


@pytest.fixture
def copied(golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    source, copy = golden_bundle("ss_delay1_compression4"), tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_weights_of_another_network_are_refused(copied: Path) -> None:
    weights = load_file(copied / "small.safetensors")
    weights["network.output_conv.conv.weight"] = weights["network.output_conv.conv.weight"][:2].copy()
    save_file(weights, copied / "small.safetensors")
    manifest = json.loads((copied / "bundle.json").read_text())
    manifest["digests"]["small"] = file_digest(copied / "small.safetensors")
    manifest["id"] = bundle_id(Bundle(copied).model, manifest["digests"])
    (copied / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"small\.safetensors: .*output_conv.* export the bundle again"):
        CompiledModel(Bundle(copied))


def test_a_changed_graph_is_refused(copied: Path) -> None:
    graph = copied / "small.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"small\.onnx: digest differs"):
        OnnxModel(Bundle(copied))


def test_the_error_for_a_bundle_without_a_graph_says_how_to_create_one(copied: Path) -> None:
    (copied / "small.onnx").unlink()
    with pytest.raises(InputError, match="kb-export"):
        OnnxModel(Bundle(copied))


def test_the_error_for_an_old_bundle_without_a_graph_says_how_to_create_one(copied: Path) -> None:
    manifest = json.loads((copied / "bundle.json").read_text())
    del manifest["graph_digest"]
    (copied / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="kb-export"):
        OnnxModel(Bundle(copied))
