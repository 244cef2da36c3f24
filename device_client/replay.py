"""The frame loop over a recording, on a virtual or the real clock."""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from device_client.engine import Engine
from device_client.hint_buffer import HintBuffer, HintLog
from device_client.hint_stream import HintStream, ReceivedHint, StreamEnd
from device_client.simulated_network import Link
from models.config import Framing
from protos.codec import Samples


@dataclass
class Run:
    """What a pass over a recording gave."""

    output: Samples  # [S, M, N]
    compute_ns: NDArray[np.int64]  # [T] the small network's time for each frame
    late_start_ns: NDArray[np.int64]  # [T] how long after its window was complete a frame was started
    log: HintLog
    ended_at: int  # stream time, ns
    hints_received: int = 0
    server_queue_us: list[int] = field(default_factory=list)
    server_compute_us: list[int] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    lost: StreamEnd | None = None  # why hints ended before the audio did


class Hints(Protocol):
    """Where the frame loop sends audio and gets hints, on its own clock. Times are stream times in nanoseconds."""

    def wait_until(self, time_ns: int) -> int:
        """Wait until a stream time; the time it is then."""
        ...

    def send(self, frame: int, samples: Samples, now: int) -> None:
        """Send the samples that complete a frame."""
        ...

    def take(self, frame: int, now: int) -> Samples | None:
        """The hint of a frame if it is there."""
        ...

    def finish(self, run: Run) -> None:
        """No more frames: write into the run what became of the hints."""
        ...


def run_frames(
    engine: Engine,
    mixture: Samples,
    framing: Framing,
    delay: int,
    hints: Hints | None,
    log: HintLog,
    progress: Callable[[], None],
) -> Run:
    """Run a whole mixture ``[M, N]`` frame by frame.

    Args:
        hints: None for a network alone, or one whose hints are all withheld.
        log: of these frames.
        progress: called after every frame.
    """
    length = mixture.shape[1]
    frames, chunk, n_fft = framing.frames(length), framing.chunk, framing.n_fft
    padded = np.pad(mixture, ((0, 0), (0, frames * chunk + framing.lookahead - length)))
    compute, late_start = np.zeros(frames, np.int64), np.zeros(frames, np.int64)
    output = []
    now = 0
    for frame in range(frames):
        window = np.ascontiguousarray(padded[:, frame * chunk : frame * chunk + n_fft])
        complete = round(framing.complete_at(frame) * 1e9)
        log.captured_at[frame] = complete
        hint = None
        if hints is not None:
            now = hints.wait_until(complete)
            hints.send(frame, window if frame == 0 else window[:, -chunk:], now)
            if frame >= delay:
                hint = hints.take(frame - delay, now)
                log.used[frame - delay] = hint is not None
        late_start[frame] = now - complete
        started = time.perf_counter_ns()
        output.append(engine.step(window, hint))
        compute[frame] = time.perf_counter_ns() - started
        progress()
    run = Run(np.concatenate(output, axis=-1)[..., :length], compute, late_start, log, ended_at=now)
    if hints is not None:
        hints.finish(run)
    return run


