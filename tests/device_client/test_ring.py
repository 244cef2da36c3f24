"""What passes between the real-time threads."""

import sys
import threading

import numpy as np

from knowledge_boosting.device_client.audio.rings import SampleRing, Signal


def test_samples_come_out_as_they_went_in_and_none_is_overwritten() -> None:
    rng = np.random.default_rng(0)
    ring = SampleRing(100, 2)
    there: list[float] = []
    given = 0
    for _ in range(2000):
        samples = np.arange(given, given + rng.integers(0, 60), dtype=np.float32)
        fit = ring.write(np.stack([samples, -samples], axis=1))
        assert fit == min(len(samples), 100 - len(there))
        there += samples[:fit].tolist()
        given += fit
        if rng.random() < 0.2:
            skipped = ring.skip(5)
            assert skipped == min(5, len(there))
            there = there[skipped:]
        out = np.full((rng.integers(0, 60), 2), np.nan, np.float32)
        got = ring.read(out)
        assert got == min(len(out), len(there))
        assert out[:got, 0].tolist() == there[:got]
        assert (out[:got, 1] == -out[:got, 0]).all()
        there = there[got:]
        assert len(ring) == len(there)


def test_one_thread_writes_while_another_reads() -> None:
    ring, ready, total = SampleRing(64, 1), Signal(), 20_000
    interval = sys.getswitchinterval()

    def write() -> None:
        given = 0
        while given < total:
            samples = np.arange(given, min(given + 37, total), dtype=np.float32)[:, None]
            given += ring.write(samples)
            ready.set()

    thread = threading.Thread(target=write)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        got: list[float] = []
        out = np.zeros((48, 1), np.float32)
        while len(got) < total:
            ready.wait(1)
            while count := ring.read(out):
                got += out[:count, 0].tolist()
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert got == list(range(total))


def test_a_signal_set_twice_wakes_once() -> None:
    signal, woken = Signal(), threading.Event()
    signal.set()
    signal.set()
    signal.wait(60)

    def wait() -> None:
        signal.wait(60)
        woken.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert not woken.wait(0.1)
    signal.set()
    assert woken.wait(60)
