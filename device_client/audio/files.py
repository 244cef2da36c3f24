"""Sound files in and out, block by block, at the rate a bundle works at."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

from knowledge_boosting.common import sound_files
from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.common.files import atomic_file, is_stream, open_stream
from knowledge_boosting.protos.codec import ENROLLMENT_RATE, ENROLLMENT_SECONDS, Samples

SampleFormat = Literal["s16", "float"]
_FORMATS = {".wav": "WAV", ".flac": "FLAC"}
_SUBTYPES = {"s16": "PCM_16", "float": "FLOAT"}


@dataclass(frozen=True)
class Recording:
    """An audio file's samples, and its own rate."""

    samples: Samples  # [channels, N]
    rate: int


@dataclass(frozen=True)
class AudioFile:
    """A sound file of which all samples have been looked at once."""

    path: Path  # as it was given
    rate: int
    channels: int
    length: int  # samples a channel
    floating: bool  # whether its samples are floating point
    _place: Path  # of its bytes

    def blocks(self) -> Iterator[Samples]:
        """All samples, ``[channels, n]`` at a time.

        Raises:
            InputError: the file has changed since it was looked at.
        """
        left = self.length
        with _named(self.path), sound_files.open_sound(self._place) as sound:
            for block in sound_files.blocks(sound):
                yield np.ascontiguousarray(block[:left].T)
                left -= len(block)
                if left <= 0:
                    return
        raise InputError(f"{self.path}: has become shorter while it was read; start again when it is written")

    def heard(self, microphones: int, rate: int) -> Iterator[Samples]:
        """All samples as a network of ``microphones`` hears them at its rate, ``[microphones, n]`` at a time.

        At least one sample comes, however short the file is. A single channel is heard by all microphones.
        """
        resampler, heard = StreamResampler(self.rate, rate, microphones), 0
        for block in self.blocks():
            samples = block if len(block) == microphones else np.repeat(block, microphones, axis=0)
            yield (converted := resampler(samples))
            heard += converted.shape[1]
        yield (rest := resampler.rest())
        if not heard + rest.shape[1]:
            yield np.zeros((microphones, 1), np.float32)


@contextmanager
def open_audio(path: Path, longest: float = np.inf) -> Iterator[AudioFile]:
    """An audio file (WAV, FLAC, OGG and whatever else libsndfile reads), looked at from end to end.

    Standard input (``-``) and pipes are kept in a temporary file for as long as the block lasts.

    Args:
        longest: seconds beyond which it is not looked at any further.

    Raises:
        InputError: no such file, not readable as audio, cut short, empty, or with samples that cannot be computed with.
    """
    if not is_stream(path):
        yield _looked_at(path, existing_file(path, "an audio file"), longest)
        return
    if path == Path("-") and sys.stdin is not None and sys.stdin.isatty():
        raise InputError("-: standard input is a terminal; send it a sound file, or give the name of one")
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "stream"
        try:
            with open_stream(path, "rb") as source, kept.open("wb") as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({reason(error)})") from None
        yield _looked_at(path, kept, longest)


