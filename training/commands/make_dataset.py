"""The ``kb-make-dataset`` command: makes a dataset in the published layout from speech and head-related responses.

A folder ``<output>/<split>/<item>/`` has ``source00.wav`` and ``source01.wav`` (two ears, 16 kHz, 16-bit) and
``metadata.json``. With ``--noise`` it also has ``noise.wav``; the mixture is the sum of all these signals. For TSE it
also has ``spk_id00.pt`` and ``spk_id01.pt`` (``[1, 256]``). ``<output>/<split>/metadata.csv`` has the records of all
items, and ``<output>/dataset.json`` the parameters of the dataset. With ``--responses-only`` the command makes
``<output>/responses.safetensors`` and its ``metadata.csv`` instead.

The bytes of an item depend only on the flags (:mod:`training.data.items`). If a run is interrupted, the same command
makes the missing items (:mod:`training.data.dataset_folder`).
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from knowledge_boosting.common import cli
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.models.manifest import file_digest
from knowledge_boosting.training.data.corpus import SAMPLE_RATE, find_noise, find_speech, recordings_digest
from knowledge_boosting.training.data.dataset_folder import (
    check_root,
    make_missing_items,
    warn_of_broken,
    write_metadata,
)
from knowledge_boosting.training.data.items import (
    BANK_SPLIT,
    RESPONSE_FILE,
    MixtureMaker,
    ResponseMaker,
    item_name,
    mixture_bytes,
    read_record,
    room_bytes,
)
from knowledge_boosting.training.data.responses import BANK_FILE, Renderer, check_sofa, head_name, write_bank
from knowledge_boosting.training.data.rooms import MICROPHONES, MONO, Range, RoomRanges, check_range
from knowledge_boosting.training.data.speakers import Speaker, select_speakers, split_speakers

app = cli.Application()

_MAX_COUNT = 1_000_000
_DEFAULT_RANGES = RoomRanges()


class Task(StrEnum):
    """The task that the dataset is for."""

    SS = "ss"
    TSE = "tse"


@app.command()
def make_dataset(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make, or to continue.")],
    sofa: Annotated[
        list[Path],
        typer.Option("--sofa", help="Head-related responses of two ears (SOFA file). Give several for random heads."),
    ],
    speech: Annotated[
        Path | None,
        typer.Option("--speech", help="Mono speech of 16 kHz or more: <speaker>/… folders or <speaker>-… names."),
    ] = None,
    valid_speech: Annotated[
        Path | None,
        typer.Option(
            "--valid-speech", help="Speech for val and test. By default, the speakers of --speech are divided."
        ),
    ] = None,
    task: Annotated[Task | None, typer.Option("--task", help="With tse, every item has speaker embeddings.")] = None,
    train: Annotated[int, typer.Option("--train", min=0, max=_MAX_COUNT, help="Number of items in train.")] = 0,
    val: Annotated[int, typer.Option("--val", min=0, max=_MAX_COUNT, help="Number of items in val.")] = 0,
    test: Annotated[int, typer.Option("--test", min=0, max=_MAX_COUNT, help="Number of items in test.")] = 0,
    seconds: Annotated[float, typer.Option("--seconds", min=0.5, max=60, help="Length of an item, s.")] = 4.0,
    enrollment_seconds: Annotated[
        float,
        typer.Option("--enrollment-seconds", min=1, max=60, help="tse: length of the speech for an embedding, s."),
    ] = 4.0,
    level_difference: Annotated[
        Range,
        typer.Option("--level-difference", metavar="LOW HIGH", help="Level of the first speaker over the second, dB."),
    ] = (-5.0, 5.0),
    level: Annotated[
        Range,
        typer.Option("--level", metavar="LOW HIGH", help="Level (RMS) of the mixture, dBFS; reduced if it would clip."),
    ] = (-35.0, -20.0),
    noise: Annotated[
        Path | None,
        typer.Option("--noise", help="Folder of recordings without speech, mono, 16 kHz or more, at any depth."),
    ] = None,
    noise_ratio: Annotated[
        Range, typer.Option("--noise-ratio", metavar="LOW HIGH", help="Level of both speakers over the noise, dB.")
    ] = (15.0, 40.0),
    side: Annotated[
        Range, typer.Option("--side", metavar="LOW HIGH", help="Length and width of a room, m.")
    ] = _DEFAULT_RANGES.side,
    height: Annotated[
        Range, typer.Option("--height", metavar="LOW HIGH", help="Height of a room, m.")
    ] = _DEFAULT_RANGES.height,
    absorption: Annotated[
        Range, typer.Option("--absorption", metavar="LOW HIGH", help="Share of the energy that surfaces absorb.")
    ] = _DEFAULT_RANGES.absorption,
    anechoic: Annotated[
        float, typer.Option("--anechoic", min=0, max=1, help="Share of rooms without reflections.")
    ] = _DEFAULT_RANGES.anechoic,
    distance: Annotated[
        Range, typer.Option("--distance", metavar="LOW HIGH", help="Distance from the head to a speaker, m.")
    ] = _DEFAULT_RANGES.distance,
    azimuth: Annotated[
        Range,
        typer.Option(
            "--azimuth", metavar="LOW HIGH", help="Azimuth from the direction the head faces, degrees; 90 is left."
        ),
    ] = _DEFAULT_RANGES.azimuth,
    elevation: Annotated[
        Range, typer.Option("--elevation", metavar="LOW HIGH", help="Elevation above the height of the head, degrees.")
    ] = _DEFAULT_RANGES.elevation,
    separation: Annotated[
        float, typer.Option("--separation", min=0, max=90, help="Minimum difference between the two azimuths, degrees.")
    ] = _DEFAULT_RANGES.separation,
    microphones: Annotated[
        float, typer.Option("--microphones", min=0, max=1, help="Share of rooms with two microphones and no head.")
    ] = _DEFAULT_RANGES.microphones,
    mono: Annotated[
        float,
        typer.Option("--mono", min=0, max=1, help="Share of rooms with one microphone, whose signal is used twice."),
    ] = _DEFAULT_RANGES.mono,
    unequal: Annotated[
        float,
        typer.Option(
            "--unequal",
            min=0,
            max=1,
            help="Share of the rooms that are not mono with one ear or microphone 20 dB weaker.",
        ),
    ] = _DEFAULT_RANGES.unequal,
    responses_only: Annotated[
        bool, typer.Option("--responses-only", help="Make a bank of room responses for dynamic mixing, without speech.")
    ] = False,
    rooms: Annotated[int, typer.Option("--rooms", min=0, max=_MAX_COUNT, help="Number of rooms in the bank.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of all random values.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, help="Number of processes; one a core by default. It does not affect the result."
        ),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out speech that is unreadable, not mono or below 16 kHz.")
    ] = False,
) -> None:
    """Mix two speakers in random rooms as two ears receive them. The same command continues an interrupted run."""
    shares = (microphones, mono, unequal)
    ranges = RoomRanges(side, height, absorption, anechoic, distance, azimuth, elevation, separation, *shares)
    counts = {split: count for split, count in (("train", train), ("val", val), ("test", test)) if count}
    if responses_only:
        if speech or valid_speech or task or counts or noise:
            raise InputError(
                "--responses-only takes no --speech, --valid-speech, --noise, --task, --train, --val or --test"
            )
        if not rooms:
            raise InputError("--responses-only needs --rooms, the number of rooms in the bank")
        cli.check_installed("netCDF4", "pyroomacoustics", "safetensors", "sofa")
        _check_heads(sofa)
        _make_bank(output, sofa, ranges, rooms, seed, workers)
        return
    if rooms:
        raise InputError("--rooms needs --responses-only; a dataset has one room for every item")
    if speech is None or task is None:
        raise InputError(f"give {'--speech DIR' if speech is None else '--task ss or tse'}, or --responses-only")
    if not counts:
        raise InputError("nothing to make; give --train, --val or --test a number of items")
    if valid_speech is not None and not (val or test):
        raise InputError("--valid-speech is for val and test; give --val or --test a number of items")
    check_range("--level-difference", level_difference, -40, 40)
    check_range("--level", level, -60, 0)
    check_range("--noise-ratio", noise_ratio, -20, 100)
    folders = {"speech": speech, **({"valid_speech": valid_speech} if valid_speech else {})}
    for folder in folders.values():
        if output.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"{output}: lies in the speech folder {folder}; give another --output")
    needed = ("resemblyzer", "torch") if task is Task.TSE else ()
    cli.check_installed("netCDF4", "pyroomacoustics", "sofa", *needed)
    _check_heads(sofa)
    length = round(seconds * SAMPLE_RATE)
    enrollment = round(enrollment_seconds * SAMPLE_RATE) if task is Task.TSE else 0
    recordings = find_noise(noise) if noise is not None else ()
    speakers, digests = _find_splits(folders, counts, length, enrollment, seed, skip_broken=skip_broken)
    parameters: dict[str, object] = {
        "task": task.value,
        "train": train,
        "val": val,
        "test": test,
        "seconds": seconds,
        "enrollment_seconds": enrollment_seconds if enrollment else None,
        "level_difference": level_difference,
        "level": level,
        "seed": seed,
        **asdict(ranges),
        "speech": digests["speech"],
        "valid_speech": digests.get("valid_speech"),
        "sofa": _digests(sofa),
        "noise": recordings_digest(recordings) if recordings else None,
        "noise_ratio": noise_ratio if recordings else None,
    }

    def prepare() -> MixtureMaker:
        return MixtureMaker(
            Renderer(sofa),
            ranges,
            seed,
            speakers,
            length,
            enrollment,
            level_difference,
            level,
            recordings,
            noise_ratio,
            skip_broken,
        )

    make_missing_items(
        output,
        parameters,
        counts,
        mixture_bytes(length, embeddings=enrollment > 0, noise=noise is not None),
        prepare,
        workers,
    )
    for split, count in counts.items():
        write_metadata(output / split, output / split, count)
        print(f"{output / split}: {count} items of {len(speakers[split])} speakers")


def _make_bank(
    root: Path, sofa: Sequence[Path], ranges: RoomRanges, rooms: int, seed: int, workers: int | None
) -> None:
    parameters = {"rooms": rooms, "seed": seed, **asdict(ranges), "sofa": _digests(sofa)}
    bank, items = root / BANK_FILE, root / BANK_SPLIT
    if bank.exists():
        check_root(root, parameters)
        print(f"{bank}: exists already")
    else:
        make_missing_items(
            root,
            parameters,
            {BANK_SPLIT: rooms},
            room_bytes(),
            lambda: ResponseMaker(Renderer(sofa), ranges, seed),
            workers,
        )
        write_metadata(root, items, rooms)
        folders = [items / item_name(index) for index in range(rooms)]
        responses = np.stack([np.load(folder / RESPONSE_FILE) for folder in folders])
        listeners = [str(read_record(folder)["listener"]) for folder in folders]
        with atomic_file(bank) as temporary:
            write_bank(temporary, responses, listeners)
        print(f"{bank}: {rooms} rooms")
    shutil.rmtree(items, ignore_errors=True)


def _find_splits(
    folders: Mapping[str, Path],
    counts: Mapping[str, int],
    length: int,
    enrollment: int,
    seed: int,
    *,
    skip_broken: bool,
) -> tuple[dict[str, tuple[Speaker, ...]], dict[str, object]]:
    """Return the speakers of every split and the digest of each corpus.

    Args:
        folders: the corpora by parameter, ``speech`` and optionally ``valid_speech``.
        counts: the number of items of every split that has some.
        length: the samples that a speaker needs to be mixed.
        enrollment: the additional samples that a speaker needs to be enrolled; 0 for none.
        seed: the seed of the division.
        skip_broken: whether broken files are left out.

    Raises:
        InputError: a corpus has too few speakers, or a speaker is in both.
    """
    corpora = {name: find_speech(folder, skip_broken=skip_broken) for name, folder in folders.items()}
    warn_of_broken({path: fault for corpus in corpora.values() for path, fault in corpus.broken.items()})
    shared = set.intersection(*(set(corpus.speakers) for corpus in corpora.values())) if len(corpora) > 1 else set()
    if shared:
        raise InputError(
            f"--valid-speech: speaker {min(shared)} is in --speech too; give folders of different speakers"
        )
    chosen: dict[str, tuple[Speaker, ...]] = {}
    for name, corpus in corpora.items():
        splits = [split for split in counts if len(corpora) == 1 or (split == "train") == (name == "speech")]
        speakers = select_speakers(corpus, length, enrollment)
        if len(speakers) < 2 * len(splits):
            enrolling = f" and {enrollment / SAMPLE_RATE:g} s more to enroll with" if enrollment else ""
            raise InputError(
                f"{folders[name]}: {len(speakers)} of its {len(corpus.speakers)} speakers have "
                f"{length / SAMPLE_RATE:g} s of speech in one file{enrolling}; at least {2 * len(splits)} are needed "
                f"for {' and '.join(splits)}; add speech or ask for less"
            )
        chosen |= split_speakers(speakers, splits, seed)
    return chosen, {name: corpus.digest for name, corpus in corpora.items()}


def _check_heads(files: Sequence[Path]) -> None:
    for sofa in files:
        check_sofa(sofa)
    names = [head_name(sofa) for sofa in files]
    for name in names:
        if names.count(name) > 1 or name in (MICROPHONES, MONO):
            raise InputError(f"--sofa: two listeners would have the name {name}; rename the file")


def _digests(files: Sequence[Path]) -> str | list[str]:
    digests = [file_digest(path) for path in files]
    return digests[0] if len(digests) == 1 else digests


def main() -> None:
    """Entry point of ``kb-make-dataset``."""
    cli.run(app, "kb-make-dataset", "train")


if __name__ == "__main__":
    main()
