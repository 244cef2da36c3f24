"""Audio files in and out, at the rate a bundle works at."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
import soxr

from common.errors import InputError, existing_file, reason
from common.files import atomic_file
from protos.codec import ENROLLMENT_RATE, ENROLLMENT_SECONDS, Samples

SampleFormat = Literal["s16", "float"]
_FORMATS = {".wav": "WAV", ".flac": "FLAC"}
_SUBTYPES = {"s16": "PCM_16", "float": "FLOAT"}


@dataclass(frozen=True)
class Recording:
    """An audio file's samples, and its own rate."""

    samples: Samples  # [channels, N]
    rate: int


def read_audio(path: Path) -> Recording:
    """An audio file (WAV, FLAC, OGG and whatever else libsndfile reads) as it is.

    Raises:
        InputError: no such file, not readable as audio, cut short, empty, or with samples that are not finite.
    """
    existing_file(path, "an audio file")
    try:
        with soundfile.SoundFile(path) as file:
            samples = file.read(dtype="float32", always_2d=True)
            promised, rate = file.frames, file.samplerate
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise InputError(
            f"{path}: not readable as audio ({reason(error).rstrip('.')}); give WAV, FLAC or OGG"
        ) from None
    promised = max(promised, _promised_frames(path))
    if not promised:
        raise InputError(f"{path}: holds no samples")
    if len(samples) < promised:
        raise InputError(f"{path}: cut short, {len(samples)} of {promised} samples are there; copy it again")
    if not np.isfinite(samples).all():
        raise InputError(f"{path}: has samples that are NaN or infinite; write it again without them")
    return Recording(np.ascontiguousarray(samples.T), rate)


def _wav_chunks(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Identifier, position and size of every chunk of a RIFF/WAVE file; nothing for other files."""
    with path.open("rb") as file:
        riff = file.read(12)
        if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            return
        while len(head := file.read(8)) == 8:
            size = int.from_bytes(head[4:], "little")
            yield head[:4], file.tell(), size
            file.seek(size + size % 2, 1)


def _promised_frames(path: Path) -> int:
    """Frames that a WAV header promises; 0 for other files. libsndfile takes what is there without a word."""
    block = 0
    for name, position, size in _wav_chunks(path):
        if name == b"fmt ":
            with path.open("rb") as file:
                file.seek(position + 12)
                block = int.from_bytes(file.read(2), "little")
        if name == b"data":
            # Programs that write to a pipe leave the size open, as all ones or nothing.
            return size // block if block and size < 0xFFFFFF00 else 0
    return 0


def erase_time(path: Path) -> None:
    """Take the time of writing out of a WAV file, where libsndfile puts it beside the peaks of float samples."""
    for name, position, _ in _wav_chunks(path):
        if name == b"PEAK":
            with path.open("r+b") as file:
                file.seek(position + 4)
                file.write(bytes(4))


def to_microphones(recording: Recording, microphones: int, path: Path) -> tuple[Samples, str | None]:
    """Samples ``[M, N]`` for a network of M microphones; mono is duplicated, which a warning line tells.

    Raises:
        InputError: more channels than microphones, or fewer but more than one.
    """
    channels = len(recording.samples)
    if channels == microphones:
        return recording.samples, None
    if channels == 1:
        copies = np.repeat(recording.samples, microphones, axis=0)
        return copies, f"{path}: is mono; its channel is used for all {microphones} microphones"
    raise InputError(f"{path}: has {channels} channels; give {microphones} (binaural: left, right) or one")


def resample(samples: Samples, rate: int, target: int) -> Samples:
    """Samples ``[..., N]`` at another rate, without delay."""
    if rate == target:
        return samples
    flat = samples.reshape(-1, samples.shape[-1])
    converted = soxr.resample(flat.T, rate, target, quality="VHQ")
    return np.ascontiguousarray(converted.T, dtype=np.float32).reshape(*samples.shape[:-1], -1)


def read_speech(path: Path, shortest: float = ENROLLMENT_SECONDS[0]) -> Samples:
    """Enrollment speech ``[N]`` at 16 kHz, of ``shortest`` to 30 seconds.

    Raises:
        InputError: the file cannot be used.
    """
    recording = read_audio(path)
    speech = resample(recording.samples.mean(axis=0), recording.rate, ENROLLMENT_RATE)
    longest = ENROLLMENT_SECONDS[1]
    if not shortest <= len(speech) / ENROLLMENT_RATE <= longest:
        raise InputError(
            f"{path}: has {len(speech) / ENROLLMENT_RATE:.1f} s; give {shortest:g} to {longest:g} s of speech"
        )
    return speech


def fit_length(samples: Samples, length: int) -> Samples:
    """Samples ``[..., N]`` cut, or extended by zeros, to ``length``."""
    missing = length - samples.shape[-1]
    if missing > 0:
        return np.pad(samples, [(0, 0)] * (samples.ndim - 1) + [(0, missing)])
    return samples[..., :length]


def check_output(path: Path, sample_format: SampleFormat) -> None:
    """Whether a file of that name and sample format can be written at all.

    Raises:
        InputError: unknown suffix, a folder that does not exist, or a format that cannot hold the samples.
    """
    if path.suffix not in _FORMATS:
        raise InputError(f"{path}: output files must end in {' or '.join(_FORMATS)}")
    if not soundfile.check_format(_FORMATS[path.suffix], _SUBTYPES[sample_format]):
        raise InputError(f"{path}: {path.suffix} files cannot hold {sample_format} samples; use .wav")
    if not path.parent.is_dir():
        raise InputError(f"{path}: no folder {path.parent}; make it first")


def write_audio(path: Path, samples: Samples, rate: int, sample_format: SampleFormat, comment: str | None) -> int:
    """Write samples ``[channels, N]``, whole or not at all.

    Args:
        comment: kept in the file's header, where the format has room for one.

    Returns:
        How many samples exceeded full scale and were clipped; always 0 for float.

    Raises:
        InputError: the file cannot be written.
    """
    clipped = 0
    if sample_format == "s16":
        clipped = int((np.abs(samples) > 1).sum())
        samples = np.clip(samples, -1, 1)
    with atomic_file(path) as temporary:
        try:
            form, subtype = _FORMATS[path.suffix], _SUBTYPES[sample_format]
            with soundfile.SoundFile(temporary, "w", rate, len(samples), subtype, format=form) as file:
                if comment:
                    file.comment = comment
                file.write(samples.T)
            # Equal runs write equal files.
            erase_time(temporary)
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise InputError(f"{path}: cannot write ({reason(error)})") from None
    return clipped
