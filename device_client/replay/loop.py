"""The frame loop over a recording, on a virtual or the real clock."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from knowledge_boosting.device_client.boosted_stream import BoostedStream, HintSource, split_frames
from knowledge_boosting.device_client.engines.engine import Engine
from knowledge_boosting.device_client.hints.buffer import HintBuffer
from knowledge_boosting.device_client.hints.links import Link
from knowledge_boosting.device_client.hints.stream import HintStream, ReceivedHint, StreamEnd
from knowledge_boosting.device_client.replay.hint_log import HintLog
from knowledge_boosting.device_client.replay.tally import Tally
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.protos.codec import Samples


@dataclass
class Run:
    """What a pass over a recording gave, beside the estimate."""

    log: HintLog
    compute: Tally = field(default_factory=Tally)  # the small network's time for each frame
    frames_behind: int = 0  # that were started more than a chunk after their windows were complete
    ended_at: int = 0  # stream time, ns
    hints_received: int = 0
    server_queue: Tally = field(default_factory=Tally)
    server_compute: Tally = field(default_factory=Tally)
    bytes_up: int = 0
    bytes_down: int = 0
    overflows: int = 0  # frames at which the network gave no numbers, and the input was taken
    lost: StreamEnd | None = None  # why hints ended before the audio did

    def count(self, hint: ReceivedHint) -> None:
        """A hint has come."""
        self.hints_received += 1
        self.server_queue.add(hint.queue_us)
        self.server_compute.add(hint.compute_us)


class Hints(HintSource, Protocol):
    """Hints on a clock of their own. Times are stream times in nanoseconds."""

    def wait_until(self, time_ns: int) -> int:
        """Wait until a stream time; the time it is then."""
        ...

    def finish(self) -> None:
        """No more frames: write into the run what became of the hints."""
        ...


def run_frames(
    engine: Engine,
    mixture: Iterable[Samples],
    model: ModelConfig,
    hints: Hints | None,
    run: Run,
    write: Callable[[Samples], None],
    progress: Callable[[], None],
) -> None:
    """Run a mixture frame by frame.

    Args:
        mixture: its samples, ``[M, n]`` at a time.
        hints: None for a network alone, or one whose hints are all withheld.
        run: where it is written down what happens; the log has room for all frames.
        write: called with every chunk of the estimate, ``[S, M, n]``; together they are as long as the mixture.
        progress: called after every frame.
    """
    framing, log, stream = model.framing, run.log, BoostedStream(engine, model, hints)
    chunk_ns = round(framing.chunk_seconds * 1e9)
    for samples, length in split_frames(mixture, framing):
        complete = round(framing.complete_at(stream.frames) * 1e9)
        log.captured_at[stream.frames] = complete
        now = hints.wait_until(complete) if hints is not None else 0
        run.frames_behind += hints is not None and now - complete > chunk_ns
        run.ended_at = now
        stream.fresh[:] = samples
        frame = stream.step(now)
        if frame.hint_due:
            log.used[frame.number - model.delay] = frame.hint is not None
        run.compute.add((frame.compute_ns + 500) // 1000)
        write(frame.estimate[..., :length])
        progress()
    log.end(stream.frames)
    run.overflows = engine.overflows
    if hints is not None:
        hints.finish()


class VirtualHints:
    """Hints on a computed clock: a real server computes them, arithmetic says when each arrives.

    The result depends on the seed alone, not on the speed of this machine.
    """

    def __init__(
        self,
        stream: HintStream,
        delay: int,
        run: Run,
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
        self._stream, self._run = stream, run
        self._buffer = HintBuffer(delay)
        self._uplink, self._downlink = uplink, downlink
        self._server_ns, self._sample_bytes = server_ns, sample_bytes
        self._sent = 0
        self._free_at = 0  # the server, ns
        self._computed_at: deque[int] = deque()  # of the hints that have not been received

    def wait_until(self, time_ns: int) -> int:
        return time_ns

    def send(self, frame: int, samples: Samples, now: int) -> None:
        self._sent += 1
        if self._stream.ended is not None:
            return  # nobody takes it any more
        self._stream.send(frame, samples.copy())
        reached = self._uplink.arrival(now, samples.shape[1] * self._sample_bytes)
        self._free_at = max(reached, self._free_at) + self._server_ns
        self._computed_at.append(self._free_at)

    def take(self, frame: int, now: int) -> Samples | None:
        # Waiting for the hint even if it will be late keeps the server from falling behind without bound.
        while self._run.hints_received <= frame and self._receive():
            pass
        return self._buffer.take(frame, now)

    def finish(self) -> None:
        if self._stream.ended is None:
            self._stream.finish()
            while self._receive():
                pass
        if self._run.hints_received < self._sent:
            self._run.lost = self._stream.ended
        self._run.bytes_up, self._run.bytes_down = self._stream.bytes_up, self._stream.bytes_down

    def _receive(self) -> bool:
        received = self._stream.receive()
        if received is None:
            return False
        arrival = self._downlink.arrival(self._computed_at.popleft(), received.payload_bytes)
        self._run.log.arrived_at[received.frame] = arrival
        assert received.hint is not None  # this session has no deadline
        self._buffer.put(received.frame, received.hint, arrival)
        self._run.count(received)
        return True


class RealHints:
    """Hints on the real clock: frames are paced, simulated delays really pass, deadlines are met or missed."""

    def __init__(self, delay: int, run: Run, *, uplink: Link, downlink: Link) -> None:
        self._run = run
        self._buffer = HintBuffer(delay)
        self._uplink, self._downlink = uplink, downlink
        self._sent_at: dict[int, int] = {}
        self._on_the_way: queue.SimpleQueue[tuple[int, ReceivedHint] | None] = queue.SimpleQueue()
        self._stream: HintStream | None = None
        self._threads = [
            threading.Thread(target=self._receive, name="hint-receiver", daemon=True),
            threading.Thread(target=self._deliver, name="hint-downlink", daemon=True),
        ]
        self._started_at = 0

    def wait_for_uplink(self, frame: int, payload_bytes: int) -> None:
        """Wait, on the sending thread, until a message has crossed the uplink."""
        self.wait_until(self._uplink.arrival(self._sent_at.pop(frame), payload_bytes))

    def start(self, stream: HintStream) -> None:
        """Begin with stream time 0 now; the stream must have :meth:`wait_for_uplink` as its ``before_send``."""
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
        if self._stream.ended is None:  # else nobody takes it any more
            self._sent_at[frame] = now
            self._stream.send(frame, samples.copy())

    def take(self, frame: int, now: int) -> Samples | None:
        return self._buffer.take(frame, now)

    def finish(self) -> None:
        assert self._stream is not None
        self._run.ended_at = self._now()
        self._run.lost = self._stream.ended
        self._stream.close()
        for thread in self._threads:
            thread.join()
        self._run.bytes_up, self._run.bytes_down = self._stream.bytes_up, self._stream.bytes_down

    def _now(self) -> int:
        return time.perf_counter_ns() - self._started_at

    def _receive(self) -> None:
        assert self._stream is not None
        while (received := self._stream.receive()) is not None:
            self._run.count(received)
            self._on_the_way.put((self._downlink.arrival(self._now(), received.payload_bytes), received))
        self._on_the_way.put(None)

    def _deliver(self) -> None:
        while (item := self._on_the_way.get()) is not None:
            arrival, received = item
            now = self.wait_until(arrival)
            assert received.hint is not None  # this session has no deadline
            self._buffer.put(received.frame, received.hint, now)
            self._run.log.arrived_at[received.frame] = now
