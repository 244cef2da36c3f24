"""The large network for many sessions: their states lie in slots, and one step serves all that have a frame ready."""

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

# Frames of one session that a step takes: a backlog is worked off in such pieces, so that nobody waits long for it.
_LENGTHS = (1, 2, 4, 8)
_MOST_FRAMES = _LENGTHS[-1]
_log = logging.getLogger(__name__)


class Batch:
    """What one step computed for all of its sessions. It is encoded at once: one by one takes many times as long."""

    def __init__(self, values: Samples) -> None:
        """Hints ``[B, T, hint channels, F]``."""
        self.values = values
        self._encoded: dict[int, tuple[NDArray[Any], list[list[float]]]] = {}

    def encoded(self, encoding: int) -> tuple[NDArray[Any], list[list[float]]]:
        """The values as payloads hold them, and the scales ``[B][T]``."""
        if encoding not in self._encoded:
            payloads, scales = encode_hints(self.values, encoding)
            self._encoded[encoding] = payloads, scales.tolist()
        return self._encoded[encoding]


@dataclass(frozen=True)
class Hints:
    """What one step computed for one session."""

    batch: Batch
    row: int  # the session's in it
    arrived: Sequence[int]  # when the audio of each frame came, ns of the monotonic clock
    finite: bool  # whether all values are
    started: int  # when the step began, ns
    ended: int  # when it ended, ns

    @property
    def values(self) -> Samples:
        """Hints ``[T, hint channels, F]``."""
        own: Samples = self.batch.values[self.row]
        return own

    def payload(self, frame: int, encoding: int) -> tuple[bytes, float]:
        """Payload and scale of one of the frames."""
        payloads, scales = self.batch.encoded(encoding)
        return payloads[self.row, frame].tobytes(), scales[self.row][frame]


@dataclass(frozen=True)
class Step:
    """One step's figures, for whoever observes the engine."""

    sessions: int
    frames: int
    started: int  # ns
    ended: int  # ns


@dataclass(eq=False)
class EngineSession:
    """One device's stream through the large network. :meth:`send` never waits."""

    engine: "HintEngine"
    receive: Callable[[Hints | Exception], None]  # called on the event loop, in frame order
    alone: bool = False  # whether each of its frames is a step by itself
    slot: int = -1  # none before the engine has begun with the session
    closed: bool = False
    audio: bytearray = field(default_factory=bytearray)  # [n, M] not computed yet
    arrived: deque[int] = field(default_factory=deque)  # of the frames in it

    @property
    def waiting(self) -> int:
        """Frames sent whose step has not begun."""
        return len(self.arrived)

    def send(self, samples: Samples, frames: int) -> None:
        """Leave samples ``[M, chunk T]`` that complete T frames; the first ones with ``lookahead`` before them."""
        self.engine._add(self, samples, frames)

    def close(self) -> None:
        """Give the slot back. Hints of what was sent do not come any more."""
        self.engine._leave(self)


