"""The ``kb-make-dataset`` command: speech and head-related responses to a dataset in the published layout.

``<output>/<split>/<item>/`` holds ``source00.wav`` and ``source01.wav`` (two ears, 16 kHz, 16-bit), with ``--noise``
``noise.wav`` (the sum of all is the mixture), for TSE ``spk_id00.pt`` and ``spk_id01.pt`` (``[1, 256]``), and
``metadata.json``; ``<output>/<split>/`` holds the items' records as ``metadata.csv``; ``<output>/dataset.json`` what it
was made with. With ``--responses-only`` there is ``<output>/responses.safetensors`` instead, and its ``metadata.csv``.

Everything of item i of a split is drawn from ``default_rng([seed, split, i])`` and computed on one thread, so that an
item's bytes follow from the flags alone, not from the number of workers or from what was made before. Items are
written under a temporary name and renamed: what is there is whole, and the same command makes what is missing.
"""

import csv
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from knowledge_boosting.common import cli
from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_directory, atomic_file, write_by_memory
from knowledge_boosting.models.manifest import file_digest
from knowledge_boosting.training.data.corpus import (
    METADATA_FILE,
    NOISE_FILE,
    SAMPLE_RATE,
    SPLITS,
    Samples,
    Talker,
    Utterance,
    clips_digest,
    draw_voices,
    find_clips,
    find_speech,
    find_talkers,
    read_noise,
    split_talkers,
)
from knowledge_boosting.training.data.rooms import (
    BANK_FILE,
    HEADROOM,
    MICROPHONES,
    MONO,
    RESPONSE_LENGTH,
    Listener,
    Range,
    Renderer,
    RoomRanges,
    check_range,
    check_sofa,
    draw_room,
    head_name,
    level_gains,
    render,
    write_bank,
)
from knowledge_boosting.training.workers import run_in_workers

app = cli.Application()

PARAMETERS_FILE = "dataset.json"
_ITEM_FILE = "metadata.json"
_RESPONSE_FILE = "responses.npy"
_BANK = "rooms"  # where the rooms of a bank wait until all are there
_SPLIT_NUMBERS = {split: number for number, split in enumerate((*SPLITS, _BANK))}
_LEFTOVER = re.compile(r"\.(dataset|metadata|responses|\d{6})-")  # temporary names of what a killed run was writing
_MOST = 1_000_000
_BLOCK = 4096  # bytes; a file takes whole blocks of a disk
_ROOMS = RoomRanges()


class Task(StrEnum):
    """What the dataset is for."""

    SS = "ss"
    TSE = "tse"


@dataclass(frozen=True)
class Mixtures:
    """What a worker needs to make mixtures. Lengths are samples at 16 kHz."""

    renderer: Renderer
    rooms: RoomRanges
    seed: int
    talkers: Mapping[str, tuple[Talker, ...]]  # of every split
    length: int
    enrollment: int  # 0 for SS
    difference: Range  # dB
    level: Range  # dBFS
    noise: tuple[Utterance, ...]  # recordings, perhaps none
    noise_ratio: Range  # dB, of the voices over the noise
    skip_broken: bool

    def make(self, split: str, index: int, folder: Path) -> dict[Path, str]:
        """Write one item; gives the broken files that were drawn and left out."""
        rng = np.random.default_rng([self.seed, _SPLIT_NUMBERS[split], index])
        room = draw_room(rng, self.rooms, self.renderer.heads)
        difference, level = rng.uniform(*self.difference), rng.uniform(*self.level)
        voices, broken = draw_voices(
            rng, self.talkers[split], self.length, self.enrollment, skip_broken=self.skip_broken
        )
        responses = self.renderer.responses(room)
        sources = [render(voice.speech, own) for voice, own in zip(voices, responses, strict=True)]
        gains = level_gains(sources, difference, level)
        heard = [gain * source for gain, source in zip(gains, sources, strict=True)]
        record: dict[str, object] = {"item": _item_name(index), **room.record()}
        if self.noise:
            noise, drawn = self._noise(rng, heard[0] + heard[1], room.listener)
            factor = min(1.0, HEADROOM / float(np.abs(heard[0] + heard[1] + noise).max()))
            heard = [factor * source for source in heard]
            gains = (factor * gains[0], factor * gains[1])
            _write_wav(folder / NOISE_FILE, factor * noise)
            record |= drawn
        for number, voice, source, gain in zip(("00", "01"), voices, heard, gains, strict=True):
            _write_wav(folder / f"source{number}.wav", source)
            if voice.embedding is not None:
                _write_embedding(folder / f"spk_id{number}.pt", voice.embedding)
            record |= {**voice.record(number), f"gain{number}": gain}
        _write_record(folder, {**record, "level_difference_db": difference, "mixture_level_dbfs": level})
        return broken

    def _noise(
        self, rng: np.random.Generator, mixture: Samples, listener: Listener
    ) -> tuple[Samples, dict[str, object]]:
        """Noise ``[2, N]`` from two places in a room of its own, as the same listener hears it, and its record."""
        clip = self.noise[rng.integers(len(self.noise))]
        ratio = rng.uniform(*self.noise_ratio)
        places = [read_noise(rng, clip, mixture.shape[1]) for _ in range(2)]
        room = replace(draw_room(rng, self.rooms, self.renderer.heads), listener=listener)
        noise = np.sum([render(*pair) for pair in zip(places, self.renderer.responses(room), strict=True)], axis=0)
        power = max(float(np.mean(np.square(noise))), 1e-16)
        gain = math.sqrt(float(np.mean(np.square(mixture))) / power) * 10 ** (-ratio / 20)
        return gain * noise, {"noise": clip.name, "noise_ratio_db": ratio}


