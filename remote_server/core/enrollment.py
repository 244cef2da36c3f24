"""Speaker embeddings from enrollment audio, made in a process beside the server's."""

import asyncio
import importlib.util
import logging
import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from knowledge_boosting.models.speaker_encoder import SAMPLE_RATE, Samples, speaker_embedding
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
        noise = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32)
        self._executor.submit(speaker_embedding, noise).add_done_callback(_tell_loaded)

    async def embed(self, speech: Samples) -> Samples:
        """The embedding ``[256]`` of speech ``[N]`` at 16 kHz.

        Raises:
            NoSpeech: as :func:`speaker_embedding`.
            Refused: too many wait already.
        """
        if self._waiting >= _MOST_WAITING:
            text = f"{_MOST_WAITING} enrollments wait already; try again in a minute"
            raise Refused(text, Status.RESOURCE_EXHAUSTED)
        self._waiting += 1
        executor = self._executor
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, speaker_embedding, speech)
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
