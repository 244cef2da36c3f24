"""Tests for the hint service on a Ray cluster: one address for replicas that start, stop and fail."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from knowledge_boosting.device_client.hints.reconnecting import LiveHints, ServerEvent
from knowledge_boosting.device_client.hints.stream import Encodings
from knowledge_boosting.models.manifest import read_manifest
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub
from tests.golden_cases import TOLERANCE, Golden, worst
from tests.remote_server.driver import Device, Material, material
from tests.remote_server.ray_cluster import PATIENCE, RayCluster, replica_processes, running_cluster

pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
pytestmark = pytest.mark.slow

SS = "ss_delay6_compression2"
DEVICES = 16
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "target_ongoing_requests": 12,
    "upscale_delay_s": 1,
    "downscale_delay_s": 8,
    "look_back_period_s": 2,
    "metrics_interval_s": 0.5,
}
ATTEMPTS = 3
# A machine with few cores cannot run all live sessions in real time. So they run at a quarter of the pace of a device,
# with a burst of frames every 16 ticks.
BURST, TICK, TICKS = 4, 0.02, 16  # frames, seconds, ticks


@pytest.fixture(scope="module")
def bundle(golden_bundle: Callable[[str], Path]) -> Path:
    return golden_bundle(SS)


@pytest.fixture(scope="module")
def case(bundle: Path, golden: Callable[[str], Golden]) -> Material:
    return material(bundle, golden(SS))


@pytest.fixture(scope="module")
def cluster(bundle: Path) -> Iterator[RayCluster]:
    with running_cluster(bundle, **SCALING) as cluster:
        yield cluster


class Live:
    """The live session of a device, on a thread, and the events of its connection."""

    def __init__(self, address: str, bundle: Path) -> None:
        self._manifest = read_manifest(bundle)
        self._hints = LiveHints([address], self._manifest, encodings=Encodings())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.events: list[tuple[float, ServerEvent]] = []
        self.hint_times: list[float] = []  # when hints arrived, on time or late
        self._hints.start()
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether hints arrive."""
        return bool(self.events) and self.events[-1][1].connected

    @property
    def moved(self) -> bool:
        """Whether its replica announced its shutdown, or ended the session for that reason."""
        texts = "shuts down; the client looks", "UNAVAILABLE: the server is shutting down"
        return any(text in event.text for _, event in self.events for text in texts)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._hints.close()

    def _run(self) -> None:
        model = self._manifest.model
        chunk, lookahead = model.framing.chunk, model.framing.lookahead
        frame, tick, late = 0, 0, 0
        while not self._closed.wait(TICK):
            if self._hints.late > late:
                late = self._hints.late
                self.hint_times.append(time.monotonic())
            while self._hints.events:
                self.events.append((time.monotonic(), self._hints.events.popleft()))
            tick += 1
            if tick % TICKS:
                continue
            for _ in range(BURST):
                samples = np.zeros((model.microphones, chunk if frame else chunk + lookahead), np.float32)
                self._hints.send(frame, samples, time.perf_counter_ns())
                if self._hints.take(frame, time.perf_counter_ns()):
                    self.hint_times.append(time.monotonic())
                frame += 1


@contextmanager
def live_sessions(cluster: RayCluster, bundle: Path, count: int) -> Iterator[list[Live]]:
    """Open live sessions, and wait until all of them get hints."""
    with ExitStack() as stack:
        sessions = []
        for _ in range(count):
            sessions.append(Live(cluster.server.address, bundle))
            stack.callback(sessions[-1].close)
        cluster.wait_for("live sessions", lambda: all(session.connected for session in sessions))
        yield sessions


@contextmanager
def open_sessions(cluster: RayCluster, case: Material, count: int) -> Iterator[list[Device]]:
    """Open sessions, and wait until all of them have started."""
    with ExitStack() as stack:
        devices = [stack.enter_context(Device(cluster.server, case.opening(), timeout=None)) for _ in range(count)]
        for device in devices:
            device.started()
        yield devices


def test_each_method_can_be_called_at_the_common_address(cluster: RayCluster, case: Material) -> None:
    with grpc.insecure_channel(cluster.server.address) as channel:
        stub = HintServiceStub(channel)
        answer = stub.DescribeModel(pb.DescribeModelRequest(), timeout=PATIENCE)
        assert (answer.bundle_name, answer.bundle_id) == (case.manifest.name, case.manifest.id)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Enroll(pb.EnrollRequest(sample_rate=8000), timeout=PATIENCE)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "sample_rate: is 8000" in str(refused.value.details())
    with Device(cluster.server, case.opening(bundle_id="another")) as device:
        status, details = device.end()
    assert status == "FAILED_PRECONDITION"
    assert case.manifest.id in details


def test_many_sessions_start_a_second_replica_and_both_give_the_golden_hints(
    cluster: RayCluster, case: Material
) -> None:
    with open_sessions(cluster, case, DEVICES):
        assert list(cluster.sessions().values()) == [DEVICES]
        cluster.wait_for_replicas(2)
    with open_sessions(cluster, case, DEVICES) as devices:
        spread = list(cluster.sessions().values())
        assert sum(spread) == DEVICES
        assert min(spread) >= DEVICES // 4, spread
        for frame in range(len(case.hints)):
            for device in devices:
                device.send(case.audio(frame))
        for device in devices:
            device.finish()
            hints = device.hints(len(case.hints))
            assert [hint.frame for hint in hints] == list(range(len(case.hints)))
            assert worst(case.values(hints), case.hints) < TOLERANCE
            assert device.end()[0] == "OK"


def test_the_sessions_of_a_killed_replica_get_hints_from_the_other_one(
    cluster: RayCluster, case: Material, bundle: Path
) -> None:
    with open_sessions(cluster, case, DEVICES - 1):
        cluster.wait_for_replicas(2)
    with live_sessions(cluster, bundle, DEVICES) as sessions:
        assert min(cluster.sessions().values()) >= DEVICES // 4
        before = [len(session.events) for session in sessions]
        killed = time.monotonic()
        os.kill(replica_processes()[0], signal.SIGKILL)
        cluster.wait_for("a loss", lambda: any(not session.connected for session in sessions))
        cluster.wait_for("hints for all", lambda: all(session.connected for session in sessions))
        lost = [session for session, seen in zip(sessions, before, strict=True) if len(session.events) > seen]
        assert DEVICES // 4 <= len(lost) <= DEVICES - DEVICES // 4
        for session in lost:
            lost_at = next(at for at, event in session.events if at > killed and not event.connected)
            # The third replica takes a core from the second one while it starts. So hints can be late, but they arrive.
            assert any(at > lost_at for at in session.hint_times), session.events
        cluster.wait_for("a new process", lambda: len(replica_processes()) == 2)
        cluster.wait_for_replicas(2)


def test_the_sessions_of_a_replica_that_is_not_needed_move_to_the_other_one(
    cluster: RayCluster, case: Material, bundle: Path
) -> None:
    # On a busy machine, sessions without hints for too long open new ones. Then the replica that stops can have no
    # session that could move.
    assert any(_sessions_move(cluster, case, bundle) for _ in range(ATTEMPTS))


def _sessions_move(cluster: RayCluster, case: Material, bundle: Path) -> bool:
    with open_sessions(cluster, case, DEVICES - 1):
        cluster.wait_for_replicas(2)
    with live_sessions(cluster, bundle, DEVICES // 2) as sessions:
        assert len(cluster.sessions()) == 2
        cluster.wait_for("one process", lambda: len(replica_processes()) == 1)
        cluster.wait_for("hints for all", lambda: all(session.connected for session in sessions))
        return any(session.moved for session in sessions)
