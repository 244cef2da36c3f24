"""Hints for a live stream: a session with one of several servers whenever one can be had, for as long as it lasts."""

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
from knowledge_boosting.device_client.hints.buffer import HintBuffer
from knowledge_boosting.device_client.hints.stream import Encodings, HintStream
from knowledge_boosting.models.manifest import Manifest
from knowledge_boosting.protos.codec import MAX_CHUNKS_PER_MESSAGE, Samples

# Seconds.
_BACKFILL = 0.5  # audio before now that a new session begins with, so that the large network is warm
_MOST_UNANSWERED = 0.75  # audio under way at most: what is in no buffer cannot become stale in one
_MOST_WAITING = 1.0  # audio that waits to be sent; a new session's backfill is less than that
_SILENCE = 1.5  # without a hint, while audio is unanswered: the server is gone
_PATIENCE = 2.0  # for a connection
_SETTLING = 3.0  # until something is known of the servers
_PAUSES = (0.5, 15.0)  # between attempts, the shortest and the longest
# Pauses grow slowly: an outage of a few seconds is then over at most a second or two after the server is back.
_GROWTH = 1.15
_USELESS = 5.0  # in which no hint comes in time: another server may do better
_STEADY = 2.0  # a session that lasted so long was worth having, and the next attempt is made at once
_NONE = Credentials()


@dataclass(frozen=True)
class ServerEvent:
    """What a person or a script is told of the network."""

    server: str
    connected: bool
    text: str


