"""The folder that ``kb-make-dataset`` makes, or goes on with: what is there, what is missing, and whether it fits.

Items are written under a temporary name and renamed: what is there is whole, and the same command makes the rest.
"""

import csv
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from knowledge_boosting.common import cli
from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.common.files import atomic_directory, atomic_file
from knowledge_boosting.training.data.items import (
    ITEM_FILE,
    SPLIT_NUMBERS,
    MixtureMaker,
    ResponseMaker,
    item_name,
    read_record,
)
from knowledge_boosting.training.data.layout import METADATA_FILE
from knowledge_boosting.training.workers import run_in_workers

_PARAMETERS_FILE = "dataset.json"
_LEFTOVER = re.compile(r"\.(dataset|metadata|responses|\d{6})-")  # temporary names of what a killed run was writing


_maker: MixtureMaker | ResponseMaker  # of a worker process, set when it starts


def _start_worker(maker: MixtureMaker | ResponseMaker) -> None:
    global _maker
    _maker = maker


def _make_item(split: Path, index: int) -> dict[Path, str]:
    with atomic_directory(split / item_name(index)) as folder:
        return _maker.make(split.name, index, folder)


def _make_items(maker: MixtureMaker | ResponseMaker, missing: Sequence[tuple[Path, int]], workers: int | None) -> None:
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
        crash_advice="the same command goes on from here",
    ):
        broken |= found
    warn_of_broken(broken)


def warn_of_broken(files: Mapping[Path, str]) -> None:
    """Warn that broken files, given with what is wrong with each, were left out."""
    if files:
        path = min(files)
        cli.warn(f"broken files left out: {len(files)}, the first {path}: {files[path]}")


def check_root(root: Path, parameters: Mapping[str, object]) -> None:
    """Whether a dataset of these parameters can be made, or gone on with, in a folder.

    Raises:
        InputError: something else is there.
    """
    path = root / _PARAMETERS_FILE
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
            how = f"without {flag}" if old is None else f"with {flag} {_flag_values(old)}"
            if "sha256:" in str(old) and "sha256:" in str(new):
                how = f"from other {flag} files"
            raise InputError(f"{root}: was made {how}; give another --output, or the same flags to go on with it")


def _flag_values(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _open_root(root: Path, parameters: Mapping[str, object]) -> None:
    """Make the folder, or clear away what a killed run left half-written in it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        for folder in (root, *(root / split for split in SPLIT_NUMBERS)):
            for entry in list(folder.iterdir()) if folder.is_dir() else []:
                if _LEFTOVER.match(entry.name):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except OSError as error:
        raise InputError(f"{root}: cannot write there ({reason(error)}); choose a folder you can write to") from None
    if not (root / _PARAMETERS_FILE).exists():
        with atomic_file(root / _PARAMETERS_FILE) as temporary:
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


def make_missing_items(
    root: Path,
    parameters: Mapping[str, object],
    counts: Mapping[str, int],
    item_bytes: int,
    prepare: Callable[[], MixtureMaker | ResponseMaker],
    workers: int | None,
) -> None:
    """Make what is missing of ``counts`` items a split, after saying what that takes."""
    check_root(root, parameters)
    wanted = [(root / split, index) for split, count in counts.items() for index in range(count)]
    missing = [(split, index) for split, index in wanted if not (split / item_name(index) / ITEM_FILE).exists()]
    disk = _check_disk(root, len(missing) * item_bytes)
    maker = prepare() if missing else None
    _open_root(root, parameters)
    print(f"{root}: {len(missing)} of {len(wanted)} to make; {disk}", flush=True)
    if maker:
        _make_items(maker, missing, workers)


def write_metadata(folder: Path, items: Path, count: int) -> None:
    """Put the items' records together as ``metadata.csv``, a line an item."""
    records = [read_record(items / item_name(index)) for index in range(count)]
    with atomic_file(folder / METADATA_FILE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
