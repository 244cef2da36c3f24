"""What training minimises."""

from itertools import permutations
from typing import Literal

import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

Permutation = Literal["per_channel", "joint"]


def si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio of zero-mean signals ``[..., N]``, dB, ``[...]``."""
    ratio: Tensor = scale_invariant_signal_distortion_ratio(estimate, reference, zero_mean=True)
    return ratio


def permuted_si_sdr(estimates: Tensor, references: Tensor, permutation: Permutation) -> Tensor:
    """SI-SDR of every source under the best assignment of estimates to references.

    Args:
        estimates, references: ``[B, S, M, N]``.
        permutation: ``per_channel`` lets each microphone find its own assignment, as in the published loss; ``joint``
            finds one for all microphones.

    Returns:
        ``[B, S, M]``, dB, in the order of the references.
    """
    sources = references.shape[1]
    orders = list(permutations(range(sources)))
    # [orders, B, S, M]
    scores = torch.stack([si_sdr(estimates[:, list(order)], references) for order in orders])
    total = scores.sum(2, keepdim=True)
    if permutation == "joint":
        total = total.sum(3, keepdim=True)
    best = total.argmax(0, keepdim=True).expand(1, *scores.shape[1:])
    return scores.gather(0, best)[0]


def match_sources(signals: Tensor, others: Tensor) -> Tensor:
    """Signals ``[B, S, M, N]`` in the order that fits the others best, one for all microphones."""
    orders = [list(order) for order in permutations(range(others.shape[1]))]
    scores = torch.stack([si_sdr(signals[:, order], others).mean((1, 2)) for order in orders])
    best = torch.tensor(orders, device=signals.device)[scores.argmax(0)]  # [B, S]
    return signals.gather(1, best[:, :, None, None].expand_as(signals))


def negative_si_sdr(estimates: Tensor, references: Tensor, permutation: Permutation) -> Tensor:
    """The training loss, dB: every microphone apart, permutation-invariant over the sources, averaged.

    Args:
        estimates, references: ``[B, S, M, N]``; S is 1 for target speech extraction.
    """
    return -permuted_si_sdr(estimates, references, permutation).mean()


def level_error(estimates: Tensor, references: Tensor) -> Tensor:
    """How far the levels of estimates are from those of their references, dB, averaged; SI-SDR is blind to it.

    Args:
        estimates, references: ``[B, S, M, N]``.
    """
    with torch.no_grad():
        references = match_sources(references, estimates)
    energies = [signal.square().sum(-1).clamp_min(1e-10) for signal in (estimates, references)]
    return (10 * torch.log10(energies[0] / energies[1])).abs().mean()
