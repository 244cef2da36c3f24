"""Sound files as they are found: whether all of a file is there, and its samples block by block.

libsndfile reads what it finds of a file that was cut off without a word, and trusts headers that their writers never
came back to. So each container is looked into here first. Sizes that a program wrote to a pipe, or left open when it
was killed, stand for all the bytes that follow.
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

BLOCK = 4096  # samples a channel that are read at a time
RATES = (1000, 768_000)  # Hz
LOUDEST = 2.0**31  # of full scale 1: whole numbers of 32 bits in floating point, and less than what overflows
_UNKNOWN_LENGTH = 2**60  # samples; libsndfile's word for a stream that does not say
_OGG_PAGE = 65_307  # bytes at most
Order = Literal["big", "little"]

Samples = npt.NDArray[np.float32]


class UnusableSound(Exception):
    """What is wrong with a sound file, without its name."""


@dataclass(frozen=True)
class _Container:
    """What a file's headers say of the place of its samples."""

    end: int | None = None  # where they end, bytes; None: not known
    left_open: tuple[int, Order] | None = None  # place and byte order of a length, 4 bytes, that nobody came back to


class Sound(soundfile.SoundFile):  # type: ignore[misc] # it has no types
    """A sound file that is read from one place on. ``read`` must be told how many samples are wanted."""

    def seekable(self) -> bool:
        # Else every block that is read ends with a search for where it ends, which some files do not survive.
        return False

    def can_seek(self) -> bool:
        """Whether reading can begin anywhere."""
        return bool(super().seekable())


@contextmanager
def open_sound(path: Path) -> Iterator[Sound]:
    """A sound file, open for reading.

    Raises:
        UnusableSound: it is no sound file, or cut short.
        OSError: it cannot be read.
    """
    with path.open("rb", buffering=0) as file:  # libsndfile reads from where the descriptor stands
        size = os.fstat(file.fileno()).st_size
        container = _look_into(file, size)
        if container.end is not None and container.end > size:
            raise UnusableSound(f"cut short, {size} of {container.end} bytes are there; copy it again")
        file.seek(0)
        source = _Mended(file, size, container.left_open) if container.left_open is not None else file.fileno()
        try:
            # Given open, a file may have any name: neither its suffix nor bytes that are no UTF-8 matter.
            sound = Sound(source, closefd=False)
        except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
            raise _unreadable(error) from None
        with sound:
            if not RATES[0] <= sound.samplerate <= RATES[1]:
                raise UnusableSound(f"says its rate is {sound.samplerate} Hz; give {RATES[0]} to {RATES[1]} Hz")
            yield sound


