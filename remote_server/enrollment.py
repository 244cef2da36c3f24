"""Speaker embeddings from enrollment audio, with the Resemblyzer voice encoder (d-vectors, 256 values)."""

import asyncio
import importlib.util
import logging
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from protos.codec import ENROLLMENT_RATE, Samples

_log = logging.getLogger("kb-server")


class SpeakerEncoder:
    """The voice encoder, on a thread of its own so that hints go on meanwhile."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="enrollment")
        self._encoder: Any = None

    @staticmethod
    def installed() -> bool:
        """Whether the optional package is there."""
        return importlib.util.find_spec("resemblyzer") is not None

    def load(self) -> None:
        """Begin to load it, which takes seconds, many of them the first time on a machine; else the first speech does.

        Most of what it builds on is loaded, or compiled, only when there is something to hear.
        """
        self._executor.submit(self._load)

    async def embed(self, speech: Samples) -> Samples:
        """The embedding ``[256]`` of speech ``[N]`` at 16 kHz.

        Raises:
            ValueError: no speech was found in it.
        """
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._embed, speech)

    def close(self) -> None:
        """Wait for the embedding under way and end the thread."""
        self._executor.shutdown()

    def _load(self) -> None:
        try:
            self._embed(np.random.default_rng(0).normal(0, 0.1, ENROLLMENT_RATE).astype(np.float32))
        except Exception:
            _log.exception("the speaker encoder cannot be loaded; nobody can be enrolled")
        else:
            _log.info({"event": "speaker_encoder_loaded"})

    def _embed(self, speech: Samples) -> Samples:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages that Resemblyzer builds on, about themselves
            import resemblyzer

            if self._encoder is None:
                self._encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
            if not speech.any():
                raise ValueError("silence")
            voiced = resemblyzer.preprocess_wav(speech, source_sr=ENROLLMENT_RATE)
            if len(voiced) < ENROLLMENT_RATE // 2:
                raise ValueError("less than half a second of speech")
            embedding: Samples = np.asarray(self._encoder.embed_utterance(voiced), dtype=np.float32)
            if not np.isfinite(embedding).all():
                raise ValueError("the encoder overflows; scale the samples to +-1")
            return embedding
