"""Several server processes on one port, each with its share of the cores or a GPU of its own."""

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
from knowledge_boosting.remote_server.server import why_not_listening

_RESTART_SECONDS = 1.0
_STARTING_SECONDS = 30.0  # in which a worker that cannot start says something of all of them


def run_workers(count: int, host: str, port: int, arguments: Sequence[str]) -> int:
    """Run ``count`` processes of this command until they are told to stop; the exit code.

    The system spreads connections over them. SIGTERM, SIGINT and SIGHUP go on to all; one that crashes is replaced.

    Args:
        arguments: of the command line, without ``kb-server`` itself.

    Raises:
        InputError: the port cannot be had.
        Failure: the system cannot share a port.
    """
    if not hasattr(socket, "SO_REUSEPORT"):
        raise Failure("--workers: this system cannot share a port among processes; start one server a port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            reserved.bind((host, port))
        except (OSError, UnicodeError):
            raise InputError(why_not_listening(host, port)) from None
        port = reserved.getsockname()[1]
        return _Workers(count, (host, port), [*arguments, "--port", str(port)]).run()


def pin(worker: int, workers: int) -> None:
    """Keep this process on its share of the cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        own = cores[worker % len(cores) :: workers] if workers < len(cores) else [cores[worker % len(cores)]]
        os.sched_setaffinity(0, own)


def device_of(device: str, worker: int) -> str:
    """A worker's own GPU, where there are several and none was named."""
    import torch

    if device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{worker % torch.cuda.device_count()}"
    return device


class _Workers:
    def __init__(self, count: int, address: tuple[str, int], arguments: Sequence[str]) -> None:
        self._command = [sys.executable, "-m", "knowledge_boosting.remote_server.main", *arguments, "--worker"]
        self._until_stdin_ends = "--until-stdin-ends" in arguments
        self._began = time.monotonic()
        self._address = address
        # The others begin when the first one listens: what is wrong with the command is told once.
        self._running, self._waiting = {0: self._start(0)}, range(1, count)
        self._stopping = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._pass_on)

    def run(self) -> int:
        """Watch over the workers until all have ended."""
        worst = 0
        while self._running:
            if self._waiting and not self._stopping and self._listening():
                self._running |= {worker: self._start(worker) for worker in self._waiting}
                self._waiting = range(0)
            for worker, process in list(self._running.items()):
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=0.2 / len(self._running))
                    del self._running[worker]
                    # What one cannot use at the start, none can.
                    if code == 2 and time.monotonic() - self._began < _STARTING_SECONDS:
                        self._stop()
                    if self._stopping or (code == 0 and self._until_stdin_ends):
                        worst = max(worst, abs(code))
                        continue
                    print(f"warning: worker {worker} ended with {code}; starting another", file=sys.stderr)
                    time.sleep(_RESTART_SECONDS)
                    if not self._stopping:  # meanwhile
                        self._running[worker] = self._start(worker)
        return worst

    def _listening(self) -> bool:
        with suppress(OSError), socket.create_connection(self._address, timeout=0.2):
            return True
        return False

    def _start(self, worker: int) -> "subprocess.Popen[bytes]":
        # In a group of its own, so that Ctrl-C comes to it once, from here.
        return subprocess.Popen([*self._command, str(worker)], process_group=0)

    def _stop(self) -> None:
        if not self._stopping:
            self._pass_on(signal.SIGTERM, None)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self._stopping = self._stopping or number != signal.SIGHUP
        for process in self._running.values():
            process.send_signal(number)
