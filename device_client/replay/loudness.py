"""The common loudness of all sounds that are to be compared by ear."""

from collections.abc import Iterable

import numpy as np

from knowledge_boosting.protos.codec import Samples

_USUAL_DB = -23.0  # RMS, full scale 0 dB
_PEAK = 0.98


def common_loudness(sounds: Iterable[Samples]) -> float:
    """Return the loudness that all sounds ``[M, N]`` can have without clipping, as RMS in full scale."""
    levels = [_PEAK * _rms(samples) / peak for samples in sounds if (peak := float(np.abs(samples).max())) > 0]
    return float(min([10 ** (_USUAL_DB / 20), *levels]))


def at_loudness(samples: Samples, loudness: float) -> Samples:
    """Return samples ``[M, N]`` at a loudness. Silence stays silence."""
    level = _rms(samples)
    scaled: Samples = np.float32(loudness / level if level else 0.0) * samples
    return scaled


def _rms(samples: Samples) -> float:
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