def _looked_at(path: Path, place: Path, longest: float) -> AudioFile:
    with _named(path), sound_files.open_sound(place) as sound:
        length = sound_files.declared_length(sound)
        if length <= longest * sound.samplerate:
            length = 0
            for block in sound_files.blocks(sound):
                length += len(block)
                if length > longest * sound.samplerate:
                    break
        floating = sound.subtype in ("FLOAT", "DOUBLE")
        return AudioFile(path, sound.samplerate, sound.channels, length, floating, place)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What is wrong with a sound file becomes an error that names it."""
    try:
        yield
    except sound_files.UnusableSound as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None


def read_audio(file: AudioFile) -> Recording:
    """All samples of a file at once."""
    return Recording(np.concatenate(list(file.blocks()), axis=1), file.rate)


def check_channels(file: AudioFile, microphones: int) -> str | None:
    """Whether a network of M microphones can hear a file; the warning that a mono one gets.

    Raises:
        InputError: more channels than microphones, or fewer but more than one.
    """
    if file.channels == microphones:
        return None
    if file.channels == 1:
        return f"{file.path}: is mono; its channel is used for all {microphones} microphones"
    raise InputError(f"{file.path}: has {file.channels} channels; give {microphones} (binaural: left, right) or one")


def resample(samples: Samples, rate: int, target: int) -> Samples:
    """Samples ``[..., N]`` at another rate, without delay."""
    if rate == target:
        return samples
    flat = samples.reshape(-1, samples.shape[-1])
    converted = soxr.resample(flat.T, rate, target, quality="VHQ")
    return np.ascontiguousarray(converted.T, dtype=np.float32).reshape(*samples.shape[:-1], -1)


class StreamResampler:
    """:func:`resample` for samples that come one after another: the same values, to the last bit."""

    def __init__(self, rate: int, target: int, channels: int) -> None:
        self._stream = None
        if rate != target:
            self._stream = soxr.ResampleStream(rate, target, channels, dtype="float32", quality="VHQ")
        self._channels = channels

    def __call__(self, samples: Samples) -> Samples:
        """The next samples ``[channels, n]`` at the target rate, as far as they are known."""
        if self._stream is None:
            return samples
        return np.ascontiguousarray(self._stream.resample_chunk(np.ascontiguousarray(samples.T)).T)

    def rest(self) -> Samples:
        """What is left when no more samples come, ``[channels, n]``."""
        nothing = np.zeros((0, self._channels), np.float32)
        if self._stream is None:
            return nothing.T
        return np.ascontiguousarray(self._stream.resample_chunk(nothing, last=True).T)


def read_speech(path: Path, shortest: float = ENROLLMENT_SECONDS[0]) -> Samples:
    """Enrollment speech ``[N]`` at 16 kHz, of ``shortest`` to 30 seconds.

    Raises:
        InputError: the file cannot be used.
    """
    longest = ENROLLMENT_SECONDS[1]
    with open_audio(path, longest) as file:
        seconds = file.length / file.rate
        if not shortest <= seconds <= longest:
            raise InputError(f"{path}: has {seconds:.1f} s; give {shortest:g} to {longest:g} s of speech")
        recording = read_audio(file)
    return resample(recording.samples.mean(axis=0), recording.rate, ENROLLMENT_RATE)


def check_output(path: Path, sample_format: SampleFormat) -> None:
    """Whether a file of that name can hold samples of that format; that it can be written is for ``check_files``.

    Raises:
        InputError: unknown suffix, or a format that cannot hold the samples.
    """
    if not is_stream(path) and path.suffix.lower() not in _FORMATS:
        raise InputError(f"{path}: output files must end in {' or '.join(_FORMATS)}")
    if sample_format == "float" and not holds_floats(path):
        raise InputError(f"{path}: {path.suffix} files cannot hold {sample_format} samples; use .wav")


def holds_floats(path: Path) -> bool:
    """Whether a file of that name can hold floating-point samples."""
    return bool(soundfile.check_format(_format(path), _SUBTYPES["float"]))


def _format(path: Path) -> str:
    # A pipe may have any name.
    return _FORMATS.get(path.suffix.lower(), "WAV")


class SoundWriter:
    """A sound file that is being written."""

    def __init__(self, path: Path, file: soundfile.SoundFile, descriptor: int, sample_format: SampleFormat) -> None:
        self._path, self._file, self._descriptor, self._limit = path, file, descriptor, sample_format == "s16"
        self.clipped = 0  # samples that exceeded full scale, and were clipped; always 0 for float

    def write(self, samples: Samples) -> None:
        """Write the next samples ``[channels, n]``.

        Raises:
            InputError: they cannot be written.
        """
        if self._limit:
            self.clipped += int((np.abs(samples) > 1).sum())
            samples = np.clip(samples, -1, 1)
        try:
            self._file.write(samples.T)
        except (soundfile.LibsndfileError, RuntimeError, AssertionError) as error:
            raise InputError(f"{self._path}: cannot write ({self._why() or reason(error)})") from None

    def _why(self) -> str | None:
        """What the system says when it is asked for more room; libsndfile does not pass it on."""
        size = os.fstat(self._descriptor).st_size
        try:
            os.pwrite(self._descriptor, bytes(1 << 16), size)
        except OSError as error:
            return reason(error)
        finally:
            os.ftruncate(self._descriptor, size)
        return None


@contextmanager
def write_sound(
    path: Path, rate: int, channels: int, sample_format: SampleFormat, comment: str | None = None
) -> Iterator[SoundWriter]:
    """A sound file that appears, whole, when the block ends without an error.

    Args:
        comment: kept in the file's header, where the format has room for one.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_file(path) as temporary, temporary.open("r+b", buffering=0) as handle:
        try:
            with soundfile.SoundFile(
                handle.fileno(), "w", rate, channels, _SUBTYPES[sample_format], format=_format(path), closefd=False
            ) as file:
                if comment:
                    file.comment = comment
                yield SoundWriter(path, file, handle.fileno(), sample_format)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise InputError(f"{path}: cannot write ({reason(error)})") from None
        # Equal runs write equal files.
        sound_files.erase_time(handle)


def write_audio(path: Path, samples: Samples, rate: int, sample_format: SampleFormat) -> None:
    """Write samples ``[channels, N]``, whole or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    with write_sound(path, rate, len(samples), sample_format) as file:
        file.write(samples)


class OutputStream:
    """What a network makes of a recording, brought to the recording's rate and length, and handed on."""

    def __init__(self, shape: tuple[int, ...], rate: int, file: AudioFile) -> None:
        """An output of signals ``[*shape, N]`` at ``rate``, for what was made of ``file``."""
        self._shape, self._resampler = shape, StreamResampler(rate, file.rate, int(np.prod(shape)))
        self._left, self._gathered, self._size = file.length, list[Samples](), 0

    def add(self, samples: Samples) -> Iterable[Samples]:
        """What is known of the output ``[*shape, n]`` when ``samples`` come next; in pieces of some frames."""
        self._gathered.append(samples)
        self._size += samples.shape[-1]
        return self._convert() if self._size >= sound_files.BLOCK else ()

    def finish(self, *, whole: bool = True) -> Iterable[Samples]:
        """What is left, and if the ``whole`` recording was run, zeros up to its length."""
        if self._gathered:
            yield from self._convert()
        yield from self._fit(self._resampler.rest())
        while whole and self._left:
            silence = np.zeros((int(np.prod(self._shape)), min(self._left, sound_files.BLOCK)), np.float32)
            yield from self._fit(silence)

    def _convert(self) -> Iterable[Samples]:
        samples = np.concatenate(self._gathered, axis=-1)
        self._gathered, self._size = [], 0
        return self._fit(self._resampler(samples.reshape(-1, samples.shape[-1])))

    def _fit(self, flat: Samples) -> Iterable[Samples]:
        flat = flat[:, : self._left]
        self._left -= flat.shape[1]
        return (flat.reshape(*self._shape, -1),) if flat.shape[1] else ()
