"""Quality figures of estimates, in dB. Signals have the shape ``[..., N]``."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.device_client.replay.report import Quality
from knowledge_boosting.protos.codec import Samples


def si_sdr(estimate: Samples, reference: Samples) -> NDArray[np.float64]:
    """Return the scale-invariant signal-to-distortion ratio of each signal, after removal of the mean.

    The definition is that of Le Roux et al., ICASSP 2019.
    """
    centred, centred_reference = _zero_mean(estimate), _zero_mean(reference)
    scale = (centred * centred_reference).sum(-1) / _power(centred_reference)
    target = centred_reference * scale[..., None]
    return _decibels(_power(target), _power(centred - target))


def snr(estimate: Samples, reference: Samples) -> NDArray[np.float64]:
    """Return the signal-to-noise ratio of each signal. The noise is the difference from the reference."""
    reference64 = reference.astype(np.float64)
    return _decibels(_power(reference64), _power(reference64 - estimate))


def match_sources(estimates: Samples, references: Samples) -> Sequence[int]:
    """Assign the estimates to the references, by the best mean SI-SDR.

    Args:
        estimates: ``[S, M, N]``.
        references: ``[S, M, N]``.

    Returns:
        For each reference, the index of its estimate.
    """
    scores = np.array([[si_sdr(e, r).mean() for e in estimates] for r in references])
    orders = permutations(range(len(estimates)))
    return max(orders, key=lambda order: sum(scores[i, j] for i, j in enumerate(order)))


def _zero_mean(signal: Samples) -> NDArray[np.float64]:
    signal64 = signal.astype(np.float64)
    centred: NDArray[np.float64] = signal64 - signal64.mean(-1, keepdims=True)
    return centred


def _power(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    # The smallest positive double prevents a division by zero for silence and for perfect estimates.
    power: NDArray[np.float64] = np.square(signal).sum(-1) + np.finfo(np.float64).tiny
    return power


def _decibels(power: NDArray[np.float64], of: NDArray[np.float64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = 10 * (np.log10(power) - np.log10(of))
    return ratio


@dataclass(frozen=True)
class Measured:
    """The signals for quality figures and comparisons, at the rate of the mixture's file."""

    mixture: Samples  # [M, N]
    references: Samples  # [S, M, N]


def qualities(measured: Measured, estimates: dict[str, Samples]) -> dict[str, Quality]:
    """Return the figures of the mixture and of each system, by name. ``estimates`` has one ``[S, M, N]`` for each."""
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
