"""Figures of merit, by torchmetrics: what training watches and evaluation tabulates."""

import torch
from torch import Tensor
from torchmetrics.functional.audio import (
    perceptual_evaluation_speech_quality,
    short_time_objective_intelligibility,
    signal_noise_ratio,
)

from knowledge_boosting.models.config import Framing
from knowledge_boosting.training.learning.losses import permuted_si_sdr, si_sdr

SAMPLE_RATE = Framing().sample_rate


def match(estimates: Tensor, references: Tensor) -> Tensor:
    """Estimates ``[B, S, M, N]`` in the order of the references, one assignment for all microphones (best SI-SDR)."""
    if references.shape[1] == 1:
        return estimates
    straight = si_sdr(estimates, references).mean((1, 2))
    crossed = si_sdr(estimates.flip(1), references).mean((1, 2))
    return torch.where((straight >= crossed)[:, None, None, None], estimates, estimates.flip(1))


def si_sdr_improvement(estimates: Tensor, references: Tensor, mixture: Tensor) -> Tensor:
    """SI-SDR of matched estimates over that of the mixture, dB, mean over sources and microphones, ``[B]``."""
    return (
        permuted_si_sdr(estimates, references, "joint") - si_sdr(mixture[:, None].expand_as(references), references)
    ).mean((1, 2))


def snr_improvement(estimates: Tensor, references: Tensor, mixture: Tensor) -> Tensor:
    """SNR of matched estimates over that of the mixture, dB, mean over sources and microphones, ``[B]``."""
    after = signal_noise_ratio(match(estimates, references), references)
    before = signal_noise_ratio(mixture[:, None].expand_as(references), references)
    improvement: Tensor = (after - before).mean((1, 2))
    return improvement


def stoi(estimates: Tensor, references: Tensor) -> Tensor:
    """Short-time objective intelligibility of matched estimates, 0 to 1, mean over sources and microphones, ``[B]``."""
    score: Tensor = short_time_objective_intelligibility(match(estimates, references), references, SAMPLE_RATE)
    return score.mean((1, 2))


def pesq(estimates: Tensor, references: Tensor) -> Tensor:
    """Wide-band PESQ of matched estimates, mean over sources and microphones, ``[B]``; NaN where it cannot judge."""
    matched = match(estimates, references)
    scores = [
        _pesq(estimate, reference)
        for estimate, reference in zip(matched.flatten(0, 2), references.flatten(0, 2), strict=True)
    ]
    return torch.stack(scores).view(matched.shape[:3]).nanmean((1, 2))


def _pesq(estimate: Tensor, reference: Tensor) -> Tensor:
    from pesq import PesqError

    try:
        score: Tensor = perceptual_evaluation_speech_quality(estimate, reference, SAMPLE_RATE, "wb")
    except (PesqError, ValueError):  # no speech, less than a quarter of a second, or a silent estimate
        return torch.tensor(float("nan"))
    return score
