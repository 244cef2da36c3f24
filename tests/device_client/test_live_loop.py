"""Tests for the live frame loop with a real server: what it plays and which hints it fuses."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from knowledge_boosting.device_client.audio.mixer import Mixer, Play
from knowledge_boosting.device_client.boosted_stream import HintRamp
from knowledge_boosting.device_client.engines.onnx_engine import OnnxModel
from knowledge_boosting.device_client.hints.reconnecting import LiveHints
from knowledge_boosting.device_client.hints.stream import Encodings
from knowledge_boosting.device_client.live.loop import LiveLoop
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.bundle import Bundle
from knowledge_boosting.models.manifest import read_manifest
from knowledge_boosting.protos.codec import Samples
from tests.golden_cases import TOLERANCE, Golden, worst
from tests.processes import PATIENCE, Server, running_server

SS = "ss_delay6_compression2"
GetGolden = Callable[[str], Golden]
GetBundle = Callable[[str], Path]


class MemoryAudio:
    """Live audio from samples ``[M, N]``. It calls a function for pacing before every read, and records the output."""

    underruns = overruns = 0
    latency_ms = None

    def __init__(self, samples: Samples, pace: Callable[[int], None] = lambda _: None) -> None:
        self._samples, self._pace, self._position, self._reads = samples, pace, 0, 0
        self._played: list[Samples] = []

    def start(self) -> None: ...

    def read(self, samples: Samples) -> bool:
        self._pace(self._reads)
        self._reads += 1
        end = self._position + samples.shape[1]
        if end > self._samples.shape[1]:
            return False
        samples[:] = self._samples[:, self._position : end]
        self._position = end
        return True

    def write(self, samples: Samples) -> None:
        self._played.append(samples)

    def stop(self) -> None:
        self._position = self._samples.shape[1]

    @property
    def played(self) -> Samples:
        return np.concatenate(self._played, axis=1)


@dataclass
class Frames:
    """A recorder that keeps all hints and records in memory."""

    hints: list[Sequence[Hint]] = field(default_factory=list)
    records: list[np.void] = field(default_factory=list)

    def put(self, fresh: Samples, played: Samples, hints: Sequence[Hint], record: np.void, play: Play) -> None:
        self.hints.append(hints)
        self.records.append(record)


def real_time(_: int) -> None:
    time.sleep(0.008)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def noise(frames: int) -> Samples:
    return np.random.default_rng(0).normal(0, 0.1, (2, 128 * frames + 64)).astype(np.float32)


@pytest.mark.parametrize("play", ["1", "2"])
def test_without_hints_it_plays_the_published_output(play: Play, golden: GetGolden, golden_bundle: GetBundle) -> None:
    case, model = golden(SS), OnnxModel(Bundle(golden_bundle(SS)))
    mixture, config = case.mixture[0].numpy(), model.manifest.model
    frames = config.framing.frames(mixture.shape[1])
    padded = np.pad(mixture, ((0, 0), (0, 128 * frames + 64 - mixture.shape[1])))
    audio = MemoryAudio(padded)
    loop = LiveLoop(model.session(None), config, audio, None, play)
    loop.run()
    assert loop.frames == frames
    expected = case.small_output_without_hints[0][int(play) - 1]
    assert worst(audio.played[:, : mixture.shape[1]], expected) < TOLERANCE


def test_it_fuses_the_hints_of_the_published_computation(
    golden: GetGolden, golden_bundle: GetBundle, ss_server: Server
) -> None:
    case, bundle = golden(SS), golden_bundle(SS)
    model, manifest = OnnxModel(Bundle(bundle)), read_manifest(bundle)
    mixture, config = case.mixture[0].numpy(), manifest.model
    hints = LiveHints([ss_server.address], manifest, encodings=Encodings("f32", "f32"))
    hints.start()

    def pace(frame: int) -> None:
        real_time(frame)
        if frame == 20:
            wait_for(lambda: hints.server is not None)  # without a server there would be no hints to compare

    frames, audio = Frames(), MemoryAudio(mixture, pace)
    loop = LiveLoop(model.session(None), config, audio, hints, "1", frames)
    loop.run()
    hints.close()
    used = [frame for frame, hints in enumerate(frames.hints) if hints]
    assert len(used) == loop.stream.hints_used > 10
    assert min(used) >= config.delay
    assert loop.stream.hints_due == loop.frames - config.delay
    for frame in used:
        (hint,) = frames.hints[frame]
        assert worst(hint.values, case.hint[0, frame - config.delay]) < TOLERANCE
        assert frames.records[frame]["age_ms"] > 0
    assert all(np.isnan(frames.records[frame]["age_ms"]) for frame in set(range(loop.frames)) - set(used))


def test_another_server_takes_over_with_a_warm_network(golden: GetGolden, golden_bundle: GetBundle) -> None:
    bundle = golden_bundle(SS)
    manifest, model = read_manifest(bundle), OnnxModel(Bundle(bundle))
    with running_server(bundle) as first, running_server(bundle) as second:
        hints = LiveHints([first.address, second.address], manifest, encodings=Encodings("f32", "f32"))
        hints.start()
        seen: dict[str, int] = {}

        def pace(frame: int) -> None:
            real_time(frame)
            if hints.server is not None and hints.server not in seen:
                seen[hints.server] = frame
            if first.address in seen and frame == seen[first.address] + 100:
                first.process.kill()
            if second.address in seen and frame == seen[second.address] + 100:
                audio.stop()

        samples = noise(5000)
        frames, audio = Frames(), MemoryAudio(samples, pace)
        loop = LiveLoop(model.session(None), manifest.model, audio, hints, "1", frames)
        loop.run()
        hints.close()
    assert list(seen) == [first.address, second.address]
    assert len(frames.hints) == loop.frames
    assert audio.played.shape[1] == 128 * loop.frames
    assert [event.connected for event in hints.events][:3] == [True, False, True]
    resumed = range(seen[second.address] + 2 * 8, loop.frames)  # after the fade-in
    used = {frame - 6: frames.hints[frame][0].values for frame in resumed if frames.hints[frame]}
    assert len(used) > 10
    # The hints are those of a network that started half a second earlier, or slightly more.
    large, last = golden(SS).pair.large, max(used)
    distances = {}
    for start in range(max(min(used) - 120, 0), min(used) - 62):
        audio_since_start = torch.from_numpy(samples[None, :, 128 * start : 128 * (last + 1) + 64])
        with torch.inference_mode():
            expected = large(audio_since_start, large.initial_state(1, None))[0][0]
        distances[start] = max(worst(hint, expected[frame - start]) for frame, hint in used.items())
    assert min(distances.values()) < TOLERANCE, distances


class SlowUplink:
    """A proxy that limits the bytes per second to a server while ``slow`` is set. The answers are not delayed."""

    def __init__(self, server: str, rate: int) -> None:
        self._server, self._rate, self.slow = server, rate, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                device, _ = self._listener.accept()
                host, port = self._server.split(":")
                server = socket.create_connection((host, int(port)))
                for source, target, up in ((device, server, True), (server, device, False)):
                    threading.Thread(target=self._forward, args=(source, target, up), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError), source, target:
            while content := source.recv(1024):
                while up and self.slow.is_set() and not self._rate:
                    time.sleep(0.05)
                if up and self.slow.is_set():
                    time.sleep(len(content) / self._rate)
                target.sendall(content)


@pytest.mark.parametrize(
    ("rate", "reason"), [(30_000, "the connection is too slow"), (0, "the server stopped answering")]
)
def test_a_session_ends_if_its_audio_does_not_get_through(
    rate: int, reason: str, golden_bundle: GetBundle, ss_server: Server
) -> None:
    """The connection carries a quarter of the audio's bandwidth, or nothing at all."""
    manifest, model = read_manifest(golden_bundle(SS)), OnnxModel(Bundle(golden_bundle(SS)))
    uplink = SlowUplink(ss_server.address, rate)
    hints = LiveHints([uplink.address], manifest, encodings=Encodings("f32", "f32"))
    hints.start()

    def pace(frame: int) -> None:
        real_time(frame)
        if hints.server is not None:
            uplink.slow.set()
        if any(event.text.startswith("lost") for event in hints.events):
            audio.stop()

    audio = MemoryAudio(noise(5000), pace)
    loop = LiveLoop(model.session(None), manifest.model, audio, hints, "1")
    loop.run()
    hints.close()
    uplink.close()
    assert loop.frames < 5000
    assert audio.played.shape[1] == 128 * loop.frames
    assert reason in hints.events[-1].text


