"""The losses of training."""

import torch
from torch import Tensor

from knowledge_boosting.training.config import Permutation
from knowledge_boosting.training.evaluation.si_sdr import match_sources, permuted_si_sdr


def negative_si_sdr(estimates: Tensor, references: Tensor, permutation: Permutation) -> Tensor:
    """Return the negative SI-SDR under the best assignment of estimates to references, dB, averaged over everything.

    Args:
        estimates, references: signals ``[B, S, M, N]``; S is 1 for target speech extraction.
        permutation: see :func:`permuted_si_sdr`.
    """
    return -permuted_si_sdr(estimates, references, permutation).mean()


def level_error(estimates: Tensor, references: Tensor) -> Tensor:
    """Return the mean absolute difference between the levels of estimates and references, dB.

    SI-SDR does not depend on the level of an estimate.

    Args:
        estimates, references: signals ``[B, S, M, N]``.
    """
    with torch.no_grad():
        references = match_sources(references, estimates)
    energies = [signal.square().sum(-1).clamp_min(1e-10) for signal in (estimates, references)]
    return (10 * torch.log10(energies[0] / energies[1])).abs().mean()
