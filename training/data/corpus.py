"""A corpus is a folder of speech. This module finds its speakers and reads segments of their utterances at 16 kHz.

The speaker of a file is determined by the first of these rules that applies:

1. If the file is named as in LibriSpeech, ``<speaker>-<chapter>-<utterance>`` in digits, the name gives the speaker.
   The file can lie at any depth.
2. If the file lies in a folder, the first folder below the corpus is the speaker.
3. If the file lies directly in the corpus and is called ``<speaker>-….ogg``, the part before the first hyphen is the
   speaker.
"""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.models.speaker_encoder import NoSpeech

if TYPE_CHECKING:
    from knowledge_boosting.common.sound_files import Sound

Samples = npt.NDArray[np.float32]
SAMPLE_RATE = 16000
# kb-make-voices calls the voices that it derives from speaker 19 "19~1", "19~2" and so on.
VOICE_SEPARATOR = "~"
_SUFFIXES = frozenset({".aif", ".aiff", ".flac", ".mp3", ".ogg", ".opus", ".wav"})
_LIBRISPEECH_NAME = re.compile(r"(\d+)-\d+-\d+")
_LAYOUTS = "<speaker>/… folders or <speaker>-… file names"
_FADE = SAMPLE_RATE // 50  # 20 ms; without a fade, a cut in the middle of a word would click
_SILENCE = 1e-3  # RMS, -60 dBFS


class BrokenFile(InputError):
    """A speech file that cannot be used. The flag ``--skip-broken`` leaves such files out."""

    def __init__(self, path: Path, fault: str) -> None:
        super().__init__(f"{path}: {fault}; --skip-broken leaves such files out")
        self.path, self.fault = path, fault

    def __reduce__(self) -> tuple[type["BrokenFile"], tuple[Path, str]]:
        return type(self), (self.path, self.fault)  # how pickle sends it to another process


@dataclass(frozen=True)
class Utterance:
    """One file of speech or noise."""

    path: Path
    name: str  # the path relative to the folder of the corpus
    length: int  # samples at 16 kHz


@dataclass(frozen=True)
class Segment:
    """A part of an utterance. Start and length are in samples at 16 kHz."""

    utterance: Utterance
    start: int
    length: int


@dataclass(frozen=True)
class Corpus:
    """The utterances of every speaker by name, and the faults of the files that were left out."""

    speakers: Mapping[str, tuple[Utterance, ...]]
    broken: Mapping[Path, str]

    @property
    def digest(self) -> str:
        """A digest of the names and lengths of the files. It does not depend on where the folder lies."""
        return recordings_digest([utterance for own in self.speakers.values() for utterance in own])


def recordings_digest(recordings: Sequence[Utterance]) -> str:
    """Return a digest of the names and lengths of recordings."""
    lines = sorted(f"{recording.name} {recording.length}\n" for recording in recordings)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def find_speech(folder: Path, *, skip_broken: bool) -> Corpus:
    """Find the speech in a folder.

    Only headers are read, so damage further inside a file is found only when a segment is read.

    Raises:
        InputError: the folder does not exist or has no speech, or the speaker of a file cannot be determined.
        BrokenFile: a file is not readable, not mono, below 16 kHz or empty, and ``skip_broken`` is false.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder of speech ({_LAYOUTS})")
    speakers: defaultdict[str, list[Utterance]] = defaultdict(list)
    broken = {}
    for path in _sound_files(folder):
        name = path.relative_to(folder)
        speaker = _speaker_of(folder, name)
        try:
            speakers[speaker].append(Utterance(path, name.as_posix(), _length(path)))
        except BrokenFile as error:
            if not skip_broken:
                raise
            broken[error.path] = error.fault
    found = {speaker: tuple(own) for speaker, own in sorted(speakers.items()) if own}
    if not found:
        raise InputError(f"{folder}: holds no usable speech; give a folder of WAV, FLAC, OGG or MP3 ({_LAYOUTS})")
    return Corpus(found, broken)


def _sound_files(folder: Path) -> list[Path]:
    """Return the sound files in a folder at any depth, also in folders that are links. A folder counts once.

    Raises:
        InputError: a folder cannot be read.
    """

    def refuse(error: OSError) -> NoReturn:
        raise InputError(f"{error.filename}: cannot be read ({reason(error)}); allow it, or leave the folder out")

    found, seen = [], set()
    for name, inside, files in os.walk(folder, onerror=refuse, followlinks=True):
        own = Path(name).stat()
        if (own.st_dev, own.st_ino) in seen:  # a link back to a folder above it, for example
            inside.clear()
            continue
        seen.add((own.st_dev, own.st_ino))
        inside.sort()
        paths = (Path(name, file) for file in files if not file.startswith("."))
        found += [path for path in paths if path.suffix.lower() in _SUFFIXES and path.is_file()]
    return sorted(found)


def find_noise(folder: Path) -> tuple[Utterance, ...]:
    """Find the recordings of noise in a folder, at any depth.

    Raises:
        InputError: the folder does not exist or has no recordings.
        BrokenFile: a file is not readable, not mono, below 16 kHz or empty.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder of noise")
    recordings = tuple(
        Utterance(path, path.relative_to(folder).as_posix(), _length(path)) for path in _sound_files(folder)
    )
    if not recordings:
        raise InputError(f"{folder}: holds no recordings; give a folder of WAV, FLAC, OGG or MP3")
    return recordings


