"""Initial weights from a related model, of the other task or without hints."""

import json
from pathlib import Path

import pytest
import torch

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.checkpoint import apply_output_gains, build
from knowledge_boosting.models.config import MODEL
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.pair import BoostedPair, SmallModel
from knowledge_boosting.training.evaluation.systems import load_models
from knowledge_boosting.training.weights import average_with, warm_start

ROOT = Path(__file__).parents[2]
SIZE = {"channels": 6, "hidden": 5, "blocks": 3}
SS = MODEL.validate_python({"task": "ss", "small": SIZE})
TSE = MODEL.validate_python({"task": "tse", "small": SIZE})
PAIR = MODEL.validate_python({"task": "ss", "small": {**SIZE, "heads": 3}, "large": SIZE, "boosting": {"delay": 1}})


@pytest.fixture
def separation(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(build(SS).state_dict(), tmp_path / "ss.pt")
    return tmp_path / "ss.pt"


def small_of(model: torch.nn.Module) -> SmallModel:
    small = model.get_submodule("small")
    assert isinstance(small, SmallModel)
    return small.eval()


def test_extraction_starts_as_the_mean_of_the_separated_voices(separation: Path) -> None:
    """With a speaker embedding of zeros, the speaker layers have no effect at first."""
    separating, extracting = build(SS), build(TSE)
    separating.load_state_dict(torch.load(separation, weights_only=True))
    left = warm_start(extracting, separation, TSE)
    assert left == [f"small.network.speaker.{index}.{name}" for index in (0, 1) for name in ("bias", "weight")]
    samples = pad_to_frames(torch.randn(1, 2, 1000), SS.framing)
    with torch.inference_mode():
        both, _ = small_of(separating)(samples, small_of(separating).initial_state(1))
        one, _ = small_of(extracting)(samples, small_of(extracting).initial_state(1, torch.zeros(1, 256)))
    assert one.shape == (1, 1, 2, 1024)
    torch.testing.assert_close(one[:, 0], both.mean(1), rtol=0, atol=1e-5)


def test_a_pair_starts_with_the_small_network_that_was_trained_alone(separation: Path) -> None:
    pair = build(PAIR)
    assert isinstance(pair, BoostedPair)
    before = {name: value.clone() for name, value in pair.large.state_dict().items()}
    left = warm_start(pair, separation, PAIR)
    alone = torch.load(separation, weights_only=True)
    taken = {f"small.{name}": value for name, value in pair.small.state_dict().items()}
    assert set(left) == set(pair.state_dict()) - set(alone)
    assert all(torch.equal(taken[name], value) for name, value in alone.items())
    assert all(torch.equal(value, pair.large.state_dict()[name]) for name, value in before.items())


def test_weights_of_another_size_are_refused(separation: Path, tmp_path: Path) -> None:
    other = MODEL.validate_python({"task": "ss", "small": {"channels": 7, "hidden": 9, "blocks": 1}})
    torch.save({"state_dict": {"model.nothing": torch.ones(1)}}, tmp_path / "none.ckpt")
    with pytest.raises(InputError, match=r"none\.ckpt: has no tensor that fits"):
        warm_start(build(other), tmp_path / "none.ckpt", other)
    state = torch.load(separation, weights_only=True)
    state["small.network.input_norm.weight"][0] = torch.nan
    torch.save(state, separation)
    with pytest.raises(InputError, match=r"input_norm\.weight has values that are not finite"):
        warm_start(build(SS), separation, SS)


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.float64])
def test_a_pair_can_start_at_the_mean_with_the_network_trained_alone(separation: Path, precision: torch.dtype) -> None:
    alone = {name: value.to(precision) for name, value in torch.load(separation, weights_only=True).items()}
    torch.save(alone, separation)
    pair = build(PAIR)
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    average_with(pair, separation)
    for name, value in pair.state_dict().items():
        expected = (before[name] + alone[name].float()) / 2 if name in alone else before[name]
        torch.testing.assert_close(value, expected.float(), rtol=0, atol=1e-6)
    assert any(not torch.equal(pair.state_dict()[name], alone[name]) for name in alone)


def test_only_weights_that_fit_are_averaged(separation: Path, tmp_path: Path) -> None:
    torch.save(build(PAIR).state_dict(), tmp_path / "pair.pt")
    with pytest.raises(InputError, match=r"pair\.pt: tensor \S*fusion\S* has no place"):
        average_with(build(SS), tmp_path / "pair.pt")
    other = MODEL.validate_python({"task": "ss", "small": {**SIZE, "channels": 7}})
    with pytest.raises(InputError, match=r"ss\.pt: tensor \S+ has shape \[.*\], expected \["):
        average_with(build(other), separation)


def test_a_run_is_evaluated_at_the_level_of_the_sources(separation: Path, tmp_path: Path) -> None:
    """As the bundle is that it becomes. The level and sign of a trained network are arbitrary."""
    gains, weights = [2.0, 0.5, -3.0, 1.0], torch.load(separation, weights_only=True)
    run = tmp_path / "run"
    run.mkdir()
    torch.save({"state_dict": weights, "output_gain": {"small": gains}}, run / "last.ckpt")
    config = json.loads((ROOT / "configs/baselines/SM-BS-25.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"model": {"task": "ss", "network": SIZE}}))
    (evaluated,) = load_models([str(run)])
    trained = build(SS)
    trained.load_state_dict(weights)
    samples = pad_to_frames(torch.randn(1, 2, 1000), SS.framing)
    with torch.inference_mode():
        before, _ = small_of(trained)(samples, small_of(trained).initial_state(1))
        after, _ = evaluated.small.eval()(samples, evaluated.small.initial_state(1))
    torch.testing.assert_close(after, before * torch.tensor(gains).view(1, 2, 2, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "gains", ["loud", {"small": "x"}, {"small": [1.0]}, {"small": [0.0] * 4}, {"nobody": [1.0] * 4}]
)
def test_damaged_output_gains_are_refused(gains: object, separation: Path) -> None:
    torch.save({"state_dict": torch.load(separation, weights_only=True), "output_gain": gains}, separation)
    with pytest.raises(InputError, match=r"ss\.pt: its output gains are damaged"):
        apply_output_gains(build(SS), separation)


def test_a_frozen_large_network_computes_the_same() -> None:
    torch.manual_seed(0)
    pair = build(PAIR)
    assert isinstance(pair, BoostedPair)
    mixture = torch.randn(1, 2, 1500)
    free = pair(mixture)
    pair.large.network.requires_grad_(False)
    frozen = pair(mixture)
    assert free.embedding.requires_grad
    assert not frozen.embedding.requires_grad
    torch.testing.assert_close(frozen.small, free.small, rtol=0, atol=1e-5)
    frozen.small.square().sum().backward()
    # The hint encoder is still trained.
    assert pair.large.encoder.conv.weight.grad is not None
    assert all(weight.grad is None for weight in pair.large.network.parameters())
