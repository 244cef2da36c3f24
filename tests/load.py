"""Many devices in one process: sessions that send a chunk every 8 ms, and when their hints came.

A process may run one event loop with these, no more: grpc.aio stays with the first.
"""

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import grpc
import numpy as np
import torch
from numpy.typing import NDArray

from knowledge_boosting.models.checkpoint import build
from knowledge_boosting.models.config import FixedDelay, NetworkSize, Pair
from knowledge_boosting.models.manifest import Manifest
from knowledge_boosting.models.networks import write_bundle
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import HINT_ENCODINGS, PCM_ENCODINGS, PROTOCOL_VERSION, SERVICE_NAME, encode_pcm

# A bundle by the size of its networks, small and large: one that hardly computes, and the published one.
SIZES = {
    "tiny": (NetworkSize(channels=4, hidden=4, blocks=1), NetworkSize(channels=4, hidden=4, blocks=1)),
    "full-size": (
        NetworkSize(channels=16, hidden=16),
        NetworkSize(channels=64, hidden=64, heads=8, self_attention=True),
    ),
}
_SLOTS = 8  # of a chunk, in which sessions take turns to send
_REMEMBERED = 1024  # frames; an answer that is later than that counts as one of another frame
_GRACE = 1.0  # seconds after the last chunk in which hints still count


def write_random_bundle(folder: Path, size: str) -> Path:
    """An SS bundle of random weights whose hints are due after 6 frames."""
    small, large = SIZES[size]
    config = Pair(task="ss", small=small, large=large, boosting=FixedDelay(delay=6))
    torch.manual_seed(0)
    torch.set_num_threads(1)  # threads that wait for one another spin, and others want the cores
    write_bundle(folder / size, build(config), config, untrained=True, source="random", configuration="none")
    return folder / size


class DeviceAudio:
    """The requests of a session, the same for all: a second of noise, over and over."""

    def __init__(self, manifest: Manifest, *, pcm: str = "f32", hints: str = "f32") -> None:
        model, framing = manifest.model, manifest.model.framing
        self.chunk_seconds = framing.chunk_seconds
        self.deadline_ms = model.max_age_ms
        self.opening = pb.StreamHintsRequest(
            config=pb.SessionConfig(
                protocol_version=PROTOCOL_VERSION,
                bundle_name=manifest.name,
                bundle_id=manifest.id,
                sample_rate=framing.sample_rate,
                pcm_encoding=PCM_ENCODINGS[pcm],
                hint_encoding=HINT_ENCODINGS[hints],
            )
        ).SerializeToString()
        noise = np.random.default_rng(0).normal(0, 0.1, (model.microphones, framing.sample_rate)).astype(np.float32)
        starts = range(0, framing.sample_rate - framing.chunk + 1, framing.chunk)
        self._first = encode_pcm(noise[:, : framing.n_fft], PCM_ENCODINGS[pcm])
        self._chunks = [encode_pcm(noise[:, start : start + framing.chunk], PCM_ENCODINGS[pcm]) for start in starts]
        self.request = lru_cache(maxsize=_REMEMBERED)(self._request)  # sessions are at about the same frame

    def _request(self, frame: int) -> bytes:
        pcm = self._chunks[frame % len(self._chunks)] if frame else self._first
        return pb.StreamHintsRequest(audio=pb.AudioChunk(first_frame=frame, pcm=pcm)).SerializeToString()


def _floats() -> "array[float]":
    return array("f")


@dataclass(frozen=True)
class Arrivals:
    """Hints in the order they came, milliseconds each."""

    latency: "array[float]" = field(default_factory=_floats)  # from when the chunk was due to be sent
    lag: "array[float]" = field(default_factory=_floats)  # of this process in sending it
    queue: "array[float]" = field(default_factory=_floats)
    compute: "array[float]" = field(default_factory=_floats)

    def milliseconds(self) -> dict[str, NDArray[np.float32]]:
        """The arrays by name, and what is left of the latency: ``transport``, with all waiting that no one counts."""
        parts = {name: np.array(values, np.float32) for name, values in vars(self).items()}
        parts["transport"] = parts["latency"] - parts["lag"] - parts["queue"] - parts["compute"]
        return parts


