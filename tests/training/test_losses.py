"""The training loss equals torchmetrics and brute force, and is finite for silent signals."""

from itertools import permutations

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.audio import permutation_invariant_training, scale_invariant_signal_distortion_ratio

from knowledge_boosting.training.config import Permutation
from knowledge_boosting.training.evaluation.si_sdr import permuted_si_sdr, si_sdr
from knowledge_boosting.training.learning.losses import negative_si_sdr

BATCH, MICROPHONES, SAMPLES = 4, 2, 800
TOLERANCE = 1e-4  # dB


def random_pair(sources: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return estimates and references ``[B, S, M, N]``. Every estimate is a blend of all references with an offset."""
    random = torch.Generator().manual_seed(seed)
    references = torch.randn(BATCH, sources, MICROPHONES, SAMPLES, generator=random)
    blend = torch.rand(BATCH, sources, sources, MICROPHONES, 1, generator=random)
    return (blend * references[:, None]).sum(2) + 0.1, references


def closed_form(estimate: Tensor, reference: Tensor) -> float:
    """Compute the SI-SDR of two signals ``[N]`` by its definition, in double precision."""
    estimate, reference = estimate.double(), reference.double()
    estimate, reference = estimate - estimate.mean(), reference - reference.mean()
    target = (estimate @ reference) / (reference @ reference) * reference
    return float(10 * torch.log10(target.square().sum() / (estimate - target).square().sum()))


def brute_force(estimates: Tensor, references: Tensor) -> list[float]:
    """Compute the SI-SDR of every source of ``[S, M, N]`` for the order with the largest sum."""
    orders = [
        [
            closed_form(estimates[estimate, microphone], references[reference, microphone])
            for reference, estimate in enumerate(order)
            for microphone in range(references.shape[1])
        ]
        for order in permutations(range(len(references)))
    ]
    return max(orders, key=sum)


def test_si_sdr_is_its_definition_and_that_of_torchmetrics() -> None:
    estimates, references = random_pair(2)
    ratio = si_sdr(estimates, references)
    theirs = scale_invariant_signal_distortion_ratio(estimates, references, zero_mean=True)
    assert torch.allclose(ratio, theirs, atol=TOLERANCE)
    for index in ((0, 0, 0), (1, 1, 0), (3, 0, 1)):
        assert float(ratio[index]) == pytest.approx(closed_form(estimates[index], references[index]), abs=TOLERANCE)
    assert torch.allclose(si_sdr(3 * estimates - 0.5, references), ratio, atol=TOLERANCE)


@pytest.mark.parametrize("sources", [2, 3])
def test_every_channel_finds_the_permutation_that_torchmetrics_finds(sources: int) -> None:
    estimates, references = random_pair(sources)
    best, _ = permutation_invariant_training(
        estimates.transpose(1, 2).flatten(0, 1),
        references.transpose(1, 2).flatten(0, 1),
        lambda estimate, reference: scale_invariant_signal_distortion_ratio(estimate, reference, zero_mean=True),
        eval_func="max",
    )
    ours = permuted_si_sdr(estimates, references, "per_channel").mean(1)
    assert torch.allclose(ours, best.view(BATCH, MICROPHONES), atol=TOLERANCE)
    assert torch.allclose(negative_si_sdr(estimates, references, "per_channel"), -best.mean(), atol=TOLERANCE)


@pytest.mark.parametrize("sources", [2, 3])
def test_all_channels_find_the_one_permutation_that_torchmetrics_finds(sources: int) -> None:
    estimates, references = random_pair(sources)
    best, _ = permutation_invariant_training(
        estimates,
        references,
        lambda estimate, reference: scale_invariant_signal_distortion_ratio(estimate, reference, zero_mean=True).mean(
            -1
        ),
        eval_func="max",
    )
    ours = permuted_si_sdr(estimates, references, "joint").mean((1, 2))
    assert torch.allclose(ours, best, atol=TOLERANCE)
    assert torch.allclose(negative_si_sdr(estimates, references, "joint"), -best.mean(), atol=TOLERANCE)


@pytest.mark.parametrize("sources", [2, 3])
def test_permutations_are_those_of_brute_force(sources: int) -> None:
    estimates, references = random_pair(sources, seed=1)
    joint = permuted_si_sdr(estimates, references, "joint")
    per_channel = permuted_si_sdr(estimates, references, "per_channel")
    for item in range(BATCH):
        expected = torch.tensor(brute_force(estimates[item], references[item])).view(sources, MICROPHONES)
        assert torch.allclose(joint[item], expected, atol=TOLERANCE)
        for microphone in range(MICROPHONES):
            own = slice(microphone, microphone + 1)
            alone = torch.tensor(brute_force(estimates[item, :, own], references[item, :, own]))
            assert torch.allclose(per_channel[item, :, microphone], alone, atol=TOLERANCE)
    assert not torch.allclose(joint, per_channel, atol=1)  # the two differ for these inputs


def test_only_per_channel_permutation_undoes_a_swap_in_one_channel() -> None:
    _, references = random_pair(2)
    random = torch.Generator().manual_seed(2)
    estimates = references + 0.01 * torch.randn(references.shape, generator=random)
    swapped = estimates.clone()
    swapped[:, :, 1] = estimates[:, :, 1].flip(1)
    plain = permuted_si_sdr(estimates, references, "joint")
    assert (plain > 35).all()
    assert torch.equal(permuted_si_sdr(estimates.flip(1), references, "joint"), plain)
    assert torch.equal(permuted_si_sdr(swapped, references, "per_channel"), plain)
    torn = permuted_si_sdr(swapped, references, "joint")
    assert ((torn > 35).sum((1, 2)) == 2).all()  # one channel is correct, the other is swapped


def test_one_source_has_nothing_to_permute() -> None:
    estimates, references = random_pair(1)
    expected = -si_sdr(estimates, references).mean()
    for permutation in ("per_channel", "joint"):
        assert torch.equal(negative_si_sdr(estimates, references, permutation), expected)


@pytest.mark.parametrize("permutation", ["per_channel", "joint"])
@pytest.mark.parametrize("case", ["estimate", "reference", "both", "one source", "perfect", "constant"])
def test_loss_and_gradient_are_finite_whatever_is_silent(case: str, permutation: Permutation) -> None:
    estimates, references = random_pair(2)
    if case in ("estimate", "both"):
        estimates = torch.zeros_like(estimates)
    if case in ("reference", "both"):
        references = torch.zeros_like(references)
    if case == "one source":
        references[:, 1] = 0
    if case == "perfect":
        estimates = references.clone()
    if case == "constant":
        estimates = torch.ones_like(estimates)
    estimates.requires_grad_()
    loss = negative_si_sdr(estimates, references, permutation)
    (gradient,) = torch.autograd.grad(loss, estimates)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_the_gradient_leads_to_the_references() -> None:
    estimates, references = random_pair(2)
    before = negative_si_sdr(estimates, references, "per_channel")
    estimates.requires_grad_()
    optimiser = torch.optim.Adam([estimates], lr=1e-2)
    for _ in range(100):
        optimiser.zero_grad()
        negative_si_sdr(estimates, references, "per_channel").backward()
        optimiser.step()
    assert negative_si_sdr(estimates, references, "per_channel") < before - 10