def test_hints_are_faded_in_after_a_long_gap() -> None:
    ramp, hints = HintRamp(), [Hint(6, np.ones((4, 97), np.float32))]
    for _ in range(20):
        assert ramp.scale(hints) is hints
    for _ in range(10):
        assert not ramp.scale([])
    assert ramp.scale(hints) is hints
    for _ in range(60):
        assert not ramp.scale([])
    gains = [float(ramp.scale(hints)[0].values[0, 0]) for _ in range(12)]
    assert gains[0] > 0
    assert gains[-1] == 1
    assert max(np.diff([0, *gains])) <= 0.125


def test_a_sample_that_is_not_finite_has_no_lasting_effect(golden_bundle: GetBundle) -> None:
    model, samples = OnnxModel(Bundle(golden_bundle(SS))), noise(80)
    samples[1, 2000] = np.nan
    audio = MemoryAudio(samples)
    LiveLoop(model.session(None), model.manifest.model, audio, None, "both").run()
    assert np.isfinite(audio.played).all()


def test_both_plays_one_speaker_in_each_channel() -> None:
    rng = np.random.default_rng(0)
    chunk, estimate = rng.normal(size=(2, 128)), rng.normal(size=(2, 2, 128))
    played = Mixer(2, 2, "both").mix("both", chunk.astype(np.float32), estimate.astype(np.float32))
    np.testing.assert_array_equal(played, np.stack([estimate[0, 0], estimate[1, 1]]).astype(np.float32))
    assert Mixer(1, 2, "1").choices == ["bypass", "1"]


