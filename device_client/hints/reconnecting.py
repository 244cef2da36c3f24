"""Hints for a live stream from one of several servers, with automatic reconnection."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.common.call_credentials import Credentials
from knowledge_boosting.common.connection import Refused
from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.device_client.audio.rings import WakeEvent
from knowledge_boosting.device_client.hints.buffer import hint_buffer
from knowledge_boosting.device_client.hints.stream import Encodings, HintStream
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.manifest import Manifest
from knowledge_boosting.protos.codec import MAX_CHUNKS_PER_MESSAGE, Samples

# All times are in seconds.
_BACKFILL = 0.5  # past audio at the start of a new session, which warms up the large network
_MAX_UNANSWERED = 0.75  # limit for sent audio without an answer, so that no stale audio collects in network buffers
_MAX_UNSENT = 1.0  # limit for audio that waits to be sent; longer than the backfill
_ANSWER_TIMEOUT = 1.5  # without any hint while audio is unanswered, the server is considered lost
_CONNECT_TIMEOUT = 2.0
_STARTUP_TIMEOUT = 3.0  # maximum wait for the first answer of a server
_MIN_PAUSE, _MAX_PAUSE = 0.5, 15.0  # between connection attempts
# Pauses grow slowly. After an outage of a few seconds, hints are back at most one or two seconds after the server.
_PAUSE_GROWTH = 1.15
_LATE_TIMEOUT = 5.0  # if all hints are late for this time, another server is tried
_STABLE_TIME = 2.0  # after a session of at least this length, the next attempt is made without a pause
_NO_CREDENTIALS = Credentials()


@dataclass(frozen=True)
class ServerEvent:
    """A change of the connection to a server, for the user or a script."""

    server: str
    connected: bool
    text: str


class LiveHints:
    """Keeps a live stream connected to a server. The frame loop calls :meth:`send` and :meth:`take`, which never wait.

    The last two seconds of audio are buffered. When a session is lost or falls behind, a new one is opened. It begins
    with half a second of past audio, for which hints are computed but not used.
    """

    def __init__(
        self,
        servers: Sequence[str],
        manifest: Manifest,
        *,
        encodings: Encodings,
        credentials: Credentials = _NO_CREDENTIALS,
        speaker_embedding: Samples | None = None,
        first_frame: int = 0,
    ) -> None:
        """Prepare the connection. Nothing is sent before :meth:`start`.

        Args:
            servers: The addresses ``HOST:PORT``, in the order in which they are tried.
            manifest: The manifest of the device's bundle. A server must run the same bundle.
            encodings: The encodings of samples and hints.
            credentials: The credentials for all servers.
            speaker_embedding: ``[256]`` for TSE, otherwise None.
            first_frame: The first frame that will be sent. The audio before it is taken to be silence.

        Raises:
            InputError: An address is malformed, or the token must not be sent to it.
        """
        for server in servers:
            credentials.check(server)
        self._servers, self._manifest, self._encodings = tuple(servers), manifest, encodings
        self._credentials = credentials
        self._speaker_embedding = speaker_embedding
        model = manifest.model
        self._lookahead, self._max_age = model.framing.lookahead, model.max_age
        frames_per_second = 1 / model.framing.chunk_seconds
        self._backfill = round(_BACKFILL * frames_per_second)
        self._max_unanswered = round(_MAX_UNANSWERED * frames_per_second)
        self._max_unsent = round(_MAX_UNSENT * frames_per_second)
        self._max_consecutive_late = round(_LATE_TIMEOUT * frames_per_second)
        self._history = 2 * self._max_unsent
        # A ring buffer by frame, with the newest chunk of each frame's window.
        self._audio = np.zeros((self._history, model.microphones, model.framing.chunk), np.float32)
        self._captured_at = np.zeros(self._history, np.int64)
        self._ages: NDArray[np.float64] = np.zeros(self._history)
        self._first_frame = first_frame
        self._frames = first_frame  # end of the frames that the loop has passed to send()
        self._next_take = first_frame  # first frame whose hint can still be used
        self._buffer = hint_buffer(model)
        self._wake = WakeEvent()
        self._closed = threading.Event()
        self._startup_done = threading.Event()  # set when a server has answered, or all servers were tried once
        self._any_answered = False
        self._refused: Refused | None = None  # the error of the first server that refused the connection
        self._thread = threading.Thread(target=self._keep_connected, name="kb-network", daemon=True)
        self._active: _Session | None = None  # the session from which hints come
        self.late = 0  # number of hints that came after their deadline
        self.events: deque[ServerEvent] = deque(maxlen=32)

    @property
    def server(self) -> str | None:
        """The address of the server from which hints come. None if there is none."""
        active = self._active
        return None if active is None else active.server

    def start(self) -> None:
        """Start to connect in the background."""
        self._thread.start()

    def wait_for_server(self) -> None:
        """Wait until a server has answered or all servers were tried once, but at most a few seconds.

        Raises:
            Refused: A server and this device do not accept each other, and no other server has answered.
        """
        self._startup_done.wait(_STARTUP_TIMEOUT)
        if self._refused is not None and not self._any_answered:
            raise self._refused

    def close(self) -> None:
        """End the session, and stop connecting."""
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=2 * _CONNECT_TIMEOUT + 1)

    def send(self, frame: int, samples: Samples, now: int) -> None:
        """Pass on the samples ``[M, n]`` that complete a frame. For frame 0, pass its whole window.

        Args:
            frame: The index of the frame.
            samples: The new samples.
            now: When the last sample was captured, nanoseconds.
        """
        slot, chunk = frame % self._history, self._audio.shape[2]
        self._audio[slot] = samples[:, -chunk:]
        if frame == 0 and self._lookahead:
            self._audio[-1, :, -self._lookahead :] = samples[:, : self._lookahead]
        self._captured_at[slot] = now
        self._frames = frame + 1
        self._wake.set()

    def take(self, frame: int, now: int) -> list[Hint]:
        """Return the hints to use from a frame on, of those that have arrived by ``now`` (nanoseconds)."""
        hints = self._buffer.take(frame, now)
        self._next_take = frame + 1 - self._max_age
        return hints

    def age_ms(self, frame: int) -> float:
        """Return the milliseconds from a frame's capture to the arrival of its hint. Call it directly after take()."""
        return float(self._ages[frame % self._history])

    def _keep_connected(self) -> None:
        failures, index, known_lost = 0, 0, False
        session: _Session | None = None
        while not self._closed.is_set():
            if session is None:
                attempt = self._open(index)
                server, index, reason = attempt.server, attempt.index + 1, attempt.reason
                session = self._start_session(attempt) if attempt.stream is not None else None
            else:
                server, index = session.server, session.index + 1
            stable, successor = False, None
            if session is not None:
                reason, successor = self._run_session(session)
                stable = time.monotonic() - session.opened_at > _STABLE_TIME and not self._always_late(session)
            if index >= len(self._servers):
                self._startup_done.set()
            if self._closed.is_set():
                if successor is not None:
                    successor.end()
                return
            lost, session = session is not None, successor
            if successor is not None:
                continue
            if lost:
                text = f"lost {server} ({reason}); the small network continues without hints"
                self.events.append(ServerEvent(server, False, text))
                known_lost = True
            elif not known_lost and index >= len(self._servers):
                text = f"{reason}; the small network runs without hints while the client keeps trying to connect"
                self.events.append(ServerEvent(server, False, text))
                known_lost = True
            failures = 0 if stable else failures + 1
            extra_failures = failures - len(self._servers)
            if extra_failures >= 0:
                pause = min(_MAX_PAUSE, _MIN_PAUSE * _PAUSE_GROWTH ** min(extra_failures, 100))
                # A random part keeps devices that lost the same server from reconnecting at the same instant.
                self._closed.wait(max(_MIN_PAUSE, pause * random.uniform(0.75, 1)))

    def _open(self, index: int) -> "_Attempt":
        """Try to open a session with the server at an index of the cyclic list."""
        server = self._servers[index % len(self._servers)]
        try:
            stream = HintStream(
                server,
                self._manifest,
                encodings=self._encodings,
                credentials=self._credentials,
                speaker_embedding=self._speaker_embedding,
                first_frame=lambda: max(0, self._frames - self._backfill),
                deadline_ms=round(self._manifest.model.max_age_ms),
                timeout=_CONNECT_TIMEOUT,
            )
        except (InputError, Failure) as error:
            if isinstance(error, Refused) and self._refused is None:
                self._refused = error
                self.events.append(ServerEvent(server, False, str(error)))
            return _Attempt(server, index, None, str(error))
        self._any_answered = True
        self._startup_done.set()
        return _Attempt(server, index, stream)

    def _start_session(self, attempt: "_Attempt") -> "_Session":
        """Start to receive the hints of a session that was opened."""
        assert attempt.stream is not None
        # A network that processes the stream from its start needs no warm-up.
        warm_up = self._backfill if attempt.stream.first_frame else 0
        first_usable = max(attempt.stream.first_frame + warm_up, self._first_frame)
        session = _Session(attempt.server, attempt.index, attempt.stream, first_usable)
        session.start_receiving(lambda: self._receive(session))
        return session

    def _run_session(self, session: "_Session") -> "tuple[str, _Session | None]":
        """Run a session to its end.

        Returns:
            Why it ended, and its successor if there is one already.
        """
        search = _Search(self._open, session.index + 1, len(self._servers))
        successor: _Session | None = None
        reason: str | None = None
        announced = False
        try:
            while reason is None and not self._closed.is_set():
                self._wake.wait(0.1)
                if session.stream.draining:
                    # A draining server still serves, so it is used until another one sends hints.
                    search.start()
                    if not announced:
                        announced = True
                        text = f"{session.server} shuts down; the client looks for another server"
                        self.events.append(ServerEvent(session.server, False, text))
                if successor is None and search.found is not None:
                    successor = self._start_session(search.found)
                if successor is not None:
                    if self._send_audio(successor) is not None:
                        successor.end()
                        search = _Search(self._open, successor.index + 1, len(self._servers))
                        successor = None
                    elif successor.had_timely_hint:
                        return "the client moved to another server", successor
                reason = self._send_audio(session)
        finally:
            search.stop()
            session.end()
            if self._active is session:
                self._active = None
        if successor is None and search.found is not None:  # the search succeeded while it was stopped
            successor = self._start_session(search.found)
        return reason or "closed", successor

    def _send_audio(self, session: "_Session") -> str | None:
        """Send a session the audio that the loop has passed on. Return why the session is over, or None."""
        stream = session.stream
        if stream.ended is not None:
            return f"{stream.ended.status}: {stream.ended.detail}"
        unsent = self._frames - session.sent
        unanswered = session.sent - session.answered
        if unanswered and time.perf_counter_ns() - session.answered_at > 1e9 * _ANSWER_TIMEOUT:
            return "the server stopped answering"
        if session.sent > stream.first_frame and unsent > self._max_unsent:
            return "the connection is too slow"
        if self._always_late(session):
            return f"no hint came in time for {_LATE_TIMEOUT:g} s"
        count = min(unsent, self._max_unanswered - unanswered, MAX_CHUNKS_PER_MESSAGE)
        if count <= 0:
            return None
        samples = self._samples(session.sent, count, first=session.sent == stream.first_frame)
        if self._frames - session.sent >= self._history:  # the ring buffer was overwritten during the copy
            return "the connection is too slow"
        if not unanswered:
            session.answered_at = time.perf_counter_ns()
        stream.send(session.sent, samples)
        session.sent += count
        return None

    def _always_late(self, session: "_Session") -> bool:
        return session.consecutive_late >= self._max_consecutive_late

    def _samples(self, frame: int, count: int, *, first: bool) -> Samples:
        """Return the samples ``[M, n]`` that complete ``count`` frames. For the first frames, include the lookahead."""
        slots = np.arange(frame, frame + count) % self._history
        samples = self._audio[slots].transpose(1, 0, 2).reshape(self._audio.shape[1], -1)
        if first and self._lookahead:
            before = self._audio[(frame - 1) % self._history, :, -self._lookahead :]
            samples = np.concatenate([before, samples], axis=1)
        return samples

    def _receive(self, session: "_Session") -> None:
        while (received := session.stream.receive()) is not None:
            now, frame = time.perf_counter_ns(), received.frame
            session.answered, session.answered_at = frame + 1, now
            if frame < session.first_usable:
                continue
            self._ages[frame % self._history] = (now - self._captured_at[frame % self._history]) / 1e6
            late = frame < self._next_take or received.hint is None
            self.late += late
            session.consecutive_late = session.consecutive_late + 1 if late else 0
            if received.hint is None:
                continue
            if not late:  # a late hint would take the place of a newer one of another session
                self._buffer.put(frame, received.hint, now)
            if not session.had_timely_hint and (not late or self._active is None):
                session.had_timely_hint = not late
                # Compare sessions instead of addresses, because one address can stand for several servers.
                if self._active is not session:
                    self._active = session
                    self.events.append(ServerEvent(session.server, True, f"hints come from {session.server}"))
        self._wake.set()


