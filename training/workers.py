"""Runs calls in worker processes, which end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import connection
from typing import Any, TypeVar

from knowledge_boosting.common.cli import progress_bar
from knowledge_boosting.common.errors import Failure

Result = TypeVar("Result")

_CALLS_PER_WORKER = 4  # enough to keep a worker busy, and few enough to stop quickly
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def run_in_workers(
    function: Callable[..., Result],
    calls: Sequence[tuple[Any, ...]],
    workers: int | None,
    *,
    crash_advice: str,
    start: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Call a function in worker processes, and yield its results in the order in which the calls finish.

    On a terminal, a progress bar is shown. If the function raises an exception, the calls that have not begun are
    dropped and the exception is raised here.

    Args:
        function: the function.
        calls: the arguments of every call.
        workers: the number of processes, which have one thread each; None for one a core.
        crash_advice: what a user can do if a worker is killed; the end of the error message.
        start: called with ``arguments`` when a process starts.
        arguments: see ``start``.

    Raises:
        Failure: a worker process died.
    """
    count = max(1, min(workers or os.cpu_count() or 1, len(calls)))
    context = multiprocessing.get_context("spawn")
    with (
        _one_thread_each(),
        ProcessPoolExecutor(count, context, _start, (start, arguments)) as pool,
        progress_bar(len(calls)) as advance,
    ):
        waiting = iter(calls)
        running: set[Future[Result]] = set()
        try:
            while True:
                running.update(
                    pool.submit(function, *call) for call in islice(waiting, _CALLS_PER_WORKER * count - len(running))
                )
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
                    advance()
        except BrokenProcessPool:
            raise Failure(f"a worker process died (out of memory?); {crash_advice}") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start(start: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    if start is not None:
        start(*arguments)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let processes that start in this context use one thread, so the order of a sum does not depend on the cores."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def end_with_parent() -> None:
    """Make a worker process ignore Ctrl-C and end when its parent ends, even if the parent is killed.

    A worker must call this first.
    """
    # Ctrl-C reaches every process of the terminal. The parent handles it and ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(parent: int) -> None:
    # A killed parent cannot end its workers, and they would wait for it indefinitely.
    connection.wait([parent])
    os._exit(1)
