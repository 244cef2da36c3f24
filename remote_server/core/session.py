"""One session: audio in from a device, hints out to it, and why it ends."""

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

_MOST_WAITING = 250  # frames in the engine, and hints in the outbox, above which no more audio is taken
_BURST = 125  # frames that may come at once, such as the audio of an outage
_CLOSING_SECONDS = 3.0  # that an ended session has to tell its device so

Response = pb.StreamHintsResponse


class Session:
    """A session whose configuration has been accepted.

    The audio is read by a task of its own. :meth:`responses` gives what the device gets, until the session ends; every
    end but the good one is raised there as :class:`Refused`.
    """

    def __init__(self, config: pb.SessionConfig, bundle: ServedBundle, limits: Limits, metrics: Metrics) -> None:
        self.id = uuid.uuid4().hex[:12]
        self.frames = 0  # answered
        self._bundle, self._limits = bundle, limits
        self._reader = AudioReader(config, bundle.manifest.model, limits.chunks)
        self._encoding = config.hint_encoding
        self._price = bundle.manifest.model.framing.chunk_seconds / limits.speed if limits.speed else 0.0
        self._deadline = config.hint_deadline_ms * 1_000_000 or None  # ns
        self._reproducible = config.reproducible
        self._embedding = np.array(config.speaker_embedding, np.float32) if config.speaker_embedding else None
        self._next_hint = config.first_frame
        self._stream: EngineSession | None = None
        self._outbox: deque[Response] = deque()
        self._wake, self._room = asyncio.Event(), asyncio.Event()
        self.ended: Refused | None = None  # why, other than by the device's own wish
        self._ended_at = 0.0
        self._read_all = False
        self._refused: Refused | None = None  # what was read last, after the hints of what came before
        # When it began, audio came last, a hint went last, until when what came may last, and until when it must have
        # been followed by more; of the monotonic clock.
        self._opened = self._last_audio_at = self._last_sent_at = self._paid_until = time.monotonic()
        self._enough_until = self._opened + limits.slow_seconds
        name = bundle.manifest.name
        self._late, self._queue = metrics.late.labels(name), metrics.queue.labels(name)

    async def responses(self, requests: AsyncIterator[pb.StreamHintsRequest]) -> AsyncGenerator[Response, None]:
        """Everything that goes to the device.

        Raises:
            Refused: the session has ended otherwise than by the device's own wish.
        """
        self._stream = await self._bundle.engine.open(self._receive, self._embedding, alone=self._reproducible)
        reading = asyncio.create_task(self._read(requests, self._stream))
        try:
            yield Response(started=pb.SessionStarted(session_id=self.id))
            while True:
                while self._outbox:
                    yield self._outbox[0]
                    # Only now, so that one the device does not read counts as unread.
                    self._outbox.popleft()
                    self._last_sent_at = time.monotonic()
                    self._room.set()
                if self.ended is not None:
                    raise self.ended
                if self._read_all and self._next_hint == self._reader.next_frame:
                    if self._refused is not None:
                        raise self._refused
                    return
                self._wake.clear()
                await self._wake.wait()
        finally:
            reading.cancel()
            self._stream.close()

    @property
    def bundle_name(self) -> str:
        """Of the bundle whose hints these are."""
        return self._bundle.manifest.name

    def end(self, why: Refused) -> None:
        """End the session once the hints there are have gone out."""
        if self.ended is None:
            self.ended, self._ended_at = why, time.monotonic()
            self._wake.set()

    def announce_draining(self, seconds: float) -> None:
        """Tell the device that it should go elsewhere."""
        self._put(Response(draining=pb.Draining(seconds=seconds)))

    def stuck(self, now: float) -> bool:
        """Whether it has ended but cannot tell its device, which reads nothing."""
        if self.ended is None:
            return False
        return self.ended.status is Status.RESOURCE_EXHAUSTED or now - self._ended_at > _CLOSING_SECONDS

    def overdue(self, now: float) -> Refused | None:
        """Which of the limits on time has passed, if one has; ``now`` in seconds of the monotonic clock."""
        limits = self._limits
        if self._outbox and now - self._last_sent_at > limits.unread_seconds:
            text = f"hints wait unread for {limits.unread_seconds:g} s; read them as they come"
            return Refused(text, Status.RESOURCE_EXHAUSTED)
        if limits.idle_seconds and now - self._last_audio_at > limits.idle_seconds:
            text = f"no audio for {limits.idle_seconds:g} s; open a session when there is some"
            return Refused(text, Status.DEADLINE_EXCEEDED)
        if limits.least_speed and now > self._enough_until:
            text = f"audio came at less than {limits.least_speed:g} of its speed for {limits.slow_seconds:g} s"
            return Refused(f"{text}; open a session when there is more", Status.DEADLINE_EXCEEDED)
        if limits.session_seconds and now - self._opened > limits.session_seconds:
            text = f"a session here may last {limits.session_seconds:g} s; open a new one"
            return Refused(text, Status.DEADLINE_EXCEEDED)
        return None

    async def _read(self, requests: AsyncIterator[pb.StreamHintsRequest], stream: EngineSession) -> None:
        try:
            async for request in requests:
                first, samples = self._reader.read(request)
                self._last_audio_at = time.monotonic()
                frames = self._reader.next_frame - first
                self._credit(frames)
                stream.send(samples, frames)
                # Not reading is what holds a device back.
                ahead = self._ahead(frames)
                if ahead > 0:
                    await asyncio.sleep(ahead)
                while stream.waiting > _MOST_WAITING or len(self._outbox) > _MOST_WAITING:
                    self._room.clear()
                    await self._room.wait()
            # A call that was cancelled ends its requests too, a moment before its task is told.
            await asyncio.sleep(0.01)
        except Refused as error:
            self._refused = error
        self._read_all = True
        self._wake.set()

    def _credit(self, frames: int) -> None:
        """Let audio that came keep the session for as long as it may last at the least speed."""
        limits = self._limits
        if limits.least_speed:
            earned = frames * self._bundle.manifest.model.framing.chunk_seconds / limits.least_speed
            self._enough_until = min(self._enough_until + earned, self._last_audio_at + limits.slow_seconds)

    def _ahead(self, frames: int) -> float:
        """The seconds by which the audio has come too fast."""
        # Silence earns no more than one burst.
        self._paid_until = max(self._paid_until, self._last_audio_at) + frames * self._price
        return self._paid_until - self._last_audio_at - _BURST * self._price

    def _receive(self, result: Hints | Exception) -> None:
        if self.ended is not None:
            return
        if isinstance(result, Exception):
            text = f"the server failed on this session; see its log ({type(result).__name__})"
            self.end(Refused(text, Status.INTERNAL))
            return
        compute = (result.ended - result.started) // 1000
        if not result.finite:
            # Frames of one step cannot be told apart: what overflows in one spoils those before it.
            first, last = self._next_hint, self._next_hint + len(result.arrived) - 1
            where = f"frame {first}" if first == last else f"a frame from {first} to {last}"
            self.end(Refused(f"audio.pcm: the network overflows on {where}; scale the samples to +-1"))
            return
        for number, arrived in enumerate(result.arrived):
            frame = self._next_hint
            self._next_hint = frame + 1
            queued = result.started - arrived
            self._queue.observe(queued / 1e9)
            if self._deadline is not None and result.ended - arrived > self._deadline:
                self._late.inc()
                payload, scale = b"", 1.0
            else:
                payload, scale = result.payload(number, self._encoding)
            hint = pb.Hint(frame=frame, payload=payload, scale=scale, queue_us=queued // 1000, compute_us=compute)
            self._put(Response(hint=hint))
            self.frames += 1
        self._room.set()

    def _put(self, response: Response) -> None:
        if not self._outbox:
            self._last_sent_at = time.monotonic()
        self._outbox.append(response)
        self._wake.set()
