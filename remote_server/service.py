"""The gRPC service: one coroutine a session."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from models.manifest import Manifest
from protos import hints_pb2 as pb
from protos.codec import MAX_CHUNKS_PER_MESSAGE, PROTOCOL_VERSION, hint_encoder
from protos.hints_pb2_grpc import HintServiceServicer
from remote_server.engine import HintEngine
from remote_server.enrollment import SpeakerEncoder
from remote_server.sessions import AudioReader, Mismatch, Refused, check_config, check_enrollment

_log = logging.getLogger("kb-server")

_CONFIG_TIMEOUT = 10  # seconds that a call may hold a session's place without saying what it wants

# grpc's own context types differ between its synchronous and asyncio halves.
Context = Any


class HintService(HintServiceServicer):
    """Serves the hints of one bundle."""

    def __init__(self, engine: HintEngine, manifest: Manifest, max_sessions: int) -> None:
        self._engine = engine
        self._manifest = manifest
        self._max_sessions = max_sessions
        self._sessions: set[asyncio.Task[Any]] = set()
        self._draining = False
        self._speakers = SpeakerEncoder() if SpeakerEncoder.installed() else None

    async def drain(self) -> None:
        """End every open session with UNAVAILABLE and accept no more."""
        self._draining = True
        for task in self._sessions:
            task.cancel()
        if self._sessions:
            await asyncio.wait(self._sessions, timeout=2)

    def close(self) -> None:
        """End the threads."""
        if self._speakers is not None:
            self._speakers.close()
        self._engine.close()

    async def StreamHints(
        self, request_iterator: AsyncIterator[pb.StreamHintsRequest], context: Context
    ) -> AsyncGenerator[pb.StreamHintsResponse]:
        """One session, from its configuration to the end of its audio."""
        session = _Session(context.peer())
        task = asyncio.current_task()
        assert task is not None
        if self._draining:
            await session.end(context, grpc.StatusCode.UNAVAILABLE, "the server is shutting down; try another")
        if len(self._sessions) >= self._max_sessions:
            text = f"all {self._max_sessions} sessions of this server are taken; try again later or another server"
            await session.end(context, grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        self._sessions.add(task)
        try:
            async for response in self._run(request_iterator, session):
                yield response
            await _let_cancellation_through()
            session.log_end("OK", "the device ended it")
        except Mismatch as error:
            await session.end(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Refused as error:
            await session.end(context, grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except DecodeError:
            await session.end(context, grpc.StatusCode.INVALID_ARGUMENT, "request: is no StreamHintsRequest")
        except asyncio.CancelledError:
            if self._draining:
                await session.end(context, grpc.StatusCode.UNAVAILABLE, "the server is shutting down; try another")
            session.log_end("CANCELLED", "the device went away")
            raise
        except grpc.RpcError as error:
            session.log_end("CANCELLED", f"the connection broke ({type(error).__name__})")
            raise
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError):
                raise
            _log.exception("session %s failed", session.id)
            await session.end(context, grpc.StatusCode.INTERNAL, "the server failed on this session; see its log")
        finally:
            self._sessions.discard(task)

    async def _run(
        self, requests: AsyncIterator[pb.StreamHintsRequest], session: "_Session"
    ) -> AsyncIterator[pb.StreamHintsResponse]:
        try:
            async with asyncio.timeout(_CONFIG_TIMEOUT):
                request = await anext(requests, None)
        except TimeoutError:
            raise Refused(f"request: no config came within {_CONFIG_TIMEOUT} s") from None
        if request is None:
            await _let_cancellation_through()
            raise Refused("request: the stream ended before its configuration")
        config = check_config(request, self._manifest)
        reader = AudioReader(config, self._manifest.model)
        encode = hint_encoder(config.hint_encoding)
        speaker = np.array(config.speaker_embedding, dtype=np.float32) if config.speaker_embedding else None
        stream = await self._engine.open(speaker)
        session.log_start()
        yield pb.StreamHintsResponse(started=pb.SessionStarted(session_id=session.id))
        async for request in requests:
            first, samples = reader.read(request)
            hints = await stream.step(samples)
            if not np.isfinite(hints.values).all():
                raise Refused(f"audio.pcm: the network overflows on frame {first}; scale the samples to +-1")
            for offset, values in enumerate(hints.values):
                payload, scale = encode(values)
                hint = pb.Hint(
                    frame=first + offset,
                    payload=payload,
                    scale=scale,
                    queue_us=hints.queue_us,
                    compute_us=hints.compute_us,
                )
                yield pb.StreamHintsResponse(hint=hint)
                session.frames += 1

    async def Enroll(self, request: pb.EnrollRequest, context: Context) -> pb.EnrollResponse:
        """Enrollment speech to a speaker embedding."""
        try:
            speech = check_enrollment(request)
        except Refused as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        if self._speakers is None:
            text = "this server has no speaker encoder; install it there with pip install 'knowledge-boosting[enroll]'"
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, text)
            raise AssertionError  # abort has raised
        try:
            embedding = await self._speakers.embed(speech)
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"pcm: no voice to learn from ({error})")
        except Exception:
            _log.exception("enrollment failed")
            await context.abort(grpc.StatusCode.INTERNAL, "the server failed on this enrollment; see its log")
        return pb.EnrollResponse(speaker_embedding=embedding.tolist())

    async def DescribeModel(self, request: pb.DescribeModelRequest, context: Context) -> pb.DescribeModelResponse:
        """What this server runs."""
        model = self._manifest.model
        return pb.DescribeModelResponse(
            protocol_version=PROTOCOL_VERSION,
            bundle_name=self._manifest.name,
            bundle_id=self._manifest.id,
            untrained=self._manifest.untrained,
            task=model.task,
            sample_rate=model.framing.sample_rate,
            microphones=model.microphones,
            chunk=model.framing.chunk,
            lookahead=model.framing.lookahead,
            delay=model.delay,
            hint_channels=model.hint_channels,
            hint_bins=model.framing.bins,
            max_chunks_per_message=MAX_CHUNKS_PER_MESSAGE,
            enrolls=self._speakers is not None,
        )


class _Session:
    """What the log tells of a session."""

    def __init__(self, peer: str) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.frames = 0
        self._peer = peer
        self._opened = time.monotonic()

    async def end(self, context: Context, status: grpc.StatusCode, why: str) -> None:
        """Log the end and abort the call; does not return."""
        self.log_end(status.name, why)
        await context.abort(status, why)

    def log_start(self) -> None:
        log_event("session_opened", session=self.id, peer=self._peer)

    def log_end(self, status: str, why: str) -> None:
        log_event(
            "session_closed",
            session=self.id,
            peer=self._peer,
            status=status,
            why=why,
            frames=self.frames,
            seconds=round(time.monotonic() - self._opened, 3),
        )


async def _let_cancellation_through() -> None:
    """At the end of a session's requests: a call that was cancelled ends them too, a moment before its task is told."""
    await asyncio.sleep(0.01)


def log_event(event: str, **fields: object) -> None:
    """One structured log line."""
    _log.info(json.dumps({"event": event, **fields}))
