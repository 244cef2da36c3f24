"""The metrics of validation and evaluation, computed by torchmetrics, and a word error rate.

The packages that compute a metric are imported when it is computed, so that a command can list all metrics quickly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from knowledge_boosting.models.config import Framing

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_RATE = Framing().sample_rate

MetricName = Literal["si_sdri", "snri", "stoi", "pesq", "wer"]


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


def word_error_rate(estimates: "Tensor", references: "Tensor") -> "Tensor":
    """Return the word error rate of matched estimates, mean over sources, ``[B]``.

    The expected words are those that the same recogniser, PocketSphinx, finds in the references. Only the first
    microphone is heard. The result is NaN for items in whose references it finds no word.
    """
    import torch
    from torchmetrics.functional.text import word_error_rate as rate

    from knowledge_boosting.training.evaluation.si_sdr import match_sources

    matched, references = match_sources(estimates, references).cpu(), references.cpu()
    scores = []
    for estimate, reference in zip(matched[:, :, 0].flatten(0, 1), references[:, :, 0].flatten(0, 1), strict=True):
        expected = _words(_pcm(reference))
        scores.append(rate([_words(_pcm(estimate))], [expected]) if expected else torch.tensor(math.nan))
    return torch.stack(scores).view(matched.shape[:2]).nanmean(1)


def _pcm(signal: "Tensor") -> bytes:
    """Return a signal as 16-bit samples at one level, which the recogniser is to hear well."""
    from torch import int16

    return (signal * (0.5 * 32767 / signal.abs().max().clamp_min(1e-9))).to(int16).numpy().tobytes()


@lru_cache
def _words(pcm: bytes) -> str:
    if not any(pcm):
        return ""  # the recogniser would guess a word
    decoder = _recogniser()
    decoder.start_utt()
    decoder.process_raw(pcm, full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr if found is not None else ""


@cache
def _recogniser() -> Any:
    from pocketsphinx import Decoder

    # With the cepstral mean of each signal by itself, the words do not depend on what was decoded before.
    return Decoder(samprate=SAMPLE_RATE, cmn="batch", loglevel="FATAL")


@dataclass(frozen=True)
class Metric:
    """A metric of estimates."""

    heading: str
    digits: int  # digits after the decimal point in tables
    # Maps estimates [B, S, M, N], references [B, S, M, N] and mixture [B, M, N] to values [B].
    measure: "Callable[[Tensor, Tensor, Tensor], Tensor]"
    package: str | None = None  # a package that is needed besides torchmetrics
    slow: bool = False  # whether it is computed in several processes; slow metrics need half a second of speech
    usual: bool = True  # whether it is computed unless others are asked for


METRICS: dict[MetricName, Metric] = {
    "si_sdri": Metric("SI-SDRi, dB", 2, si_sdr_improvement),
    "snri": Metric("SNRi, dB", 2, snr_improvement),
    "stoi": Metric("STOI", 3, lambda estimates, references, _: stoi(estimates, references), "pystoi", slow=True),
    "pesq": Metric("PESQ-WB", 2, lambda estimates, references, _: pesq(estimates, references), "pesq", slow=True),
    "wer": Metric(
        "WER",
        2,
        lambda estimates, references, _: word_error_rate(estimates, references),
        "pocketsphinx",
        slow=True,
        usual=False,
    ),
}
USUAL_METRICS = [name for name, metric in METRICS.items() if metric.usual]
