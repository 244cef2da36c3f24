"""The ``kb-make-voices`` command: more voices than a corpus of speech has, by the WORLD vocoder.

A network that learns few speakers by heart tells no others apart. Every recording is taken apart into pitch, spectral
envelope and aperiodicity, and put together again with another pitch and with formants elsewhere, which is what tells
most speakers apart. ``<output>/<speaker>/`` holds a speaker's recordings, ``<output>/<speaker>~<number>/`` the same
words in a voice made of it, 16 kHz FLAC; ``<output>/voices.json`` what was made with which factors.

Source: Morise, Yokomori and Ozawa, "WORLD: a vocoder-based high-quality speech synthesis system", 2016.
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer

from knowledge_boosting.common import cli
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.files import atomic_directory, write_by_memory
from knowledge_boosting.training.data.corpus import (
    DERIVED,
    SAMPLE_RATE,
    Corpus,
    Samples,
    Segment,
    Utterance,
    find_speech,
    read_segment,
)
from knowledge_boosting.training.workers import run_in_workers

app = cli.Application()

RECORD_FILE = "voices.json"
_LOWEST_PITCH, _HIGHEST_PITCH = 65.0, 500.0  # Hz, of recorded speech
_FULL_SCALE = 0.99
_LEAST, _MOST = 0.5, 2.0  # a factor beyond is no human voice any more


@dataclass(frozen=True)
class Change:
    """What makes a speaker's recordings another voice."""

    voice: str  # its name
    pitch: float  # factor
    formants: float  # factor


def change_voice(speech: Samples, changes: Sequence[Change]) -> list[Samples]:
    """Speech ``[N]`` at 16 kHz in other voices, each ``[N]`` and as loud.

    Factors of 1 give what the vocoder makes of the voice itself, which sounds like it but has other samples.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package about how it finds its version
        import pyworld
    samples = speech.astype(np.float64)
    pitch, times = pyworld.dio(samples, SAMPLE_RATE, f0_floor=_LOWEST_PITCH, f0_ceil=_HIGHEST_PITCH)
    pitch = pyworld.stonemask(samples, pitch, times, SAMPLE_RATE)
    envelope = pyworld.cheaptrick(samples, pitch, times, SAMPLE_RATE)
    aperiodicity = pyworld.d4c(samples, pitch, times, SAMPLE_RATE)
    level = np.sqrt(np.mean(np.square(samples)))
    changed = []
    for change in changes:
        stretched = _stretched(envelope, change.formants)
        made = pyworld.synthesize(pitch * change.pitch, stretched, aperiodicity, SAMPLE_RATE)
        made = np.pad(made, (0, max(0, len(samples) - len(made))))[: len(samples)]
        made *= level / max(float(np.sqrt(np.mean(np.square(made)))), 1e-9)
        changed.append((made * min(1.0, _FULL_SCALE / max(float(np.abs(made).max()), 1e-9))).astype(np.float32))
    return changed


def _stretched(envelope: npt.NDArray[np.float64], factor: float) -> npt.NDArray[np.float64]:
    """An envelope ``[frames, bins]`` whose formants lie at ``factor`` times their frequency."""
    last = envelope.shape[1] - 1
    at = np.minimum(np.arange(last + 1) / factor, last)
    lower = np.minimum(at.astype(int), last - 1)
    share = at - lower
    logarithm = np.log(envelope)
    return np.ascontiguousarray(np.exp((1 - share) * logarithm[:, lower] + share * logarithm[:, lower + 1]))


def draw_changes(
    corpus: Corpus, count: int, pitch: tuple[float, float], formants: tuple[float, float], seed: int
) -> dict[str, tuple[Change, ...]]:
    """``count`` voices of every speaker, factors drawn evenly on a logarithmic scale, for each speaker by itself."""
    drawn = {}
    for index, speaker in enumerate(corpus.speakers):
        rng = np.random.default_rng([seed, index])
        factors = np.exp(rng.uniform(np.log([pitch[0], formants[0]]), np.log([pitch[1], formants[1]]), (count, 2)))
        drawn[speaker] = tuple(
            Change(f"{speaker}{DERIVED}{number}", round(float(first), 4), round(float(second), 4))
            for number, (first, second) in enumerate(factors, 1)
        )
    return drawn


def _make(root: Path, number: int, utterance: Utterance, speaker: str, changes: Sequence[Change]) -> None:
    speech = read_segment(Segment(utterance, 0, utterance.length))
    names = [speaker, *(change.voice for change in changes)]
    for name, samples in zip(names, [speech, *change_voice(speech, changes)], strict=True):
        _write_flac(root / name / f"{number:04d}.flac", samples)


def _write_flac(path: Path, samples: Samples) -> None:
    import soundfile

    write_by_memory(path, lambda file: soundfile.write(file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16"))


def _check_factors(flag: str, factors: tuple[float, float]) -> None:
    low, high = factors
    if not _LEAST <= low <= high <= _MOST:
        raise InputError(f"{flag}: is {low} {high}; give a lower and a higher factor from {_LEAST} to {_MOST}")


@app.command()
def make_voices(
    speech: Annotated[Path, typer.Option(help="Folder of speech, as kb-make-dataset takes it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder of speech with the voices.")],
    voices: Annotated[int, typer.Option(min=1, max=100, help="Voices made of every speaker.")] = 4,
    pitch: Annotated[tuple[float, float], typer.Option(help="Lowest and highest factor of pitch.")] = (0.75, 1.35),
    formants: Annotated[tuple[float, float], typer.Option(help="Lowest and highest factor of formants.")] = (
        0.86,
        1.16,
    ),
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; as many as cores by default.")] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken files out.")] = False,
) -> None:
    """Make more voices of a corpus of speech, for training: the same words at another pitch, with other formants."""
    _check_factors("--pitch", pitch)
    _check_factors("--formants", formants)
    cli.check_installed("pyworld")
    corpus = find_speech(speech, skip_broken=skip_broken)
    for path, fault in corpus.broken.items():
        cli.warn(f"skipped: {path}: {fault}")
    drawn = draw_changes(corpus, voices, pitch, formants, seed)
    calls = [
        (number, utterance, speaker, drawn[speaker])
        for speaker, utterances in corpus.speakers.items()
        for number, utterance in enumerate(utterances)
    ]
    with atomic_directory(output) as root:
        for name in (*drawn, *(change.voice for own in drawn.values() for change in own)):
            (root / name).mkdir()
        for _ in run_in_workers(partial(_make, root), calls, workers, after_death="nothing was written"):
            pass
        record = {
            "speech": corpus.digest,
            "seed": seed,
            "voices": [asdict(change) for own in drawn.values() for change in own],
        }
        (root / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(f"{output}: {len(corpus.speakers)} speakers and {voices * len(corpus.speakers)} voices made of them")


def main() -> None:
    """Entry point of ``kb-make-voices``."""
    cli.run(app, "kb-make-voices", "train")