@dataclass(frozen=True)
class Responses:
    """What a worker needs to make the rooms of a bank."""

    renderer: Renderer
    rooms: RoomRanges
    seed: int

    def make(self, split: str, index: int, folder: Path) -> dict[Path, str]:
        """Write one room's responses; nothing can be broken."""
        rng = np.random.default_rng([self.seed, _SPLIT_NUMBERS[split], index])
        room = draw_room(rng, self.rooms, self.renderer.heads)
        write_by_memory(folder / _RESPONSE_FILE, lambda file: np.save(file, self.renderer.responses(room)))
        _write_record(folder, {"room": _item_name(index), **room.record()})
        return {}


def mixture_bytes(length: int, *, embeddings: bool, noise: bool) -> int:
    """What an item of ``length`` samples takes of a disk: sources, record, folder, perhaps embeddings and noise."""
    return (3 if noise else 2) * _on_disk(44 + 4 * length) + (4 if embeddings else 2) * _BLOCK


def room_bytes() -> int:
    """What a room takes of a disk, where its responses lie twice while the bank is put together."""
    return 2 * _on_disk(4 * 4 * RESPONSE_LENGTH) + 3 * _BLOCK


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _item_name(index: int) -> str:
    return f"{index:06d}"


def _write_wav(path: Path, samples: Samples) -> None:
    """Samples ``[2, N]`` below full scale."""
    import soundfile

    pcm = np.rint(samples.T * 32768).astype(np.int16)
    write_by_memory(path, lambda file: soundfile.write(file, pcm, SAMPLE_RATE, format="WAV", subtype="PCM_16"))


def _write_embedding(path: Path, embedding: Samples) -> None:
    import torch

    write_by_memory(path, lambda file: torch.save(torch.from_numpy(embedding), file))


def _write_record(folder: Path, record: Mapping[str, object]) -> None:
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in record.items()}
    (folder / _ITEM_FILE).write_text(json.dumps(rounded, indent=1) + "\n")


def _read_record(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / _ITEM_FILE).read_text()))


_maker: Mixtures | Responses  # of a worker process, set when it starts


def _start_worker(maker: Mixtures | Responses) -> None:
    global _maker
    _maker = maker


def _make_item(split: Path, index: int) -> dict[Path, str]:
    with atomic_directory(split / _item_name(index)) as folder:
        return _maker.make(split.name, index, folder)


def _make_items(maker: Mixtures | Responses, missing: Sequence[tuple[Path, int]], workers: int | None) -> None:
    """Make items in worker processes, and warn of the broken files that were left out.

    Raises:
        InputError: from a worker, of speech or disk.
        Failure: a worker process died.
    """
    broken: dict[Path, str] = {}
    for found in run_in_workers(
        _make_item,
        missing,
        workers,
        start=_start_worker,
        arguments=(maker,),
        after_death="the same command goes on from here",
    ):
        broken |= found
    _warn_of_broken(broken)


