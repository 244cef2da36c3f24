"""Speaker embeddings from enrollment audio, with the Resemblyzer voice encoder (d-vectors, 256 values)."""

import asyncio
import importlib.util
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any

import numpy as np

from knowledge_boosting.protos.codec import ENROLLMENT_RATE, Samples
from knowledge_boosting.remote_server.core.refusals import Refused, Status

_log = logging.getLogger("kb-server")

_MOST_WAITING = 8  # enrollments, the one under way included
_NICE = 10  # of the process: what steps leave it


class SpeakerEncoder:
    """The voice encoder, in a process of its own that begins on first use.

    It takes seconds of a processor for each enrollment, much of it under the interpreter's lock. Hints go first: the
    process runs when no step wants the processor, and enrollments wait for one another.
    """

    def __init__(self) -> None:
        self._waiting = 0
        self._executor = _new_executor()

    @staticmethod
    def installed() -> bool:
        """Whether the optional package is there."""
        return importlib.util.find_spec("resemblyzer") is not None

    def load(self) -> None:
        """Begin to load it, which takes seconds, many of them the first time on a machine; else the first speech does.

        Most of what it builds on is loaded, or compiled, only when there is something to hear.
        """
        noise = np.random.default_rng(0).normal(0, 0.1, ENROLLMENT_RATE).astype(np.float32)
        self._executor.submit(_embed, noise).add_done_callback(_tell_loaded)

    async def embed(self, speech: Samples) -> Samples:
        """The embedding ``[256]`` of speech ``[N]`` at 16 kHz.

        Raises:
            ValueError: no speech was found in it.
            Refused: too many wait already.
        """
        if not speech.any():
            raise ValueError("silence")
        if self._waiting >= _MOST_WAITING:
            text = f"{_MOST_WAITING} enrollments wait already; try again in a minute"
            raise Refused(text, Status.RESOURCE_EXHAUSTED)
        self._waiting += 1
        executor = self._executor
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, _embed, speech)
        except BrokenProcessPool:
            if self._executor is executor:
                self._executor = _new_executor()
            raise
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _new_executor() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_begin)


def _tell_loaded(loading: Future[Samples]) -> None:
    if loading.cancelled() or isinstance(error := loading.exception(), BrokenProcessPool):
        return  # by the end of the server, or of the process, which the next enrollment finds out
    if error is not None:
        _log.error("the speaker encoder cannot be loaded; nobody can be enrolled", exc_info=error)
    else:
        _log.info({"event": "speaker_encoder_loaded"})


def _begin() -> None:
    # Ctrl-C comes to the server's processes all at once; the server ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(_NICE)
    threading.Thread(target=_end_with_server, daemon=True).start()


def _end_with_server() -> None:
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(0)


@lru_cache(1)
def _encoder() -> Any:
    import resemblyzer

    return resemblyzer.VoiceEncoder("cpu", verbose=False)


def _embed(speech: Samples) -> Samples:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages that Resemblyzer builds on, about themselves
        import resemblyzer

        voiced = resemblyzer.preprocess_wav(speech, source_sr=ENROLLMENT_RATE)
        if len(voiced) < ENROLLMENT_RATE // 2:
            raise ValueError("less than half a second of speech")
        embedding: Samples = np.asarray(_encoder().embed_utterance(voiced), dtype=np.float32)
        if not np.isfinite(embedding).all():
            raise ValueError("the encoder overflows; scale the samples to +-1")
        return embedding