def test_a_change_of_the_mix_makes_no_click() -> None:
    mixer, ones = Mixer(2, 2, "1"), np.ones((2, 128), np.float32)
    estimate = np.stack([-ones, 0.5 * ones])
    orders: list[tuple[Play, int]] = [("1", 2), ("bypass", 8), ("2", 8)]
    played = np.concatenate([mixer.mix(play, ones, estimate) for play, times in orders for _ in range(times)], axis=1)
    assert np.abs(np.diff(played)).max() < 0.005  # a change of 2 is spread over hundreds of samples
    assert (played[:, 2 * 128 - 1] == -1).all()
    assert (played[:, 10 * 128 - 1] == 1).all()
    assert (played[:, -1] == 0.5).all()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_memory_does_not_grow_in_ten_minutes(golden_bundle: GetBundle) -> None:
    """All that time, the client tries to connect to a server that does not exist."""
    manifest, model = read_manifest(golden_bundle(SS)), OnnxModel(Bundle(golden_bundle(SS)))
    sound, memory = noise(100), []

    class Endless(MemoryAudio):
        def __init__(self) -> None:
            super().__init__(sound)
            self.frames = 0

        def read(self, samples: Samples) -> bool:
            start = 128 * (self.frames % 99)
            samples[:] = sound[:, start : start + samples.shape[1]]
            return self.frames < 75_000

        def write(self, samples: Samples) -> None:
            self.frames += 1
            if self.frames % 7500 == 0:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                memory.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)

    hints = LiveHints(["127.0.0.1:1"], manifest, encodings=Encodings("f32", "f32"))
    hints.start()
    loop = LiveLoop(model.session(None), manifest.model, Endless(), hints, "1")
    loop.run()
    hints.close()
    assert loop.frames == 75_000
    assert memory[-1] - memory[0] < 2, memory
