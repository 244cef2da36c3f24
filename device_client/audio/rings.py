"""Lock-free communication between a real-time thread and another thread."""

import threading

import numpy as np

from knowledge_boosting.protos.codec import Samples


class SampleRing:
    """A ring buffer of samples for one writing thread and one reading thread.

    Each thread changes only its own counter, after it has copied the samples. So no lock is needed.
    """

    def __init__(self, capacity: int, channels: int) -> None:
        self._samples = np.zeros((capacity, channels), np.float32)
        self._written = 0
        self._read = 0

    def __len__(self) -> int:
        """Return the number of samples of each channel that can be read."""
        return self._written - self._read

    def write(self, samples: Samples) -> int:
        """Write samples ``[n, channels]``, as many as fit. Return their number. Only for the writing thread."""
        capacity = len(self._samples)
        count = min(len(samples), capacity - len(self))
        start = self._written % capacity
        head = min(count, capacity - start)
        self._samples[start : start + head] = samples[:head]
        self._samples[: count - head] = samples[head:count]
        self._written += count
        return count

    def read(self, out: Samples) -> int:
        """Move up to n samples into ``out`` ``[n, channels]``. Return their number. Only for the reading thread."""
        capacity = len(self._samples)
        count = min(len(out), len(self))
        start = self._read % capacity
        head = min(count, capacity - start)
        out[:head] = self._samples[start : start + head]
        out[head:count] = self._samples[: count - head]
        self._read += count
        return count

    def skip(self, count: int) -> int:
        """Discard up to ``count`` of the oldest samples. Return their number. Only for the reading thread."""
        count = min(count, len(self))
        self._read += count
        return count


class WakeEvent:
    """Wakes a waiting thread. Unlike :class:`threading.Event`, setting it never waits for a lock of that thread."""

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        """Wake the waiting thread. If no thread waits, the next call of :meth:`wait` returns at once."""
        try:
            self._unset.release()
        except RuntimeError:  # it is already set
            return

    def wait(self, timeout: float) -> None:
        """Wait until the event is set, for at most ``timeout`` seconds, and clear it."""
        self._unset.acquire(timeout=timeout)
