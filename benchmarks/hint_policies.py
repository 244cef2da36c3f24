"""Compares the time of a frame on the device with both ways to use hints: at a fixed delay, and on arrival.

    python -m benchmarks.hint_policies [--frames 4000] [--window 64]

The streams take turns frame by frame, so that the machine treats them alike. The hints of the first two arrive after 48
ms. Those of the third arrive after stalls of 20 frames, all together. Prints the median and the 99th percentile of each
in ms, and its ratio to the fixed delay.
"""

import argparse
import time

import numpy as np
import torch

from knowledge_boosting.device_client.boosted_stream import BoostedStream
from knowledge_boosting.device_client.engines.engine import CheckedEngine
from knowledge_boosting.device_client.hints.buffer import hint_buffer
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.config import Boosting, FixedDelay, NetworkSize, OnArrival, Pair
from knowledge_boosting.models.onnx_graph import frame_graph
from knowledge_boosting.models.onnx_stream import OnnxStream, load_graph
from knowledge_boosting.models.pair import SmallModel
from knowledge_boosting.protos.codec import Samples

DELAY, STALL = 6, 20  # frames
WARM_UP = 200


class SimulatedHints:
    """A source of the same hint for every frame, which arrives after the delay or at the end of a stall."""

    def __init__(self, config: Pair, stall: int) -> None:
        self._buffer, self._stall = hint_buffer(config), stall
        values = np.random.default_rng(0).normal(0, 1, (config.hint_channels, config.framing.bins))
        self._hint = values.astype(np.float32)

    def send(self, frame: int, samples: Samples, now: int) -> None:
        """Ignore the audio, and put the hint of the frame into the buffer."""
        arrival = frame + DELAY
        self._buffer.put(frame, self._hint, arrival + (-arrival) % self._stall)

    def take(self, frame: int, now: int) -> list[Hint]:
        """Return the hints to use at a frame."""
        return self._buffer.take(frame, frame)


def make_stream(boosting: Boosting, window: int, stall: int) -> BoostedStream:
    """Make a stream of a small network of the published size, with random weights."""
    size = NetworkSize(channels=16, hidden=16, window=window)
    config = Pair(task="ss", small=size, large=size, boosting=boosting)
    network = OnnxStream(load_graph(frame_graph(SmallModel(config).eval())), config)
    return BoostedStream(CheckedEngine(network), config, SimulatedHints(config, stall))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4000)
    parser.add_argument("--window", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    arrival = OnArrival(policy="arrival")
    streams = {
        "fixed delay": make_stream(FixedDelay(delay=DELAY), options.window, 1),
        "on arrival": make_stream(arrival, options.window, 1),
        "on arrival, after stalls": make_stream(arrival, options.window, STALL),
    }
    sound = np.random.default_rng(1).normal(0, 0.1, (2, 192)).astype(np.float32)
    times = {name: np.zeros(WARM_UP + options.frames) for name in streams}
    for frame in range(WARM_UP + options.frames):
        for name, stream in streams.items():
            stream.fresh[:] = sound[:, -stream.fresh.shape[1] :]
            began = time.perf_counter_ns()
            stream.step(0)
            times[name][frame] = (time.perf_counter_ns() - began) / 1e6
    base = np.median(times["fixed delay"][WARM_UP:])
    for name, of_frames in times.items():
        median, p99 = np.quantile(of_frames[WARM_UP:], [0.5, 0.99])
        print(f"{name:25} median {median:.3f} ms, p99 {p99:.3f} ms, {median / base:.3f} of the fixed delay")


if __name__ == "__main__":
    main()
