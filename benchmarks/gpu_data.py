"""Packs training data into a small folder, to take it to a machine that has a GPU but no data, and unpacks it there.

``python -m benchmarks.gpu_data pack OUT --speech DIR --responses FILE --noise DIR`` encodes speech and noise as Opus,
and the room responses with 16 bits. ``unpack PACK OUT`` makes from them what ``kb-train`` reads: folders of speech and
noise, a bank of responses, and a validation split with the voices of ``samples/speech/valid-more`` in other rooms.
"""

import argparse
import csv
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from knowledge_boosting.common.cli import warn
from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import check_folder
from knowledge_boosting.training.data.corpus import (
    SAMPLE_RATE,
    VOICE_SEPARATOR,
    Segment,
    Utterance,
    find_noise,
    find_speech,
    read_segment,
    read_speaker_names,
    read_speech,
)
from knowledge_boosting.training.data.layout import METADATA_FILE
from knowledge_boosting.training.data.responses import level_gains, read_bank, render, write_bank

VALID_SPEECH = Path(__file__).parents[1] / "samples/speech/valid-more"
RESPONSES_FILE = "responses.npz"
_FEWEST_ROOMS = 4
_VALID_ROOMS, _VALID_ITEMS, _VALID_SECONDS = 40, 48, 4
_LEVEL_DBFS = -26.0
# libsndfile spreads its compression levels from 0 to 1 over these bits a second for each channel.
_MOST_BITS, _FEWEST_BITS = 256_000, 6_000


def pack(
    out: Path, speech: list[Path], excluded: Path | None, noise: Path, responses: Path, rooms: int, kbit: float
) -> None:
    """Write speech, noise and the responses of ``rooms`` rooms to a folder."""
    if rooms < _FEWEST_ROOMS:
        raise InputError(f"--rooms: must be at least {_FEWEST_ROOMS}, because a quarter is for validation")
    names = read_speaker_names(excluded) if excluded is not None else frozenset()
    for number, folder in enumerate(speech):
        for name, utterances in find_speech(folder, skip_broken=False).speakers.items():
            if name.partition(VOICE_SEPARATOR)[0] in names:
                continue
            for utterance in utterances:
                file = Path(utterance.name).with_suffix(".opus").name
                _encode(utterance, out / "speech" / str(number) / name / file, kbit)
    for recording in find_noise(noise):
        _encode(recording, out / "noise" / Path(recording.name).with_suffix(".opus"), kbit)
    bank = read_bank(responses)
    chosen = np.random.default_rng(0).permutation(len(bank.responses))[:rooms]
    scales = np.abs(bank.responses[chosen]).max((1, 2, 3)) / 32767
    whole = np.rint(bank.responses[chosen] / scales[:, None, None, None]).astype(np.int16)
    np.savez_compressed(out / RESPONSES_FILE, responses=whole, scales=scales, listeners=bank.listeners[chosen])


def _encode(utterance: Utterance, path: Path, kbit: float) -> None:
    samples = read_segment(Segment(utterance, 0, utterance.length))
    path.parent.mkdir(parents=True, exist_ok=True)
    level = min(max((_MOST_BITS - 1e3 * kbit) / (_MOST_BITS - _FEWEST_BITS), 0.0), 1.0)
    soundfile.write(path, samples, SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=level)


def unpack(pack_folder: Path, out: Path) -> None:
    """Make the data for ``kb-train`` from a folder of :func:`pack`.

    Raises:
        InputError: it is not such a folder, or a file is damaged.
    """
    path = pack_folder / RESPONSES_FILE
    try:
        with np.load(path) as content:
            responses = content["responses"] * content["scales"].astype(np.float32)[:, None, None, None]
            listeners = content["listeners"]
        for name in ("speech", "noise"):
            shutil.copytree(pack_folder / name, out / name, dirs_exist_ok=True)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        text = "not a folder that `python -m benchmarks.gpu_data pack` has made, or a damaged one"
        raise InputError(f"{pack_folder}: {text} ({reason(error)})") from None
    held_out = min(_VALID_ROOMS, len(responses) // _FEWEST_ROOMS)
    write_bank(out / "responses.safetensors", responses[held_out:], [str(number) for number in listeners[held_out:]])
    _write_validation(out / "valid" / "val", responses[:held_out])


def _write_validation(split: Path, responses: NDArray[np.float32]) -> None:
    rng = np.random.default_rng(1)
    length = _VALID_SECONDS * SAMPLE_RATE
    speakers = find_speech(VALID_SPEECH, skip_broken=False).speakers
    long_enough = {name: [one for one in own if one.length >= length] for name, own in speakers.items()}
    names = [name for name, own in long_enough.items() if own]
    rows = []
    for number in range(_VALID_ITEMS):
        pair = [names[index] for index in rng.permutation(len(names))[:2]]
        room, sources = responses[number % len(responses)], []
        for name, response in zip(pair, room, strict=True):
            utterance = long_enough[name][rng.integers(len(long_enough[name]))]
            start = int(rng.integers(utterance.length - length + 1))
            sources.append(render(read_speech(Segment(utterance, start, length)), response))
        item = split / f"{number:05d}"
        item.mkdir(parents=True, exist_ok=True)
        gains = level_gains(sources, float(rng.uniform(-5, 5)), _LEVEL_DBFS)
        for index, (source, gain) in enumerate(zip(sources, gains, strict=True)):
            soundfile.write(item / f"source{index:02d}.wav", (gain * source).T, SAMPLE_RATE, subtype="FLOAT")
        rows.append({"item": item.name, "speaker00": pair[0], "speaker01": pair[1]})
    with (split / METADATA_FILE).open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument("out", type=Path)
    packing.add_argument("--speech", type=Path, required=True, action="append", help="may be given several times")
    packing.add_argument("--excluded", type=Path, help="names of speakers who are left out, one a line")
    packing.add_argument("--noise", type=Path, required=True)
    packing.add_argument("--responses", type=Path, required=True)
    packing.add_argument("--rooms", type=int, default=550)
    packing.add_argument("--kbit", type=float, default=12.0, help="of a second of speech")
    unpacking = commands.add_parser("unpack")
    unpacking.add_argument("pack", type=Path)
    unpacking.add_argument("out", type=Path)
    arguments = vars(parser.parse_args())
    command = arguments.pop("command")
    try:
        check_folder(arguments["out"])
        if command == "pack":
            pack(**arguments)
            size = sum(path.stat().st_size for path in arguments["out"].rglob("*") if path.is_file())
            print(f"{arguments['out']}: {size / 2**20:.1f} MiB")
        else:
            unpack(arguments["pack"], arguments["out"])
    except InputError as error:
        warn(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
