"""Tests for a live session in real time whose server is killed, restarted and frozen."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from knowledge_boosting.models.arrivals import RAMP
from knowledge_boosting.models.networks import write_bundle
from tests.arrivals import arrival_pair
from tests.processes import PATIENCE, Server, command, environment, free_port, memory_mib, run, running_server, threads

GAP = 50  # frames without hints; after such a gap, fusion fades in


@pytest.fixture(params=["fixed", pytest.param("arrival", marks=pytest.mark.slow)])
def bundle(request: pytest.FixtureRequest, golden_bundle: Callable[[str], Path], tmp_path: Path) -> Path:
    """A bundle of each policy for the use of hints."""
    if request.param == "fixed":
        return golden_bundle("ss_delay6_compression2")
    pair = arrival_pair(GAP)
    write_bundle(tmp_path / "arrival", pair, pair.config, untrained=False, source="random", configuration="none")
    return tmp_path / "arrival"


FIXED = pytest.mark.parametrize("bundle", ["fixed"], indirect=True)


class Live:
    """A running ``kb-client live --json-lines`` with files as input and output."""

    def __init__(self, folder: Path, bundle: Path, seconds: int, servers: list[str]) -> None:
        self.folder, self.frames = folder, seconds * 125
        sound = np.random.default_rng(0).normal(0, 0.1, (seconds * 16000, 2)).astype(np.float32)
        soundfile.write(folder / "sound.wav", sound, 16000, subtype="FLOAT")
        flags: list[object] = ["--bundle", bundle, "--json-lines", "--record", folder / "recording"]
        for server in servers:
            flags += ["--server", server]
        call = command("kb-client", "live", *flags, "--input", folder / "sound.wav", "--output", folder / "played.wav")
        self.process = subprocess.Popen(
            call, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, (what, self.lines[-3:])
            assert self.process.poll() is None, (what, self.lines[-3:])
            time.sleep(0.02)

    def used(self) -> int:
        return max((int(line["hints_on_time"]) for line in self.lines if line["event"] == "figures"), default=0)

    def wait_for_hints(self) -> None:
        """Wait until more hints have been fused than now."""
        before = self.used()
        self.wait_for("hints", lambda: self.used() > before + 20)

    def wait_for_event(self, connected: bool, since: int) -> None:
        self.wait_for(
            f"connected: {connected}", lambda: any(line.get("connected") is connected for line in self.lines[since:])
        )

    def end(self) -> dict[str, Any]:
        """Stop it with Ctrl-C, and return its last line."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=PATIENCE)
        self._reader.join()
        assert self.process.stderr is not None
        errors = self.process.stderr.read()
        assert self.process.returncode == 0, errors
        assert not errors, errors
        assert self.lines[-1]["event"] == "ended"
        return self.lines[-1]

    def check_output(self, bundle: Path) -> None:
        """Check that the output is complete, and that the recorded session gives the same output again."""
        last, recording = self.lines[-1], self.folder / "recording"
        played = soundfile.read(recording / "output.wav", dtype="float32")[0]
        assert len(played) == 128 * last["frames"]
        np.testing.assert_array_equal(played, soundfile.read(self.folder / "played.wav", dtype="float32")[0])
        again = ["-o", self.folder / "again.wav", "--frame-log", recording / "frames.csv", "--bundle", bundle]
        result = run("kb-client", "replay", recording / "input.wav", *again)
        assert result.returncode == 0, result.stderr
        np.testing.assert_array_equal(played, soundfile.read(self.folder / "again.wav", dtype="float32")[0])

    def check_returns(self, count: int) -> None:
        """Check that hints that are used on arrival were at full strength within 100 ms, each time they returned.

        They must have returned at least ``count`` times.
        """
        with (self.folder / "recording" / "frames.csv").open() as file:
            rows = list(csv.DictReader(file))
        used = [int(row["hint"]) for row in rows]
        returns = [frame for frame in range(GAP, len(used) - 12) if used[frame] and not any(used[frame - GAP : frame])]
        assert len(returns) >= count
        for frame in returns:
            age = 8 * int(rows[frame]["ages"].split()[0])  # at its first use, ms
            since = age - float(rows[frame]["age_ms"])  # its arrival
            full = next(more for more in range(len(used)) if sum(used[frame : frame + more + 1]) >= RAMP)
            assert since + 8 * full < 100


@contextmanager
def live(folder: Path, bundle: Path, seconds: int, servers: list[str]) -> Iterator[Live]:
    session = Live(folder, bundle, seconds, servers)
    try:
        yield session
    finally:
        session.process.kill()
        session.process.wait()


