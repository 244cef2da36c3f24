"""The metrics of validation and evaluation, computed by torchmetrics.

The packages that compute a metric are imported when it is computed, so that a command can list all metrics quickly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from knowledge_boosting.models.config import Framing

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_RATE = Framing().sample_rate

MetricName = Literal["si_sdri", "snri", "stoi", "pesq"]


def si_sdr_improvement(estimates: "Tensor", references: "Tensor", mixture: "Tensor") -> "Tensor":
    """Return the SI-SDR improvement of matched estimates, dB, mean over sources and microphones, ``[B]``."""
    from knowledge_boosting.training.evaluation.si_sdr import permuted_si_sdr, si_sdr

    return (
        permuted_si_sdr(estimates, references, "joint") - si_sdr(mixture[:, None].expand_as(references), references)
    ).mean((1, 2))


def snr_improvement(estimates: "Tensor", references: "Tensor", mixture: "Tensor") -> "Tensor":
    """Return the SNR improvement of matched estimates, dB, mean over sources and microphones, ``[B]``."""
    from torchmetrics.functional.audio import signal_noise_ratio

    from knowledge_boosting.training.evaluation.si_sdr import match_sources

    after = signal_noise_ratio(match_sources(estimates, references), references)
    before = signal_noise_ratio(mixture[:, None].expand_as(references), references)
    improvement: Tensor = (after - before).mean((1, 2))
    return improvement


def stoi(estimates: "Tensor", references: "Tensor") -> "Tensor":
    """Return the STOI of matched estimates, 0 to 1, mean over sources and microphones, ``[B]``."""
    from torchmetrics.functional.audio import short_time_objective_intelligibility

    from knowledge_boosting.training.evaluation.si_sdr import match_sources

    score: Tensor = short_time_objective_intelligibility(match_sources(estimates, references), references, SAMPLE_RATE)
    return score.mean((1, 2))


def pesq(estimates: "Tensor", references: "Tensor") -> "Tensor":
    """Return the wide-band PESQ of matched estimates, mean over sources and microphones, ``[B]``.

    The result is NaN for items in which PESQ finds no speech.
    """
    import torch

    from knowledge_boosting.training.evaluation.si_sdr import match_sources

    matched = match_sources(estimates, references).cpu()
    scores = [
        _pesq(estimate, reference)
        for estimate, reference in zip(matched.flatten(0, 2), references.cpu().flatten(0, 2), strict=True)
    ]
    return torch.stack(scores).view(matched.shape[:3]).nanmean((1, 2))


def _pesq(estimate: "Tensor", reference: "Tensor") -> "Tensor":
    import torch
    from pesq import PesqError
    from torchmetrics.functional.audio import perceptual_evaluation_speech_quality

    try:
        score: Tensor = perceptual_evaluation_speech_quality(estimate, reference, SAMPLE_RATE, "wb")
    except (PesqError, ValueError):  # no speech, a signal below a quarter of a second, or a silent estimate
        return torch.tensor(float("nan"))
    return score


@dataclass(frozen=True)
class Metric:
    """A metric of estimates."""

    heading: str
    digits: int  # digits after the decimal point in tables
    # Maps estimates [B, S, M, N], references [B, S, M, N] and mixture [B, M, N] to values [B].
    measure: "Callable[[Tensor, Tensor, Tensor], Tensor]"
    package: str | None = None  # a package that is needed besides torchmetrics
    slow: bool = False  # whether it is computed in several processes; slow metrics need half a second of speech


METRICS: dict[MetricName, Metric] = {
    "si_sdri": Metric("SI-SDRi, dB", 2, si_sdr_improvement),
    "snri": Metric("SNRi, dB", 2, snr_improvement),
    "stoi": Metric("STOI", 3, lambda estimates, references, _: stoi(estimates, references), "pystoi", slow=True),
    "pesq": Metric("PESQ-WB", 2, lambda estimates, references, _: pesq(estimates, references), "pesq", slow=True),
}
