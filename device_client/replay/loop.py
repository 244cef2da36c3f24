"""The frame loop over a recording, on the virtual or the real clock."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from knowledge_boosting.common.links import Link
from knowledge_boosting.device_client.boosted_stream import BoostedStream, HintSource, split_frames
from knowledge_boosting.device_client.engines.engine import Engine
from knowledge_boosting.device_client.hints.buffer import hint_buffer
from knowledge_boosting.device_client.hints.stream import HintStream, ReceivedHint, StreamEnd
from knowledge_boosting.device_client.replay.hint_log import HintLog
from knowledge_boosting.device_client.replay.tally import Tally
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.protos.codec import Samples


@dataclass
class Run:
    """The figures of one pass over a recording."""

    log: HintLog
    compute: Tally = field(default_factory=Tally)  # time of the small network for each frame
    frames_behind: int = 0  # frames that started more than a chunk after their window was complete
    ended_at: int = 0  # stream time, ns
    hints_received: int = 0
    server_queue: Tally = field(default_factory=Tally)
    server_compute: Tally = field(default_factory=Tally)
    bytes_up: int = 0
    bytes_down: int = 0
    overflows: int = 0  # frames whose estimate was not finite, so that the output is the input
    lost: StreamEnd | None = None  # why the session ended before the audio; None if it did not
    kept: dict[int, Samples] | None = None  # the hints by frame, if they are kept

    def count_hint(self, hint: ReceivedHint) -> None:
        """Add a received hint to the figures."""
        self.hints_received += 1
        self.server_queue.add(hint.queue_us)
        self.server_compute.add(hint.compute_us)
        if self.kept is not None and hint.hint is not None:
            self.kept[hint.frame] = hint.hint


class Hints(HintSource, Protocol):
    """A source of hints that also defines the clock. All times are stream times in nanoseconds."""

    def wait_until(self, time_ns: int) -> int:
        """Wait until a stream time. Return the time at the end of the wait."""
        ...

    def finish(self) -> None:
        """End the stream, and complete the figures of the run."""
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
    """Process a mixture frame by frame.

    Args:
        engine: A new session of the small network.
        mixture: The samples of the mixture, ``[M, n]`` at a time.
        model: The configuration of the model.
        hints: The source of hints. None for one network alone, or to withhold all hints.
        run: The object for the figures. Its log must have room for all frames.
        write: Called with each chunk of the estimate, ``[S, M, n]``. All chunks together are as long as the mixture.
        progress: Called after each frame.
    """
    framing, log, stream = model.framing, run.log, BoostedStream(engine, model, hints)
    chunk_ns = round(framing.chunk_seconds * 1e9)
    for samples, length in split_frames(mixture, framing):
        captured_at = round(framing.complete_at(stream.frames) * 1e9)
        log.captured_at[stream.frames] = captured_at
        now = hints.wait_until(captured_at) if hints is not None else 0
        run.frames_behind += hints is not None and now - captured_at > chunk_ns
        run.ended_at = now
        stream.fresh[:] = samples
        frame = stream.step(now)
        for hint in frame.hints:
            log.used[frame.number - hint.age] = True
            log.age_used[frame.number - hint.age] = hint.age
        run.compute.add((frame.compute_ns + 500) // 1000)
        write(frame.estimate[..., :length])
        progress()
    log.end(stream.frames)
    run.overflows = engine.overflows
    if hints is not None:
        hints.finish()


class VirtualHints:
    """Hints on the virtual clock: a real server computes them, and their arrival times are simulated.

    The result depends only on the seed, and not on the speed of this machine.
    """

    def __init__(
        self,
        stream: HintStream,
        model: ModelConfig,
        run: Run,
        *,
        uplink: Link,
        downlink: Link,
        server_ns: int,
        sample_bytes: int,
    ) -> None:
        """Create a source of hints.

        Args:
            stream: An open session with the server.
            model: The configuration of the model.
            run: The object for the figures.
            uplink: The simulated link to the server.
            downlink: The simulated link from the server.
            server_ns: The simulated time of the server for each frame, ns.
            sample_bytes: The size of one sample of all channels on the wire, bytes.
        """
        self._stream, self._model, self._run = stream, model, run
        self._buffer = hint_buffer(model)
        self._uplink, self._downlink = uplink, downlink
        self._server_ns, self._sample_bytes = server_ns, sample_bytes
        self._sent = 0
        self._server_idle_at = 0  # ns
        self._computed_at: deque[int] = deque()  # ns, for the hints that have not been received yet

    def wait_until(self, time_ns: int) -> int:
        return time_ns

    def send(self, frame: int, samples: Samples, now: int) -> None:
        self._sent += 1
        if self._stream.ended is not None:
            return  # there is no server any more
        self._stream.send(frame, samples.copy())
        received_at = self._uplink.arrival(now, samples.shape[1] * self._sample_bytes)
        self._server_idle_at = max(received_at, self._server_idle_at) + self._server_ns
        self._computed_at.append(self._server_idle_at)

    def take(self, frame: int, now: int) -> list[Hint]:
        # Even a late hint is awaited here, so that the real server does not fall behind without limit.
        while self._run.hints_received <= frame - self._model.max_age or self._can_have_arrived(now):
            if not self._receive():
                break
        return self._buffer.take(frame, now)

    def _can_have_arrived(self, now: int) -> bool:
        # The downlink only adds to the time at which the simulated server has computed a hint.
        return self._model.on_arrival and bool(self._computed_at) and self._computed_at[0] <= now

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
        assert received.hint is not None  # a session without a deadline always gets the values
        self._buffer.put(received.frame, received.hint, arrival)
        self._run.count_hint(received)
        return True


class RealHints:
    """Hints on the real clock: frames are paced in real time, and the simulated delays are waited for."""

    def __init__(self, model: ModelConfig, run: Run, *, uplink: Link, downlink: Link) -> None:
        self._run = run
        self._buffer = hint_buffer(model)
        self._uplink, self._downlink = uplink, downlink
        self._sent_at: dict[int, int] = {}
        self._in_flight: queue.SimpleQueue[tuple[int, ReceivedHint] | None] = queue.SimpleQueue()
        self._stream: HintStream | None = None
        self._threads = [
            threading.Thread(target=self._receive, name="hint-receiver", daemon=True),
            threading.Thread(target=self._deliver, name="hint-downlink", daemon=True),
        ]
        self._started_at = 0

    def wait_for_uplink(self, frame: int, payload_bytes: int) -> None:
        """Wait on the sending thread until a message would have crossed the simulated uplink."""
        self.wait_until(self._uplink.arrival(self._sent_at.pop(frame), payload_bytes))

    def start(self, stream: HintStream) -> None:
        """Start the clock at stream time 0. ``stream`` must call :meth:`wait_for_uplink` as its ``before_send``."""
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
        if self._stream.ended is None:
            self._sent_at[frame] = now
            self._stream.send(frame, samples.copy())

    def take(self, frame: int, now: int) -> list[Hint]:
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
            self._run.count_hint(received)
            self._in_flight.put((self._downlink.arrival(self._now(), received.payload_bytes), received))
        self._in_flight.put(None)

    def _deliver(self) -> None:
        while (item := self._in_flight.get()) is not None:
            arrival, received = item
            now = self.wait_until(arrival)
            assert received.hint is not None  # a session without a deadline always gets the values
            self._buffer.put(received.frame, received.hint, now)
            self._run.log.arrived_at[received.frame] = now
