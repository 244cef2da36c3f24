"""A device for tests that can send any messages in any order."""

import json
import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import torch

from knowledge_boosting.models.framing import pad_to_frames
from knowledge_boosting.models.manifest import Manifest, read_manifest
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import (
    PCM_ENCODINGS,
    PROTOCOL_VERSION,
    SERVICE_NAME,
    Samples,
    decode_hint,
    encode_pcm,
)
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceStub
from tests.golden_cases import TOLERANCE, Golden, worst
from tests.processes import PATIENCE, Server

Request = pb.StreamHintsRequest


@dataclass(frozen=True)
class Material:
    """A bundle, and the first mixture of a parity case with its expected hints."""

    manifest: Manifest
    golden: Golden

    @property
    def samples(self) -> Samples:
        """The samples ``[M, chunk T + lookahead]``."""
        samples: Samples = pad_to_frames(self.golden.mixture[0], self.manifest.model.framing).numpy()
        return samples

    @property
    def hints(self) -> Samples:
        """The expected hints ``[T, channels, F]``."""
        hints: Samples = self.golden.hint[0].numpy()
        return hints

    @property
    def speaker(self) -> list[float]:
        """The speaker embedding for a session. It is empty for SS."""
        embedding = self.golden.speaker_embedding
        return [] if embedding is None else list(embedding[0].tolist())

    def opening(self, **changes: Any) -> Request:
        """Return a valid first message of a session, with some fields changed."""
        fields: dict[str, Any] = {
            "protocol_version": PROTOCOL_VERSION,
            "bundle_name": self.manifest.name,
            "bundle_id": self.manifest.id,
            "sample_rate": self.manifest.model.framing.sample_rate,
            "speaker_embedding": self.speaker,
            "pcm_encoding": pb.PCM_ENCODING_F32LE,
            "hint_encoding": pb.HINT_ENCODING_F32LE,
        }
        return Request(config=pb.SessionConfig(**{**fields, **changes}))

    def window(self, frame: int, chunks: int = 1, samples: Samples | None = None) -> Samples:
        """Return the samples that complete ``chunks`` frames, beginning with ``frame``."""
        framing = self.manifest.model.framing
        start = frame * framing.chunk + framing.lookahead if frame else 0
        end = (frame + chunks) * framing.chunk + framing.lookahead
        return (self.samples if samples is None else samples)[:, start:end]

    def audio(
        self, frame: int, chunks: int = 1, samples: Samples | None = None, *, pcm: str = "f32", first_frame: int = 0
    ) -> Request:
        """Return the message that completes ``chunks`` frames. The stream began at ``first_frame``."""
        window = self.window(frame, chunks, samples)
        return message(first_frame + frame, encode_pcm(window, PCM_ENCODINGS[pcm]))

    def offline_hints(self, samples: Samples) -> Samples:
        """Compute hints ``[B, T, channels, F]`` of whole signals ``[B, M, chunk T + lookahead]`` without a server."""
        large = self.golden.pair.large
        speaker = torch.tensor([self.speaker] * len(samples)) if self.speaker else None
        with torch.inference_mode():
            hints: Samples = large(torch.from_numpy(samples), large.initial_state(len(samples), speaker))[0].numpy()
        return hints

    def values(self, hints: list[pb.Hint], encoding: int = pb.HINT_ENCODING_F32LE) -> Samples:
        """Decode hint messages to ``[T, channels, F]``."""
        model = self.manifest.model
        return np.stack([decode_hint(hint, encoding, model.hint_channels, model.framing.bins) for hint in hints])


def material(bundle: Path, golden: Golden) -> Material:
    return Material(read_manifest(bundle), golden)


def message(first_frame: int, pcm: bytes) -> Request:
    return Request(audio=pb.AudioChunk(first_frame=first_frame, pcm=pcm))


