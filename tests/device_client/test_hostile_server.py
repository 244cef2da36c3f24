"""Tests for malicious servers: nothing that they send causes noise or blocks the frame loop."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from knowledge_boosting.device_client.engines.engine import CheckedEngine
from knowledge_boosting.device_client.engines.loading import load_model
from knowledge_boosting.device_client.hints.reconnecting import LiveHints
from knowledge_boosting.device_client.hints.stream import Encodings, HintStream
from knowledge_boosting.device_client.live.loop import LiveLoop
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.manifest import Manifest, read_manifest
from knowledge_boosting.protos import hints_pb2 as pb
from knowledge_boosting.protos.codec import Samples
from knowledge_boosting.protos.hints_pb2_grpc import HintServiceServicer, add_HintServiceServicer_to_server
from tests.device_client.test_live_loop import MemoryAudio, noise, real_time
from tests.processes import Server, running_server

SS = "ss_delay6_compression2"
PATIENCE = 30.0
# Returns the responses to an audio message, which has the given number of frames.
Answer = Callable[[Any, int], Iterator[pb.StreamHintsResponse]]


class Hostile(HintServiceServicer):
    """A service that answers every audio message with the result of a function."""

    def __init__(self, manifest: Manifest, answer: Answer) -> None:
        self._chunk = 8 * manifest.model.microphones // 2 * manifest.model.framing.chunk
        self._answer = answer

    def Enroll(self, request: pb.EnrollRequest, context: grpc.ServicerContext) -> pb.EnrollResponse:
        raise NotImplementedError

    def DescribeModel(
        self, request: pb.DescribeModelRequest, context: grpc.ServicerContext
    ) -> pb.DescribeModelResponse:
        raise NotImplementedError

    def StreamHints(
        self, request_iterator: Iterator[pb.StreamHintsRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.StreamHintsResponse]:
        next(request_iterator)
        yield pb.StreamHintsResponse(started=pb.SessionStarted(session_id="hostile"))
        for request in request_iterator:
            yield from self._answer(request.audio, len(request.audio.pcm) // self._chunk)


@contextmanager
def hostile(manifest: Manifest, answer: Answer) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    add_HintServiceServicer_to_server(Hostile(manifest, answer), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)


def hint(manifest: Manifest, frame: int, value: float = 0.0) -> pb.StreamHintsResponse:
    model = manifest.model
    payload = np.full((model.hint_channels, model.framing.bins), value, np.float32).tobytes()
    return pb.StreamHintsResponse(hint=pb.Hint(frame=frame, payload=payload, scale=1))


def flood(_manifest: Manifest, _first: int) -> Iterator[pb.StreamHintsResponse]:
    for _ in range(100_000):
        yield pb.StreamHintsResponse(draining=pb.Draining(seconds=1))


def ahead(manifest: Manifest, first: int) -> Iterator[pb.StreamHintsResponse]:
    for frame in range(first, first + 1000):
        yield hint(manifest, frame)


def huge(manifest: Manifest, first: int) -> Iterator[pb.StreamHintsResponse]:
    yield hint(manifest, first, 3e38)


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        (flood, "the server announced its shutdown more than once"),
        (ahead, "hint of frame 1 came before its audio was sent"),
        (huge, "hint of frame 0 has values above 65504"),
    ],
)
def test_invalid_responses_end_a_session(
    responses: Callable[[Manifest, int], Iterator[pb.StreamHintsResponse]],
    reason: str,
    golden_bundle: Callable[[str], Path],
) -> None:
    manifest = read_manifest(golden_bundle(SS))
    with hostile(manifest, lambda audio, _: responses(manifest, audio.first_frame)) as address:
        stream = HintStream(address, manifest, encodings=Encodings("f32", "f32"))
        stream.send(0, noise(1))
        while stream.receive() is not None:
            pass
        assert stream.ended is not None
        assert (stream.ended.status, stream.ended.detail) == ("DATA_LOSS", reason)
        stream.close()


def test_a_servers_message_cannot_control_the_terminal(golden_bundle: Callable[[str], Path]) -> None:
    manifest = read_manifest(golden_bundle(SS))

    class Rude(Hostile):
        def StreamHints(self, request_iterator: Any, context: grpc.ServicerContext) -> Any:
            yield pb.StreamHintsResponse(started=pb.SessionStarted(session_id="rude"))
            context.abort(grpc.StatusCode.INTERNAL, "\x1b]0;title\x07 \x1b[2J no\u202e more\r\n" + "x" * 5000)

    server = grpc.server(ThreadPoolExecutor(2))
    add_HintServiceServicer_to_server(Rude(manifest, lambda *_: iter(())), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        stream = HintStream(f"127.0.0.1:{port}", manifest, encodings=Encodings("f32", "f32"))
        assert stream.receive() is None
        assert stream.ended is not None
        assert stream.ended.detail.isprintable()
        assert "no" in stream.ended.detail
        assert len(stream.ended.detail) < 2000
        stream.close()
    finally:
        server.stop(0)


def test_a_server_whose_hints_are_all_late_is_replaced(
    golden_bundle: Callable[[str], Path], ss_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knowledge_boosting.device_client.hints.reconnecting._LATE_TIMEOUT", 1.0)
    bundle = golden_bundle(SS)
    manifest = read_manifest(bundle)
    played = [0]

    def late(audio: Any, frames: int) -> Iterator[pb.StreamHintsResponse]:
        # The hints are a little too late for their deadline.
        while played[0] < audio.first_frame + frames + 10:
            time.sleep(0.004)
        for frame in range(audio.first_frame, audio.first_frame + frames):
            yield hint(manifest, frame)

    with hostile(manifest, late) as address:
        hints = LiveHints([address, ss_server.address], manifest, encodings=Encodings("f32", "f32"))

        def pace(frame: int) -> None:
            real_time(frame)
            played[0] = frame
            if hints.server == ss_server.address:
                audio.stop()

        audio = MemoryAudio(noise(4000), pace)
        hints.start()
        LiveLoop(load_model(Bundle(bundle), "onnx").session(None), manifest.model, audio, hints, "1").run()
        hints.close()
    texts = [event.text for event in hints.events]
    assert any(f"lost {address} (no hint came in time for 1 s)" in text for text in texts), texts
    assert hints.events[-1].text == f"hints come from {ss_server.address}"


class RecordedHints(LiveHints):
    """Hints that record at every frame whether one was used."""

    def __init__(self, servers: Sequence[str], manifest: Manifest) -> None:
        super().__init__(servers, manifest, encodings=Encodings("f32", "f32"))
        self.used: list[bool] = []

    def take(self, frame: int, now: int) -> list[Hint]:
        hints = super().take(frame, now)
        self.used.append(bool(hints))
        return hints


def test_a_server_gives_no_hints_for_what_it_did_not_hear() -> None:
    """A stream can begin without a server. What came before is silence for the server, and so are its hints for it."""
    manifest = read_manifest(Bundle("ss-compact").directory)

    def answer(audio: Any, frames: int) -> Iterator[pb.StreamHintsResponse]:
        for frame in range(audio.first_frame, audio.first_frame + frames):
            yield hint(manifest, frame)

    with hostile(manifest, answer) as address:
        hints = LiveHints([address], manifest, encodings=Encodings("f32", "f32"), first_frame=30)
        hints.send(30, noise(1), 0)
        assert hints.take(30, time.perf_counter_ns()) == []
        hints.start()
        heard, frame, deadline = list[int](), 31, time.monotonic() + PATIENCE
        while len(heard) < 3:
            assert time.monotonic() < deadline
            hints.send(frame, noise(1), 0)
            heard += [frame - one.age for one in hints.take(frame, time.perf_counter_ns())]
            frame += 1
            time.sleep(0.008)
        hints.close()
    assert min(heard) >= 30
    assert hints.late == 0


def test_late_hints_of_the_next_server_do_not_replace_those_of_a_draining_one(
    golden_bundle: Callable[[str], Path],
) -> None:
    bundle = golden_bundle(SS)
    manifest = read_manifest(bundle)
    late_hints: list[int] = []

    def drains(audio: Any, frames: int) -> Iterator[pb.StreamHintsResponse]:
        for frame in range(audio.first_frame, audio.first_frame + frames):
            yield hint(manifest, frame)
            if frame == 50:
                yield pb.StreamHintsResponse(draining=pb.Draining(seconds=30))

    def late(audio: Any, frames: int) -> Iterator[pb.StreamHintsResponse]:
        for frame in range(audio.first_frame, audio.first_frame + frames):
            # Frame + 6 is the last that can use it.
            while 6 + len(hints.used) < frame + 10 and len(late_hints) <= 200:
                time.sleep(0.002)
            late_hints.append(frame)
            yield hint(manifest, frame)

    with hostile(manifest, drains) as first, hostile(manifest, late) as second:
        hints = RecordedHints([first, second], manifest)

        def pace(frame: int) -> None:
            real_time(frame)
            if len(late_hints) > 200:
                audio.stop()

        audio = MemoryAudio(noise(4000), pace)
        hints.start()
        LiveLoop(load_model(Bundle(bundle), "onnx").session(None), manifest.model, audio, hints, "1").run()
        hints.close()
    during = hints.used[late_hints[0] + 80 : late_hints[-1]]
    assert np.mean(during) > 0.5, during


@pytest.mark.parametrize("failures", [0, 2])
def test_a_move_is_announced_once(golden_bundle: Callable[[str], Path], failures: int) -> None:
    """Even if the next server has the same address, and even if the first sessions with it fail."""
    bundle = golden_bundle(SS)
    manifest = read_manifest(bundle)
    drained: list[int] = []
    answered: set[int] = set()
    failed: list[int] = []

    def leaves_once(audio: Any, frames: int) -> Iterator[pb.StreamHintsResponse]:
        if audio.first_frame in answered and len(failed) < failures:  # past audio: the start of another session
            failed.append(audio.first_frame)
            yield hint(manifest, audio.first_frame + 1)
        for frame in range(audio.first_frame, audio.first_frame + frames):
            answered.add(frame)
            yield hint(manifest, frame)
        if not drained and audio.first_frame > 50:
            drained.append(audio.first_frame)
            yield pb.StreamHintsResponse(draining=pb.Draining(seconds=30))

    with hostile(manifest, leaves_once) as address:
        hints = LiveHints([address], manifest, encodings=Encodings("f32", "f32"))

        def pace(frame: int) -> None:
            real_time(frame)
            if len(hints.events) == 3:
                audio.stop()

        audio = MemoryAudio(noise(4000), pace)
        hints.start()
        LiveLoop(load_model(Bundle(bundle), "onnx").session(None), manifest.model, audio, hints, "1").run()
        server = hints.server
        hints.close()
    assert [event.text for event in hints.events] == [
        f"hints come from {address}",
        f"{address} shuts down; the client looks for another server",
        f"hints come from {address}",
    ]
    assert (server, len(failed)) == (address, failures)


@pytest.mark.slow  # runs in real time
def test_a_drain_loses_no_hints(golden_bundle: Callable[[str], Path]) -> None:
    """The draining server sends hints until the first hint of the next server arrives, even if that takes a while."""
    bundle = golden_bundle(SS)
    manifest = read_manifest(bundle)

    def slow_to_begin(audio: Any, frames: int) -> Iterator[pb.StreamHintsResponse]:
        if frames > 20:  # the backfill at the start of a session
            time.sleep(0.5)
        for frame in range(audio.first_frame, audio.first_frame + frames):
            yield hint(manifest, frame)

    stopping: list[threading.Thread] = []
    with running_server(bundle) as first, hostile(manifest, slow_to_begin) as second:
        hints = RecordedHints([first.address, second], manifest)
        moved: list[int] = []

        def pace(frame: int) -> None:
            # Like the audio of a real device, this keeps its pace.
            time.sleep(max(0.0, started + 0.008 * frame - time.monotonic()))
            if not stopping and len(hints.used) > 400 and hints.used[-1]:
                stopping.append(threading.Thread(target=first.stop))
                stopping[0].start()
            if hints.server == second and not moved:
                moved.append(frame)
            if moved and frame == moved[0] + 100:
                audio.stop()

        audio = MemoryAudio(noise(4000), pace)
        hints.start()
        started = time.monotonic()
        LiveLoop(load_model(Bundle(bundle), "onnx").session(None), manifest.model, audio, hints, "1").run()
        hints.close()
        stopping[0].join(PATIENCE)
    after = hints.used[hints.used.index(True) + 50 :]
    # A gap of half a second would have 62 frames. On a busy machine, some hints can be late.
    assert after.count(False) < 20, [index for index, was_used in enumerate(after) if not was_used]
    assert [event.connected for event in hints.events] == [True, False, True], hints.events


class Network:
    """A network whose estimates are ones, and contain infinity while ``overflowing`` is set."""

    def __init__(self) -> None:
        self.resets, self.overflowing = 0, False

    def step(self, window: Samples, hints: Sequence[Hint] = ()) -> Samples:
        estimate = np.ones((2, 2, 128), np.float32)
        if self.overflowing:
            estimate[1, 0, 5] = np.inf
        return estimate

    def reset(self) -> None:
        self.resets += 1


def test_an_overflow_is_replaced_by_the_input_without_a_click() -> None:
    network = Network()
    engine = CheckedEngine(network)
    window = np.full((2, 192), -0.5, np.float32)
    played = []
    for overflowing in (False, False, True, True, True, False, False):
        network.overflowing = overflowing
        played.append(engine.step(window))
    sound = np.concatenate(played, axis=-1)
    assert np.isfinite(sound).all()
    assert np.abs(np.diff(sound)).max() < 0.05
    assert (sound[..., :256] == 1).all()
    assert (sound[..., 3 * 128 : 5 * 128] == -0.5).all()
    assert (sound[..., -128:] == 1).all()
    assert (engine.overflows, network.resets) == (3, 3)


@pytest.mark.parametrize("name", ["compiled", "onnx", "torch"])
def test_a_network_that_overflows_is_reset(name: Any, golden_bundle: Callable[[str], Path]) -> None:
    """After the overflow, the estimates are those of a new session."""
    model = load_model(Bundle(golden_bundle(SS)), name)
    engine, sound = model.session(None), noise(80)
    windows = [np.ascontiguousarray(sound[:, 128 * frame : 128 * frame + 192]) for frame in range(79)]
    loud = np.full((2, 192), 3e38, np.float32)
    before = [engine.step(window) for window in (*windows[:20], loud)]
    # It can take some frames until the estimate overflows.
    while engine.overflows == 0:
        before.append(engine.step(loud))
        assert len(before) < 60
    after = [engine.step(window) for window in windows[20:]]
    assert np.isfinite(np.stack(before + after)).all()
    fresh = model.session(None)
    expected = [fresh.step(window) for window in windows[20:]]
    np.testing.assert_array_equal(np.stack(after[1:]), np.stack(expected[1:]))  # the first one is faded in