class HintEngine:
    """The large network on one device, and the thread that runs its steps.

    A step takes what is there of every session: one frame, or of a session that is behind a power of two, up to eight.
    Sessions with equally many go through the network together, those with one frame first. Frames of a session stay in
    order, and no session waits for more than one such round.

    How frames are put together changes the last bits of their hints. So a session may ask for steps of its own, each of
    one frame; of all such sessions a round takes one frame, for which the others wait.
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
            slots: most sessions at once.
            max_wait: seconds that a step may wait for the frames of further sessions.
            observe: called on the engine's thread after every step.
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
        self._ready: set[EngineSession] = set()  # those of them with a frame
        self._commands: deque[Callable[[], None]] = deque()
        self._closing = False
        self._failure: Exception | None = None  # of the last step
        self._most_backlog = _MOST_FRAMES  # frames of all sessions together in a step over backlogs
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
        alone: bool = False,
    ) -> EngineSession:
        """A new session, whose hints go to ``receive``; ``speaker_embedding`` is ``[256]`` for TSE.

        No more than ``slots`` may be open; one that was closed counts no more.

        Args:
            alone: compute every frame by itself, so that the same audio gives the same hints to the last bit.
        """
        session = EngineSession(self, receive, alone)
        self._loop = asyncio.get_running_loop()
        ready = self._loop.create_future()
        self._command(lambda: self._begin(session, speaker_embedding, ready))
        try:
            await ready
        except BaseException:
            session.close()
            raise
        return session

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    async def answer(self) -> None:
        """Wait until the thread is between two steps.

        Raises:
            RuntimeError: it has ended, or its last step failed.
        """
        loop = asyncio.get_running_loop()
        answered = loop.create_future()
        self._command(lambda: _on_loop(loop, lambda: _resolve(answered)))
        if not self.alive:
            raise RuntimeError("the engine's thread has ended")
        await answered
        if self._failure is not None:
            raise RuntimeError(f"the last step failed ({self._failure})")

    def close(self) -> None:
        """End the thread after the step under way."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _add(self, session: EngineSession, samples: Samples, frames: int) -> None:
        if session.closed:
            return
        now = time.perf_counter_ns()
        with self._changed:
            session.audio += samples.T.tobytes()
            session.arrived.extend([now] * frames)
            self._ready.add(session)
            # Those between the first and the last do not change what the thread waits for.
            if len(self._ready) == 1 or len(self._ready) == len(self._sessions):
                self._changed.notify()

    def _leave(self, session: EngineSession) -> None:
        if session.closed:
            return
        session.closed = True
        self._command(lambda: self._end(session))

    def _command(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _begin(self, session: EngineSession, speaker_embedding: Samples | None, ready: "asyncio.Future[None]") -> None:
        try:
            if not session.closed:
                state = self._model.initial_state(1, self._embedding(speaker_embedding))
                session.slot = self._free.pop()
                self._sessions.add(session)
                self._states.put(session.slot, state)
        except Exception as error:
            _log.exception("a session could not begin")
            failure = error
            _on_loop(ready.get_loop(), lambda: _resolve(ready, failure))
        else:
            _on_loop(ready.get_loop(), lambda: _resolve(ready))

    def _end(self, session: EngineSession) -> None:
        # A command as well, so that no step can still write to the slot when the next session gets it.
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
        """What the next round computes: frames a session, and the sessions. None when the engine closes."""
        while True:
            # Outside the lock, which the event loop wants: a session's first state takes as long as a step.
            while self._commands:
                self._commands.popleft()()
            with self._changed:
                if self._commands:
                    continue
                if self._closing:
                    return None
                if self._ready:
                    first = min(session.arrived[0] for session in self._ready)
                    left = self._max_wait - (time.perf_counter_ns() - first) / 1e9
                    if len(self._ready) == len(self._sessions) or left <= 0:
                        return _groups(self._ready, self._most_backlog)
                    self._changed.wait(left)
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
            del parts  # which hold the audio as it is
            arrived = [[session.arrived.popleft() for _ in range(frames)] for session in sessions]
            for session in sessions:
                del session.audio[: size * chunk * frames]
                if not session.arrived:
                    self._ready.remove(session)
        started = time.perf_counter_ns()
        try:
            indexes = slots.to(self._device)
            samples = torch.from_numpy(windows).view(len(sessions), -1, microphones).transpose(1, 2)
            values = self._states.step(samples.to(self._device), indexes).cpu().numpy()
        except Exception as error:  # of memory, or of the device: those sessions end, the engine goes on
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
                Hints(batch, row, *own, started, ended) for row, own in enumerate(zip(arrived, finite, strict=True))
            ]
        if frames > 1:
            # As many as leave the others' next frames their time.
            took = (ended - started) / 1e9 / self._framing.chunk_seconds
            if took < 0.5 and 2 * frames * len(sessions) > self._most_backlog:
                self._most_backlog *= 2
            elif took > 1:
                self._most_backlog = max(self._most_backlog // 2, _MOST_FRAMES)
        deliveries = list(zip(sessions, results, strict=True))
        if self._observe is not None:
            self._observe(Step(len(sessions), frames * len(sessions), started, ended))
        assert self._loop is not None
        _on_loop(self._loop, lambda: _deliver(deliveries))


def _groups(ready: Iterable[EngineSession], most_backlog: int) -> list[tuple[int, list[EngineSession]]]:
    """Sessions by the frames that a step takes of each: a power of two, of those that have waited longest first."""
    groups: dict[int, list[EngineSession]] = {}
    alone: list[tuple[int, list[EngineSession]]] = []
    for session in sorted(ready, key=lambda session: session.arrived[0]):
        if session.alone:
            alone = alone or [(1, [session])]
            continue
        frames = min(1 << (session.waiting.bit_length() - 1), _MOST_FRAMES)
        group = groups.setdefault(frames, [])
        if frames <= 2 or not group or (len(group) + 1) * frames <= most_backlog:
            group.append(session)
    return sorted(groups.items()) + alone


def _deliver(results: list[tuple[EngineSession, Hints | Exception]]) -> None:
    for session, result in results:
        if not session.closed:
            session.receive(result)


def _resolve(ready: "asyncio.Future[None]", error: Exception | None = None) -> None:
    if ready.done():
        return
    if error is not None:
        ready.set_exception(error)
    else:
        ready.set_result(None)


def _on_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed already, and nobody waits
        loop.call_soon_threadsafe(call)