class LoadSession:
    """One session. It sends a chunk for every call of :meth:`due`, and takes down what comes back."""

    def __init__(self, channel: grpc.aio.Channel, audio: DeviceAudio) -> None:
        method: grpc.aio.StreamStreamMultiCallable[bytes, pb.StreamHintsResponse] = channel.stream_stream(
            f"/{SERVICE_NAME}/StreamHints",
            response_deserializer=pb.StreamHintsResponse.FromString,  # cheaper than to pick fields out in Python
        )
        self._call = method()
        self._loop, self._audio = asyncio.get_running_loop(), audio
        self._due_at, self._sent_at = [0.0] * _REMEMBERED, [0.0] * _REMEMBERED
        self._due = 0
        self._wake: asyncio.Future[None] = self._loop.create_future()
        self._tasks: list[asyncio.Task[None]] = []
        self.sent = self.hints = 0
        self.end: str | None = None  # how the server ended it, if it did
        self.arrivals = Arrivals()

    async def open(self, arrivals: Arrivals) -> None:
        """Begin, and wait until the server has started the session; how it ended is in ``end`` if it does not."""
        self.arrivals = arrivals
        try:
            await self._call.write(self._audio.opening)
            response = await self._call.read()
            if response is grpc.aio.EOF:
                self.end = f"{(await self._call.code()).name}: {await self._call.details()}"
        except grpc.aio.AioRpcError as error:
            self.end = f"{error.code().name}: {error.details()}"
        else:
            self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._receive())]

    def due(self, now: float) -> None:
        """The next chunk is complete at ``now``, seconds."""
        self._due_at[self._due % _REMEMBERED] = now
        self._due += 1
        if not self._wake.done():
            self._wake.set_result(None)

    async def close(self) -> None:
        """End the session without waiting for hints."""
        for task in self._tasks:
            task.cancel()
        self._call.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self) -> None:
        # A call that the server has ended takes no more; the receiver knows why.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while self.end is None:
                while self.sent < self._due:
                    self._sent_at[self.sent % _REMEMBERED] = self._loop.time()
                    request = self._audio.request(self.sent)
                    self.sent += 1
                    await self._call.write(request)
                self._wake = self._loop.create_future()
                await self._wake

    async def _receive(self) -> None:
        read, time = self._call.read, self._loop.time
        try:
            while isinstance(response := await read(), pb.StreamHintsResponse):
                now, hint, arrivals = time(), response.hint, self.arrivals
                due, sent = self._due_at[hint.frame % _REMEMBERED], self._sent_at[hint.frame % _REMEMBERED]
                arrivals.latency.append(1e3 * (now - due))
                arrivals.lag.append(1e3 * (sent - due))
                arrivals.queue.append(hint.queue_us / 1e3)
                arrivals.compute.append(hint.compute_us / 1e3)
                self.hints += 1
            self.end = f"{(await self._call.code()).name}: {await self._call.details()}"
        except grpc.aio.AioRpcError as error:
            self.end = f"{error.code().name}: {error.details()}"


class Load:
    """Sessions that have begun."""

    def __init__(self, sessions: Sequence[LoadSession], audio: DeviceAudio) -> None:
        self._sessions, self._chunk_seconds = sessions, audio.chunk_seconds

    @property
    def sent(self) -> int:
        """Chunks, so far."""
        return sum(session.sent for session in self._sessions)

    @property
    def hints(self) -> int:
        """Hints that came, so far."""
        return sum(session.hints for session in self._sessions)

    @property
    def ended(self) -> list[str]:
        """How sessions ended that the server ended."""
        return [session.end for session in self._sessions if session.end is not None]

    def take(self) -> Arrivals:
        """What has arrived since the last call."""
        arrivals, fresh = self._sessions[0].arrivals, Arrivals()
        for session in self._sessions:
            session.arrivals = fresh
        return arrivals

    async def run(self, seconds: float) -> None:
        """Send in real time, one slot of sessions after the other, on one timer."""
        loop, slots = asyncio.get_running_loop(), [self._sessions[slot::_SLOTS] for slot in range(_SLOTS)]
        began, turn, done = loop.time(), 0, loop.create_future()

        def tick() -> None:
            nonlocal turn
            while (due := began + turn * self._chunk_seconds / _SLOTS) <= loop.time():
                if due > began + seconds:
                    done.set_result(None)
                    return
                for session in slots[turn % _SLOTS]:
                    session.due(due)
                turn += 1
            loop.call_at(due, tick)

        tick()
        await done

    async def settle(self) -> None:
        """Wait for the hints that are under way, a while."""
        end = asyncio.get_running_loop().time() + _GRACE
        while self.hints < self.sent and not self.ended and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def open_load(address: str, audio: DeviceAudio, count: int, per_connection: int = 1) -> AsyncIterator[Load]:
    """Sessions that have begun, so many on a connection."""
    options = [("grpc.use_local_subchannel_pool", 1)]  # else all share one
    channels = [grpc.aio.insecure_channel(address, options) for _ in range(-(-count // per_connection))]
    sessions = [LoadSession(channels[k // per_connection], audio) for k in range(count)]
    arrivals = Arrivals()
    try:
        for session in sessions:
            await session.open(arrivals)
        yield Load(sessions, audio)
    finally:
        await asyncio.gather(*(session.close() for session in sessions))
        await asyncio.gather(*(channel.close() for channel in channels))