class LiveHints:
    """The network's side of a live stream. The frame loop calls :meth:`send` and :meth:`take`, which never wait.

    The last two seconds of audio stay here. A session that is lost, or that falls behind, is followed by another one,
    which begins with half a second of past audio; hints of that past are not used.
    """

    def __init__(
        self,
        servers: Sequence[str],
        manifest: Manifest,
        *,
        encodings: Encodings,
        credentials: Credentials = _NONE,
        speaker_embedding: Samples | None = None,
        first_frame: int = 0,
    ) -> None:
        """Nothing is sent before :meth:`start`.

        Args:
            servers: ``HOST:PORT`` of each, in the order they are tried in.
            credentials: that they want.
            first_frame: that will be sent; silence is taken to be before it.

        Raises:
            InputError: an address is malformed, or must not be sent the token.
        """
        for server in servers:
            credentials.check(server)
        self._servers, self._manifest, self._encodings = tuple(servers), manifest, encodings
        self._credentials = credentials
        self._speaker_embedding = speaker_embedding
        model = manifest.model
        self._lookahead, self._delay = model.framing.lookahead, model.delay
        per_second = 1 / model.framing.chunk_seconds
        self._backfill = round(_BACKFILL * per_second)
        self._most_unanswered = round(_MOST_UNANSWERED * per_second)
        self._most_waiting = round(_MOST_WAITING * per_second)
        self._most_late = round(_USELESS * per_second)
        self._history = 2 * self._most_waiting
        # The newest chunk of every frame's window, by frame.
        self._audio = np.zeros((self._history, model.microphones, model.framing.chunk), np.float32)
        self._captured_at = np.zeros(self._history, np.int64)
        self._ages: NDArray[np.float64] = np.zeros(self._history)
        self._frames = first_frame  # that the loop has sent
        self._taken = first_frame  # first frame whose hint has not been asked for
        self._buffer = HintBuffer(model.delay)
        self._wake = WakeEvent()
        self._closed = threading.Event()
        # At the start: a server has answered or all were tried once; whether one answered; who did not accept us.
        self._settled = threading.Event()
        self._answers = False
        self._refused: Refused | None = None
        self._thread = threading.Thread(target=self._keep_connected, name="kb-network", daemon=True)
        self._source: _Session | None = None  # that hints come from
        self.late = 0  # hints that came after their frame had started
        self.events: deque[ServerEvent] = deque(maxlen=32)

    @property
    def server(self) -> str | None:
        """The server that hints come from."""
        source = self._source
        return None if source is None else source.server

    def start(self) -> None:
        """Begin to look for a server."""
        self._thread.start()

    def settle(self) -> None:
        """Wait, some seconds at most, until a server has answered or all were tried once.

        Raises:
            Refused: a server and this device do not accept each other, and no other server has answered.
        """
        self._settled.wait(_SETTLING)
        if self._refused is not None and not self._answers:
            raise self._refused

    def close(self) -> None:
        """End the session and stop looking."""
        self._closed.set()
        self._wake.set()
        self._thread.join(timeout=2 * _PATIENCE + 1)

    def send(self, frame: int, samples: Samples, now: int) -> None:
        """Leave the samples ``[M, n]`` that complete a frame, captured at ``now`` (ns); all of frame 0's window."""
        slot, chunk = frame % self._history, self._audio.shape[2]
        self._audio[slot] = samples[:, -chunk:]
        if frame == 0 and self._lookahead:
            self._audio[-1, :, -self._lookahead :] = samples[:, : self._lookahead]
        self._captured_at[slot] = now
        self._frames = frame + 1
        self._wake.set()

    def take(self, frame: int, now: int) -> Samples | None:
        """The hint ``[channels, F]`` of a frame if it is there."""
        hint = self._buffer.take(frame, now)
        self._taken = frame + 1
        return hint

    def age_ms(self, frame: int) -> float:
        """Milliseconds from a frame's capture to the arrival of its hint, for a hint that was just taken."""
        return float(self._ages[frame % self._history])

    def _keep_connected(self) -> None:
        failures, turn, known_lost = 0, 0, False
        session: _Session | None = None
        while not self._closed.is_set():
            if session is None:
                opened = self._open(turn)
                server, turn, why = opened.server, opened.turn + 1, opened.why
                session = self._begin(opened) if opened.stream is not None else None
            else:
                server, turn = session.server, session.turn + 1
            steady, following = False, None
            if session is not None:
                why, following = self._run_session(session)
                steady = time.monotonic() - session.began > _STEADY and not self._useless(session)
            if turn >= len(self._servers):
                self._settled.set()
            if self._closed.is_set():
                if following is not None:
                    following.end()
                return
            lost, session = session is not None, following
            if following is not None:
                continue
            if lost:
                self.events.append(
                    ServerEvent(server, False, f"lost {server} ({why}); the small network goes on alone")
                )
                known_lost = True
            elif not known_lost and turn >= len(self._servers):
                text = f"{why}; the small network goes on alone, and connecting in the background"
                self.events.append(ServerEvent(server, False, text))
                known_lost = True
            failures = 0 if steady else failures + 1
            rounds = failures - len(self._servers)
            if rounds >= 0:
                shortest, longest = _PAUSES
                pause = min(longest, shortest * _GROWTH ** min(rounds, 100))
                # Devices that lost the same server do not come back in the same instant.
                self._closed.wait(max(shortest, pause * random.uniform(0.75, 1)))

    def _open(self, turn: int) -> "_Opened":
        """A session with the server whose turn it is, or why there is none."""
        server = self._servers[turn % len(self._servers)]
        framing = self._manifest.model.framing
        try:
            stream = HintStream(
                server,
                self._manifest,
                encodings=self._encodings,
                credentials=self._credentials,
                speaker_embedding=self._speaker_embedding,
                first_frame=lambda: max(0, self._frames - self._backfill),
                deadline_ms=round(1000 * self._delay * framing.chunk_seconds),
                patience=_PATIENCE,
            )
        except (InputError, Failure) as error:
            if isinstance(error, Refused) and self._refused is None:
                self._refused = error
                self.events.append(ServerEvent(server, False, str(error)))
            return _Opened(server, turn, None, str(error))
        self._answers = True
        self._settled.set()
        return _Opened(server, turn, stream)

    def _begin(self, opened: "_Opened") -> "_Session":
        """Listen to a session that was opened."""
        assert opened.stream is not None
        session = _Session(opened.server, opened.turn, opened.stream, self._backfill)
        session.listen(lambda: self._receive(session))
        return session

    def _run_session(self, session: "_Session") -> "tuple[str, _Session | None]":
        """One session to its end: why it ended, and the one that follows if that has begun already."""
        search = _Search(self._open, session.turn + 1, len(self._servers))
        following: _Session | None = None
        why: str | None = None
        try:
            while why is None and not self._closed.is_set():
                self._wake.wait(0.1)
                if session.stream.draining:
                    # This one serves on until hints of another one are there.
                    search.start()
                if following is None and search.found is not None:
                    following = self._begin(search.found)
                    text = f"{session.server} shuts down; moving to {following.server}"
                    self.events.append(ServerEvent(session.server, False, text))
                if following is not None:
                    if self._feed(following) is not None:
                        following.end()
                        search = _Search(self._open, following.turn + 1, len(self._servers))
                        following = None
                    elif following.in_time:
                        return "moves", following
                why = self._feed(session)
        finally:
            search.stop()
            session.end()
            if self._source is session:
                self._source = None
        if following is None and search.found is not None:  # as it was told to stop
            following = self._begin(search.found)
        return why or "closed", following

    def _feed(self, session: "_Session") -> str | None:
        """Send a session what the loop has left; why the session is over, if it is."""
        stream = session.stream
        if stream.ended is not None:
            return f"{stream.ended.status}: {stream.ended.detail}"
        waiting = self._frames - session.sent
        unanswered = session.sent - session.answered
        if unanswered and time.perf_counter_ns() - session.answered_at > 1e9 * _SILENCE:
            return "no answer any more"
        if session.sent > stream.first_frame and waiting > self._most_waiting:
            return "falls behind"
        if self._useless(session):
            return f"no hint came in time for {_USELESS:g} s"
        count = min(waiting, self._most_unanswered - unanswered, MAX_CHUNKS_PER_MESSAGE)
        if count <= 0:
            return None
        samples = self._samples(session.sent, count, first=session.sent == stream.first_frame)
        if self._frames - session.sent >= self._history:  # overwritten while it was read
            return "falls behind"
        if not unanswered:
            session.answered_at = time.perf_counter_ns()
        stream.send(session.sent, samples)
        session.sent += count
        return None

    def _useless(self, session: "_Session") -> bool:
        return session.late_in_row >= self._most_late

    def _samples(self, frame: int, count: int, *, first: bool) -> Samples:
        """The samples ``[M, n]`` that complete ``count`` frames; a session's first ones with the lookahead before."""
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
            if frame < session.warm:
                continue
            self._ages[frame % self._history] = (now - self._captured_at[frame % self._history]) / 1e6
            late = frame < self._taken or received.hint is None
            self.late += late
            session.late_in_row = session.late_in_row + 1 if late else 0
            if received.hint is None:
                continue
            self._buffer.put(frame, received.hint, now)
            if not session.in_time and (not late or self._source is None):
                session.in_time = not late
                # Sessions are compared, not addresses: behind one address there may be several servers.
                if self._source is not session:
                    self._source = session
                    self.events.append(ServerEvent(session.server, True, f"hints come from {session.server}"))
        self._wake.set()


