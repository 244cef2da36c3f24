"""The frame loop by itself: which samples and which hint a network gets, and what is counted."""

import numpy as np
import pytest

from knowledge_boosting.device_client.boosted_stream import BoostedStream, frames_of
from knowledge_boosting.models.config import Boosting, Framing, NetworkSize, Pair
from knowledge_boosting.protos.codec import Samples

SMALL = NetworkSize(channels=4, hidden=4, blocks=2)
PAIR = Pair(task="ss", small=SMALL, large=SMALL, boosting=Boosting(delay=3))


class Network:
    """Keeps what it was given."""

    overflows = 0

    def __init__(self) -> None:
        self.given: list[tuple[Samples, float | None]] = []

    def step(self, window: Samples, hint: Samples | None) -> Samples:
        self.given.append((window.copy(), None if hint is None else float(hint[0, 0])))
        return np.zeros((2, 2, 128), np.float32)


class Hints:
    """Hints that hold their frame's number, but for some that never come."""

    def __init__(self, missing: set[int]) -> None:
        self.missing, self.sent, self.asked = missing, list[Samples](), list[int]()

    def send(self, frame: int, samples: Samples, now: int) -> None:
        assert frame == len(self.sent)
        self.sent.append(samples.copy())

    def take(self, frame: int, now: int) -> Samples | None:
        self.asked.append(frame)
        return None if frame in self.missing else np.full((8, 97), frame, np.float32)


def test_a_frame_gets_the_hint_of_the_frame_that_was_delay_before() -> None:
    network, hints = Network(), Hints(missing={2, 5})
    stream = BoostedStream(network, PAIR, hints)
    sound = np.random.default_rng(0).normal(size=(2, 12 * 128 + 64)).astype(np.float32)
    for frame in range(12):
        stream.hints_on = frame not in (6, 7)
        stream.fresh[:] = sound[:, : 128 * frame + 192][:, -stream.fresh.shape[1] :]
        done = stream.step(0)
        assert (done.number, done.hint_due) == (frame, frame >= 3)
    assert [hint for _, hint in network.given] == [None, None, None, 0, 1, None, None, None, None, 6, 7, 8]
    for frame, (window, _) in enumerate(network.given):
        np.testing.assert_array_equal(window, sound[:, 128 * frame :][:, :192])
    # What is sent is the sound once; hints that are not wanted are taken all the same, and not counted as due.
    np.testing.assert_array_equal(np.concatenate(hints.sent, axis=1), sound)
    assert hints.asked == list(range(9))
    assert (stream.frames, stream.hints_due, stream.hints_used) == (12, 7, 5)


def test_what_is_no_number_is_silence_to_the_network() -> None:
    network = Network()
    stream = BoostedStream(network, PAIR)
    for value in (1.0, np.nan, 1.0):
        stream.fresh[:] = 1
        stream.fresh[0, -1] = value
        stream.step(0)
    assert all(np.isfinite(window).all() for window, _ in network.given)
    assert (network.given[1][0][:, 64:] == 0).all()
    assert (network.given[2][0][:, 64:] == 1).all()


@pytest.mark.parametrize("framing", [Framing(), Framing(lookahead=128), Framing(chunk=10, lookahead=2)], ids=str)
@pytest.mark.parametrize("block", [1000, 50, 7])
def test_frames_of_a_recording_cover_it_once_with_zeros_after_it(framing: Framing, block: int) -> None:
    for length in (1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 320, 321, 384, 1000):
        sound = np.random.default_rng(length).normal(size=(2, length)).astype(np.float32)
        frames = -(-length // framing.chunk)
        padded = np.pad(sound, ((0, 0), (0, frames * framing.chunk + framing.lookahead - length)))
        pieces = list(frames_of((sound[:, first : first + block] for first in range(0, length, block)), framing))
        assert [piece.shape[1] for piece, _ in pieces] == [framing.n_fft] + [framing.chunk] * (frames - 1)
        np.testing.assert_array_equal(np.concatenate([piece for piece, _ in pieces], axis=1), padded)
        assert sum(kept for _, kept in pieces) == length
        assert {kept for _, kept in pieces[:-1]} <= {framing.chunk}