class Device:
    """One call of StreamHints on a separate connection."""

    def __init__(self, server: Server, *requests: Request, timeout: float | None = PATIENCE) -> None:
        self._outbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.session = ""
        # By default, the channels of a process share connections.
        self.channel = grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
        self.call = HintServiceStub(self.channel).StreamHints(self._requests(), timeout=timeout)
        self.send(*requests)

    def send(self, *requests: Request) -> None:
        for request in requests:
            self._outbox.put(request)

    def finish(self) -> None:
        """End the requests."""
        self._outbox.put(None)

    def started(self) -> str:
        """Wait for the start of the session, and return its id."""
        response = next(self.call)
        assert response.WhichOneof("response") == "started"
        self.session = response.started.session_id
        return self.session

    def hints(self, count: int) -> list[pb.Hint]:
        """Wait for the next hints, and return them."""
        responses = [next(self.call) for _ in range(count)]
        assert all(response.WhichOneof("response") == "hint" for response in responses)
        return [response.hint for response in responses]

    def end(self) -> tuple[str, str]:
        """Read to the end of the stream. Return its status and details."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError:
            pass
        return self.call.code().name, self.call.details()

    def close(self) -> None:
        self.finish()
        self.call.cancel()
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _requests(self) -> Iterator[Request]:
        while (request := self._outbox.get()) is not None:
            yield request


class Witness:
    """A valid session that stays open while other sessions misbehave."""

    def __init__(self, server: Server, material: Material) -> None:
        self._server = server
        self._material = material
        self._frame = 0
        self._device = self._opened()

    def assert_exact(self) -> None:
        """Check that the session continues and that its next hints are correct."""
        frame, end = self._frame, self._frame + 2
        self._device.send(self._material.audio(frame, 2))
        hints = self._device.hints(2)
        assert [hint.frame for hint in hints] == [frame, frame + 1]
        assert worst(self._material.values(hints), self._material.hints[frame:end]) < TOLERANCE
        self._frame = end
        if end + 2 > len(self._material.hints):
            self.close()
            self._frame = 0
            self._device = self._opened()

    def close(self) -> None:
        """End the session properly."""
        self._device.finish()
        assert self._device.end()[0] == "OK"
        self._device.close()

    def _opened(self) -> Device:
        device = Device(self._server, self._material.opening(), timeout=None)
        device.started()
        return device


def send_bytes(server: Server, *messages: bytes) -> tuple[str, str]:
    """Call StreamHints with raw messages. Return its status and details."""
    with grpc.insecure_channel(server.address) as channel:
        method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE_NAME}/StreamHints")
        call = method(iter(messages), timeout=PATIENCE)
        try:
            for _ in call:
                pass
        except grpc.RpcError:
            pass
        return call.code().name, call.details()


def closings(server: Server, seen: int = 0) -> list[dict[str, Any]]:
    """Return the records of closed sessions from the log, from line ``seen`` on."""
    lines = [line for line in server.log[seen:] if '"session_closed"' in line]
    return [json.loads(line[line.index("{") :]) for line in lines]


def assert_logged(server: Server, seen: int, **fields: object) -> None:
    """Wait until the log has a closed session with these fields, from line ``seen`` on."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if any(fields.items() <= record.items() for record in closings(server, seen)):
            return
        time.sleep(0.01)
    raise AssertionError(f"no session was closed with {fields}: {server.log[seen:]}")


def open_when_free(server: Server, material: Material) -> Device:
    """Open a session as soon as the server has a free slot."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        device = Device(server, material.opening())
        try:
            device.started()
        except grpc.RpcError:
            assert device.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            device.close()
            time.sleep(0.01)
        else:
            return device
    raise AssertionError(f"the slot of a session that ended stays in use: {server.log}")


def wait_until_free(server: Server, material: Material) -> None:
    """Wait until a slot is free. It is free again at the end of the call."""
    with open_when_free(server, material) as device:
        device.finish()
        assert device.end()[0] == "OK"