def _warn_of_broken(files: Mapping[Path, str]) -> None:
    if files:
        path = min(files)
        cli.warn(f"broken files left out: {len(files)}, the first {path}: {files[path]}")


def _check_root(root: Path, parameters: Mapping[str, object]) -> None:
    """Whether a dataset of these parameters can be made, or gone on with, in a folder.

    Raises:
        InputError: something else is there.
    """
    path = root / PARAMETERS_FILE
    if not path.exists():
        if root.exists() and (not root.is_dir() or any(not _LEFTOVER.match(entry.name) for entry in root.iterdir())):
            raise InputError(f"{root}: exists already and is no dataset; give another --output")
        return
    try:
        made_with = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not readable ({reason(error)}); give another --output") from None
    for name, new in json.loads(json.dumps(parameters)).items():
        old = made_with.get(name)
        if old != new and (name in made_with or new):
            flag = "--" + name.replace("_", "-")
            how = f"without {flag}" if old is None else f"with {flag} {_told(old)}"
            if "sha256:" in str(old) and "sha256:" in str(new):
                how = f"from other {flag} files"
            raise InputError(f"{root}: was made {how}; give another --output, or the same flags to go on with it")


def _told(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _open_root(root: Path, parameters: Mapping[str, object]) -> None:
    """Make the folder, or clear away what a killed run left half-written in it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for folder in (root, *(root / split for split in _SPLIT_NUMBERS)):
            for entry in list(folder.iterdir()) if folder.is_dir() else []:
                if _LEFTOVER.match(entry.name):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError as error:
        raise InputError(f"{root}: cannot write there ({reason(error)}); choose a folder you can write to") from None
    if not (root / PARAMETERS_FILE).exists():
        with atomic_file(root / PARAMETERS_FILE) as temporary:
            temporary.write_text(json.dumps(parameters, indent=2) + "\n")


def _check_disk(root: Path, needed: int) -> str:
    """A line that says how much will be written, and how much is free.

    Raises:
        InputError: less is free.
    """
    folder = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{root}: needs {_size(needed)} and its disk has {_size(free)} free; choose another disk or make fewer"
        )
    return f"{_size(needed)} to write, {_size(free)} free"


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _make(
    root: Path,
    parameters: Mapping[str, object],
    counts: Mapping[str, int],
    item_bytes: int,
    prepare: Callable[[], Mixtures | Responses],
    workers: int | None,
) -> None:
    """Make what is missing of ``counts`` items a split, after saying what that takes."""
    _check_root(root, parameters)
    wanted = [(root / split, index) for split, count in counts.items() for index in range(count)]
    missing = [(split, index) for split, index in wanted if not (split / _item_name(index) / _ITEM_FILE).exists()]
    disk = _check_disk(root, len(missing) * item_bytes)
    maker = prepare() if missing else None
    _open_root(root, parameters)
    print(f"{root}: {len(missing)} of {len(wanted)} to make; {disk}", flush=True)
    if maker:
        _make_items(maker, missing, workers)


def _write_metadata(folder: Path, items: Path, count: int) -> None:
    """Put the items' records together as ``metadata.csv``, a line an item."""
    records = [_read_record(items / _item_name(index)) for index in range(count)]
    with atomic_file(folder / METADATA_FILE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)


def _make_bank(
    root: Path, sofa: Sequence[Path], ranges: RoomRanges, rooms: int, seed: int, workers: int | None
) -> None:
    parameters = {"rooms": rooms, "seed": seed, **asdict(ranges), "sofa": _digests(sofa)}
    bank, items = root / BANK_FILE, root / _BANK
    if bank.exists():
        _check_root(root, parameters)
        print(f"{bank}: made already")
    else:
        _make(root, parameters, {_BANK: rooms}, room_bytes(), lambda: Responses(Renderer(sofa), ranges, seed), workers)
        _write_metadata(root, items, rooms)
        folders = [items / _item_name(index) for index in range(rooms)]
        responses = np.stack([np.load(folder / _RESPONSE_FILE) for folder in folders])
        listeners = [str(_read_record(folder)["listener"]) for folder in folders]
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
) -> tuple[dict[str, tuple[Talker, ...]], dict[str, object]]:
    """Talkers of every split, and the digest of each corpus.

    Args:
        folders: by parameter, ``speech`` and perhaps ``valid_speech``.
        counts: items of the splits that have any.

    Raises:
        InputError: a corpus has too few speakers, or shares one with the other.
    """
    corpora = {name: find_speech(folder, skip_broken=skip_broken) for name, folder in folders.items()}
    _warn_of_broken({path: fault for corpus in corpora.values() for path, fault in corpus.broken.items()})
    shared = set.intersection(*(set(corpus.speakers) for corpus in corpora.values())) if len(corpora) > 1 else set()
    if shared:
        raise InputError(
            f"--valid-speech: speaker {min(shared)} is in --speech too; give folders of different speakers"
        )
    chosen: dict[str, tuple[Talker, ...]] = {}
    for name, corpus in corpora.items():
        splits = [split for split in counts if len(corpora) == 1 or (split == "train") == (name == "speech")]
        talkers = find_talkers(corpus, length, enrollment)
        if len(talkers) < 2 * len(splits):
            apart = f" and {enrollment / SAMPLE_RATE:g} s more to enroll with" if enrollment else ""
            raise InputError(
                f"{folders[name]}: {len(talkers)} of its {len(corpus.speakers)} speakers have "
                f"{length / SAMPLE_RATE:g} s of speech in one file{apart}; at least {2 * len(splits)} are needed for "
                f"{' and '.join(splits)}; add speech or ask for less"
            )
        chosen |= split_talkers(talkers, splits, seed)
    return chosen, {name: corpus.digest for name, corpus in corpora.items()}


