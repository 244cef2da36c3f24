"""Compute speaker embeddings from enrollment speech in a separate process."""

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

_MAX_PENDING = 8  # enrollments, including the current one
_NICE = 10  # low priority of the process, so that hints come first


class SpeakerEncoder:
    """The speaker encoder in a separate process, which starts on first use.

    An enrollment takes seconds of processor time, mostly with the interpreter's lock. The process has a low priority
    and handles one enrollment at a time, so that hints are not delayed.
    """

    def __init__(self) -> None:
        self._pending = 0
        self._executor = _new_executor()

    @staticmethod
    def installed() -> bool:
        """Return whether the optional package of the encoder is installed."""
        return importlib.util.find_spec("resemblyzer") is not None

    def load(self) -> None:
        """Start to load the encoder in the background. Without this call, the first enrollment loads it.

        Loading takes seconds, and longer for the first time on a machine. It includes an embedding of noise, because
        the libraries of the encoder are loaded and compiled only when they are used.
        """
        noise = np.random.default_rng(0).normal(0, 0.1, SAMPLE_RATE).astype(np.float32)
        self._executor.submit(speaker_embedding, noise).add_done_callback(_log_loaded)

    async def embed(self, speech: Samples) -> Samples:
        """Compute the embedding ``[256]`` of speech ``[N]`` at 16 kHz.

        Raises:
            NoSpeech: As for :func:`speaker_embedding`.
            Refused: Too many enrollments are pending.
        """
        if self._pending >= _MAX_PENDING:
            text = f"{_MAX_PENDING} enrollments are already waiting; try again in a minute"
            raise Refused(text, Status.RESOURCE_EXHAUSTED)
        self._pending += 1
        executor = self._executor
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, speaker_embedding, speech)
        except BrokenProcessPool:
            if self._executor is executor:
                self._executor = _new_executor()
            raise
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Terminate the process."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()


def _new_executor() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_init_process)


def _log_loaded(loading: Future[Samples]) -> None:
    if loading.cancelled() or isinstance(error := loading.exception(), BrokenProcessPool):
        return  # the server shuts down, or the process has ended, which the next enrollment reports
    if error is not None:
        _log.error("the speaker encoder cannot be loaded, so that no speaker can be enrolled", exc_info=error)
    else:
        _log.info({"event": "speaker_encoder_loaded"})


def _init_process() -> None:
    # The terminal sends Ctrl-C to all processes, but the server ends this one itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(_NICE)
    threading.Thread(target=_end_with_server, daemon=True).start()


def _end_with_server() -> None:
    server = multiprocessing.parent_process()
    assert server is not None
    server.join()
    os._exit(0)
