"""The additional loss of target speech extraction, with which a network keeps both speakers apart."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import MODEL, ModelConfig
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.pair import SmallModel
from knowledge_boosting.training.config import read_training_config
from knowledge_boosting.training.data.loading import Batch
from knowledge_boosting.training.evaluation.si_sdr import permuted_si_sdr
from knowledge_boosting.training.learning.module import TrainingModule
from knowledge_boosting.training.learning.separation import Separation
from knowledge_boosting.training.weights import warm_start

LENGTH = 3000


def config_of(task: str, *, running_level: bool) -> ModelConfig:
    size = {"channels": 6, "hidden": 5, "blocks": 3}
    return MODEL.validate_python({"task": task, "running_level": running_level, "small": size})


def run(model: torch.nn.Module, mixture: Tensor, speaker: Tensor | None = None) -> Tensor:
    small = model.get_submodule("small")
    assert isinstance(small, SmallModel)
    samples = pad_to_frames(mixture, small.config.framing)
    estimate: Tensor = small(samples, small.initial_state(len(mixture), speaker))[0]
    return estimate[..., :LENGTH]


@pytest.mark.parametrize("running_level", [False, True])
def test_it_starts_with_the_quality_of_the_network_that_separates(running_level: bool, tmp_path: Path) -> None:
    """With a speaker embedding of zeros, the speaker layers have no effect at first."""
    torch.manual_seed(0)
    separating = build(config_of("ss", running_level=running_level))
    torch.save(separating.state_dict(), tmp_path / "ss.pt")
    config = config_of("tse", running_level=running_level)
    extracting = build(config)
    warm_start(extracting, tmp_path / "ss.pt", config)
    small = extracting.get_submodule("small")
    assert isinstance(small, SmallModel)
    separation = Separation(small)
    separation.start_from(tmp_path / "ss.pt")

    sources = torch.randn(2, 2, 2, LENGTH) * torch.linspace(0.1, 1, LENGTH)
    mixture = sources.sum(1)
    expected = -permuted_si_sdr(run(separating, mixture), sources, "joint").mean()
    for target in (0, 1):  # which of the speakers is the target does not matter, nor do earlier runs
        run(extracting, mixture, torch.zeros(2, 256))
        loss = separation.loss(sources[:, [target]], mixture)
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-3)


def test_it_trains_the_network_through_its_own_layer() -> None:
    extracting = build(config_of("tse", running_level=True))
    small = extracting.get_submodule("small")
    assert isinstance(small, SmallModel)
    separation = Separation(small)
    mixture = torch.randn(1, 2, LENGTH)
    run(extracting, mixture, torch.randn(1, 256))
    separation.loss(torch.randn(1, 1, 2, LENGTH), mixture).backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in separation.parameters())
    assert small.network.input_conv.conv.weight.grad is not None
    assert small.network.output_conv.conv.weight.grad is None


def test_a_checkpoint_of_another_size_changes_nothing(tmp_path: Path) -> None:
    extracting = build(config_of("tse", running_level=False))
    small = extracting.get_submodule("small")
    assert isinstance(small, SmallModel)
    torch.save(extracting.state_dict(), tmp_path / "tse.pt")
    separation = Separation(small)
    before = separation.output_conv.conv.weight.clone()
    separation.start_from(tmp_path / "tse.pt")
    assert torch.equal(separation.output_conv.conv.weight, before)
    with pytest.raises(InputError, match=r"none\.pt: no such file"):
        separation.start_from(tmp_path / "none.pt")


def module_of(folder: Path, **changes: object) -> TrainingModule:
    """Return the module of a small network that extracts a speaker."""
    document = json.loads((Path(__file__).parents[2] / "configs/baselines/SM-TSE-25.json").read_text())
    document |= {"model": {"task": "tse", "network": {"channels": 6, "hidden": 5, "blocks": 3}}, **changes}
    (folder / "config.json").write_text(json.dumps(document))
    return TrainingModule(read_training_config(folder / "config.json"))


def test_a_run_continues_the_layer_of_the_run_before(tmp_path: Path) -> None:
    first = module_of(tmp_path, separation=1.0)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "last.ckpt")
    second = module_of(tmp_path, separation=1.0, initial_checkpoint=str(tmp_path / "last.ckpt"))
    assert first.separation is not None
    assert second.separation is not None
    assert torch.equal(first.separation.output_conv.conv.weight, second.separation.output_conv.conv.weight)
    torch.nn.init.constant_(first.separation.output_conv.conv.weight, torch.nan)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "damaged.ckpt")
    with pytest.raises(InputError, match=r"damaged\.ckpt: .*weight has values that are not finite"):
        module_of(tmp_path, separation=1.0, initial_checkpoint=str(tmp_path / "damaged.ckpt"))
    # A run without this loss can start from the same checkpoint.
    assert module_of(tmp_path, initial_checkpoint=str(tmp_path / "last.ckpt")).separation is None


def test_a_run_continues_its_guidance_but_not_that_of_another_model(tmp_path: Path) -> None:
    first = module_of(tmp_path, guidance=1.0)
    torch.save({"state_dict": first.state_dict()}, tmp_path / "last.ckpt")
    assert first.guidance is not None
    for change, continues in (("initial_checkpoint", True), ("warm_start", False)):
        second = module_of(tmp_path, guidance=1.0, **{change: str(tmp_path / "last.ckpt")})
        assert second.guidance is not None
        pairs = zip(first.guidance.parameters(), second.guidance.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs) == continues


def test_all_losses_are_added_by_their_weights(tmp_path: Path) -> None:
    weights = {"separation": 0.5, "guidance": 7.0}
    module = module_of(tmp_path, **weights).train()
    logged: dict[str, Tensor] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    sources = torch.randn(2, 1, 2, LENGTH)
    mixture = sources.sum(0).expand(2, 2, LENGTH)
    batch: Batch = {
        "names": ["a", "b"],
        "mixture": mixture,
        "sources": sources,
        "speaker_embedding": torch.randn(2, 256),
    }
    loss = module.training_step(batch, 0)
    expected = logged["train/loss"] + sum(weight * logged[f"train/{name}"] for name, weight in weights.items())
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