class _Session:
    """The state of an open session with a server."""

    def __init__(self, server: str, index: int, stream: HintStream, first_usable: int) -> None:
        self.server, self.index, self.stream = server, index, stream
        self.first_usable = first_usable  # first frame with a usable hint
        self.opened_at = time.monotonic()
        self.sent = self.answered = stream.first_frame  # ends of the frames that were sent and answered
        self.answered_at = time.perf_counter_ns()
        self.had_timely_hint = False  # whether a usable hint came before its deadline
        self.consecutive_late = 0  # number of the last hints that were late without interruption

    def start_receiving(self, receive: Callable[[], None]) -> None:
        """Start a thread that runs ``receive``."""
        self._receiver = threading.Thread(target=receive, name="kb-hints", daemon=True)
        self._receiver.start()

    def end(self) -> None:
        """End the session. After this call, no more hints are received."""
        # Closing takes seconds if the peer has vanished, and the next session must not wait for that.
        threading.Thread(target=self.stream.close, name="kb-close").start()
        self._receiver.join()


@dataclass(frozen=True)
class _Attempt:
    """The result of an attempt to open a session."""

    server: str
    index: int
    stream: HintStream | None  # None if it failed
    reason: str = ""  # why it failed


class _Search:
    """Looks for another server in the background while the current one still serves."""

    def __init__(self, attempt: Callable[[int], _Attempt], index: int, servers: int) -> None:
        self._attempt, self._index, self._servers = attempt, index, servers
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.found: _Attempt | None = None

    def start(self) -> None:
        """Start the search unless it has already started."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kb-search", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop the search after the current attempt."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            attempt = self._attempt(self._index)
            if attempt.stream is not None:
                self.found = attempt
                return
            self._index += 1
            if self._index % self._servers == 0:
                self._stopped.wait(_MIN_PAUSE)
