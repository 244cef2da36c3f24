"""The project's commands as real processes."""

import importlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

# Seconds, for what must come: so many that only a test that has failed waits so long, however busy the machine is.
PATIENCE = 240.0

COMMANDS = {
    "kb-client": "knowledge_boosting.device_client.main",
    "kb-evaluate": "knowledge_boosting.training.commands.evaluate",
    "kb-export": "knowledge_boosting.models.export",
    "kb-make-dataset": "knowledge_boosting.training.commands.make_dataset",
    "kb-make-voices": "knowledge_boosting.training.commands.make_voices",
    "kb-store-hints": "knowledge_boosting.training.commands.store_hints",
    "kb-server": "knowledge_boosting.remote_server.main",
    "kb-train": "knowledge_boosting.training.trainer",
}


# Without rounding on the wire, two processes give the samples of one.
EXACT = ("--pcm-encoding", "f32", "--hint-encoding", "f32")

REMARKS = ("warning:", "kb-train: LSTMs of ")  # that may come before a refusal


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", COMMANDS[name], *map(str, arguments)]


def run(name: str, *arguments: object, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """A command run to its end."""
    return subprocess.run(
        command(name, *arguments), cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )


def refusal(name: str, *arguments: object, cwd: Path | None = None) -> str:
    """The one line that a command refuses a call with, its exit code checked."""
    result = run(name, *arguments, cwd=cwd)
    lines = [line for line in result.stderr.splitlines() if not line.startswith(REMARKS)]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"{name}: error: ")
    assert not result.stdout
    return lines[0].removeprefix(f"{name}: error: ")


def call_here(name: str, *arguments: object) -> int:
    """The exit code of a command that is called in this process, which spares its start."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            importlib.import_module(COMMANDS[name]).main()
    # What the command has set for its process does not count for the tests that follow.
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    torch.set_num_threads(threads)
    assert isinstance(left.value.code, int)
    return left.value.code


def refusal_here(name: str, capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """As :func:`refusal`, by :func:`call_here`."""
    exit_code = call_here(name, *arguments)
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if not line.startswith(REMARKS)]
    assert exit_code == code, printed.err
    assert len(lines) == 1, printed.err
    assert not printed.out
    return lines[0].removeprefix(f"{name}: error: ")


@dataclass
class Server:
    """A kb-server process."""

    process: "subprocess.Popen[str]"
    address: str
    log: list[str] = field(default_factory=list)  # of its standard error, as it comes

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=PATIENCE)

    def wait_for_log(self, pattern: str) -> str:
        """The first log line that matches; fails if none comes."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for line in list(self.log):
                if re.search(pattern, line):
                    return line
            time.sleep(0.02)
        raise AssertionError(f"no log line matches {pattern}: {self.log}")


def free_port() -> int:
    """A port of loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken so far, from /proc as all of these."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


_PATIENT = ("--max-sessions", 16, "--limit", "least_speed=0", "--limit", "idle_seconds=0")


@contextmanager
def running_server(bundle: Path | None, *arguments: object, for_us: bool = True) -> Iterator[Server]:
    """A server of a bundle, or of those that are shipped, on a free port of loopback, stopped at the end.

    It stops by itself when this process ends, however that comes, unless it is to be a server for others too.
    """
    if bundle is not None:
        arguments = ("--bundle", bundle, *arguments)
    if for_us:
        arguments = ("--until-stdin-ends", *arguments)
    process = subprocess.Popen(
        # What a busy machine carries, and how long its devices keep quiet, is not what most tests ask.
        command("kb-server", "--port", 0, "--device", "cpu", *_PATIENT, *arguments),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    server = Server(process, "")
    reader = threading.Thread(target=lambda: server.log.extend(iter(process.stderr.readline, "")), daemon=True)  # type: ignore[union-attr]
    reader.start()
    try:
        line = process.stdout.readline()
        match = re.search(r"listening on (\S+:\d+)", line)
        assert match, (line, server.log)
        server.address = match[1]
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(timeout=5)
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def environment() -> dict[str, str]:
    # One thread each: several processes share few cores, and threads that wait for one another spin. A process that
    # crashes says where.
    settings = {"COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return {**os.environ, **settings}