def read_noise(rng: np.random.Generator, recording: Utterance, length: int) -> Samples:
    """Read samples ``[length]`` of a recording from a random position. A shorter recording is repeated.

    Raises:
        BrokenFile: see :func:`read_segment`.
    """
    if recording.length >= length:
        return read_segment(Segment(recording, int(rng.integers(recording.length - length + 1)), length))
    whole = read_segment(Segment(recording, 0, recording.length))
    return np.roll(np.resize(whole, length), int(rng.integers(length)))


def read_speaker_names(path: Path) -> frozenset[str]:
    """Read the names of speakers from a text file, one name a line. Empty lines and text after ``#`` are ignored.

    Raises:
        InputError: the file cannot be read or contains no name.
    """
    try:
        lines = existing_file(path, "a list of speakers").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as text ({reason(error)})") from None
    names = frozenset(name for line in lines if (name := line.partition("#")[0].strip()))
    if not names:
        raise InputError(f"{path}: contains no name of a speaker; write one name a line")
    return names


def _speaker_of(folder: Path, name: Path) -> str:
    match = _LIBRISPEECH_NAME.fullmatch(name.stem)
    if match:
        return match[1]
    if len(name.parts) > 1:
        return name.parts[0]
    speaker, hyphen, _ = name.stem.partition("-")
    if not speaker or not hyphen:
        raise InputError(f"{folder / name}: the name does not say who speaks; use {_LAYOUTS}")
    return speaker


def _length(path: Path) -> int:
    from knowledge_boosting.common import sound_files

    with _open_speech(path) as header:
        if header.samplerate < SAMPLE_RATE:
            raise BrokenFile(path, f"sampled at {header.samplerate} Hz; at least {SAMPLE_RATE} Hz is needed")
        if header.channels != 1:
            raise BrokenFile(path, f"has {header.channels} channels; speech must be mono")
        if not header.can_seek():
            raise BrokenFile(path, f"is {header.subtype_info} sound, which allows no seeking; convert it to FLAC")
        frames = sound_files.declared_length(header)
        if not frames:
            raise BrokenFile(path, "holds no samples")
        return frames * SAMPLE_RATE // int(header.samplerate)


@contextmanager
def _open_speech(path: Path) -> "Iterator[Sound]":
    """Open a file of speech, and report every fault in it as a :class:`BrokenFile`."""
    from knowledge_boosting.common import sound_files

    try:
        with sound_files.open_sound(path) as sound:
            yield sound
    except sound_files.UnusableSound as error:
        raise BrokenFile(path, str(error)) from None
    except (OSError, RuntimeError) as error:
        raise BrokenFile(path, f"not readable as audio ({reason(error).rstrip('.')}); copy it again") from None


def read_segment(segment: Segment) -> Samples:
    """Read samples ``[N]`` of a segment at 16 kHz, full scale 1. A file of a higher rate is resampled with soxr.

    Raises:
        BrokenFile: the file is damaged or truncated, or has samples that are not finite.
    """
    from knowledge_boosting.common import sound_files

    path = segment.utterance.path
    with _open_speech(path) as file:
        rate = file.samplerate
        start = segment.start * rate // SAMPLE_RATE
        wanted = min(-(-segment.length * rate // SAMPLE_RATE), file.frames - start)
        file.seek(start)
        samples = file.read(wanted, dtype="float32")
        sound_files.check_samples(samples)
    if len(samples) < wanted:
        raise BrokenFile(path, "cut short; copy it again")
    if rate != SAMPLE_RATE:
        import soxr

        samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="VHQ")
    # The resampler rounds the length to the nearest sample, so it can be one sample short or long.
    return np.pad(samples, (0, max(0, segment.length - len(samples))))[: segment.length]


def read_speech(segment: Segment) -> Samples:
    """Read samples ``[N]`` of a segment to be mixed, and fade 20 ms in at the start and out at the end.

    Raises:
        BrokenFile: see :func:`read_segment`.
        NoSpeech: the segment is silent (below -60 dBFS).
    """
    samples = read_segment(segment)
    if np.sqrt(np.mean(np.square(samples))) < _SILENCE:
        raise NoSpeech(f"{segment.utterance.path}: silent from sample {segment.start}")
    ramp = (0.5 - 0.5 * np.cos(np.pi * (np.arange(_FADE) + 0.5) / _FADE)).astype(np.float32)
    samples[:_FADE] *= ramp
    samples[-_FADE:] *= ramp[::-1]
    return samples
