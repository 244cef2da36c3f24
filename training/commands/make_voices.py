"""The ``kb-make-voices`` command: a corpus of speech with voices made of its speakers (:mod:`training.data.voices`).

``<output>/<speaker>/`` holds a speaker's recordings, ``<output>/<speaker>~<number>/`` the same words in a voice made of
it, 16 kHz FLAC; ``<output>/voices.json`` what was made with which factors.
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
from knowledge_boosting.training.data.voices import Change, change_voice, draw_changes
from knowledge_boosting.training.workers import run_in_workers

app = cli.Application()

RECORD_FILE = "voices.json"
_LEAST, _MOST = 0.5, 2.0  # a factor beyond is no human voice any more


def _make(root: Path, number: int, utterance: Utterance, speaker: str, changes: Sequence[Change]) -> None:
    speech = read_segment(Segment(utterance, 0, utterance.length))
    names = [speaker, *(change.voice for change in changes)]
    for name, samples in zip(names, [speech, *change_voice(speech, changes)], strict=True):
        _write_flac(root / name / f"{number:04d}.flac", samples)


def _write_flac(path: Path, samples: Samples) -> None:
    import soundfile

    write_buffered(path, lambda file: soundfile.write(file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16"))


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


if __name__ == "__main__":
    main()
