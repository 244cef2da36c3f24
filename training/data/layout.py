"""The published layout of a dataset, ``<root>/<split>/<item>/…``: its names, and the speakers of a split."""

import csv
from collections.abc import Collection
from pathlib import Path

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.training.data.corpus import VOICE_SEPARATOR

SPLITS = ("train", "val", "test")
NOISE_FILE = "noise.wav"  # in the folder of an item, beside its sources
METADATA_FILE = "metadata.csv"  # in the folder of a rendered split, one line an item


def mixture_speakers(split: Path) -> frozenset[str]:
    """Return the names of the speakers of a rendered split.

    The result is empty if the split has no metadata, as in the published datasets.

    Raises:
        InputError: the metadata cannot be read.
    """
    path = split / METADATA_FILE
    if not path.is_file():
        return frozenset()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return frozenset(line[f"speaker{number}"] for line in csv.DictReader(file) for number in ("00", "01"))
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise InputError(f"{path}: not readable as the metadata of mixtures ({reason(error)})") from None


def refuse_shared_speakers(trained: Collection[str], split: Path) -> None:
    """Check that no speaker of a split was in the training data.

    Raises:
        InputError: a speaker of the split is in ``trained``.
    """
    # A voice that was derived from a speaker counts as that speaker, in the split and in the training data.
    measured, learned = (
        {name.partition(VOICE_SEPARATOR)[0] for name in names} for names in (mixture_speakers(split), trained)
    )
    shared = sorted(measured & learned)
    if shared:
        others = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise InputError(
            f"{split}: speaker {shared[0]}{others} was in the training data too; use a split with other speakers"
        )
