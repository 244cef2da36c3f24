"""Hostile peers, each a process of its own: ``python -m tests.attackers KIND ADDRESS SECONDS [BUNDLE]``. Loopback only.

They speak HTTP/2 by hand, since no library sends what these send. A connection that the server ends is opened anew.
"""

import argparse
import contextlib
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from knowledge_boosting.common.addresses import is_loopback
from knowledge_boosting.models.manifest import read_manifest
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import PROTOCOL_VERSION, SERVICE_NAME
from tests.processes import environment

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STREAM_HINTS = f"/{SERVICE_NAME}/StreamHints"
WATCH = "/grpc.health.v1.Health/Watch"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING = 0, 1, 3, 4, 6
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_CANCEL = struct.pack(">I", 8)
# Another address of this machine than that of honest devices, for whoever counts by host.
_FROM = ("127.0.0.2", 0) if sys.platform == "linux" else None
_STREAMS = 1000  # a second, of rapid reset


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """An HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def settings(**values: int) -> bytes:
    """A frame of settings, by name."""
    numbers = {"window": 4, "concurrent": 3}
    return frame(_SETTINGS, 0, 0, b"".join(struct.pack(">HI", numbers[name], value) for name, value in values.items()))


def headers(path: str) -> bytes:
    """The header block of a gRPC call, without compression."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    block = b"\x83\x86\x04" + text(path) + b"\x01" + text("localhost")
    for name, value in (("content-type", "application/grpc"), ("te", "trailers")):
        block += b"\x00" + text(name) + text(value)
    return block


def call(stream: int, path: str, *messages: bytes, end: bool = False) -> bytes:
    """The frames that begin a call and send its messages."""
    frames = frame(_HEADERS, _END_HEADERS, stream, headers(path))
    for number, message in enumerate(messages, start=1):
        last = end and number == len(messages)
        frames += frame(_DATA, _END_STREAM * last, stream, b"\0" + struct.pack(">I", len(message)) + message)
    return frames


def connect(address: str, **initial: int) -> socket.socket:
    """A connection on which HTTP/2 has begun."""
    host, _, port = address.rpartition(":")
    assert is_loopback(host), "attackers attack this machine alone"
    connection = socket.create_connection((host, int(port)), 5, _FROM)
    connection.sendall(PREFACE + settings(**initial) + frame(_SETTINGS, _ACK, 0))
    return connection


def drain(connection: socket.socket) -> None:
    """Throw away what has come.

    Raises:
        ConnectionError: the server has ended the connection.
    """
    connection.setblocking(False)
    try:
        while True:
            if not connection.recv(65536):
                raise ConnectionResetError
    except BlockingIOError:
        pass
    finally:
        connection.settimeout(5)


def watch(address: str) -> Iterator[None]:
    """Health watchers that take no answer."""
    connection = connect(address, window=0)
    for stream in range(1, 41, 2):
        connection.sendall(call(stream, WATCH, b"", end=True))
    while True:
        drain(connection)
        time.sleep(0.1)
        yield


def pings(address: str) -> Iterator[None]:
    """Ping frames before any call, ten thousand at a time; nobody reads the answers but to go on."""
    connection, burst = connect(address), frame(_PING, 0, 0, bytes(8)) * 10_000
    while True:
        connection.sendall(burst)
        drain(connection)
        yield


def settings_flood(address: str) -> Iterator[None]:
    """Frames of settings, each of which wants an answer."""
    connection, burst = connect(address), settings(window=65535) * 5_000
    while True:
        connection.sendall(burst)
        drain(connection)
        yield


def resets(address: str) -> Iterator[None]:
    """Calls that are taken back at once, a thousand a second."""
    connection, stream, began, made = connect(address), 1, time.monotonic(), 0
    while True:
        due = int((time.monotonic() - began) * _STREAMS)
        burst = bytearray()
        while made < due:
            burst += call(stream, STREAM_HINTS) + frame(_RESET, 0, stream, _CANCEL)
            stream, made = stream + 2, made + 1
        connection.sendall(burst)
        drain(connection)
        time.sleep(0.005)
        yield


def refusals(address: str) -> Iterator[None]:
    """Calls that are refused, as many as the server answers, each with a line in its log."""
    connection, stream = connect(address, window=2**20), 1
    wrong = pb.StreamHintsRequest(config=pb.SessionConfig(bundle_name="x" * 80)).SerializeToString()
    while True:
        burst = bytearray()
        for _ in range(20):
            burst += call(stream, STREAM_HINTS, wrong, end=True)
            stream += 2
        connection.sendall(burst)
        time.sleep(0.02)
        drain(connection)
        yield


def places(address: str, opening: bytes, audio: bytes) -> Iterator[None]:
    """Sessions with one frame of audio and no more for a long time, as many as can be had."""
    connection = connect(address, window=2**20)
    for stream in range(1, 41, 2):
        connection.sendall(call(stream, STREAM_HINTS, opening, audio))
    while True:
        drain(connection)
        time.sleep(0.1)
        yield


def openings(bundle: Path) -> tuple[bytes, bytes]:
    """The first two messages of a session."""
    manifest = read_manifest(bundle)
    model = manifest.model
    config = pb.SessionConfig(
        protocol_version=PROTOCOL_VERSION,
        bundle_id=manifest.id,
        sample_rate=model.framing.sample_rate,
        pcm_encoding=pb.PCM_ENCODING_S16LE,
        hint_encoding=pb.HINT_ENCODING_INT8,
    )
    silence = bytes(2 * model.microphones * model.framing.n_fft)
    audio = pb.AudioChunk(first_frame=0, pcm=silence)
    return tuple(  # type: ignore[return-value]
        request.SerializeToString()
        for request in (pb.StreamHintsRequest(config=config), pb.StreamHintsRequest(audio=audio))
    )


KINDS: dict[str, Callable[..., Iterator[None]]] = {
    "watch": watch,
    "pings": pings,
    "settings": settings_flood,
    "resets": resets,
    "refusals": refusals,
    "places": places,
}


def attack(kind: str, address: str, seconds: float, bundle: Path | None) -> int:
    """Attack for so many seconds; how often the connection was lost."""
    end, lost = time.monotonic() + seconds, 0
    extra = openings(bundle) if kind == "places" and bundle is not None else ()
    while time.monotonic() < end:
        try:
            for _ in KINDS[kind](address, *extra):
                if time.monotonic() >= end:
                    return lost
        except OSError:
            lost += 1
            time.sleep(0.01)
    return lost


@contextlib.contextmanager
def attacked(kinds: list[str], address: str, seconds: float, bundle: Path) -> Iterator[None]:
    """Around what happens meanwhile: one attacker of each kind, at most for so many seconds."""
    calls = [[sys.executable, "-m", "tests.attackers", kind, address, str(seconds), str(bundle)] for kind in kinds]
    attackers = [subprocess.Popen(arguments, env=environment()) for arguments in calls]
    try:
        yield
    finally:
        for attacker in attackers:
            attacker.terminate()
            attacker.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("address")
    parser.add_argument("seconds", type=float)
    parser.add_argument("bundle", type=Path, nargs="?")
    chosen = parser.parse_args()
    print(attack(chosen.kind, chosen.address, min(chosen.seconds, 120), chosen.bundle), flush=True)