class VirtualHints:
    """Hints on a computed clock: a real server computes them, arithmetic says when each arrives.

    The result depends on the seed alone, not on the speed of this machine.
    """

    def __init__(
        self,
        stream: HintStream,
        delay: int,
        log: HintLog,
        *,
        uplink: Link,
        downlink: Link,
        server_ns: int,
        sample_bytes: int,
    ) -> None:
        """Hints over a stream.

        Args:
            server_ns: time the server takes for a frame.
            sample_bytes: size of one sample of all channels on the wire.
        """
        self._stream, self._log = stream, log
        self._buffer = HintBuffer(delay)
        self._uplink, self._downlink = uplink, downlink
        self._server_ns, self._sample_bytes = server_ns, sample_bytes
        self._computed_at: list[int] = []
        self._received: list[ReceivedHint] = []

    def wait_until(self, time_ns: int) -> int:
        return time_ns

    def send(self, frame: int, samples: Samples, now: int) -> None:
        self._stream.send(frame, samples)
        reached = self._uplink.arrival(now, samples.shape[1] * self._sample_bytes)
        free = self._computed_at[-1] if self._computed_at else 0
        self._computed_at.append(max(reached, free) + self._server_ns)

    def take(self, frame: int, now: int) -> Samples | None:
        # Waiting for the hint even if it will be late keeps the server from falling behind without bound.
        while len(self._received) <= frame and self._receive():
            pass
        return self._buffer.take(frame, now)

    def finish(self, run: Run) -> None:
        if self._stream.ended is None:
            self._stream.finish()
            while self._receive():
                pass
        if len(self._received) < len(self._log.used):
            run.lost = self._stream.ended
        _account(run, self._stream, self._received)

    def _receive(self) -> bool:
        received = self._stream.receive()
        if received is None:
            return False
        arrival = self._downlink.arrival(self._computed_at[received.frame], received.payload_bytes)
        self._log.arrived_at[received.frame] = arrival
        assert received.hint is not None  # this session has no deadline
        self._buffer.put(received.frame, received.hint, arrival)
        self._received.append(received)
        return True


class RealHints:
    """Hints on the real clock: frames are paced, simulated delays really pass, deadlines are met or missed."""

    def __init__(self, delay: int, log: HintLog, *, uplink: Link, downlink: Link) -> None:
        self._log = log
        self._buffer = HintBuffer(delay)
        self._uplink, self._downlink = uplink, downlink
        self._sent_at: dict[int, int] = {}
        self._received: list[ReceivedHint] = []
        self._on_the_way: queue.SimpleQueue[tuple[int, ReceivedHint] | None] = queue.SimpleQueue()
        self._stream: HintStream | None = None
        self._threads = [
            threading.Thread(target=self._receive, name="hint-receiver", daemon=True),
            threading.Thread(target=self._deliver, name="hint-downlink", daemon=True),
        ]
        self._started_at = 0

    def hold(self, frame: int, payload_bytes: int) -> None:
        """Wait, on the sending thread, until a message has crossed the uplink."""
        self.wait_until(self._uplink.arrival(self._sent_at.pop(frame), payload_bytes))

    def start(self, stream: HintStream) -> None:
        """Begin with stream time 0 now; the stream must have :meth:`hold` as its ``hold``."""
        self._stream = stream
        self._started_at = time.perf_counter_ns()
        for thread in self._threads:
            thread.start()

    def wait_until(self, time_ns: int) -> int:
        while (left := time_ns - self._now()) > 0:
            time.sleep(left / 1e9)
        return self._now()

    def send(self, frame: int, samples: Samples, now: int) -> None:
        assert self._stream is not None
        self._sent_at[frame] = now
        self._stream.send(frame, samples)

    def take(self, frame: int, now: int) -> Samples | None:
        return self._buffer.take(frame, now)

    def finish(self, run: Run) -> None:
        assert self._stream is not None
        run.ended_at = self._now()
        run.lost = self._stream.ended
        self._stream.close()
        for thread in self._threads:
            thread.join()
        _account(run, self._stream, self._received)

    def _now(self) -> int:
        return time.perf_counter_ns() - self._started_at

    def _receive(self) -> None:
        assert self._stream is not None
        while (received := self._stream.receive()) is not None:
            self._received.append(received)
            self._on_the_way.put((self._downlink.arrival(self._now(), received.payload_bytes), received))
        self._on_the_way.put(None)

    def _deliver(self) -> None:
        while (item := self._on_the_way.get()) is not None:
            arrival, received = item
            now = self.wait_until(arrival)
            assert received.hint is not None  # this session has no deadline
            self._buffer.put(received.frame, received.hint, now)
            self._log.arrived_at[received.frame] = now


def _account(run: Run, stream: HintStream, received: list[ReceivedHint]) -> None:
    run.hints_received = len(received)
    run.server_queue_us = [hint.queue_us for hint in received]
    run.server_compute_us = [hint.compute_us for hint in received]
    run.bytes_up, run.bytes_down = stream.bytes_up, stream.bytes_down
