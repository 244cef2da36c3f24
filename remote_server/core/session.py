"""One session with a device, which sends audio and gets hints."""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator

import numpy as np

from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.remote_server.core.bundles import ServedBundle
from knowledge_boosting.remote_server.core.engine import EngineSession, Hints
from knowledge_boosting.remote_server.core.limits import Limits
from knowledge_boosting.remote_server.core.messages import AudioReader
from knowledge_boosting.remote_server.core.metrics import Metrics
from knowledge_boosting.remote_server.core.refusals import Refused, Status

_MAX_PENDING = 250  # frames in the engine, or hints in the outbox, above which no more audio is read
_BURST = 125  # frames that a device can send at once, for example after an outage
_END_TIMEOUT = 3.0  # seconds in which a device must read the end of its session

Response = pb.StreamHintsResponse


class Session:
    """A session whose configuration was accepted.

    A separate task reads the audio. :meth:`responses` yields the responses to the device until the session ends, and
    raises :class:`Refused` unless the device ended the session.
    """

    def __init__(self, config: pb.SessionConfig, bundle: ServedBundle, limits: Limits, metrics: Metrics) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.frames = 0  # number of frames whose hints were computed
        self._bundle, self._limits = bundle, limits
        self._reader = AudioReader(config, bundle.manifest.model, limits.chunks)
        self._encoding = config.hint_encoding
        # At the maximum speed, a frame takes this number of seconds.
        self._min_frame_seconds = bundle.manifest.model.framing.chunk_seconds / limits.speed if limits.speed else 0.0
        self._deadline = config.hint_deadline_ms * 1_000_000 or None  # ns
        self._reproducible = config.reproducible
        self._embedding = np.array(config.speaker_embedding, np.float32) if config.speaker_embedding else None
        self._next_hint = config.first_frame
        self._stream: EngineSession | None = None
        self._outbox: deque[Response] = deque()
        self._response_added, self._queue_shrunk = asyncio.Event(), asyncio.Event()
        self.end_reason: Refused | None = None  # why the server ends the session; None if it does not
        self._ended_at = 0.0
        self._input_ended = False
        self._input_error: Refused | None = None  # the fault of the last request; hints of earlier requests come first
        # Times of the monotonic clock, in seconds. The audio so far would last until _paid_until at the maximum speed.
        # At the minimum speed, it keeps the session open until _slow_deadline.
        self._opened_at = self._last_audio_at = self._last_sent_at = self._paid_until = time.monotonic()
        self._slow_deadline = self._opened_at + limits.slow_seconds
        name = bundle.manifest.name
        self._late, self._queue = metrics.late.labels(name), metrics.queue.labels(name)

    async def responses(self, requests: AsyncIterator[pb.StreamHintsRequest]) -> AsyncGenerator[Response, None]:
        """Yield all responses to the device.

        Args:
            requests: The requests of the device after the configuration.

        Raises:
            Refused: The session ended for another reason than the end of the audio.
        """
        self._stream = await self._bundle.engine.open(self._receive, self._embedding, reproducible=self._reproducible)
        reading = asyncio.create_task(self._read(requests, self._stream))
        try:
            yield Response(started=pb.SessionStarted(session_id=self.id))
            while True:
                while self._outbox:
                    yield self._outbox[0]
                    # A response is removed only after it was read, so that an unread one stays in the outbox.
                    self._outbox.popleft()
                    self._last_sent_at = time.monotonic()
                    self._queue_shrunk.set()
                if self.end_reason is not None:
                    raise self.end_reason
                if self._input_ended and self._next_hint == self._reader.next_frame:
                    if self._input_error is not None:
                        raise self._input_error
                    return
                self._response_added.clear()
                await self._response_added.wait()
        finally:
            reading.cancel()
            self._stream.close()

    @property
    def bundle_name(self) -> str:
        """The name of the session's bundle."""
        return self._bundle.manifest.name

    def end(self, reason: Refused) -> None:
        """End the session after the hints that are in the outbox."""
        if self.end_reason is None:
            self.end_reason, self._ended_at = reason, time.monotonic()
            self._response_added.set()

    def announce_draining(self, seconds: float) -> None:
        """Ask the device to move to another server within ``seconds``."""
        self._put(Response(draining=pb.Draining(seconds=seconds)))

    def is_stuck(self, now: float) -> bool:
        """Return whether the session should have ended, but its device does not read the end."""
        if self.end_reason is None:
            return False
        return self.end_reason.status is Status.RESOURCE_EXHAUSTED or now - self._ended_at > _END_TIMEOUT

    def exceeded_limit(self, now: float) -> Refused | None:
        """Return the time limit that the session exceeds, or None. ``now`` is in seconds of the monotonic clock."""
        limits = self._limits
        if self._outbox and now - self._last_sent_at > limits.unread_seconds:
            text = f"hints were not read for {limits.unread_seconds:g} s; read them as they arrive"
            return Refused(text, Status.RESOURCE_EXHAUSTED)
        if limits.idle_seconds and now - self._last_audio_at > limits.idle_seconds:
            text = f"no audio for {limits.idle_seconds:g} s; open a new session when there is audio"
            return Refused(text, Status.DEADLINE_EXCEEDED)
        if limits.least_speed and now > self._slow_deadline:
            text = f"audio was slower than {limits.least_speed:g} of real time for {limits.slow_seconds:g} s"
            return Refused(f"{text}; open a new session when there is more audio", Status.DEADLINE_EXCEEDED)
        if limits.session_seconds and now - self._opened_at > limits.session_seconds:
            text = f"the maximum duration of a session is {limits.session_seconds:g} s; open a new session"
            return Refused(text, Status.DEADLINE_EXCEEDED)
        return None

    async def _read(self, requests: AsyncIterator[pb.StreamHintsRequest], stream: EngineSession) -> None:
        try:
            async for request in requests:
                first, samples = self._reader.read(request)
                self._last_audio_at = time.monotonic()
                frames = self._reader.next_frame - first
                self._extend_slow_deadline(frames)
                stream.send(samples, frames)
                # While no request is read, gRPC's flow control slows the device down.
                seconds_ahead = self._seconds_ahead(frames)
                if seconds_ahead > 0:
                    await asyncio.sleep(seconds_ahead)
                while stream.pending_frames > _MAX_PENDING or len(self._outbox) > _MAX_PENDING:
                    self._queue_shrunk.clear()
                    await self._queue_shrunk.wait()
            # A cancelled call ends its requests first, and cancels this task a moment later.
            await asyncio.sleep(0.01)
        except Refused as error:
            self._input_error = error
        self._input_ended = True
        self._response_added.set()

    def _extend_slow_deadline(self, frames: int) -> None:
        """Extend the deadline for slow audio by the time that new frames can take at the minimum speed."""
        limits = self._limits
        if limits.least_speed:
            seconds = frames * self._bundle.manifest.model.framing.chunk_seconds / limits.least_speed
            self._slow_deadline = min(self._slow_deadline + seconds, self._last_audio_at + limits.slow_seconds)

    def _seconds_ahead(self, frames: int) -> float:
        """Return the seconds by which the audio is ahead of the maximum speed, including new frames."""
        # A pause in the audio permits no more than one burst after it.
        self._paid_until = max(self._paid_until, self._last_audio_at) + frames * self._min_frame_seconds
        return self._paid_until - self._last_audio_at - _BURST * self._min_frame_seconds

    def _receive(self, result: Hints | Exception) -> None:
        if self.end_reason is not None:
            return
        if isinstance(result, Exception):
            text = f"an error of the server ended the session; see its log ({type(result).__name__})"
            self.end(Refused(text, Status.INTERNAL))
            return
        compute = (result.ended - result.started) // 1000
        if not result.finite:
            # An overflow in one frame of a step also affects the frames before it, so the frame cannot be identified.
            first, last = self._next_hint, self._next_hint + len(result.arrived_at) - 1
            frames = f"frame {first}" if first == last else f"a frame from {first} to {last}"
            self.end(Refused(f"audio.pcm: the network overflows at {frames}; scale the samples to +-1"))
            return
        for number, arrived_at in enumerate(result.arrived_at):
            frame = self._next_hint
            self._next_hint = frame + 1
            queued = result.started - arrived_at
            self._queue.observe(queued / 1e9)
            if self._deadline is not None and result.ended - arrived_at > self._deadline:
                self._late.inc()
                payload, scale = b"", 1.0
            else:
                payload, scale = result.payload(number, self._encoding)
            hint = pb.Hint(frame=frame, payload=payload, scale=scale, queue_us=queued // 1000, compute_us=compute)
            self._put(Response(hint=hint))
            self.frames += 1
        self._queue_shrunk.set()

    def _put(self, response: Response) -> None:
        if not self._outbox:
            self._last_sent_at = time.monotonic()
        self._outbox.append(response)
        self._response_added.set()
