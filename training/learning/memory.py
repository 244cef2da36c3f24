"""How the C library treats freed memory while training on a CPU."""

import ctypes

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # of glibc's mallopt


def keep_freed_memory() -> None:
    """Have freed blocks kept for the next step instead of given back to the system.

    A step frees and asks for the same gigabytes again; with glibc's usual settings half of its time goes into pages
    that the system takes back and hands out zeroed. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
