"""Configures how the C library handles freed memory during training on a CPU."""

import ctypes

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # parameters of mallopt in glibc


def keep_freed_memory() -> None:
    """Keep freed memory for the next step instead of returning it to the system.

    Every step frees and allocates the same gigabytes. With the default settings of glibc, half of its time goes into
    pages that the system takes back and returns zeroed. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