@app.command()
def make_dataset(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make, or to go on with.")],
    sofa: Annotated[
        list[Path],
        typer.Option("--sofa", help="Head-related responses of two ears (SOFA file); several are drawn from."),
    ],
    speech: Annotated[
        Path | None,
        typer.Option("--speech", help="Mono speech of 16 kHz or more: <speaker>/… folders or <speaker>-… names."),
    ] = None,
    valid_speech: Annotated[
        Path | None, typer.Option("--valid-speech", help="Speech of val and test; else --speech is divided by speaker.")
    ] = None,
    task: Annotated[Task | None, typer.Option("--task", help="For tse every item has speaker embeddings.")] = None,
    train: Annotated[int, typer.Option("--train", min=0, max=_MOST, help="Items of train.")] = 0,
    val: Annotated[int, typer.Option("--val", min=0, max=_MOST, help="Items of val.")] = 0,
    test: Annotated[int, typer.Option("--test", min=0, max=_MOST, help="Items of test.")] = 0,
    seconds: Annotated[float, typer.Option("--seconds", min=0.5, max=60, help="Length of an item.")] = 4.0,
    enrollment_seconds: Annotated[
        float, typer.Option("--enrollment-seconds", min=1, max=60, help="tse: speech that an embedding is made of.")
    ] = 4.0,
    level_difference: Annotated[
        Range, typer.Option("--level-difference", metavar="LOW HIGH", help="dB, first speaker over the second.")
    ] = (-5.0, 5.0),
    level: Annotated[
        Range, typer.Option("--level", metavar="LOW HIGH", help="dBFS (RMS) of the mixture, lowered if it would clip.")
    ] = (-35.0, -20.0),
    noise: Annotated[
        Path | None, typer.Option("--noise", help="Recordings without voices, mono, 16 kHz or more, at any depth.")
    ] = None,
    noise_ratio: Annotated[
        Range, typer.Option("--noise-ratio", metavar="LOW HIGH", help="dB, both speakers over the noise.")
    ] = (15.0, 40.0),
    side: Annotated[
        Range, typer.Option("--side", metavar="LOW HIGH", help="Length and width of a room, m.")
    ] = _ROOMS.side,
    height: Annotated[Range, typer.Option("--height", metavar="LOW HIGH", help="Height of a room, m.")] = _ROOMS.height,
    absorption: Annotated[
        Range, typer.Option("--absorption", metavar="LOW HIGH", help="Share of the energy that surfaces take.")
    ] = _ROOMS.absorption,
    anechoic: Annotated[
        float, typer.Option("--anechoic", min=0, max=1, help="Share of rooms without reflections.")
    ] = _ROOMS.anechoic,
    distance: Annotated[
        Range, typer.Option("--distance", metavar="LOW HIGH", help="Head to speaker, m.")
    ] = _ROOMS.distance,
    azimuth: Annotated[
        Range, typer.Option("--azimuth", metavar="LOW HIGH", help="Degrees from where the head faces; 90 is left.")
    ] = _ROOMS.azimuth,
    elevation: Annotated[
        Range, typer.Option("--elevation", metavar="LOW HIGH", help="Degrees above the height of the head.")
    ] = _ROOMS.elevation,
    separation: Annotated[
        float, typer.Option("--separation", min=0, max=90, help="Least difference of the two azimuths, degrees.")
    ] = _ROOMS.separation,
    microphones: Annotated[
        float, typer.Option("--microphones", min=0, max=1, help="Share of rooms with two microphones and no head.")
    ] = _ROOMS.microphones,
    mono: Annotated[
        float,
        typer.Option("--mono", min=0, max=1, help="Share of rooms with one microphone, whose signal comes twice."),
    ] = _ROOMS.mono,
    unequal: Annotated[
        float,
        typer.Option(
            "--unequal", min=0, max=1, help="Share of all rooms but mono: one ear or microphone 20 dB weaker."
        ),
    ] = _ROOMS.unequal,
    responses_only: Annotated[
        bool, typer.Option("--responses-only", help="A bank of room responses for dynamic mixing, without speech.")
    ] = False,
    rooms: Annotated[int, typer.Option("--rooms", min=0, max=_MOST, help="Rooms of the bank.")] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of every draw.")] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes, one a core if not given; changes no byte.")
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out speech that is unreadable, not mono or below 16 kHz.")
    ] = False,
) -> None:
    """Mix two speakers in random rooms, as two ears hear them. The same command goes on with an interrupted run."""
    shares = (microphones, mono, unequal)
    ranges = RoomRanges(side, height, absorption, anechoic, distance, azimuth, elevation, separation, *shares)
    counts = {split: count for split, count in (("train", train), ("val", val), ("test", test)) if count}
    if responses_only:
        if speech or valid_speech or task or counts or noise:
            raise InputError(
                "--responses-only takes no --speech, --valid-speech, --noise, --task, --train, --val or --test"
            )
        if not rooms:
            raise InputError("--responses-only needs --rooms, how many rooms the bank has")
        cli.check_installed("netCDF4", "pyroomacoustics", "safetensors", "sofa")
        _check_heads(sofa)
        _make_bank(output, sofa, ranges, rooms, seed, workers)
        return
    if rooms:
        raise InputError("--rooms needs --responses-only; a dataset has a room for every item")
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
    clips = find_clips(noise) if noise is not None else ()
    talkers, digests = _find_splits(folders, counts, length, enrollment, seed, skip_broken=skip_broken)
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
        "noise": clips_digest(clips) if clips else None,
        "noise_ratio": noise_ratio if clips else None,
    }

    def prepare() -> Mixtures:
        return Mixtures(
            Renderer(sofa),
            ranges,
            seed,
            talkers,
            length,
            enrollment,
            level_difference,
            level,
            clips,
            noise_ratio,
            skip_broken,
        )

    _make(
        output,
        parameters,
        counts,
        mixture_bytes(length, embeddings=enrollment > 0, noise=noise is not None),
        prepare,
        workers,
    )
    for split, count in counts.items():
        _write_metadata(output / split, output / split, count)
        print(f"{output / split}: {count} items of {len(talkers[split])} speakers")


def _check_heads(files: Sequence[Path]) -> None:
    for sofa in files:
        check_sofa(sofa)
    names = [head_name(sofa) for sofa in files]
    for name in names:
        if names.count(name) > 1 or name in (MICROPHONES, MONO):
            raise InputError(f"--sofa: two listeners would be called {name}; rename the file")


def _digests(files: Sequence[Path]) -> str | list[str]:
    digests = [file_digest(path) for path in files]
    return digests[0] if len(digests) == 1 else digests


def main() -> None:
    """Entry point of ``kb-make-dataset``."""
    cli.run(app, "kb-make-dataset", "train")


if __name__ == "__main__":
    main()
