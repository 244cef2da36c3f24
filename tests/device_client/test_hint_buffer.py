"""Tests for the buffer of hints, and for the log of hints."""

import sys
import threading
import time

import numpy as np

from knowledge_boosting.device_client.hints.buffer import FixedDelayBuffer
from knowledge_boosting.device_client.replay.hint_log import HintLog

HINT = np.ones((4, 97), np.float32)


def test_a_hint_is_on_time_up_to_its_deadline_and_not_after() -> None:
    buffer = FixedDelayBuffer(delay=6)
    buffer.put(3, HINT, arrived_at=100)
    assert buffer.take(9, now=99) == []
    (hint,) = buffer.take(9, now=100)
    assert hint.age == 6
    assert hint.values is HINT
    assert buffer.take(8, now=100) == []
    assert buffer.take(9 + 8, now=100) == []  # another frame in the same slot


def test_the_buffer_keeps_all_hints_that_can_wait_at_a_time() -> None:
    for delay in (0, 1, 6):
        buffer = FixedDelayBuffer(delay)
        for frame in range(delay + 1):
            buffer.put(frame, np.full((1, 1), frame, np.float32), arrived_at=0)
        for frame in range(delay + 1):
            (hint,) = buffer.take(frame + delay, now=0)
            assert hint.values[0, 0] == frame


def test_the_log_distinguishes_on_time_late_and_missing_hints() -> None:
    log = HintLog(frames=8, delay=2)
    log.captured_at[:] = 10 * np.arange(8)
    log.arrived_at[:] = [5, 45, 200, -1, 60, 65, -1, 80]
    log.used[[0, 4]] = True
    on_time, late, missing = log.classify(end=100)
    assert np.flatnonzero(on_time).tolist() == [0, 4]
    assert np.flatnonzero(late).tolist() == [1, 5]
    assert np.flatnonzero(missing).tolist() == [2, 3]  # the hint of frame 2 came only after the end
    ages = log.ages_ms(end=100) * 1e6
    assert ages[[0, 1, 7]].tolist() == [5, 35, 10]
    assert np.isnan(ages[[2, 3, 6]]).all()


def test_one_thread_puts_while_another_takes() -> None:
    """Every hint that is taken is complete and belongs to its frame, whenever the threads switch."""
    delay, frames = 3, 3000
    buffer = FixedDelayBuffer(delay)
    captured = threading.Semaphore(0)
    interval = sys.getswitchinterval()

    def put() -> None:
        for frame in range(frames):
            captured.acquire()
            buffer.put(frame, np.full(4, frame, np.float32), arrived_at=0)

    thread = threading.Thread(target=put)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        taken = []
        for frame in range(frames):
            captured.release()
            time.sleep(1e-5 * (frame % 3))  # sometimes longer and sometimes shorter than the other thread needs
            taken += [(frame - delay, hint.values) for hint in buffer.take(frame, now=0)]
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert all((hint == frame).all() for frame, hint in taken)
    assert len(taken) > frames // 10
