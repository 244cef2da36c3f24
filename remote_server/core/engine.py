"""The engine that runs the large network for many sessions: one step serves all sessions that have a frame ready."""

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE
from knowledge_boosting.models.pair import LargeModel
from knowledge_boosting.models.slots import StateSlots
from knowledge_boosting.protos.codec import Samples, encode_hints

# Possible numbers of frames of one session in a step. A backlog is processed in such parts, so that other sessions do
# not wait long.
_LENGTHS = (1, 2, 4, 8)
_MAX_FRAMES = _LENGTHS[-1]
_log = logging.getLogger(__name__)


class Batch:
    """The hints that one step computed for all its sessions. They are encoded together, which is many times faster."""

    def __init__(self, values: Samples) -> None:
        """Create a batch of hints ``[B, T, hint channels, F]``."""
        self.values = values
        self._encoded: dict[int, tuple[NDArray[Any], list[list[float]]]] = {}

    def encoded(self, encoding: int) -> tuple[NDArray[Any], list[list[float]]]:
        """Return the encoded values, ``[B, T, hint channels, F]``, and the scales ``[B][T]``."""
        if encoding not in self._encoded:
            payloads, scales = encode_hints(self.values, encoding)
            self._encoded[encoding] = payloads, scales.tolist()
        return self._encoded[encoding]


@dataclass(frozen=True)
class Hints:
    """The hints that one step computed for one session. All times are nanoseconds of the monotonic clock."""

    batch: Batch
    row: int  # row of the session in the batch
    arrived_at: Sequence[int]  # when the audio of each frame arrived
    finite: bool  # whether all values are finite
    started: int  # when the step started
    ended: int  # when the step ended

    @property
    def values(self) -> Samples:
        """The hints ``[T, hint channels, F]``."""
        values: Samples = self.batch.values[self.row]
        return values

    def payload(self, frame: int, encoding: int) -> tuple[bytes, float]:
        """Return the payload and the scale of one frame."""
        payloads, scales = self.batch.encoded(encoding)
        return payloads[self.row, frame].tobytes(), scales[self.row][frame]


@dataclass(frozen=True)
class Step:
    """The figures of one step."""

    sessions: int
    frames: int
    started: int  # ns
    ended: int  # ns


@dataclass(eq=False)
class EngineSession:
    """The stream of one device through the large network. :meth:`send` never waits."""

    engine: "HintEngine"
    receive: Callable[[Hints | Exception], None]  # called on the event loop, in frame order
    reproducible: bool = False  # whether each frame is computed in a separate step
    slot: int = -1  # index of the session's state; -1 until the engine has opened the session
    closed: bool = False
    audio: bytearray = field(default_factory=bytearray)  # float32 samples [n, M] that are not processed yet
    arrived_at: deque[int] = field(default_factory=deque)  # arrival times of their frames, ns

    @property
    def pending_frames(self) -> int:
        """The number of frames that were sent and whose step has not started."""
        return len(self.arrived_at)

    def send(self, samples: Samples, frames: int) -> None:
        """Add samples ``[M, chunk T]`` that complete T frames. The first call includes the lookahead before them."""
        self.engine._add_audio(self, samples, frames)

    def close(self) -> None:
        """Release the slot. No more hints are delivered."""
        self.engine._close_session(self)


