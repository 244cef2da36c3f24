"""A device that streams in real time during a test, and the check that a server is unchanged afterwards."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import grpc
import numpy as np

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import Samples, encode_pcm
from tests.golden_cases import TOLERANCE, worst
from tests.processes import PATIENCE, Server, descriptors, memory_mib, threads
from tests.remote_server.driver import Device, Material, message

_MAX_UNANSWERED = 90  # chunks; a device does not send more without an answer


class RealTimeDevice:
    """One session that sends a chunk every 8 ms. It repeats the mixture of the material."""

    def __init__(self, server: Server, material: Material) -> None:
        self._material = material
        self._device = Device(server, material.opening(), timeout=None)
        self._device.started()
        self._hints: list[pb.Hint] = []
        self._sent, self._stop = 0, threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def assert_exact(self) -> None:
        """End the session, and check that all hints arrived in order with the correct values."""
        self._stop.set()
        self._threads[0].join()
        self._device.finish()
        self._threads[1].join(PATIENCE)
        assert self._device.call.code() is grpc.StatusCode.OK, self._device.call.details()
        assert [hint.frame for hint in self._hints] == list(range(self._sent))
        expected = self._material.offline_hints(self._samples(0, self._sent)[None])[0]
        assert worst(self._material.values(self._hints), expected) < TOLERANCE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._threads[0].join()
        self._device.close()

    def _samples(self, frame: int, chunks: int) -> Samples:
        """Return the samples ``[M, n]`` that complete ``chunks`` frames."""
        framing, mixture = self._material.manifest.model.framing, self._material.samples
        start = frame * framing.chunk + framing.lookahead if frame else 0
        end = (frame + chunks) * framing.chunk + framing.lookahead
        samples: Samples = np.take(mixture, np.arange(start, end) % mixture.shape[1], axis=1)
        return samples

    def _send(self) -> None:
        started = time.monotonic()
        while not self._stop.wait(max(0.0, started + 0.008 * self._sent - time.monotonic())):
            if self._sent - len(self._hints) < _MAX_UNANSWERED:
                self._device.send(message(self._sent, encode_pcm(self._samples(self._sent, 1), pb.PCM_ENCODING_F32LE)))
                self._sent += 1
            else:
                started += 0.008
                time.sleep(0.008)

    def _receive(self) -> None:
        try:
            for response in self._device.call:
                self._hints.append(response.hint)
        except grpc.RpcError:
            return  # assert_exact checks the status


@dataclass(frozen=True)
class Footprint:
    """The resources that a server uses."""

    descriptors: int
    threads: int
    memory_mib: float

    @classmethod
    def of(cls, server: Server) -> Self:
        pid = server.process.pid
        return cls(descriptors(pid), threads(pid), memory_mib(pid))

    def within(self, other: Self) -> bool:
        """Return whether this is at most the other one, with a tolerance for reserves of gRPC and the allocator."""
        return (
            self.descriptors <= other.descriptors
            and self.threads <= other.threads + 4
            and self.memory_mib < other.memory_mib + 24
        )


@contextmanager
def unharmed(server: Server, material: Material, sessions: int) -> Iterator[None]:
    """Check that the actions in this block do not harm a server with a number of slots.

    A device that streams in the meantime must get all its hints. Afterwards all slots must be free, and the server must
    not use more resources than before.
    """
    fill(server, material, sessions)
    before, seen = Footprint.of(server), len(server.log)
    with RealTimeDevice(server, material) as device:
        yield
        device.assert_exact()
    fill(server, material, sessions)
    deadline = time.monotonic() + PATIENCE
    while not (now := Footprint.of(server)).within(before):
        assert time.monotonic() < deadline, (before, now)
        time.sleep(0.05)
    assert not any("Traceback" in line for line in server.log[seen:])


def fill(server: Server, material: Material, sessions: int) -> None:
    """Open all sessions of a server at the same time, with one frame in each."""
    devices: list[Device] = []
    deadline = time.monotonic() + PATIENCE
    try:
        while len(devices) < sessions:
            device = Device(server, material.opening(), material.audio(0))
            try:
                device.started()
            except grpc.RpcError:  # the slot of an earlier session is not free yet
                assert time.monotonic() < deadline, (len(devices), device.call.details())
                device.close()
                time.sleep(0.02)
            else:
                devices.append(device)
        for device in devices:
            device.hints(1)
    finally:
        for device in devices:
            device.close()
