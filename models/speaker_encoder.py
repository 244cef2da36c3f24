"""Computes speaker embeddings (d-vectors) with the Resemblyzer voice encoder, for training and for the server."""

import functools
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.float32]
SAMPLE_RATE = 16000
_MIN_SPEECH = SAMPLE_RATE // 2


class NoSpeech(ValueError):
    """The audio contains too little speech for an embedding."""


def speaker_embedding(speech: Samples) -> Samples:
    """Return the embedding ``[256]`` of speech ``[N]`` at 16 kHz, full scale 1. Its norm is 1.

    Raises:
        NoSpeech: the audio has less than half a second of speech, or is so loud that the encoder overflows.
    """
    if not speech.any():
        raise NoSpeech("silence")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages that Resemblyzer uses warn about themselves
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