class HintEngine:
    """The large network on one device, and the thread that runs its steps.

    The engine works in rounds. In a round, each session with pending frames gets one frame, or a power of two of up to
    eight frames if it has a backlog. The sessions with the same number of frames share a step, and those with one frame
    come first. So the frames of a session stay in order, and no session waits for more than one round.

    The composition of a step changes the last bits of its hints. So a reproducible session gets separate steps of one
    frame. Each round has only one such step, so that reproducible sessions wait for each other.
    """

    def __init__(
        self,
        model: LargeModel,
        device: torch.device,
        *,
        slots: int,
        max_wait: float = 0.001,
        observe: Callable[[Step], None] | None = None,
    ) -> None:
        """Start the thread.

        Args:
            model: The large network.
            device: The device on which it runs.
            slots: The maximum number of open sessions.
            max_wait: The time that a step waits for the audio of other sessions, seconds.
            observe: Called on the engine's thread after each step.
        """
        self.slots = slots
        self._model = model.to(device)
        self._device = device
        self._framing = model.config.framing
        self._max_wait = max_wait
        self._observe = observe
        self._changed = threading.Condition()
        self._free = list(range(slots - 1, -1, -1))
        self._sessions: set[EngineSession] = set()
        self._ready: set[EngineSession] = set()  # the sessions with pending frames
        self._commands: deque[Callable[[], None]] = deque()
        self._closing = False
        self._failure: Exception | None = None  # the exception of the last step, if it failed
        self._max_backlog = _MAX_FRAMES  # maximum number of frames, over all sessions, in a step for backlogs
        self._loop: asyncio.AbstractEventLoop | None = None
        with torch.inference_mode():
            self._states = StateSlots(self._model, slots, self._embedding(None))
            self._states.prepare(_LENGTHS)
        self._thread = threading.Thread(target=self._run, name="hint-engine", daemon=True)
        self._thread.start()

    async def open(
        self,
        receive: Callable[[Hints | Exception], None],
        speaker_embedding: Samples | None = None,
        *,
        reproducible: bool = False,
    ) -> EngineSession:
        """Open a session. The caller must not open more than ``slots`` sessions at a time.

        Args:
            receive: Called on the event loop with the hints of each step, or with an exception if the step failed.
            speaker_embedding: ``[256]`` for TSE, otherwise None.
            reproducible: Whether each frame is computed separately, so that the same audio gives bit-identical hints.
        """
        session = EngineSession(self, receive, reproducible)
        self._loop = asyncio.get_running_loop()
        ready = self._loop.create_future()
        self._submit(lambda: self._open_session(session, speaker_embedding, ready))
        try:
            await ready
        except BaseException:
            session.close()
            raise
        return session

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    async def check_health(self) -> None:
        """Check that the thread executes commands and that its last step succeeded.

        Raises:
            RuntimeError: The thread has ended, or its last step failed.
        """
        loop = asyncio.get_running_loop()
        executed = loop.create_future()
        self._submit(lambda: _call_on_loop(loop, lambda: _resolve(executed)))
        if not self.alive:
            raise RuntimeError("the engine's thread has ended")
        await executed
        if self._failure is not None:
            raise RuntimeError(f"the last step failed ({self._failure})")

    def close(self) -> None:
        """End the thread after the current step."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _add_audio(self, session: EngineSession, samples: Samples, frames: int) -> None:
        if session.closed:
            return
        now = time.perf_counter_ns()
        with self._changed:
            session.audio += samples.T.tobytes()
            session.arrived_at.extend([now] * frames)
            self._ready.add(session)
            # The thread waits for the first ready session, and then until all sessions are ready.
            if len(self._ready) == 1 or len(self._ready) == len(self._sessions):
                self._changed.notify()

    def _close_session(self, session: EngineSession) -> None:
        if session.closed:
            return
        session.closed = True
        self._submit(lambda: self._free_slot(session))

    def _submit(self, command: Callable[[], None]) -> None:
        """Have the thread execute a command between two steps."""
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _open_session(
        self, session: EngineSession, speaker_embedding: Samples | None, ready: "asyncio.Future[None]"
    ) -> None:
        try:
            if not session.closed:
                state = self._model.initial_state(1, self._embedding(speaker_embedding))
                session.slot = self._free.pop()
                self._sessions.add(session)
                self._states.put(session.slot, state)
        except Exception as error:
            _log.exception("a session could not be opened")
            failure = error
            _call_on_loop(ready.get_loop(), lambda: _resolve(ready, failure))
        else:
            _call_on_loop(ready.get_loop(), lambda: _resolve(ready))

    def _free_slot(self, session: EngineSession) -> None:
        # This runs as a command, so that no step writes to the slot after the next session has got it.
        if session in self._sessions:
            self._sessions.remove(session)
            self._free.append(session.slot)
            with self._changed:
                self._ready.discard(session)

    def _embedding(self, values: Samples | None) -> torch.Tensor | None:
        if not self._model.config.needs_speaker:
            return None
        array = values if values is not None else np.zeros(SPEAKER_EMBEDDING_SIZE, np.float32)
        return torch.from_numpy(array)[None].to(self._device)

    @torch.inference_mode()
    def _run(self) -> None:
        while (groups := self._next_round()) is not None:
            for frames, sessions in groups:
                self._step(frames, sessions)

    def _next_round(self) -> list[tuple[int, list[EngineSession]]] | None:
        """Wait for the next round. Return its steps, as pairs of frames and sessions, or None if the engine closes."""
        while True:
            # This runs without the lock, because the initial state of a session takes as long as a step, and the event
            # loop needs the lock.
            while self._commands:
                self._commands.popleft()()
            with self._changed:
                if self._commands:
                    continue
                if self._closing:
                    return None
                if self._ready:
                    first = min(session.arrived_at[0] for session in self._ready)
                    wait = self._max_wait - (time.perf_counter_ns() - first) / 1e9
                    if len(self._ready) == len(self._sessions) or wait <= 0:
                        return _plan_round(self._ready, self._max_backlog)
                    self._changed.wait(wait)
                else:
                    self._changed.wait()

    def _step(self, frames: int, sessions: list[EngineSession]) -> None:
        chunk, lookahead = self._framing.chunk, self._framing.lookahead
        microphones = self._model.config.microphones
        size = microphones * np.dtype(np.float32).itemsize
        with self._changed:
            sessions = [session for session in sessions if not session.closed]
            if not sessions:
                return
            slots = torch.tensor([session.slot for session in sessions])
            parts = [memoryview(session.audio)[: size * (chunk * frames + lookahead)] for session in sessions]
            windows = np.frombuffer(bytearray().join(parts), np.float32)
            del parts  # the audio cannot be resized while there are views of it
            arrived_at = [[session.arrived_at.popleft() for _ in range(frames)] for session in sessions]
            for session in sessions:
                del session.audio[: size * chunk * frames]
                if not session.arrived_at:
                    self._ready.remove(session)
        started = time.perf_counter_ns()
        try:
            samples = torch.from_numpy(windows).view(len(sessions), -1, microphones).transpose(1, 2)
            values = self._states.step(samples, slots).numpy()
        except Exception as error:  # a fault of memory or device ends these sessions, but not the engine
            _log.exception("a step failed")
            self._failure = error
            results: list[Hints | Exception] = [error] * len(sessions)
            ended = time.perf_counter_ns()
        else:
            ended = time.perf_counter_ns()
            self._failure = None
            finite = np.isfinite(values).all((1, 2, 3)).tolist()
            batch = Batch(values)
            results = [
                Hints(batch, row, *own, started, ended) for row, own in enumerate(zip(arrived_at, finite, strict=True))
            ]
        if frames > 1:
            # Adapt the size of steps for backlogs, so that other sessions have enough time for their next frames.
            duration = (ended - started) / 1e9 / self._framing.chunk_seconds
            if duration < 0.5 and 2 * frames * len(sessions) > self._max_backlog:
                self._max_backlog *= 2
            elif duration > 1:
                self._max_backlog = max(self._max_backlog // 2, _MAX_FRAMES)
        deliveries = list(zip(sessions, results, strict=True))
        if self._observe is not None:
            self._observe(Step(len(sessions), frames * len(sessions), started, ended))
        assert self._loop is not None
        _call_on_loop(self._loop, lambda: _deliver(deliveries))


def _plan_round(ready: Iterable[EngineSession], max_backlog: int) -> list[tuple[int, list[EngineSession]]]:
    """Group the sessions by the number of frames in the next round. Sessions that have waited longest come first."""
    groups: dict[int, list[EngineSession]] = {}
    reproducible: list[tuple[int, list[EngineSession]]] = []
    for session in sorted(ready, key=lambda session: session.arrived_at[0]):
        if session.reproducible:
            reproducible = reproducible or [(1, [session])]
            continue
        frames = min(1 << (session.pending_frames.bit_length() - 1), _MAX_FRAMES)
        group = groups.setdefault(frames, [])
        if frames <= 2 or not group or (len(group) + 1) * frames <= max_backlog:
            group.append(session)
    return sorted(groups.items()) + reproducible


def _deliver(results: list[tuple[EngineSession, Hints | Exception]]) -> None:
    for session, result in results:
        if not session.closed:
            session.receive(result)


def _resolve(future: "asyncio.Future[None]", error: Exception | None = None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(None)


def _call_on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is already closed
        loop.call_soon_threadsafe(call)
