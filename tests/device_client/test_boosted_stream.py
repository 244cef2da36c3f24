"""Tests for the frame loop: which samples and which hint the network gets, and what is counted."""

from collections.abc import Sequence

import numpy as np
import pytest

from knowledge_boosting.device_client.boosted_stream import BoostedStream, split_frames
from knowledge_boosting.models.arrivals import Hint
from knowledge_boosting.models.config import FixedDelay, Framing, NetworkSize, Pair
from knowledge_boosting.protos.codec import Samples

SMALL = NetworkSize(channels=4, hidden=4, blocks=2)
PAIR = Pair(task="ss", small=SMALL, large=SMALL, boosting=FixedDelay(delay=3))


class Network:
    """A network that records its inputs."""

    overflows = 0

    def __init__(self) -> None:
        self.inputs: list[tuple[Samples, float | None]] = []

    def step(self, window: Samples, hints: Sequence[Hint] = ()) -> Samples:
        assert len(hints) <= 1
        self.inputs.append((window.copy(), float(hints[0].values[0, 0]) if hints else None))
        return np.zeros((2, 2, 128), np.float32)


class Hints:
    """A source of hints whose values are the number of their frame. The hints of some frames are missing."""

    def __init__(self, missing: set[int]) -> None:
        self.missing, self.sent, self.requested = missing, list[Samples](), list[int]()

    def send(self, frame: int, samples: Samples, now: int) -> None:
        assert frame == len(self.sent)
        self.sent.append(samples.copy())

    def take(self, frame: int, now: int) -> list[Hint]:
        wanted = frame - PAIR.delay
        self.requested.append(wanted)
        return [] if wanted in self.missing else [Hint(PAIR.delay, np.full((8, 97), wanted, np.float32))]


def test_a_frame_gets_the_hint_of_the_frame_delay_frames_earlier() -> None:
    network, hints = Network(), Hints(missing={2, 5})
    stream = BoostedStream(network, PAIR, hints)
    sound = np.random.default_rng(0).normal(size=(2, 12 * 128 + 64)).astype(np.float32)
    for frame in range(12):
        stream.hints_on = frame not in (6, 7)
        stream.fresh[:] = sound[:, : 128 * frame + 192][:, -stream.fresh.shape[1] :]
        done = stream.step(0)
        assert (done.number, done.hint_due) == (frame, frame >= 3)
    assert [hint for _, hint in network.inputs] == [None, None, None, 0, 1, None, None, None, None, 6, 7, 8]
    for frame, (window, _) in enumerate(network.inputs):
        np.testing.assert_array_equal(window, sound[:, 128 * frame :][:, :192])
    # All samples are sent exactly once. While hints are off, they are still taken, but not counted as due.
    np.testing.assert_array_equal(np.concatenate(hints.sent, axis=1), sound)
    assert hints.requested == list(range(9))
    assert (stream.frames, stream.hints_due, stream.hints_used) == (12, 7, 5)


def test_samples_that_are_not_finite_are_replaced_by_silence() -> None:
    network = Network()
    stream = BoostedStream(network, PAIR)
    for value in (1.0, np.nan, 1.0):
        stream.fresh[:] = 1
        stream.fresh[0, -1] = value
        stream.step(0)
    assert all(np.isfinite(window).all() for window, _ in network.inputs)
    assert (network.inputs[1][0][:, 64:] == 0).all()
    assert (network.inputs[2][0][:, 64:] == 1).all()


@pytest.mark.parametrize("framing", [Framing(), Framing(lookahead=128), Framing(chunk=10, lookahead=2)], ids=str)
@pytest.mark.parametrize("block", [1000, 50, 7])
def test_split_frames_covers_a_recording_once_and_pads_it_with_zeros(framing: Framing, block: int) -> None:
    for length in (1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 320, 321, 384, 1000):
        sound = np.random.default_rng(length).normal(size=(2, length)).astype(np.float32)
        frames = -(-length // framing.chunk)
        padded = np.pad(sound, ((0, 0), (0, frames * framing.chunk + framing.lookahead - length)))
        pieces = list(split_frames((sound[:, first : first + block] for first in range(0, length, block)), framing))
        assert [piece.shape[1] for piece, _ in pieces] == [framing.n_fft] + [framing.chunk] * (frames - 1)
        np.testing.assert_array_equal(np.concatenate([piece for piece, _ in pieces], axis=1), padded)
        assert sum(kept for _, kept in pieces) == length
        assert {kept for _, kept in pieces[:-1]} <= {framing.chunk}
