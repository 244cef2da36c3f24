"""The ``kb-make-voices`` command: adds derived voices to a corpus of speech (:mod:`training.data.voices`).

``<output>/<speaker>/`` has the recordings of a speaker. ``<output>/<speaker>~<number>/`` has the same words in a voice
that is derived from the speaker. All files are 16 kHz FLAC. ``<output>/voices.json`` records the factors of all voices.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from knowledge_boosting.common import cli
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.files import atomic_directory, write_buffered
from knowledge_boosting.training.data.corpus import SAMPLE_RATE, Samples, Segment, Utterance, find_speech, read_segment
from knowledge_boosting.training.data.voices import VoiceTransformation, draw_transformations, transform_voice
from knowledge_boosting.training.workers import run_in_workers

app = cli.Application()

RECORD_FILE = "voices.json"
_MIN_FACTOR, _MAX_FACTOR = 0.5, 2.0  # factors beyond these make no human voice


def _make(root: Path, number: int, utterance: Utterance, speaker: str, changes: Sequence[VoiceTransformation]) -> None:
    speech = read_segment(Segment(utterance, 0, utterance.length))
    names = [speaker, *(change.voice for change in changes)]
    for name, samples in zip(names, [speech, *transform_voice(speech, changes)], strict=True):
        _write_flac(root / name / f"{number:04d}.flac", samples)


def _write_flac(path: Path, samples: Samples) -> None:
    import soundfile

    write_buffered(path, lambda file: soundfile.write(file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16"))


def _check_factors(flag: str, factors: tuple[float, float]) -> None:
    low, high = factors
    if not _MIN_FACTOR <= low <= high <= _MAX_FACTOR:
        raise InputError(
            f"{flag}: is {low} {high}; give a lower and a higher factor from {_MIN_FACTOR} to {_MAX_FACTOR}"
        )


@app.command()
def make_voices(
    speech: Annotated[Path, typer.Option(help="Folder of speech, as for kb-make-dataset.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="New folder for the speech with the additional voices.")
    ],
    voices: Annotated[int, typer.Option(min=1, max=100, help="Number of voices derived from every speaker.")] = 4,
    pitch: Annotated[tuple[float, float], typer.Option(help="Range of the pitch factor.")] = (0.75, 1.35),
    formants: Annotated[tuple[float, float], typer.Option(help="Range of the formant factor.")] = (
        0.86,
        1.16,
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random factors.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes; one a core by default.")] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave broken files out.")] = False,
) -> None:
    """Add voices to a corpus of speech, for training: the same words at another pitch, with other formants."""
    _check_factors("--pitch", pitch)
    _check_factors("--formants", formants)
    cli.check_installed("pyworld")
    corpus = find_speech(speech, skip_broken=skip_broken)
    for path, fault in corpus.broken.items():
        cli.warn(f"skipped: {path}: {fault}")
    drawn = draw_transformations(corpus, voices, pitch, formants, seed)
    calls = [
        (number, utterance, speaker, drawn[speaker])
        for speaker, utterances in corpus.speakers.items()
        for number, utterance in enumerate(utterances)
    ]
    with atomic_directory(output) as root:
        for name in (*drawn, *(change.voice for own in drawn.values() for change in own)):
            (root / name).mkdir()
        for _ in run_in_workers(partial(_make, root), calls, workers, crash_advice="nothing was written"):
            pass
        record = {
            "speech": corpus.digest,
            "seed": seed,
            "voices": [asdict(change) for own in drawn.values() for change in own],
        }
        (root / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(
        f"{output}: {len(corpus.speakers)} speakers and {voices * len(corpus.speakers)} voices derived from them"
    )


def main() -> None:
    """Entry point of ``kb-make-voices``."""
    cli.run(app, "kb-make-voices", "train")


if __name__ == "__main__":
    main()
