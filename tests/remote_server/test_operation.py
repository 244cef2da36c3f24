"""Tests for the operation of a server: metrics, draining, changes of bundles, and several processes."""

import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import SERVICE_NAME
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub
from knowledge_boosting.remote_server.workers import run_workers
from tests.golden_cases import TOLERANCE, Golden, worst
from tests.processes import PATIENCE, Server, command, environment, free_port, refusal, running_server, threads
from tests.remote_server.driver import Device, Material, material, wait_until_free

SS, TSE = "ss_delay6_compression2", "tse_delay6"


def metrics(port: int) -> dict[str, float]:
    """Return the samples of the metrics, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def health(server: Server) -> int:
    with grpc.insecure_channel(server.address) as channel:
        request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        return int(health_pb2_grpc.HealthStub(channel).Check(request, timeout=PATIENCE).status)  # type: ignore[attr-defined]


def described(server: Server, bundle: str = "") -> pb.DescribeModelResponse:
    with grpc.insecure_channel(server.address) as channel:
        return HintServiceStub(channel).DescribeModel(pb.DescribeModelRequest(bundle=bundle), timeout=PATIENCE)


def test_metrics_count_sessions_frames_and_refusals(golden_bundle: Callable[[str], Path], ss: Material) -> None:
    port = free_port()
    label = f'{{bundle="{SS}"}}'
    with running_server(golden_bundle(SS), "--metrics-port", port) as server:
        with Device(server, ss.opening(), ss.audio(0, 5)) as device:
            device.started()
            device.hints(5)
            eventually(lambda: metrics(port)[f"kb_sessions{label}"] == 1)
            with Device(server, ss.opening(bundle_id="another")) as refused:
                assert refused.end()[0] == "FAILED_PRECONDITION"
            device.finish()
            assert device.end()[0] == "OK"
        eventually(lambda: metrics(port)[f"kb_sessions{label}"] == 0)
        counted = metrics(port)
    assert counted[f"kb_frames_total{label}"] == 5
    assert counted[f"kb_slots{label}"] == 16
    assert counted[f"kb_queue_seconds_count{label}"] == 5
    assert 1 <= counted[f"kb_step_seconds_count{label}"] <= 5
    assert counted[f'kb_sessions_ended_total{{bundle="{SS}",status="OK"}}'] == 1
    assert counted['kb_refused_total{status="FAILED_PRECONDITION"}'] == 1


def test_late_hints_have_no_values(golden_bundle: Callable[[str], Path], ss: Material) -> None:
    port = free_port()
    label = f'{{bundle="{SS}"}}'
    with running_server(golden_bundle(SS), "--metrics-port", port) as server:
        # All frames are sent at once, so that most of them wait longer than a millisecond.
        with Device(server, ss.opening(hint_deadline_ms=1), ss.audio(0, 60)) as device:
            device.started()
            eventually(lambda: metrics(port)[f"kb_frames_total{label}"] == 60)
            device.finish()
            hints = device.hints(60)
            assert device.end()[0] == "OK"
        late = metrics(port)[f"kb_hints_late_total{label}"]
    assert [hint.frame for hint in hints] == list(range(60))
    assert late > 30
    assert sum(not hint.payload for hint in hints) == late
    sent = [hint for hint in hints if hint.payload]
    if sent:
        assert worst(ss.values(sent), ss.hints[[hint.frame for hint in sent]]) < TOLERANCE


def test_a_draining_server_notifies_its_devices_and_gives_them_time(
    golden_bundle: Callable[[str], Path], ss: Material
) -> None:
    with running_server(golden_bundle(SS), "--drain-seconds", 5) as server:
        with Device(server, ss.opening(), ss.audio(0)) as stays, Device(server, ss.opening(), ss.audio(0)) as goes:
            for device in (stays, goes):
                device.started()
                device.hints(1)
            assert health(server) == health_pb2.HealthCheckResponse.SERVING
            started = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            for device in (stays, goes):
                response = next(device.call)
                assert response.WhichOneof("response") == "draining"
                assert response.draining.seconds == 5
            assert health(server) == health_pb2.HealthCheckResponse.NOT_SERVING
            with Device(server, ss.opening()) as newcomer:
                assert newcomer.end() == ("UNAVAILABLE", "the server is shutting down; try another server")
            # Until they leave, the devices are served as before.
            goes.send(ss.audio(1))
            assert goes.hints(1)[0].frame == 1
            goes.finish()
            assert goes.end()[0] == "OK"
            assert stays.end() == ("UNAVAILABLE", "the server is shutting down; try another server")
            assert time.monotonic() - started > 4.5
        assert server.process.wait(timeout=PATIENCE) == 0


def test_a_session_that_opens_when_the_server_begins_to_drain_is_refused(
    golden_bundle: Callable[[str], Path], ss: Material
) -> None:
    with running_server(golden_bundle(SS), "--drain-seconds", 20) as server:
        with Device(server, ss.opening()) as here, Device(server) as coming:
            here.started()
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_log("server_draining")
            coming.send(ss.opening())
            with pytest.raises(grpc.RpcError) as refused:
                coming.started()
            assert cast("grpc.Call", refused.value).code() is grpc.StatusCode.UNAVAILABLE
            here.finish()
        assert server.process.wait(PATIENCE) == 0


def test_sighup_during_the_start_does_not_end_a_server(golden_bundle: Callable[[str], Path]) -> None:
    process = subprocess.Popen(
        command("kb-server", "--bundle", golden_bundle(SS), "--port", 0, "--device", "cpu", "--until-stdin-ends"),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        status = Path(f"/proc/{process.pid}/status")
        # The signal is ignored or handled, so that it no longer ends the process.
        eventually(lambda: bool(int(_field(status, "SigIgn"), 16) & 1 or int(_field(status, "SigCgt"), 16) & 1))
        process.send_signal(signal.SIGHUP)
        assert "listening on" in process.stdout.readline()
    finally:
        process.terminate()
        assert process.wait(PATIENCE) == 0


def _field(status: Path, name: str) -> str:
    return next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(f"{name}:"))


def test_copies_of_a_bundle_are_served_once(golden_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(golden_bundle(SS), tmp_path / name)
    with running_server(tmp_path) as server:
        count = threads(server.process.pid)
        assert list(described(server).bundles) == [SS]
        # With an invalid bundle in the folder, nothing changes, and the failed attempt leaves no resources behind.
        shutil.copytree(golden_bundle(TSE), tmp_path / "another")
        shutil.copytree(golden_bundle(TSE), tmp_path / "broken")
        (tmp_path / "broken" / "large.safetensors").write_bytes(b"")
        manifest = tmp_path / "broken" / "bundle.json"
        manifest.write_text(re.sub(r'"id": "..', '"id": "00', manifest.read_text()))
        for _ in range(3):
            seen = len(server.log)
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda before=seen: any("reload_failed" in line for line in server.log[before:]))  # type: ignore[misc]
        assert list(described(server).bundles) == [SS]
        assert threads(server.process.pid) <= count + 2  # the threads of the pool that reads files


def test_a_server_serves_two_bundles(golden_bundle: Callable[[str], Path], ss: Material, tse: Material) -> None:
    with running_server(golden_bundle(SS), "--bundle", golden_bundle(TSE)) as server:
        for stream in (ss, tse):
            with Device(server, stream.opening(), stream.audio(0)) as device:
                device.started()
                assert device.hints(1)[0].frame == 0
        assert described(server).bundle_name == SS
        assert described(server, TSE).task == "tse"
        assert described(server, tse.manifest.id).bundle_name == TSE
        with pytest.raises(grpc.RpcError, match="'nonsense' is unknown; give one of"):
            described(server, "nonsense")


def test_bundles_are_added_and_removed_without_an_effect_on_sessions(
    golden: Callable[[str], Golden], golden_bundle: Callable[[str], Path], tmp_path: Path, ss: Material
) -> None:
    folder = tmp_path / "bundles"
    shutil.copytree(golden_bundle(SS), folder / "first")
    with running_server(folder) as server, Device(server, ss.opening(), ss.audio(0)) as device:
        device.started()
        device.hints(1)
        shutil.copytree(golden_bundle(TSE), folder / "second")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log(f'"event": "reloaded", "added": \\["{TSE}"\\]')
        new = material(golden_bundle(TSE), golden(TSE))
        with Device(server, new.opening(), new.audio(0)) as other:
            other.started()
            other.hints(1)
        # A removed bundle accepts no new sessions, and serves the open ones to their end.
        shutil.rmtree(folder / "first")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log(f'"retired": \\["{SS}"\\]')
        device.send(ss.audio(1))
        assert device.hints(1)[0].frame == 1
        with Device(server, ss.opening()) as late:
            assert late.end()[0] == "FAILED_PRECONDITION"
        # A bundle that cannot be loaded changes nothing.
        shutil.copytree(golden_bundle("ss_delay0"), folder / "third")
        (folder / "third" / "large.safetensors").write_bytes(b"")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for_log('"event": "reload_failed".*digest differs')
        device.send(ss.audio(2))
        assert device.hints(1)[0].frame == 2


def test_workers_share_a_port_and_a_killed_one_is_replaced(golden_bundle: Callable[[str], Path], ss: Material) -> None:
    with running_server(golden_bundle(SS), "--workers", 2) as server:
        server.wait_for_log('"event": "server_started"')
        eventually(lambda: sum('"event": "server_started"' in line for line in server.log) == 2)
        workers = children(server.process.pid)
        assert len(workers) == 2
        wait_until_free(server, ss)
        os.kill(workers[0], signal.SIGKILL)
        server.wait_for_log("starting another")
        eventually(lambda: sum('"event": "server_started"' in line for line in server.log) == 3)
        for _ in range(8):
            with Device(server, ss.opening(), ss.audio(0)) as device:
                device.started()
                assert device.hints(1)[0].frame == 0
        assert server.stop() == 0
        assert not any(Path(f"/proc/{worker}").exists() for worker in (*workers, *children(server.process.pid)))


def test_workers_report_a_fault_of_their_arguments_once() -> None:
    assert "nonesuch: no bundle of that name" in refusal(
        "kb-server", "--bundle", "nonesuch", "--workers", 3, "--port", 0
    )


def children(parent: int) -> list[int]:
    processes = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            processes.append(int(status.parent.name))
    return processes


def test_a_signal_while_workers_start_reaches_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the second of three workers starts. This one is told to stop, and the third does not start."""
    started: list[Any] = []
    deadline = time.monotonic() + PATIENCE

    class Worker:
        def __init__(self, *_: object, **__: object) -> None:
            started.append(self)
            self.stopped = False
            if len(started) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        def send_signal(self, number: int) -> None:
            self.stopped = self.stopped or number == signal.SIGTERM

        def terminate(self) -> None:
            self.send_signal(signal.SIGTERM)

        def wait(self, timeout: float) -> int:
            if not self.stopped:
                assert time.monotonic() < deadline
                time.sleep(timeout)
                raise subprocess.TimeoutExpired("worker", timeout)
            return 0

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    monkeypatch.setattr(subprocess, "Popen", Worker)
    try:
        with socket.create_server(("127.0.0.1", 0), reuse_port=True) as listening:
            assert run_workers(3, "127.0.0.1", listening.getsockname()[1], []) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert [worker.stopped for worker in started] == [True, True]


def test_auto_measures_the_number_of_sessions(golden_bundle: Callable[[str], Path]) -> None:
    with running_server(golden_bundle(SS), "--max-sessions", "auto") as server:
        started = server.wait_for_log('"event": "server_started"')
        measured = int(re.search(rf'"{SS}": (\d+)', started)[1])  # type: ignore[index]
        assert 1 <= measured <= 64
        assert described(server).max_sessions == measured
