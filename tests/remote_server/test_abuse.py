"""Tests with random and incomplete input: it harms neither the server nor a device that streams in the meantime."""

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import SERVICE_NAME
from tests.processes import PATIENCE, Server, running_server
from tests.remote_server.driver import Device, Material, Request
from tests.remote_server.real_time import fill, unharmed

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")

SESSIONS = 64
REFUSALS = {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED"}
CALLS = 20  # concurrent calls
Case = list[bytes]  # the messages of a call


def scales(few: int, many: int) -> pytest.MarkDecorator:
    """Run a test with a small count, and with a large count as a long test."""
    long = pytest.param(many, marks=[pytest.mark.long, pytest.mark.timeout(1800)], id=f"{many}")
    return pytest.mark.parametrize("count", [pytest.param(few, id=f"{few}"), long])


@pytest.fixture(scope="module")
def server(golden_bundle: Callable[[str], Path], ss: Material) -> Iterator[Server]:
    """A server after a warm-up with all kinds of input, so that its resources no longer grow."""
    with running_server(golden_bundle("ss_delay6_compression2"), "--max-sessions", SESSIONS) as running:
        fill(running, ss, SESSIONS)
        replay(running, recorded_session(running, ss), 4 * CALLS)
        fuzz(mangled(ss), running, 2 * CALLS)
        yield running


def outcomes(server: Server, cases: list[Case]) -> list[tuple[str, list[pb.StreamHintsResponse]]]:
    """Make calls concurrently. Return the status and the responses of each."""
    results = []
    with grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        method: grpc.StreamStreamMultiCallable[bytes, pb.StreamHintsResponse] = channel.stream_stream(
            f"/{SERVICE_NAME}/StreamHints", response_deserializer=pb.StreamHintsResponse.FromString
        )
        for call in [method(iter(case), timeout=PATIENCE) for case in cases]:
            responses = []
            try:
                for response in call:
                    responses.append(response)
            except grpc.RpcError:
                pass
            results.append((call.code().name, responses))
    return results


def check(server: Server, cases: list[Case]) -> None:
    """Check that every call is answered up to its first invalid message, and then refused."""
    for status, responses in outcomes(server, cases):
        assert status in REFUSALS | {"OK"}
        assert [response.WhichOneof("response") for response in responses[:1]] in ([], ["started"])
        frames = [response.hint.frame for response in responses[1:]]
        assert frames == list(range(frames[0], frames[0] + len(frames))) if frames else True
        assert status != "OK" or responses


def fuzz(cases: st.SearchStrategy[Case], server: Server, messages: int) -> None:
    """Send at least a number of messages. The calls of an example are concurrent."""
    sent = 0

    @settings(
        max_examples=messages // CALLS,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(cases, min_size=CALLS, max_size=CALLS))
    def example(drawn: list[Case]) -> None:
        nonlocal sent
        sent += sum(map(len, drawn))
        check(server, drawn)

    example()
    assert sent >= messages


def any_of(kind: str) -> st.SearchStrategy[Any]:
    """A strategy for the values of a field, including unusual ones."""
    return {
        "uint32": st.integers(0, 2**32 - 1),
        "int64": st.integers(-(2**63), 2**63 - 1),
        "int32": st.integers(-(2**31), 2**31 - 1),
        "string": st.text(max_size=40),
        "floats": st.lists(st.floats(width=32), max_size=300),
    }[kind]


CONFIG = {
    "protocol_version": "uint32",
    "bundle_name": "string",
    "bundle_id": "string",
    "sample_rate": "uint32",
    "speaker_embedding": "floats",
    "pcm_encoding": "int32",
    "hint_encoding": "int32",
    "first_frame": "int64",
}


@st.composite
def structured(draw: st.DrawFn, ss: Material) -> Case:
    """A session with at most one changed field in its configuration, and one invalid message among its audio."""
    field = draw(st.sampled_from(["", "", "", *CONFIG]))
    requests = [ss.opening(**{field: draw(any_of(CONFIG[field]))} if field else {})]
    frame = 0
    for chunks in draw(st.lists(st.integers(1, 3), max_size=6)):
        requests.append(ss.audio(frame, chunks))
        frame += chunks
    invalid = draw(
        st.one_of(
            st.builds(pb.AudioChunk, first_frame=any_of("int64"), pcm=st.binary(max_size=64)),
            st.builds(pb.AudioChunk, first_frame=st.just(frame), pcm=st.binary(max_size=64)),
            st.builds(
                lambda unit, n: pb.AudioChunk(first_frame=frame, pcm=unit * n),
                st.binary(min_size=8, max_size=8),
                st.integers(0, 700),
            ),
            st.just(None),
        )
    )
    index = draw(st.integers(0, len(requests)))
    requests.insert(index, Request(audio=invalid) if invalid else draw(st.sampled_from([Request(), requests[0]])))
    return [request.SerializeToString() for request in requests]


@st.composite
def mangled(draw: st.DrawFn, ss: Material) -> Case:
    """The bytes of a session, with bytes of one message changed, removed, inserted or replaced."""
    messages = [request.SerializeToString() for request in (ss.opening(), ss.audio(0), ss.audio(1), ss.audio(2, 2))]
    index = draw(st.integers(0, len(messages) - 1))
    content = bytearray(messages[index])
    head = min(len(content), 80)  # this part has the fields, and the rest only samples
    for _ in range(draw(st.integers(1, 4))):
        offset = draw(st.integers(0, max(0, min(head, len(content) - 1))))
        match draw(st.sampled_from(["flip", "cut", "insert", "replace"])):
            case "flip" if content:
                content[offset] ^= draw(st.integers(1, 255))
            case "cut":
                del content[offset : offset + draw(st.integers(1, 2000))]
            case "insert":
                content[offset:offset] = draw(st.binary(min_size=1, max_size=40))
            case "replace":
                content = bytearray(draw(st.binary(max_size=200)))
    messages[index] = bytes(content)
    return messages


@scales(400, 20_000)
def test_random_messages(count: int, server: Server, ss: Material) -> None:
    with unharmed(server, ss, SESSIONS):
        fuzz(structured(ss), server, count)


@scales(400, 20_000)
def test_random_bytes(count: int, server: Server, ss: Material) -> None:
    with unharmed(server, ss, SESSIONS):
        fuzz(mangled(ss), server, count)


def connected(server: Server) -> socket.socket:
    host, port = server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def recorded_session(server: Server, ss: Material) -> bytes:
    """Record all bytes, including HTTP/2, that a device sends for a session of a few frames."""
    record = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def forward(source: socket.socket, target: socket.socket, keep: bytearray | None) -> None:
            while content := source.recv(65536):
                if keep is not None:
                    keep += content
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)

        def between() -> None:
            with listener.accept()[0] as device, connected(server) as target:
                back = threading.Thread(target=forward, args=(target, device, None))
                back.start()
                forward(device, target, record)
                back.join()

        thread = threading.Thread(target=between)
        thread.start()
        recorder = Server(server.process, f"127.0.0.1:{listener.getsockname()[1]}")
        with Device(recorder, ss.opening(), *(ss.audio(frame) for frame in range(5))) as device:
            device.started()
            device.hints(5)
            session = bytes(record)
        thread.join(PATIENCE)
    return session


def replay(server: Server, session: bytes, count: int) -> None:
    """Send random prefixes of a session on concurrent connections, and close half of these with a reset."""
    rng = random.Random(0)
    for _ in range(count // CALLS):
        devices = [connected(server) for _ in range(CALLS)]
        for device in devices:
            device.sendall(session[: rng.randrange(len(session) + 1)])
        time.sleep(rng.uniform(0, 0.02))
        for device in devices:
            if rng.random() < 0.5:
                device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            device.close()


@scales(100, 1000)
def test_devices_that_vanish(count: int, server: Server, ss: Material) -> None:
    session = recorded_session(server, ss)
    with unharmed(server, ss, SESSIONS):
        replay(server, session, count)


@scales(40, 200)
def test_silent_connections(count: int, server: Server, ss: Material) -> None:
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    rng = random.Random(0)
    with unharmed(server, ss, SESSIONS):
        silent = [connected(server) for _ in range(count)]
        for connection in silent[count // 2 :]:
            connection.sendall(preface[: rng.randrange(1, len(preface) + 1)])
        # Other devices can still use all remaining slots.
        fill(server, ss, SESSIONS - 1)
        for connection in silent:
            connection.close()


@scales(5, 50)
def test_devices_that_never_read_their_hints(count: int, server: Server, ss: Material) -> None:
    with unharmed(server, ss, SESSIONS):
        audio = [ss.audio(frame) for frame in range(len(ss.hints))]
        devices = [Device(server, ss.opening(), *audio) for _ in range(count)]
        time.sleep(2)
        for device in devices:
            device.close()
