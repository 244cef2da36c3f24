"""A folder of speech: whose utterance is whose, and segments of it at 16 kHz.

How a speaker is told, the first rule that fits:

1. a file named as in LibriSpeech, ``<speaker>-<chapter>-<utterance>`` in digits, at any depth: by that name;
2. a file in a folder: by the first folder below the corpus;
3. a file in no folder, ``<speaker>-….ogg``: by what stands before the first hyphen.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.models.speaker_encoder import NoSpeech

if TYPE_CHECKING:
    from knowledge_boosting.common.sound_files import Sound

Samples = npt.NDArray[np.float32]
SAMPLE_RATE = 16000
DERIVED = "~"  # between a speaker's name and the number of a voice that kb-make-voices made of the recordings
_SUFFIXES = frozenset({".aif", ".aiff", ".flac", ".mp3", ".ogg", ".opus", ".wav"})
_LIBRISPEECH_NAME = re.compile(r"(\d+)-\d+-\d+")
_LAYOUTS = "<speaker>/… folders or <speaker>-… file names"
_FADE = SAMPLE_RATE // 50  # 20 ms: a cut in the middle of a word would click
_SILENCE = 1e-3  # RMS, -60 dBFS


class BrokenFile(InputError):
    """A speech file that cannot be used; ``--skip-broken`` leaves such files out."""

    def __init__(self, path: Path, fault: str) -> None:
        super().__init__(f"{path}: {fault} (or leave such files out with --skip-broken)")
        self.path, self.fault = path, fault

    def __reduce__(self) -> tuple[type["BrokenFile"], tuple[Path, str]]:
        return type(self), (self.path, self.fault)  # as it comes out of another process


@dataclass(frozen=True)
class Utterance:
    """One file of speech."""

    path: Path
    name: str  # the path below the corpus's folder
    length: int  # samples at 16 kHz


@dataclass(frozen=True)
class Segment:
    """A stretch of an utterance, in samples at 16 kHz."""

    utterance: Utterance
    start: int
    length: int


@dataclass(frozen=True)
class Corpus:
    """Speakers by name with their utterances, and what is wrong with the files that were left out."""

    speakers: Mapping[str, tuple[Utterance, ...]]
    broken: Mapping[Path, str]

    @property
    def digest(self) -> str:
        """A digest of the files' names and lengths, the same wherever the folder lies."""
        return clips_digest([utterance for own in self.speakers.values() for utterance in own])


def clips_digest(clips: Sequence[Utterance]) -> str:
    """A digest of recordings' names and lengths."""
    lines = sorted(f"{clip.name} {clip.length}\n" for clip in clips)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


def find_speech(folder: Path, *, skip_broken: bool) -> Corpus:
    """The speech in a folder. Only headers are read; damage further on shows when a segment is read.

    Raises:
        InputError: no folder, no speech in it, or a file that does not tell its speaker.
        BrokenFile: a file is not readable, not mono, below 16 kHz or empty, and ``skip_broken`` is off.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder of speech ({_LAYOUTS})")
    speakers: defaultdict[str, list[Utterance]] = defaultdict(list)
    broken = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in _SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        name = path.relative_to(folder)
        speaker = _speaker(folder, name)
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


def find_clips(folder: Path) -> tuple[Utterance, ...]:
    """Recordings of noise in a folder, at any depth.

    Raises:
        InputError: no folder, or nothing in it.
        BrokenFile: a file is not readable, not mono, below 16 kHz or empty.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give a folder of noise")
    clips = tuple(
        Utterance(path, path.relative_to(folder).as_posix(), _length(path))
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not clips:
        raise InputError(f"{folder}: holds no recordings; give a folder of WAV, FLAC, OGG or MP3")
    return clips


def read_noise(rng: np.random.Generator, clip: Utterance, length: int) -> Samples:
    """Samples ``[length]`` of a recording from a place drawn in it; a shorter one is repeated.

    Raises:
        BrokenFile: as :func:`read_segment`.
    """
    if clip.length >= length:
        return read_segment(Segment(clip, int(rng.integers(clip.length - length + 1)), length))
    whole = read_segment(Segment(clip, 0, clip.length))
    return np.roll(np.resize(whole, length), int(rng.integers(length)))


def read_names(path: Path) -> frozenset[str]:
    """The names of speakers in a file, a line each; empty lines and those after # are passed over.

    Raises:
        InputError: the file cannot be read, or holds none.
    """
    try:
        lines = existing_file(path, "a list of speakers").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as text ({reason(error)})") from None
    names = frozenset(name for line in lines if (name := line.partition("#")[0].strip()))
    if not names:
        raise InputError(f"{path}: names no speaker")
    return names


def _speaker(folder: Path, name: Path) -> str:
    match = _LIBRISPEECH_NAME.fullmatch(name.stem)
    if match:
        return match[1]
    if len(name.parts) > 1:
        return name.parts[0]
    speaker, hyphen, _ = name.stem.partition("-")
    if not speaker or not hyphen:
        raise InputError(f"{folder / name}: does not tell its speaker; use {_LAYOUTS}")
    return speaker


def _length(path: Path) -> int:
    from knowledge_boosting.common import sound_files

    with _speech(path) as header:
        if header.samplerate < SAMPLE_RATE:
            raise BrokenFile(path, f"sampled at {header.samplerate} Hz; at least {SAMPLE_RATE} Hz is needed")
        if header.channels != 1:
            raise BrokenFile(path, f"has {header.channels} channels; speech must be mono")
        if not header.can_seek():
            raise BrokenFile(path, f"is {header.subtype_info} sound, of which no part can be found; give it as FLAC")
        frames = sound_files.declared_length(header)
        if not frames:
            raise BrokenFile(path, "holds no samples")
        return frames * SAMPLE_RATE // int(header.samplerate)


@contextmanager
def _speech(path: Path) -> "Iterator[Sound]":
    """A file of speech, open; what is wrong with it becomes a :class:`BrokenFile`."""
    from knowledge_boosting.common import sound_files

    try:
        with sound_files.open_sound(path) as sound:
            yield sound
    except sound_files.UnusableSound as error:
        raise BrokenFile(path, str(error)) from None
    except (OSError, RuntimeError) as error:
        raise BrokenFile(path, f"not readable as audio ({reason(error).rstrip('.')}); copy it again") from None


def read_segment(segment: Segment) -> Samples:
    """Samples ``[N]`` of a segment at 16 kHz, full scale 1; a file of a higher rate is resampled with soxr.

    Raises:
        BrokenFile: the file is damaged, cut short, or has samples that are not finite.
    """
    from knowledge_boosting.common import sound_files

    path = segment.utterance.path
    with _speech(path) as file:
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
    # Resampling rounds the length to the nearest sample.
    return np.pad(samples, (0, max(0, segment.length - len(samples))))[: segment.length]


def read_speech(segment: Segment) -> Samples:
    """Samples ``[N]`` of a segment to be mixed, with 20 ms fades at both ends.

    Raises:
        BrokenFile: as :func:`read_segment`.
        NoSpeech: the segment is silent (below -60 dBFS).
    """
    samples = read_segment(segment)
    if np.sqrt(np.mean(np.square(samples))) < _SILENCE:
        raise NoSpeech(f"{segment.utterance.path}: silent from sample {segment.start}")
    ramp = (0.5 - 0.5 * np.cos(np.pi * (np.arange(_FADE) + 0.5) / _FADE)).astype(np.float32)
    samples[:_FADE] *= ramp
    samples[-_FADE:] *= ramp[::-1]
    return samples
