"""The published layout of a data set, ``<root>/<split>/<item>/…``: its names, and whose voices a split holds."""

import csv
from collections.abc import Collection
from pathlib import Path

from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.training.data.corpus import VOICE_SEPARATOR

SPLITS = ("train", "val", "test")
NOISE_FILE = "noise.wav"  # of an item, beside its sources
METADATA_FILE = "metadata.csv"  # of a rendered split: a line an item


def mixture_speakers(split: Path) -> frozenset[str]:
    """Who speaks in the mixtures of a rendered split; nobody if it does not tell, as published data sets do not.

    Raises:
        InputError: its metadata cannot be read.
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
    """Refuse to measure on voices that were trained on.

    Raises:
        InputError: a speaker of the split is among those ``trained``.
    """
    # A voice made of a speaker's recordings is that speaker, on either side.
    measured, learned = (
        {name.partition(VOICE_SEPARATOR)[0] for name in names} for names in (mixture_speakers(split), trained)
    )
    shared = sorted(measured & learned)
    if shared:
        others = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
        raise InputError(
            f"{split}: speaker {shared[0]}{others} is in the training list too; measure on speakers of their own"
        )
