"""Tests for the communication between real-time threads."""

import sys
import threading

import numpy as np

from knowledge_boosting.device_client.audio.rings import SampleRing, WakeEvent


def test_samples_are_read_in_the_order_of_writing_and_none_is_overwritten() -> None:
    rng = np.random.default_rng(0)
    ring = SampleRing(100, 2)
    expected: list[float] = []
    written = 0
    for _ in range(2000):
        samples = np.arange(written, written + rng.integers(0, 60), dtype=np.float32)
        count = ring.write(np.stack([samples, -samples], axis=1))
        assert count == min(len(samples), 100 - len(expected))
        expected += samples[:count].tolist()
        written += count
        if rng.random() < 0.2:
            skipped = ring.skip(5)
            assert skipped == min(5, len(expected))
            expected = expected[skipped:]
        out = np.full((rng.integers(0, 60), 2), np.nan, np.float32)
        count = ring.read(out)
        assert count == min(len(out), len(expected))
        assert out[:count, 0].tolist() == expected[:count]
        assert (out[:count, 1] == -out[:count, 0]).all()
        expected = expected[count:]
        assert len(ring) == len(expected)


def test_one_thread_writes_while_another_reads() -> None:
    ring, ready, total = SampleRing(64, 1), WakeEvent(), 20_000
    interval = sys.getswitchinterval()

    def write() -> None:
        written = 0
        while written < total:
            samples = np.arange(written, min(written + 37, total), dtype=np.float32)[:, None]
            written += ring.write(samples)
            ready.set()

    thread = threading.Thread(target=write)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        received: list[float] = []
        out = np.zeros((48, 1), np.float32)
        while len(received) < total:
            ready.wait(1)
            while count := ring.read(out):
                received += out[:count, 0].tolist()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert received == list(range(total))


def test_an_event_that_is_set_twice_wakes_once() -> None:
    event, woken = WakeEvent(), threading.Event()
    event.set()
    event.set()
    event.wait(60)

    def wait() -> None:
        event.wait(60)
        woken.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert not woken.wait(0.1)
    event.set()
    assert woken.wait(60)
