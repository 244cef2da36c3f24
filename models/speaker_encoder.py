"""Speech to a speaker embedding, by the Resemblyzer voice encoder (d-vectors): the same for training and serving."""

import functools
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]
SAMPLE_RATE = 16000
_MIN_SPEECH = SAMPLE_RATE // 2


class NoSpeech(ValueError):
    """Audio in which no speaker can be heard."""


def speaker_embedding(speech: Samples) -> Samples:
    """The embedding ``[256]``, of norm 1, of speech ``[N]`` at 16 kHz, full scale 1.

    Raises:
        NoSpeech: less than half a second of speech is in it, or it is so loud that the encoder overflows.
    """
    if not speech.any():
        raise NoSpeech("silence")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that Resemblyzer builds on, about themselves
        import resemblyzer

        voiced = resemblyzer.preprocess_wav(speech, source_sr=SAMPLE_RATE)
        if len(voiced) < _MIN_SPEECH:
            raise NoSpeech("less than half a second of speech")
        embedding: Samples = np.asarray(_encoder().embed_utterance(voiced), dtype=np.float32)
    if not np.isfinite(embedding).all():
        raise NoSpeech("the encoder overflows; scale the samples to +-1")
    return embedding


@functools.cache
def _encoder() -> Any:
    import resemblyzer

    return resemblyzer.VoiceEncoder("cpu", verbose=False)
