"""What passes between a real-time thread and another: neither side ever waits for the other."""

import threading

import numpy as np

from knowledge_boosting.protos.codec import Samples


class SampleRing:
    """A ring of samples of fixed size, between one thread that writes and one that reads.

    Each side changes a count of its own only, and only after the samples are in place, so there is no lock to hold.
    """

    def __init__(self, capacity: int, channels: int) -> None:
        self._samples = np.zeros((capacity, channels), np.float32)
        self._written = 0
        self._read = 0

    def __len__(self) -> int:
        """Samples a channel that can be read."""
        return self._written - self._read

    def write(self, samples: Samples) -> int:
        """Add samples ``[n, channels]``, as many as there is room for; how many that was."""
        capacity = len(self._samples)
        count = min(len(samples), capacity - len(self))
        start = self._written % capacity
        head = min(count, capacity - start)
        self._samples[start : start + head] = samples[:head]
        self._samples[: count - head] = samples[head:count]
        self._written += count
        return count

    def read(self, out: Samples) -> int:
        """Move samples into ``[n, channels]``, as many as there are; how many that was."""
        capacity = len(self._samples)
        count = min(len(out), len(self))
        start = self._read % capacity
        head = min(count, capacity - start)
        out[:head] = self._samples[start : start + head]
        out[head:count] = self._samples[: count - head]
        self._read += count
        return count

    def skip(self, count: int) -> int:
        """Drop the oldest samples, at most ``count``; how many that was. For the thread that reads."""
        count = min(count, len(self))
        self._read += count
        return count


class Signal:
    """Wakes a waiting thread. Setting it takes no lock that the waiting thread could hold, as an Event's does."""

    def __init__(self) -> None:
        self._unset = threading.Lock()
        self._unset.acquire()

    def set(self) -> None:
        """Wake the thread that waits, or the next one that would."""
        try:
            self._unset.release()
        except RuntimeError:  # set already
            return

    def wait(self, timeout: float) -> None:
        """Wait until the signal is set, at most ``timeout`` seconds, and unset it."""
        self._unset.acquire(timeout=timeout)
