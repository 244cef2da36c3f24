"""Tests for the limits of a server, and for the refusals when a device exceeds them."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import grpc
import pytest

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub
from tests.processes import PATIENCE, Server, refusal_here, running_server
from tests.remote_server.driver import Device, Material, Request, Witness, message

CHUNK_SECONDS = 0.008


def server_of(bundle: Path, **limits: float) -> AbstractContextManager[Server]:
    flags = [part for name, value in limits.items() for part in ("--limit", f"{name}={value}")]
    return running_server(bundle, *flags)


@pytest.fixture(scope="module")
def bundle(golden_bundle: Callable[[str], Path]) -> Path:
    return golden_bundle("ss_delay6_compression2")


@pytest.fixture(scope="module")
def limited(bundle: Path) -> Iterator[Server]:
    """A server with low limits for everything except time."""
    with server_of(
        bundle, message_bytes=40_000, chunks=30, sessions_per_peer=3, enrollment_seconds=2, enrollments_per_minute=1
    ) as server:
        yield server


@pytest.fixture(scope="module")
def impatient(bundle: Path) -> Iterator[Server]:
    """A server with low limits for time."""
    with server_of(bundle, speed=0, config_seconds=4, idle_seconds=1.5, unread_seconds=1) as server:
        yield server


@pytest.fixture(scope="module")
def slow(bundle: Path) -> Iterator[Server]:
    """A server that accepts audio at up to twice real time."""
    with server_of(bundle, speed=2) as server:
        yield server


@pytest.fixture
def witness(limited: Server, ss: Material) -> Iterator[Witness]:
    """A session within all limits."""
    witness = Witness(limited, ss)
    yield witness
    witness.assert_exact()
    witness.close()


def ended(server: Server, *requests: Request) -> tuple[str, str]:
    with Device(server, *requests) as device:
        return device.end()


@pytest.mark.usefixtures("witness")
def test_a_message_above_the_maximum_size_ends_the_session(limited: Server) -> None:
    status, details = ended(limited, message(0, bytes(50_000)))
    assert status == "RESOURCE_EXHAUSTED"
    assert "larger than max" in details


@pytest.mark.usefixtures("witness")
def test_a_message_with_too_many_chunks_ends_the_session(limited: Server, ss: Material) -> None:
    with Device(limited, ss.opening(), ss.audio(0, 30), ss.audio(30, 31)) as device:
        device.started()
        assert len(device.hints(30)) == 30
        assert device.end() == ("INVALID_ARGUMENT", "audio.pcm: has 31 chunks, must have at most 30")


def test_a_call_without_a_configuration_ends(impatient: Server) -> None:
    assert ended(impatient) == ("INVALID_ARGUMENT", "request: no config arrived within 4 s")


def test_a_session_without_audio_ends(impatient: Server, ss: Material) -> None:
    status, details = ended(impatient, ss.opening(), ss.audio(0))
    assert (status, details.split(";")[0]) == ("DEADLINE_EXCEEDED", "no audio for 1.5 s")


def test_a_session_ends_after_its_maximum_duration(bundle: Path, ss: Material) -> None:
    with server_of(bundle, session_seconds=1) as server:
        started = time.monotonic()
        assert ended(server, ss.opening(), ss.audio(0)) == (
            "DEADLINE_EXCEEDED",
            "the maximum duration of a session is 1 s; open a new session",
        )
        assert time.monotonic() - started >= 1


def test_the_sessions_of_a_host_are_limited(limited: Server, witness: Witness, ss: Material) -> None:
    with Device(limited, ss.opening()) as second, Device(limited, ss.opening()) as third:
        second.started()
        third.started()
        with Device(limited, ss.opening()) as fourth:
            status, details = fourth.end()
            trailing = dict(fourth.call.trailing_metadata())
        assert status == "RESOURCE_EXHAUSTED"
        assert details.startswith("3 sessions of this host are already open")
        assert int(trailing["grpc-retry-pushback-ms"]) > 0
        witness.assert_exact()


def test_a_session_ends_if_its_hints_are_not_read(impatient: Server, ss: Material) -> None:
    silence = bytes(2 * 4 * 128)
    with Device(impatient, ss.opening()) as device:
        device.started()
        device.send(ss.audio(0))
        # This fills all buffers between server and device.
        device.send(*(message(frame, silence) for frame in range(1, 4000)))
        line = impatient.wait_for_log('"status": "RESOURCE_EXHAUSTED".*hints were not read')
    assert "hints were not read for 1 s" in line


@pytest.mark.usefixtures("witness")
def test_the_duration_and_the_rate_of_enrollments_are_limited(limited: Server) -> None:
    def enroll(seconds: float) -> tuple[str, str]:
        request = pb.EnrollRequest(
            sample_rate=16000, pcm_encoding=pb.PCM_ENCODING_S16LE, pcm=bytes(2 * int(16000 * seconds))
        )
        with grpc.insecure_channel(limited.address) as channel:
            with pytest.raises(grpc.RpcError) as error:
                HintServiceStub(channel).Enroll(request, timeout=PATIENCE)
            assert isinstance(error.value, grpc.Call)
            return error.value.code().name, error.value.details() or ""

    assert enroll(1.2) in (
        ("INVALID_ARGUMENT", "pcm: contains no speech that can be used (silence)"),
        (
            "UNIMPLEMENTED",
            "this server has no speaker encoder; install it on the server with "
            "pip install 'knowledge-boosting[enroll]'",
        ),
    )


def test_audio_faster_than_the_maximum_speed_waits(slow: Server, ss: Material) -> None:
    """One second of audio is accepted at once, and then twice real time."""
    frames, silence = 300, bytes(2 * 4 * 128)
    started = time.monotonic()
    with Device(slow, ss.opening(), ss.audio(0)) as device:
        device.send(*(message(frame, silence) for frame in range(1, frames)))
        device.finish()
        device.started()
        assert len(device.hints(frames)) == frames
        assert device.end()[0] == "OK"
    duration = time.monotonic() - started
    assert duration > (frames - 125) * CHUNK_SECONDS / 2 * 0.8


def test_a_pause_permits_no_larger_burst(slow: Server, ss: Material) -> None:
    """After a pause, too, only one second of audio is accepted at once."""
    frames, silence = 300, bytes(2 * 4 * 128)
    with Device(slow, ss.opening(), ss.audio(0)) as device:
        device.started()
        time.sleep(2)  # in this time, four seconds of audio would be accepted
        started = time.monotonic()
        device.send(*(message(frame, silence) for frame in range(1, frames)))
        device.finish()
        assert len(device.hints(frames)) == frames
        duration = time.monotonic() - started
    assert duration > (frames - 126) * CHUNK_SECONDS / 2 * 0.8


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("chunks", "must be NAME=VALUE with one of message_bytes, chunks"),
        ("chunk=3", "must be NAME=VALUE with one of message_bytes, chunks"),
        ("chunks=0", "chunks: Input should be greater than or equal to 1"),
        ("chunks=many", "chunks: Input should be a valid integer"),
        ("speed=nan", "speed: Input should be a finite number"),
    ],
)
def test_an_invalid_limit_is_refused(limit: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal_here("kb-server", capsys, "--limit", limit)
    assert line.startswith("--limit ")
    assert message in line
