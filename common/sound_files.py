"""Read sound files block by block, and detect files that are incomplete.

libsndfile reads the beginning of a truncated file without an error, and it trusts lengths in headers that were never
completed. So this module parses each container first. A program that writes to a pipe, or that is killed, leaves a
placeholder as the length. Then the sound extends to the end of the file.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import soundfile

from knowledge_boosting.common.errors import reason

BLOCK = 4096  # samples of each channel that are read at a time
RATES = (1000, 768_000)  # minimum and maximum, Hz
# Maximum magnitude of a sample, where full scale is 1. It admits 32-bit integers that were stored as floating point.
MAX_AMPLITUDE = 2.0**31
_UNKNOWN_LENGTH = 2**60  # samples; libsndfile reports at least this for a stream of unknown length
_MAX_OGG_PAGE = 65_307  # bytes
Order = Literal["big", "little"]

Samples = npt.NDArray[np.float32]


class UnusableSound(Exception):
    """A sound file cannot be used. The message says why, without the name of the file."""


@dataclass(frozen=True)
class _Container:
    """The position of the samples in a file, according to its headers."""

    end: int | None = None  # byte offset of the end of the samples; None if unknown
    placeholder: tuple[int, Order] | None = None  # offset and byte order of a 4-byte length that was never completed


class Sound(soundfile.SoundFile):  # type: ignore[misc] # soundfile has no type annotations
    """A sound file that is read sequentially. Every call of ``read`` must give the number of samples."""

    def seekable(self) -> bool:
        # Otherwise soundfile seeks after every block that it reads, which fails for some files.
        return False

    def can_seek(self) -> bool:
        """Return whether reading can start at any position."""
        return bool(super().seekable())


@contextmanager
def open_sound(path: Path) -> Iterator[Sound]:
    """Open a sound file for reading.

    Raises:
        UnusableSound: The file is not a sound file, or it is cut short.
        OSError: The file cannot be read.
    """
    with path.open("rb", buffering=0) as file:  # unbuffered, because libsndfile reads from the same descriptor
        size = os.fstat(file.fileno()).st_size
        container = _parse_container(file, size)
        if container.end is not None and container.end > size:
            raise UnusableSound(f"cut short, only {size} of {container.end} bytes are there; copy it again")
        file.seek(0)
        source = (
            _FileWithLength(file, size, container.placeholder) if container.placeholder is not None else file.fileno()
        )
        try:
            # With an open file, the name does not matter: it can have any suffix, and need not be valid UTF-8.
            sound = Sound(source, closefd=False)
        except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
            raise _unreadable(error) from None
        with sound:
            if not RATES[0] <= sound.samplerate <= RATES[1]:
                raise UnusableSound(f"its sample rate is {sound.samplerate} Hz; give {RATES[0]} to {RATES[1]} Hz")
            yield sound


def blocks(sound: Sound) -> Iterator[Samples]:
    """Yield the samples from the current position to the end, ``[n, channels]`` with n up to ``BLOCK``.

    Raises:
        UnusableSound: There are fewer samples than the header says, or a sample is not finite or too large.
    """
    done = 0
    while True:
        try:
            block = sound.read(BLOCK, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            text = f"cut short or damaged after {done} samples ({_error_text(error)}); copy it again"
            raise UnusableSound(text) from None
        if not len(block):
            break
        check_samples(block)
        done += len(block)
        yield block
    if done < declared_length(sound):
        raise UnusableSound(f"cut short, only {done} of {sound.frames} samples are there; copy it again")
    if not done:
        raise UnusableSound("holds no samples")


def declared_length(sound: Sound) -> int:
    """Return the number of samples of each channel that the header declares, or 0 if it declares none."""
    return int(sound.frames) if sound.frames < _UNKNOWN_LENGTH else 0


def check_samples(samples: Samples) -> None:
    """Check that all samples are finite and not too large.

    Raises:
        UnusableSound: A sample is not finite, or it is too large.
    """
    # NaN and infinity propagate to the peak, so that one pass over the block is enough.
    peak = np.abs(samples).max(initial=0)
    if not np.isfinite(peak):
        raise UnusableSound("has samples that are NaN or infinite; write the file again without them")
    if peak > MAX_AMPLITUDE:
        raise UnusableSound(f"has samples of {peak:.1e}, where full scale is 1; scale them to +-1")


def erase_timestamp(file: io.FileIO) -> None:
    """Set the time stamp in a WAV file to zero. libsndfile writes one into the PEAK chunk if the samples are floats."""
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        for name, start, _ in _chunks(file, 12, "little"):
            if name == b"PEAK":
                file.seek(start + 4)
                file.write(bytes(4))


def _unreadable(error: Exception) -> UnusableSound:
    return UnusableSound(f"not readable as audio ({_error_text(error)}); give WAV, FLAC or OGG")


def _error_text(error: Exception) -> str:
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else reason(error)
    return str(text).removeprefix("Error : ").rstrip(".")


class _FileWithLength(io.RawIOBase):
    """A file in which the placeholder of a length is replaced by the number of bytes that follow it."""

    def __init__(self, file: io.FileIO, size: int, placeholder: tuple[int, Order]) -> None:
        self._file, self._size, (self._offset, order) = file, size, placeholder
        self._field = min(size - self._offset - 4, 0xFFFFFFFF).to_bytes(4, order)

    def __len__(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        start = self._file.tell()
        content = bytearray(self._file.read(len(buffer)) or b"")
        for index, value in enumerate(self._field, self._offset - start):
            if 0 <= index < len(content):
                content[index] = value
        buffer[: len(content)] = content
        return len(content)


def _parse_container(file: io.FileIO, size: int) -> _Container:
    head = file.read(40)
    match head[:4]:
        case b"RIFF" | b"RIFX" | b"RF64" | b"BW64" if head[8:12] == b"WAVE":
            return _wave(file, size, "big" if head[:4] == b"RIFX" else "little")
        case b"riff" if head[24:28] == b"wave":
            return _wave64(file, size)
        case b"FORM" if head[8:12] in (b"AIFF", b"AIFC"):
            return _aiff(file)
        case b"caff":
            return _core_audio(file, size)
        case b".snd" | b"dns.":
            return _au(head)
        case b"OggS":
            return _ogg(file, size)
        case b"NIST":
            return _nist(file)
    return _Container()


def _is_placeholder(length: int, width: int = 4) -> bool:
    """Return whether a length is a placeholder, at or near the maximum of an integer of ``width`` bytes."""
    # sox writes 0x7FFFF000, arecord 0x80000000, and ffmpeg all ones, in each case possibly reduced by the size of a
    # header or of a part of a frame.
    half, whole = 1 << (8 * width - 1), 1 << (8 * width)
    return length >= whole - 0x200 or half - 0x1200 <= length < half + 0x200


def _wave(file: io.FileIO, size: int, order: Order) -> _Container:
    """Parse RIFF, big-endian RIFX, or RF64, which has a separate chunk for its 64-bit lengths."""
    file.seek(4)
    whole = int.from_bytes(file.read(4), order)
    long_length: int | None = None
    for name, start, length in _chunks(file, 12, order):
        if name == b"ds64":
            fields = file.read(16)
            whole, long_length = (int.from_bytes(part, order) for part in (fields[:8], fields[8:]))
        if name != b"data":
            continue
        rest = size - start
        if long_length is not None and length == 0xFFFFFFFF:
            length = long_length
            if not length or _is_placeholder(length, 8):
                return _Container()
        if length == 0 and rest and whole + 8 not in (size, size - 1):
            return _Container(placeholder=(start - 4, order))
        return _Container() if _is_placeholder(length) else _Container(end=start + length)
    return _Container()


def _chunks(file: io.FileIO, offset: int, order: Order) -> Iterator[tuple[bytes, int, int]]:
    """Yield the identifier, the start of the content, and its length, of every chunk from ``offset`` on."""
    while True:
        file.seek(offset)
        head = file.read(8)
        if len(head) < 8:
            return
        length = int.from_bytes(head[4:], order)
        yield head[:4], offset + 8, length
        offset += 8 + length + length % 2


def _wave64(file: io.FileIO, size: int) -> _Container:
    offset = 40
    while offset + 24 <= size:
        file.seek(offset)
        head = file.read(24)
        length = int.from_bytes(head[16:], "little")
        if head[:4] == b"data":
            return _Container() if length <= 24 or _is_placeholder(length, 8) else _Container(end=offset + length)
        offset += max(24, -(-length // 8) * 8)
    return _Container()


def _aiff(file: io.FileIO) -> _Container:
    for name, start, length in _chunks(file, 12, "big"):
        if name == b"SSND":
            # sox writes 0x7F000000 plus the size of a header.
            unknown = not length or _is_placeholder(length) or 0x7F000000 <= length < 0x7F001000
            return _Container() if unknown else _Container(end=start + length)
    return _Container()


def _core_audio(file: io.FileIO, size: int) -> _Container:
    offset = 8
    while offset + 12 <= size:
        file.seek(offset)
        head = file.read(12)
        length = int.from_bytes(head[4:], "big", signed=True)
        if head[:4] == b"data":
            return _Container(end=offset + 12 + length if length >= 0 else None)
        if length < 0:
            break
        offset += 12 + length
    return _Container()


def _au(head: bytes) -> _Container:
    order: Order = "big" if head[:4] == b".snd" else "little"
    start, length = (int.from_bytes(head[at : at + 4], order) for at in (4, 8))
    return _Container() if not length or _is_placeholder(length) else _Container(end=start + length)


def _nist(file: io.FileIO) -> _Container:
    file.seek(0)
    lines = file.read(1024).decode("latin-1").splitlines()
    fields = {line.split()[0]: line.split()[2] for line in lines[2:] if len(line.split()) == 3}
    try:
        frame = int(fields["sample_n_bytes"]) * int(fields["channel_count"])
        plain = fields.get("sample_coding", "pcm") in ("pcm", "ulaw", "alaw", "mu-law")
        return _Container(end=int(lines[1]) + frame * int(fields["sample_count"])) if plain else _Container()
    except (KeyError, ValueError, IndexError):
        return _Container()


def _ogg(file: io.FileIO, size: int) -> _Container:
    """Check that the last page of the file is complete and is marked as the end of the stream."""
    start = max(0, size - 2 * _MAX_OGG_PAGE)
    file.seek(start)
    tail = file.read()
    offset = tail.rfind(b"OggS")
    while offset >= 0:
        page = tail[offset:]
        if len(page) >= 27 and page[4] == 0:
            lacing = page[27 : 27 + page[26]]
            if page[5] & 4 and len(lacing) == page[26] and len(page) >= 27 + page[26] + sum(lacing):
                return _Container()
            break
        offset = tail.rfind(b"OggS", 0, offset)
    raise UnusableSound("cut short, its last page is missing; copy it again")
