"""Several server processes on one port, each with its own cores or GPU."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.remote_server.server import listen_error

_RESTART_PAUSE = 1.0  # seconds
_START_TIME = 30.0  # seconds; an input error of a worker in this time is one of the common arguments


def run_workers(count: int, host: str, port: int, arguments: Sequence[str]) -> int:
    """Run several worker processes until a signal stops them.

    The system distributes connections over the workers. SIGTERM, SIGINT and SIGHUP are forwarded to all workers, and a
    worker that crashes is replaced.

    Args:
        count: The number of workers.
        host: The address on which they listen.
        port: The port that they share.
        arguments: The arguments of ``kb-server``.

    Returns:
        The exit code.

    Raises:
        InputError: The workers cannot listen on the port.
        Failure: The system does not support a shared port.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise Failure("--workers: this system cannot share a port among processes; start one server for each port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            reserved.bind((host, port))
        except (OSError, UnicodeError):
            raise InputError(listen_error(host, port)) from None
        port = reserved.getsockname()[1]
        return _Workers(count, (host, port), [*arguments, "--port", str(port)]).run()


def pin_to_cores(worker: int, workers: int) -> None:
    """Restrict this process to its share of the cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        own = cores[worker % len(cores) :: workers] if workers < len(cores) else [cores[worker % len(cores)]]
        os.sched_setaffinity(0, own)


def worker_device(device: str, worker: int) -> str:
    """Return the device of a worker: its own GPU if there are GPUs and ``device`` names none of them."""
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{worker % torch.cuda.device_count()}"
    return device


class _Workers:
    def __init__(self, count: int, address: tuple[str, int], arguments: Sequence[str]) -> None:
        self._command = [sys.executable, "-m", "knowledge_boosting.remote_server.main", *arguments, "--worker"]
        self._until_stdin_ends = "--until-stdin-ends" in arguments
        self._started_at = time.monotonic()
        self._address = address
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._stopping = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._forward_signal)
        # The other workers start when the first one listens, so that an input error is reported only once.
        self._waiting = range(1, count)
        self._start(0)

    def run(self) -> int:
        """Supervise the workers until all have ended. Return the exit code."""
        exit_code = 0
        while self._running:
            if self._waiting and not self._stopping and self._listening():
                for worker in self._waiting:
                    self._start(worker)
                self._waiting = range(0)
            for worker, process in list(self._running.items()):
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=0.2 / len(self._running))
                    del self._running[worker]
                    # All workers have the same arguments, so an input error applies to all.
                    if code == 2 and time.monotonic() - self._started_at < _START_TIME:
                        self._stop()
                    if self._stopping or (code == 0 and self._until_stdin_ends):
                        exit_code = max(exit_code, abs(code))
                        continue
                    print(f"warning: worker {worker} ended with exit code {code}; starting another", file=sys.stderr)
                    time.sleep(_RESTART_PAUSE)
                    self._start(worker)
        return exit_code

    def _listening(self) -> bool:
        with suppress(OSError), socket.create_connection(self._address, timeout=0.2):
            return True
        return False

    def _start(self, worker: int) -> None:
        """Start a worker, unless the server stops."""
        if self._stopping:
            return
        # In its own process group, a worker gets Ctrl-C only from this process, and not from the terminal too.
        process = self._running[worker] = subprocess.Popen([*self._command, str(worker)], process_group=0)
        if self._stopping:  # a signal came before the worker was there to receive it
            process.terminate()

    def _stop(self) -> None:
        if not self._stopping:
            self._forward_signal(signal.SIGTERM, None)

    def _forward_signal(self, number: int, _frame: FrameType | None) -> None:
        self._stopping = self._stopping or number != signal.SIGHUP
        for process in self._running.values():
            process.send_signal(number)
