"""Devices whose server is shut down go on with the next one."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from knowledge_boosting.device_client.hints.reconnecting import LiveHints
from knowledge_boosting.device_client.hints.stream import Encodings
from knowledge_boosting.models.manifest import read_manifest
from tests.load import write_random_bundle
from tests.processes import PATIENCE, running_server

DEVICES = 10
SECOND = 125  # frames


class LiveDevices:
    """The network's side of several live devices, with one frame loop for all of them, in real time.

    The networks that the loop would run are left out: ten of them want more than a machine that runs the servers too.
    """

    def __init__(self, bundle: Path, servers: list[str]) -> None:
        manifest = read_manifest(bundle)
        framing, self._delay = manifest.model.framing, manifest.model.delay
        self.all = [LiveHints(servers, manifest, encodings=Encodings()) for _ in range(DEVICES)]
        self.fused: list[list[bool]] = [[] for _ in self.all]  # by device and frame: whether there was a hint to fuse
        self.slowest = 0.0  # seconds, of what the network's side keeps the loop from its sound
        self._sound = np.random.default_rng(0).normal(0, 0.1, (2, framing.n_fft)).astype(np.float32)
        self._chunk, self._seconds = framing.chunk, framing.chunk_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        for device in self.all:
            device.start()
        self._thread.start()

    @property
    def frames(self) -> int:
        """Frames so far."""
        return len(self.fused[-1])

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)
        for device in self.all:
            device.close()

    def longest_silence(self, device: int, since: int) -> int:
        """The most frames in a row without a hint, from a frame on."""
        longest = run = 0
        for fused in self.fused[device][since:]:
            run = 0 if fused else run + 1
            longest = max(longest, run)
        return longest

    def _run(self) -> None:
        began, frame = time.monotonic(), 0
        while not self._stopped.wait(max(0.0, began + frame * self._seconds - time.monotonic())):
            now = time.perf_counter_ns()
            for device, fused in zip(self.all, self.fused, strict=True):
                device.send(frame, self._sound[:, 0 if frame == 0 else -self._chunk :], now)
                fused.append(frame >= self._delay and device.take(frame - self._delay, now) is not None)
            self.slowest = max(self.slowest, (time.perf_counter_ns() - now) / 1e9)
            frame += 1


def wait_for(what: str, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.slow  # in real time, on a machine with nothing else to do
def test_devices_of_a_server_that_drains_go_on_with_another(tmp_path: Path) -> None:
    bundle = write_random_bundle(tmp_path, "tiny")
    with running_server(bundle) as first, running_server(bundle) as second:
        live = LiveDevices(bundle, [first.address, second.address])
        try:
            wait_for("hints for all", lambda: all(sum(fused) > SECOND // 4 for fused in live.fused))
            assert {device.server for device in live.all} == {first.address}
            time.sleep(2)  # a session of two seconds was worth having: the next one is tried at once
            left = live.frames
            assert first.stop() == 0
            wait_for("the second server", lambda: {device.server for device in live.all} == {second.address})
            wait_for("its hints", lambda: all(fused[-1] for fused in live.fused))
            time.sleep(1)
        finally:
            live.stop()
    for number, device in enumerate(live.all):
        assert live.longest_silence(number, left) < SECOND, [event.text for event in device.events]
        assert len(live.fused[number]) == live.frames
    # No frame waited for the network.
    assert live.slowest < 0.5