@FIXED
def test_the_client_moves_from_a_draining_server_to_the_next_one(bundle: Path, tmp_path: Path) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    silent_server = f"127.0.0.1:{silent.getsockname()[1]}"  # accepts connections and never sends anything
    with silent, running_server(bundle) as first, running_server(bundle) as second:
        with live(tmp_path, bundle, 300, [silent_server, first.address, second.address]) as session:
            check_move(session, first, second)
        session.check_output(bundle)


def check_move(session: Live, first: Server, second: Server) -> None:
    session.wait_for_event(True, 0)
    session.wait_for_hints()
    count = len(session.lines)
    assert first.stop() == 0
    session.wait_for_event(False, count)
    session.wait_for_event(True, count)
    session.wait_for_hints()
    events = [line for line in session.lines if line["event"] == "server"]
    assert f"{first.address} shuts down; the client looks for another server" in [line["text"] for line in events]
    assert events[-1]["server"] == second.address
    assert session.end()["server"] == second.address


class Host:
    """A separate host: a network namespace behind a virtual cable, which the test can disconnect."""

    address = "10.77.0.2"

    def __init__(self, name: str) -> None:
        self.name = name
        self._ip("netns", "add", name)
        self._ip("link", "add", f"{name}0", "type", "veth", "peer", "name", f"{name}1")
        self._ip("link", "set", f"{name}1", "netns", name)
        self._ip("addr", "add", "10.77.0.1/24", "dev", f"{name}0")
        self._ip("link", "set", f"{name}0", "up")
        self._ip("-n", name, "addr", "add", f"{self.address}/24", "dev", f"{name}1")
        self.cable("up")

    def cable(self, state: str) -> None:
        self._ip("-n", self.name, "link", "set", f"{self.name}1", state)

    def close(self) -> None:
        self._ip("netns", "del", self.name)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def host() -> Iterator[Host]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace needs root and iproute2")
    host = Host(f"kb{os.getpid()}"[:12])
    yield host
    host.close()


@pytest.mark.slow
@FIXED
def test_the_loss_of_a_host_is_noticed_at_once_and_its_return_too(bundle: Path, host: Host, tmp_path: Path) -> None:
    serve = command(
        *("kb-server", "--host", host.address, "--insecure"),
        *("--port", 50051, "--bundle", bundle, "--until-stdin-ends"),
    )
    server = subprocess.Popen(
        ["ip", "netns", "exec", host.name, *serve], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None
        assert b"listening" in server.stdout.readline()
        with live(tmp_path, bundle, 120, [f"{host.address}:50051"]) as session:
            for _ in range(2):
                session.wait_for_hints()
                count, pulled = len(session.lines), time.monotonic()
                host.cable("down")
                session.wait_for_event(False, count)
                # Closing the old connection takes twice as long as noticing its loss, and nothing must wait for that.
                assert time.monotonic() - pulled < 4
                count = len(session.lines)
                host.cable("up")
                session.wait_for_event(True, count)
            session.wait_for_hints()
            session.end()
        session.check_output(bundle)
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not Path("/proc").exists(), reason="counts threads in /proc")
def test_the_server_is_killed_restarted_and_frozen(bundle: Path, tmp_path: Path) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    with live(tmp_path, bundle, 600, [address]) as session:
        session.wait_for_event(False, 0)  # at first there is no server
        before = 0, 0.0
        for number in range(5):
            count = len(session.lines)
            with running_server(bundle, "--port", port) as server:
                session.wait_for_event(True, count)
                session.wait_for_hints()
                if number == 0:
                    before = threads(session.process.pid), memory_mib(session.process.pid)
                if number == 2:
                    count = len(session.lines)
                    server.process.send_signal(signal.SIGSTOP)
                    session.wait_for_event(False, count)
                    texts = [line["text"] for line in session.lines[count:] if line["event"] == "server"]
                    assert "the server stopped answering" in texts[0]
                    server.process.send_signal(signal.SIGCONT)
                    session.wait_for_event(True, count)
                    session.wait_for_hints()
                count = len(session.lines)
                server.process.kill()
                session.wait_for_event(False, count)
        with running_server(bundle, "--port", port):
            session.wait_for_hints()
            # gRPC keeps some spare threads.
            assert threads(session.process.pid) <= before[0] + 4
            assert memory_mib(session.process.pid) < before[1] + 24
            session.end()
        session.check_output(bundle)
        if bundle.name == "arrival":
            session.check_returns(5)
