"""Sound files made byte by byte."""

import struct

import numpy as np
from numpy.typing import NDArray


def wav(pcm: NDArray[np.int16], rate: int, sizes: tuple[int, int] | None = None, extra: bytes = b"") -> bytes:
    """A WAV file of samples ``[n, channels]``; ``sizes`` are what its two lengths say, ``extra`` chunks before them."""
    data = pcm.astype("<i2").tobytes()
    whole, length = sizes if sizes is not None else (36 + len(extra) + len(data), len(data))
    channels = pcm.shape[1]
    described = struct.pack("<HHIIHH", 1, channels, rate, 2 * channels * rate & 0xFFFFFFFF, 2 * channels, 16)
    head = b"RIFF" + struct.pack("<I", whole & 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<I", 16) + described
    return head + extra + b"data" + struct.pack("<I", length) + data
