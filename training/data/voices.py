"""Makes additional voices from a corpus of speech with the WORLD vocoder.

A network that was trained on few speakers memorises them and does not distinguish others. The vocoder analyses every
recording into pitch, spectral envelope and aperiodicity, and synthesises it with another pitch and with shifted
formants, which are the main differences between speakers.

Source: Morise, Yokomori and Ozawa, "WORLD: a vocoder-based high-quality speech synthesis system", 2016.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knowledge_boosting.training.data.corpus import SAMPLE_RATE, VOICE_SEPARATOR, Corpus, Samples

_LOWEST_PITCH, _HIGHEST_PITCH = 65.0, 500.0  # Hz, in the recordings
_FULL_SCALE = 0.99


@dataclass(frozen=True)
class VoiceTransformation:
    """The factors that turn the recordings of a speaker into another voice."""

    voice: str  # its name
    pitch: float  # factor
    formants: float  # factor


def transform_voice(speech: Samples, changes: Sequence[VoiceTransformation]) -> list[Samples]:
    """Return speech ``[N]`` at 16 kHz in other voices, each ``[N]`` with the level of the original.

    Factors of 1 give the vocoder's copy of the original voice, which sounds the same but has other samples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package warns about how it finds its own version
        import pyworld
    samples = speech.astype(np.float64)
    pitch, times = pyworld.dio(samples, SAMPLE_RATE, f0_floor=_LOWEST_PITCH, f0_ceil=_HIGHEST_PITCH)
    pitch = pyworld.stonemask(samples, pitch, times, SAMPLE_RATE)
    envelope = pyworld.cheaptrick(samples, pitch, times, SAMPLE_RATE)
    aperiodicity = pyworld.d4c(samples, pitch, times, SAMPLE_RATE)
    level = np.sqrt(np.mean(np.square(samples)))
    changed = []
    for change in changes:
        stretched = _stretched(envelope, change.formants)
        made = pyworld.synthesize(pitch * change.pitch, stretched, aperiodicity, SAMPLE_RATE)
        made = np.pad(made, (0, max(0, len(samples) - len(made))))[: len(samples)]
        made *= level / max(float(np.sqrt(np.mean(np.square(made)))), 1e-9)
        changed.append((made * min(1.0, _FULL_SCALE / max(float(np.abs(made).max()), 1e-9))).astype(np.float32))
    return changed


def _stretched(envelope: npt.NDArray[np.float64], factor: float) -> npt.NDArray[np.float64]:
    """Stretch an envelope ``[frames, bins]`` so that its formants move to ``factor`` times their frequency."""
    last = envelope.shape[1] - 1
    at = np.minimum(np.arange(last + 1) / factor, last)
    lower = np.minimum(at.astype(int), last - 1)
    share = at - lower
    logarithm = np.log(envelope)
    return np.ascontiguousarray(np.exp((1 - share) * logarithm[:, lower] + share * logarithm[:, lower + 1]))


def draw_transformations(
    corpus: Corpus, count: int, pitch: tuple[float, float], formants: tuple[float, float], seed: int
) -> dict[str, tuple[VoiceTransformation, ...]]:
    """Draw the factors of ``count`` voices of every speaker.

    The factors have a uniform distribution on a logarithmic scale. Each speaker has a random generator of their own.
    """
    drawn = {}
    for index, speaker in enumerate(corpus.speakers):
        rng = np.random.default_rng([seed, index])
        factors = np.exp(rng.uniform(np.log([pitch[0], formants[0]]), np.log([pitch[1], formants[1]]), (count, 2)))
        drawn[speaker] = tuple(
            VoiceTransformation(f"{speaker}{VOICE_SEPARATOR}{number}", round(float(first), 4), round(float(second), 4))
            for number, (first, second) in enumerate(factors, 1)
        )
    return drawn