class _Session:
    """A session with a server, as far as it has come."""

    def __init__(self, server: str, turn: int, stream: HintStream, backfill: int) -> None:
        self.server, self.turn, self.stream = server, turn, stream
        self.began = time.monotonic()
        # A network that has heard everything from the start is warm already.
        self.warm = stream.first_frame + backfill if stream.first_frame else 0  # first frame whose hint may be used
        self.sent = self.answered = stream.first_frame  # frames
        self.answered_at = time.perf_counter_ns()
        self.in_time = False  # whether a hint that may be used has come before its frame
        self.late_in_row = 0  # hints, of the last ones

    def listen(self, receive: Callable[[], None]) -> None:
        """Receive hints on a thread."""
        self._receiver = threading.Thread(target=receive, name="kb-hints", daemon=True)
        self._receiver.start()

    def end(self) -> None:
        """End it; no hint comes after this."""
        # A connection takes seconds to close when its peer has vanished; the next session does not wait for that.
        threading.Thread(target=self.stream.close, name="kb-close").start()
        self._receiver.join()


@dataclass(frozen=True)
class _Opened:
    """What became of an attempt to open a session."""

    server: str
    turn: int
    stream: HintStream | None
    why: str = ""


class _Search:
    """Looks for another server while the present one still serves."""

    def __init__(self, attempt: Callable[[int], _Opened], turn: int, servers: int) -> None:
        self._attempt, self._turn, self._servers = attempt, turn, servers
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self.found: _Opened | None = None

    def start(self) -> None:
        """Begin, if it has not begun."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kb-search", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no further than where it looks now."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            opened = self._attempt(self._turn)
            if opened.stream is not None:
                self.found = opened
                return
            self._turn += 1
            if self._turn % self._servers == 0:
                self._stopped.wait(_PAUSES[0])
