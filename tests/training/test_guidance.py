"""Guidance: ideal hints and the additional loss equal closed forms."""

import math

import pytest
import torch
from torch import Tensor

from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import MODEL
from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.pair import BoostedPair, SmallModel
from knowledge_boosting.training.learning.guidance import Guidance, ideal_embedding, in_order_of, source_spectra

SIZE = {"channels": 4, "hidden": 4, "blocks": 3}
COMPILED = {"channels": 16, "hidden": 16, "blocks": 3}  # sizes that the C++ library supports


def pair_of(task: str, size: dict[str, int] = SIZE) -> BoostedPair:
    torch.manual_seed(0)
    pair = build(MODEL.validate_python({"task": task, "small": size, "large": size, "boosting": {"delay": 2}}))
    assert isinstance(pair, BoostedPair)
    return pair


def voices(batch: int, count: int) -> Tensor:
    """Return noise ``[B, S, 2, 2000]``. The last source is stronger at the left ear, the others at the right."""
    noise = torch.randn(batch, count, 2, 2000, generator=torch.Generator().manual_seed(1))
    noise[:, -1, 0] *= 2
    noise[:, :-1, 1] *= 2
    return noise


def test_ideal_hints_are_made_of_the_sources_the_left_one_first() -> None:
    """As the spectral estimate of a large network, they give the sources except for a gain."""
    pair, sources = pair_of("ss"), voices(3, 2)
    estimate = pair.large.estimate(ideal_embedding(source_spectra(pair.large.stft, sources)))[..., :2000]
    # The first 64 samples lack the frame before.
    torch.testing.assert_close(estimate[..., 64:] / 4, sources.flip(1)[..., 64:], rtol=0, atol=1e-4)


def test_spectra_are_the_fourier_transforms_of_windowed_frames() -> None:
    sources = voices(1, 2)
    spectra = source_spectra(pair_of("ss").large.stft, sources)
    window = torch.hamming_window(192, periodic=True)
    frame = torch.fft.rfft(sources[..., 128 * 5 : 128 * 5 + 192] * window)
    torch.testing.assert_close(spectra[:, 5], frame.permute(0, 3, 1, 2), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [SIZE, COMPILED])
@pytest.mark.parametrize("task", ["ss", "tse"])
def test_the_loss_of_zero_heads_is_that_of_a_coin(task: str, size: dict[str, int]) -> None:
    pair = pair_of(task, size)
    guidance = Guidance(pair.small)
    for head in guidance.heads:
        torch.nn.init.zeros_(head.get_parameter("weight"))
        torch.nn.init.zeros_(head.get_parameter("bias"))
    sources = voices(2, 2)
    mixture = sources.sum(1)
    wanted = source_spectra(pair.large.stft, sources[:, : pair.config.sources])
    whole = source_spectra(pair.large.stft, mixture[:, None])[..., 0, :]
    for _ in range(2):  # features of an earlier run do not count
        guidance.reset()
        pair(mixture, torch.zeros(2, 256) if task == "tse" else None)
        loss = guidance.loss(wanted, whole, ordered=False)
        assert float(loss.detach()) == pytest.approx(2 * math.log(2), abs=1e-3)


def after_a_run(examples: int) -> tuple[Guidance, Tensor, Tensor]:
    """Return the guidance of a pair that has run, and the spectra of the sources and of their mixture."""
    pair = pair_of("ss")
    guidance = Guidance(pair.small)
    sources = voices(examples, 2)
    pair(sources.sum(1))
    mixture = source_spectra(pair.large.stft, sources.sum(1)[:, None])[..., 0, :]
    return guidance, source_spectra(pair.large.stft, sources), mixture


def test_the_large_network_may_choose_which_source_comes_first() -> None:
    guidance, spectra, whole = after_a_run(2)
    torch.testing.assert_close(
        guidance.loss(spectra, whole, ordered=False), guidance.loss(spectra.flip(3), whole, ordered=False)
    )
    half = torch.cat([spectra[:1], spectra[1:].flip(3)])  # each example has its own order
    torch.testing.assert_close(guidance.loss(half, whole, ordered=False), guidance.loss(spectra, whole, ordered=False))


def test_sources_are_put_in_the_order_of_an_estimate_of_them() -> None:
    """Each example has its own order. The estimates have errors, and each has another scale and phase."""
    spectra = source_spectra(pair_of("ss").large.stft, voices(4, 2))
    flipped = torch.tensor([False, True, True, False])
    expected = torch.where(flipped[:, None, None, None, None], spectra.flip(3), spectra)
    factors = torch.polar(torch.rand(4, 2) + 0.5, 6 * torch.rand(4, 2))[:, None, None, :, None]
    estimate = factors * (expected + 0.6 * expected.flip(3))
    found = in_order_of(torch.view_as_real(estimate).flatten(-3), spectra)
    assert torch.equal(found, expected)
    one = spectra[:, :, :, :1]
    assert torch.equal(in_order_of(torch.view_as_real(one).flatten(-3), one), one)


def test_in_the_order_of_the_hints_only_that_order_counts() -> None:
    guidance, spectra, whole = after_a_run(1)
    losses = [float(guidance.loss(each, whole, ordered=True).detach()) for each in (spectra, spectra.flip(3))]
    any_order = float(guidance.loss(spectra, whole, ordered=False).detach())
    assert abs(losses[0] - losses[1]) > 1e-4
    # Every fusion may choose its own order, so both together are at most as bad as one order for all.
    assert any_order <= min(losses) + 1e-6


@pytest.mark.parametrize("task", ["ss", "tse"])
def test_guidance_of_a_network_alone_trains_its_blocks_and_speaker_layers(task: str) -> None:
    torch.manual_seed(0)
    alone = SmallModel(MODEL.validate_python({"task": task, "small": SIZE}))
    guidance = Guidance(alone)
    sources = voices(2, 2)
    samples = pad_to_frames(sources.sum(1), alone.config.framing)

    def run() -> None:
        alone(samples, alone.initial_state(2, torch.randn(2, 256) if task == "tse" else None))

    alone.eval()
    run()  # features outside of training do not count
    alone.train()
    run()
    whole = source_spectra(alone.stft, sources.sum(1)[:, None])[..., 0, :]
    guidance.loss(source_spectra(alone.stft, sources[:, : alone.config.sources]), whole, ordered=False).backward()
    moved = {name for name, weight in alone.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {f"network.blocks.{index}.inter_linear.weight" for index in range(3)} <= moved
    assert {f"network.speaker.{index}.weight" for index in range(2 if task == "tse" else 0)} <= moved
    assert not any(name.startswith("network.output_conv") for name in moved)


def test_guidance_trains_the_layers_before_it_and_the_hint_encoder() -> None:
    pair = pair_of("ss")
    pair.large.network.requires_grad_(False)
    guidance = Guidance(pair.small)
    sources = voices(2, 2)
    pair(sources.sum(1))
    whole = source_spectra(pair.large.stft, sources.sum(1)[:, None])[..., 0, :]
    guidance.loss(source_spectra(pair.large.stft, sources), whole, ordered=True).backward()
    small = pair.small.network
    moved = {
        name for name, weight in pair.named_parameters() if weight.grad is not None and weight.grad.abs().max() > 0
    }
    assert "large.encoder.conv.weight" in moved
    for index in range(len(small.fusion)):
        assert {
            f"small.network.fusion.{index}.{name}.weight" for name in ("film", "query", "key_value", "merge")
        } <= moved
    assert not any(name.startswith(("small.network.output_conv", "large.network")) for name in moved)
