"""Read and write sound files block by block, and convert them to and from a bundle's sample rate."""

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
_BYTES = {"s16": 2, "float": 4}
LARGEST_WAV = (1 << 32) - (1 << 16)  # bytes of samples; the sizes in the header have 32 bits


@dataclass(frozen=True)
class Recording:
    """The samples of an audio file, and their rate."""

    samples: Samples  # [channels, N]
    rate: int  # Hz


@dataclass(frozen=True)
class AudioFile:
    """A sound file whose samples have all been checked."""

    path: Path  # the path that the user gave
    rate: int  # Hz
    channels: int
    length: int  # samples of each channel
    floating: bool  # whether its samples are floating point
    _content: Path  # the file that contains the bytes; a copy if ``path`` is a pipe

    def blocks(self) -> Iterator[Samples]:
        """Yield all samples, ``[channels, n]`` at a time.

        Raises:
            InputError: The file has changed since it was checked.
        """
        remaining = self.length
        with _errors_name(self.path), sound_files.open_sound(self._content) as sound:
            for block in sound_files.blocks(sound):
                yield np.ascontiguousarray(block[:remaining].T)
                remaining -= len(block)
                if remaining <= 0:
                    return
        raise InputError(f"{self.path}: became shorter while it was read; start again when the file is complete")

    def resampled_blocks(self, microphones: int, rate: int) -> Iterator[Samples]:
        """Yield all samples at another rate, ``[microphones, n]`` at a time.

        A single channel is repeated for all microphones. Even a very short file gives at least one sample.
        """
        resampler, count = StreamResampler(self.rate, rate, microphones), 0
        for block in self.blocks():
            samples = block if len(block) == microphones else np.repeat(block, microphones, axis=0)
            yield (converted := resampler(samples))
            count += converted.shape[1]
        yield (last := resampler.flush())
        if not count + last.shape[1]:
            yield np.zeros((microphones, 1), np.float32)


@contextmanager
def open_audio(path: Path, max_seconds: float = np.inf) -> Iterator[AudioFile]:
    """Open an audio file (WAV, FLAC, OGG or another format of libsndfile), and check all its samples.

    Standard input (``-``) and pipes are copied to a temporary file, which exists until the block ends.

    Args:
        path: The path of the file.
        max_seconds: The check stops after this time, so that ``length`` of a longer file is only a lower bound.

    Raises:
        InputError: The file does not exist, is not readable as audio, is cut short or empty, or has samples that are
            not finite or too large.
    """
    if not is_stream(path):
        yield _check_audio(path, existing_file(path, "an audio file"), max_seconds)
        return
    if path == Path("-") and sys.stdin is not None and sys.stdin.isatty():
        raise InputError("-: standard input is a terminal; redirect a sound file to it, or give the name of a file")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "stream"
        try:
            with open_stream(path, "rb") as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({reason(error)})") from None
        yield _check_audio(path, copy, max_seconds)


def _check_audio(path: Path, content: Path, max_seconds: float) -> AudioFile:
    with _errors_name(path), sound_files.open_sound(content) as sound:
        length = sound_files.declared_length(sound)
        if length <= max_seconds * sound.samplerate:
            length = 0
            for block in sound_files.blocks(sound):
                length += len(block)
                if length > max_seconds * sound.samplerate:
                    break
        floating = sound.subtype in ("FLOAT", "DOUBLE")
        return AudioFile(path, sound.samplerate, sound.channels, length, floating, content)


@contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Convert errors of reading a sound file into errors that name the file."""
    try:
        yield
    except sound_files.UnusableSound as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None


def read_audio(file: AudioFile) -> Recording:
    """Read all samples of a file at once."""
    return Recording(np.concatenate(list(file.blocks()), axis=1), file.rate)


def check_channels(file: AudioFile, microphones: int) -> str | None:
    """Check that the channels of a file can be used for a network with this number of microphones.

    Returns:
        A warning if the file is mono, otherwise None.

    Raises:
        InputError: The file has several channels, but not one for each microphone.
    """
    if file.channels == microphones:
        return None
    if file.channels == 1:
        return f"{file.path}: is mono; its channel is used for all {microphones} microphones"
    raise InputError(f"{file.path}: has {file.channels} channels; give {microphones} (binaural: left, right) or one")


def resample(samples: Samples, rate: int, target: int) -> Samples:
    """Resample a whole signal ``[..., N]`` from ``rate`` to ``target``, both in Hz. The result has no delay.

    Even a very short signal gives at least one sample.
    """
    if rate == target:
        return samples
    flat = samples.reshape(-1, samples.shape[-1])
    converted = soxr.resample(flat.T, rate, target, quality="VHQ")
    if not len(converted):
        return np.zeros((*samples.shape[:-1], 1), np.float32)
    return np.ascontiguousarray(converted.T, dtype=np.float32).reshape(*samples.shape[:-1], -1)


class StreamResampler:
    """Resample a signal block by block. The blocks together are bit-identical to the result of :func:`resample`."""

    def __init__(self, rate: int, target: int, channels: int) -> None:
        self._stream = None
        if rate != target:
            self._stream = soxr.ResampleStream(rate, target, channels, dtype="float32", quality="VHQ")
        self._channels = channels

    def __call__(self, samples: Samples) -> Samples:
        """Resample the next samples ``[channels, n]``. Return those that are available, ``[channels, m]``."""
        if self._stream is None:
            return samples
        return np.ascontiguousarray(self._stream.resample_chunk(np.ascontiguousarray(samples.T)).T)

    def flush(self) -> Samples:
        """End the signal, and return its last samples ``[channels, n]``."""
        nothing = np.zeros((0, self._channels), np.float32)
        if self._stream is None:
            return nothing.T
        return np.ascontiguousarray(self._stream.resample_chunk(nothing, last=True).T)


def read_speech(path: Path, min_seconds: float = ENROLLMENT_SECONDS[0]) -> Samples:
    """Read enrollment speech of ``min_seconds`` to 30 seconds.

    Returns:
        Samples ``[N]`` at 16 kHz, the mean of all channels.

    Raises:
        InputError: The file cannot be used.
    """
    max_seconds = ENROLLMENT_SECONDS[1]
    with open_audio(path, max_seconds) as file:
        seconds = file.length / file.rate
        if not min_seconds <= seconds <= max_seconds:
            raise InputError(f"{path}: has {seconds:.1f} s; give {min_seconds:g} to {max_seconds:g} s of speech")
        recording = read_audio(file)
    return resample(recording.samples.mean(axis=0), recording.rate, ENROLLMENT_RATE)


def check_output(path: Path, sample_format: SampleFormat) -> None:
    """Check that the format of an output file, which its suffix determines, supports the samples.

    Whether the file can be written is checked by :func:`common.files.check_files`.

    Raises:
        InputError: The suffix is unknown, or the format does not support the samples.
    """
    if not is_stream(path) and path.suffix.lower() not in _FORMATS:
        raise InputError(f"{path}: the name of an output file must end in {' or '.join(_FORMATS)}")
    if sample_format == "float" and not holds_floats(path):
        raise InputError(f"{path}: {path.suffix} files cannot hold {sample_format} samples; use .wav")


def holds_floats(path: Path) -> bool:
    """Return whether the format of a file, which its suffix determines, supports floating-point samples."""
    return bool(soundfile.check_format(_format(path), _SUBTYPES["float"]))


def _format(path: Path) -> str:
    # A pipe can have any name.
    return _FORMATS.get(path.suffix.lower(), "WAV")


class SoundWriter:
    """Writes a sound file block by block."""

    def __init__(self, path: Path, file: soundfile.SoundFile, descriptor: int, sample_format: SampleFormat) -> None:
        self._path, self._file, self._descriptor, self._clip = path, file, descriptor, sample_format == "s16"
        self.clipped = 0  # number of samples that exceeded full scale and were clipped; always 0 for float

    def write(self, samples: Samples) -> None:
        """Write the next samples ``[channels, n]``.

        Raises:
            InputError: The samples cannot be written.
        """
        if self._clip:
            self.clipped += int((np.abs(samples) > 1).sum())
            samples = np.clip(samples, -1, 1)
        try:
            self._file.write(samples.T)
        except (soundfile.LibsndfileError, RuntimeError, AssertionError) as error:
            raise InputError(f"{self._path}: cannot write ({self._system_error() or reason(error)})") from None

    def _system_error(self) -> str | None:
        """Extend the file and return the error of the system, which libsndfile does not report. None if it succeeds."""
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
    path: Path, rate: int, channels: int, length: int, sample_format: SampleFormat, comment: str | None = None
) -> Iterator[SoundWriter]:
    """Write a sound file, which appears at ``path`` only when the block ends without an error.

    Args:
        path: The path of the file.
        rate: The sample rate, Hz.
        channels: The number of channels.
        length: The number of samples that each channel will have. A WAV file with more than 4 GiB has the header RF64.
        sample_format: The format of the samples in the file.
        comment: A text for the file's header, if the format supports one.

    Raises:
        InputError: The file cannot be written.
    """
    format_ = _format(path)
    if format_ == "WAV" and length * channels * _BYTES[sample_format] > LARGEST_WAV:
        format_ = "RF64"
    with atomic_file(path) as temporary, temporary.open("r+b", buffering=0) as handle:
        with _errors_of_writing(path):
            file = soundfile.SoundFile(
                handle.fileno(), "w", rate, channels, _SUBTYPES[sample_format], format=format_, closefd=False
            )
            if comment:
                file.comment = comment
        try:
            yield SoundWriter(path, file, handle.fileno(), sample_format)
        finally:
            with _errors_of_writing(path):
                file.close()
        # The same samples must always give the same file.
        sound_files.erase_timestamp(handle)


@contextmanager
def _errors_of_writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise InputError(f"{path}: cannot write ({reason(error)})") from None


def write_audio(path: Path, samples: Samples, rate: int, sample_format: SampleFormat) -> None:
    """Write samples ``[channels, N]`` to a file. After an error there is no file.

    Raises:
        InputError: The file cannot be written.
    """
    with write_sound(path, rate, len(samples), samples.shape[-1], sample_format) as file:
        file.write(samples)


class OutputStream:
    """Converts the output of a network, block by block, to the rate and length of the recording that was its input."""

    def __init__(self, shape: tuple[int, ...], rate: int, file: AudioFile) -> None:
        """Start the output.

        Args:
            shape: Shape of the network's output without the time axis.
            rate: Rate of the network's output, Hz.
            file: The recording from which it is computed.
        """
        self._shape, self._resampler = shape, StreamResampler(rate, file.rate, int(np.prod(shape)))
        self._remaining, self._pending, self._pending_size = file.length, list[Samples](), 0

    def add(self, samples: Samples) -> Iterable[Samples]:
        """Add the network's next samples ``[*shape, n]``, and yield the output that is available, ``[*shape, m]``."""
        self._pending.append(samples)
        self._pending_size += samples.shape[-1]
        return self._convert() if self._pending_size >= sound_files.BLOCK else ()

    def finish(self, *, whole: bool = True) -> Iterable[Samples]:
        """Yield the last samples.

        Args:
            whole: Whether the whole recording was processed. If so, zeros fill the output up to its length.
        """
        if self._pending:
            yield from self._convert()
        yield from self._fit(self._resampler.flush())
        while whole and self._remaining:
            silence = np.zeros((int(np.prod(self._shape)), min(self._remaining, sound_files.BLOCK)), np.float32)
            yield from self._fit(silence)

    def _convert(self) -> Iterable[Samples]:
        samples = np.concatenate(self._pending, axis=-1)
        self._pending, self._pending_size = [], 0
        return self._fit(self._resampler(samples.reshape(-1, samples.shape[-1])))

    def _fit(self, flat: Samples) -> Iterable[Samples]:
        flat = flat[:, : self._remaining]
        self._remaining -= flat.shape[1]
        return (flat.reshape(*self._shape, -1),) if flat.shape[1] else ()
