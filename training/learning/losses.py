"""What training minimises."""

import torch
from torch import Tensor

from knowledge_boosting.training.config import Permutation
from knowledge_boosting.training.evaluation.si_sdr import match_sources, permuted_si_sdr


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
