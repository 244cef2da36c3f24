"""The output folder of ``kb-make-dataset``: which items are missing, and whether the folder fits the flags.

Items are written under a temporary name and then renamed, so every item in the folder is complete. When a run is
interrupted, the same command makes the remaining items.
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
_LEFTOVER = re.compile(r"\.(dataset|metadata|responses|\d{6})-")  # temporary names that a killed run leaves


_maker: MixtureMaker | ResponseMaker  # set when a worker process starts


def _start_worker(maker: MixtureMaker | ResponseMaker) -> None:
    global _maker
    _maker = maker


def _make_item(split: Path, index: int) -> dict[Path, str]:
    with atomic_directory(split / item_name(index)) as folder:
        return _maker.make(split.name, index, folder)


def _make_items(maker: MixtureMaker | ResponseMaker, missing: Sequence[tuple[Path, int]], workers: int | None) -> None:
    """Make items in worker processes, and print a warning about broken files that were left out.

    Raises:
        InputError: a worker cannot read the speech or cannot write the item.
        Failure: a worker process died.
    """
    broken: dict[Path, str] = {}
    for found in run_in_workers(
        _make_item,
        missing,
        workers,
        start=_start_worker,
        arguments=(maker,),
        crash_advice="run the same command again to make the remaining items",
    ):
        broken |= found
    warn_of_broken(broken)


def warn_of_broken(files: Mapping[Path, str]) -> None:
    """Print a warning that broken files were left out. ``files`` maps each path to its fault."""
    if files:
        path = min(files)
        cli.warn(f"broken files left out: {len(files)}, the first {path}: {files[path]}")


def check_root(root: Path, parameters: Mapping[str, object]) -> None:
    """Check that a dataset with these parameters can be made or continued in a folder.

    Raises:
        InputError: the folder contains something else, or a dataset with other parameters.
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
            raise InputError(f"{root}: was made {how}; give another --output, or the same flags to continue it")


def _flag_values(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _open_root(root: Path, parameters: Mapping[str, object]) -> None:
    """Make the folder, or delete the incomplete files that a killed run left in it."""
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
    """Return a line that says how much space is needed and how much is free.

    Raises:
        InputError: the disk has too little free space.
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
    """Print how much space the missing items need, and make them.

    Args:
        root: the output folder.
        parameters: what the dataset is made with, by name of the flag.
        counts: the number of items by split.
        item_bytes: the disk space that one item needs.
        prepare: called if an item is missing; returns the object that makes items.
        workers: the number of processes; None for one a core.

    Raises:
        InputError: see :func:`check_root`; or the disk is too small, or a worker cannot read or write a file.
        Failure: a worker process died.
    """
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
    """Write the records of all items to ``metadata.csv``, one line an item."""
    records = [read_record(items / item_name(index)) for index in range(count)]
    with atomic_file(folder / METADATA_FILE) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
