"""Devices whose server is shut down go on with the next one."""

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from device_client.hint_stream import Encodings
from device_client.live import LiveLoop
from device_client.live_hints import LiveHints
from device_client.onnx_engine import OnnxModel
from models.manifest import read_manifest
from protos.codec import Samples
from tests.load import write_random_bundle
from tests.processes import running_server
from tests.remote_server.driver import PATIENCE

DEVICES = 10
SECOND = 125  # frames
CHUNK, LOOKAHEAD = 128, 64


class LiveDevice:
    """The device's frame loop and its network side, on sound of its own in real time, until it is stopped."""

    underruns = overruns = 0

    def __init__(self, model: OnnxModel, servers: list[str], seed: int) -> None:
        manifest = model.manifest
        self.sound = np.random.default_rng(seed).normal(0, 0.1, (2, 60 * SECOND * CHUNK + LOOKAHEAD)).astype(np.float32)
        self.hints = LiveHints(servers, manifest, encodings=Encodings())
        self.loop = LiveLoop(model.session(None), manifest.model, self, self.hints, "1", self)
        self.fused: list[Samples | None] = []  # the hint of every frame
        self.played = 0  # samples; and those read, and how late at worst, in seconds
        self.read_samples, self.latest, self._stopped = 0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._began = time.monotonic()
        self.hints.start()
        self._thread.start()

    # What LiveLoop asks of its sound and of its recorder.
    def start(self) -> None: ...

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)
        self.hints.close()

    def read(self, samples: Samples) -> bool:
        end = self.read_samples + samples.shape[1]
        while (early := self._began + end / 16_000 - time.monotonic()) > 0:
            time.sleep(early)
        if self._stopped.is_set() or end > self.sound.shape[1]:
            return False
        self.latest = max(self.latest, -early)
        samples[:] = self.sound[:, self.read_samples : end]
        self.read_samples = end
        return True

    def write(self, samples: Samples) -> None:
        self.played += samples.shape[1]

    def put(self, fresh: Samples, played: Samples, hint: Samples | None, record: np.void, play: str) -> None:
        self.fused.append(hint)

    def longest_silence(self, since: int) -> int:
        """The most frames in a row without a hint, from a frame on."""
        longest = run = 0
        for hint in self.fused[since:]:
            run = 0 if hint is not None else run + 1
            longest = max(longest, run)
        return longest


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_devices_of_a_server_that_drains_go_on_with_another(tmp_path: Path) -> None:
    bundle = write_random_bundle(tmp_path, "tiny")
    model = OnnxModel(str(bundle))
    assert read_manifest(bundle).model.framing.chunk == CHUNK
    with ExitStack() as stack:
        first, second = (stack.enter_context(running_server(bundle)) for _ in range(2))
        live = [LiveDevice(model, [first.address, second.address], seed) for seed in range(DEVICES)]
        for device in live:
            stack.callback(device.stop)
        wait_for("hints of the first server", lambda: all(device.loop.hints_used > 20 for device in live))
        assert {device.hints.server for device in live} == {first.address}
        time.sleep(2)  # a session of two seconds was worth having: the next one is tried at once
        left = [device.loop.frames for device in live]
        assert first.stop() == 0
        wait_for(
            "hints of the second server",
            lambda: all(device.hints.server == second.address and device.fused[-1] is not None for device in live),
        )
        time.sleep(1)
        for device in live:
            device.stop()
    for device, frame in zip(live, left, strict=True):
        assert device.longest_silence(frame) < SECOND, [event.text for event in device.hints.events]
        # Every sample that came in went out, and the loop never stood still.
        assert device.played == CHUNK * device.loop.frames == device.read_samples - LOOKAHEAD
        assert device.latest < 1