def blocks(sound: Sound) -> Iterator[Samples]:
    """The samples from where the file stands to its end, ``[n, channels]`` with n up to ``BLOCK``.

    Raises:
        UnusableSound: fewer are there than the header says, or one is not finite, or too large.
    """
    done = 0
    while True:
        try:
            block = sound.read(BLOCK, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise UnusableSound(f"cut short or damaged after {done} samples ({_words(error)}); copy it again") from None
        if not len(block):
            break
        check_samples(block)
        done += len(block)
        yield block
    if done < promised(sound):
        raise UnusableSound(f"cut short, {done} of {sound.frames} samples are there; copy it again")
    if not done:
        raise UnusableSound("holds no samples")


def promised(sound: Sound) -> int:
    """Samples a channel that the header speaks of; 0 if it does not say."""
    return int(sound.frames) if sound.frames < _UNKNOWN_LENGTH else 0


def check_samples(samples: Samples) -> None:
    """Whether samples can be computed with.

    Raises:
        UnusableSound: one is not finite, or too large.
    """
    # One pass over the block: a sample that is not a number makes its peak none either.
    peak = np.abs(samples).max(initial=0)
    if not np.isfinite(peak):
        raise UnusableSound("has samples that are NaN or infinite; write it again without them")
    if peak > LOUDEST:
        raise UnusableSound(f"has samples of {peak:.1e}, where full scale is 1; write it again within +-1")


def erase_time(file: io.FileIO) -> None:
    """Take the time of writing out of a WAV file, where libsndfile puts it beside the peaks of float samples."""
    file.seek(0)
    head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WAVE":
        for name, place, _ in _chunks(file, 12, "little"):
            if name == b"PEAK":
                file.seek(place + 4)
                file.write(bytes(4))


def _unreadable(error: Exception) -> UnusableSound:
    return UnusableSound(f"not readable as audio ({_words(error)}); give WAV, FLAC or OGG")


def _words(error: Exception) -> str:
    text = error.error_string if isinstance(error, soundfile.LibsndfileError) else reason(error)
    return str(text).removeprefix("Error : ").rstrip(".")


class _Mended(io.RawIOBase):
    """A file as if a length in its header, which was left open, said how much follows."""

    def __init__(self, file: io.FileIO, size: int, field: tuple[int, Order]) -> None:
        self._file, self._size, (self._place, order) = file, size, field
        self._field = min(size - self._place - 4, 0xFFFFFFFF).to_bytes(4, order)

    def __len__(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        at = self._file.tell()
        content = bytearray(self._file.read(len(buffer)) or b"")
        for index, value in enumerate(self._field, self._place - at):
            if 0 <= index < len(content):
                content[index] = value
        buffer[: len(content)] = content
        return len(content)


def _look_into(file: io.FileIO, size: int) -> _Container:
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
            return _sun(head)
        case b"OggS":
            return _ogg(file, size)
        case b"NIST":
            return _nist(file)
    return _Container()


def _left_open(length: int, width: int = 4) -> bool:
    """Whether a length says only that its writer could not come back: as large as can be, signed or not, or nearly."""
    # sox writes 0x7FFFF000, arecord 0x80000000, ffmpeg all ones; each perhaps less a header or a part of a frame.
    half, whole = 1 << (8 * width - 1), 1 << (8 * width)
    return length >= whole - 0x200 or half - 0x1200 <= length < half + 0x200


def _wave(file: io.FileIO, size: int, order: Order) -> _Container:
    """RIFF, big-endian RIFX, and RF64, whose real lengths are in a chunk of their own."""
    file.seek(4)
    whole = int.from_bytes(file.read(4), order)
    long_length: int | None = None
    for name, place, length in _chunks(file, 12, order):
        if name == b"ds64":
            fields = file.read(16)
            whole, long_length = (int.from_bytes(part, order) for part in (fields[:8], fields[8:]))
        if name != b"data":
            continue
        rest = size - place
        if long_length is not None and length == 0xFFFFFFFF:
            length = long_length
            if not length or _left_open(length, 8):
                return _Container()
        if length == 0 and rest and whole + 8 not in (size, size - 1):
            return _Container(left_open=(place - 4, order))
        return _Container() if _left_open(length) else _Container(end=place + length)
    return _Container()


def _chunks(file: io.FileIO, start: int, order: Order) -> Iterator[tuple[bytes, int, int]]:
    """Identifier, position and length of every chunk after ``start``."""
    place = start
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return
        length = int.from_bytes(head[4:], order)
        yield head[:4], place + 8, length
        place += 8 + length + length % 2


def _wave64(file: io.FileIO, size: int) -> _Container:
    place = 40
    while place + 24 <= size:
        file.seek(place)
        head = file.read(24)
        length = int.from_bytes(head[16:], "little")
        if head[:4] == b"data":
            return _Container() if length <= 24 or _left_open(length, 8) else _Container(end=place + length)
        place += max(24, -(-length // 8) * 8)
    return _Container()


def _aiff(file: io.FileIO) -> _Container:
    for name, place, length in _chunks(file, 12, "big"):
        if name == b"SSND":
            # sox writes 0x7F000000 and a little.
            opened = not length or _left_open(length) or 0x7F000000 <= length < 0x7F001000
            return _Container() if opened else _Container(end=place + length)
    return _Container()


def _core_audio(file: io.FileIO, size: int) -> _Container:
    place = 8
    while place + 12 <= size:
        file.seek(place)
        head = file.read(12)
        length = int.from_bytes(head[4:], "big", signed=True)
        if head[:4] == b"data":
            return _Container(end=place + 12 + length if length >= 0 else None)
        if length < 0:
            break
        place += 12 + length
    return _Container()


def _sun(head: bytes) -> _Container:
    order: Order = "big" if head[:4] == b".snd" else "little"
    start, length = (int.from_bytes(head[at : at + 4], order) for at in (4, 8))
    return _Container() if not length or _left_open(length) else _Container(end=start + length)


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
    """The last page says that it is the last one, and all of it is there."""
    start = max(0, size - 2 * _OGG_PAGE)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"OggS")
    while at >= 0:
        page = tail[at:]
        if len(page) >= 27 and page[4] == 0:
            lacing = page[27 : 27 + page[26]]
            if page[5] & 4 and len(lacing) == page[26] and len(page) >= 27 + page[26] + sum(lacing):
                return _Container()
            break
        at = tail.rfind(b"OggS", 0, at)
    raise UnusableSound("cut short, its last page is not there; copy it again")
