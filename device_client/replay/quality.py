"""How much of the wanted voice an estimate holds. All figures in decibels; signals are ``[..., N]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.device_client.replay.report import Quality
from knowledge_boosting.protos.codec import Samples


def si_sdr(estimate: Samples, reference: Samples) -> NDArray[np.float64]:
    """Scale-invariant signal-to-distortion ratio of zero-mean signals (Le Roux et al., ICASSP 2019), per signal."""
    centred, wanted = _zero_mean(estimate), _zero_mean(reference)
    target = wanted * ((centred * wanted).sum(-1) / _power(wanted))[..., None]
    return _decibels(_power(target), _power(centred - target))


def snr(estimate: Samples, reference: Samples) -> NDArray[np.float64]:
    """Signal-to-noise ratio, the noise being whatever differs from the reference; per signal."""
    wanted = reference.astype(np.float64)
    return _decibels(_power(wanted), _power(wanted - estimate))


def match_sources(estimates: Samples, references: Samples) -> Sequence[int]:
    """Which estimate belongs to which reference.

    Args:
        estimates, references: ``[S, M, N]``.

    Returns:
        For every reference the index of its estimate: the assignment with the best mean SI-SDR.
    """
    scores = np.array([[si_sdr(e, r).mean() for e in estimates] for r in references])
    orders = permutations(range(len(estimates)))
    return max(orders, key=lambda order: sum(scores[i, j] for i, j in enumerate(order)))


def _zero_mean(signal: Samples) -> NDArray[np.float64]:
    signal64 = signal.astype(np.float64)
    centred: NDArray[np.float64] = signal64 - signal64.mean(-1, keepdims=True)
    return centred


def _power(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    # The least double keeps silence and perfection apart from a division by zero.
    power: NDArray[np.float64] = np.square(signal).sum(-1) + np.finfo(np.float64).tiny
    return power


def _decibels(power: NDArray[np.float64], of: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = 10 * (np.log10(power) - np.log10(of))
    return ratio


@dataclass(frozen=True)
class Measured:
    """What figures and comparisons are made of: whole signals, at the file's rate."""

    mixture: Samples  # [M, N]
    references: Samples  # [S, M, N]


def qualities(measured: Measured, estimates: dict[str, Samples]) -> dict[str, Quality]:
    """Figures of the mixture, and of every system there is an estimate ``[S, M, N]`` of, by its name."""
    mixture, references = measured.mixture, measured.references
    before = si_sdr(mixture, references).mean(), snr(mixture, references).mean()
    quality = {"mixture": Quality(si_sdr=round(float(before[0]), 3), si_sdri=0, snri=0)}
    for name in ("alone", "small_without_hints", "boosted", "large"):
        if name in estimates:
            matched = estimates[name][list(match_sources(estimates[name], references))]
            after = si_sdr(matched, references).mean(), snr(matched, references).mean()
            quality[name] = Quality(
                si_sdr=round(float(after[0]), 3),
                si_sdri=round(float(after[0] - before[0]), 3),
                snri=round(float(after[1] - before[1]), 3),
            )
    return quality
