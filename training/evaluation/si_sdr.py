"""The scale-invariant signal-to-distortion ratio (SI-SDR), and the order of sources that maximises it."""

from itertools import permutations

import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from knowledge_boosting.training.config import Permutation


def si_sdr(estimate: Tensor, reference: Tensor) -> Tensor:
    """Return the SI-SDR of signals ``[..., N]`` after removing their means, dB, ``[...]``."""
    ratio: Tensor = scale_invariant_signal_distortion_ratio(estimate, reference, zero_mean=True)
    return ratio


def permuted_si_sdr(estimates: Tensor, references: Tensor, permutation: Permutation) -> Tensor:
    """Return the SI-SDR of every source under the best assignment of estimates to references.

    Args:
        estimates, references: signals ``[B, S, M, N]``.
        permutation: ``per_channel`` chooses an assignment for each microphone, as in the published loss; ``joint``
            chooses one for all microphones.

    Returns:
        SI-SDR ``[B, S, M]``, dB, in the order of the references.
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


def match_sources(signals: Tensor, references: Tensor) -> Tensor:
    """Return signals ``[B, S, M, N]`` in the order of the references.

    The order is the same for all microphones and maximises the SI-SDR.
    """
    if references.shape[1] == 1:
        return signals
    orders = [list(order) for order in permutations(range(references.shape[1]))]
    scores = torch.stack([si_sdr(signals[:, order], references).mean((1, 2)) for order in orders])
    best = torch.tensor(orders, device=signals.device)[scores.argmax(0)]  # [B, S]
    return signals.gather(1, best[:, :, None, None].expand_as(signals))
