"""The network's side of several live devices, in real time."""

import threading
import time
from pathlib import Path

import numpy as np

from knowledge_boosting.device_client.hints.reconnecting import LiveHints
from knowledge_boosting.device_client.hints.stream import Encodings
from knowledge_boosting.models.manifest import read_manifest
from tests.processes import PATIENCE


class LiveDevices:
    """The network's side of ``count`` live devices, with one frame loop for all of them.

    The networks that the loop would run are left out: ten of them want more than a machine that runs the servers too.
    """

    def __init__(self, bundle: Path, servers: list[str], count: int) -> None:
        manifest = read_manifest(bundle)
        framing, self._delay = manifest.model.framing, manifest.model.delay
        self.all = [LiveHints(servers, manifest, encodings=Encodings()) for _ in range(count)]
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
                fused.append(frame >= self._delay and bool(device.take(frame, now)))
            self.slowest = max(self.slowest, (time.perf_counter_ns() - now) / 1e9)
            frame += 1
