"""Voices that were enrolled, kept under names in the user's configuration folder."""

import io
from pathlib import Path

import numpy as np
from platformdirs import user_config_path

from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.common.files import atomic_file, check_files
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE
from knowledge_boosting.protos.codec import Samples

_LARGEST = 8192  # bytes of a file that are read; an embedding has 1152


def save(name: str, embedding: Samples) -> Path:
    """Keep a speaker embedding ``[256]``; where it went.

    Raises:
        InputError: the name cannot be a file's, or the folder cannot be written.
    """
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        np.save(temporary, embedding)
    return path


def load(name: str) -> Samples:
    """The embedding ``[256]`` of a name, or of an ``.npy`` file.

    Raises:
        InputError: nobody was enrolled under that name.
    """
    if name.endswith(".npy"):
        return read_embedding(Path(name))
    path = _path(name)
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.npy"))) or "nobody is yet"
        raise InputError(f"--speaker {name}: not enrolled ({known}); see 'kb-client enroll --help'")
    return read_embedding(path)


def read_embedding(path: Path) -> Samples:
    """A speaker embedding ``[256]`` from a file.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    existing_file(path, "a speaker embedding")
    try:
        with path.open("rb") as file:
            content = io.BytesIO(file.read(_LARGEST))
        if np.lib.format.read_magic(content) != (1, 0):
            raise ValueError("of another version of the format")
        # Before anything is made of a size that the file merely claims.
        shape, _, kind = np.lib.format.read_array_header_1_0(content)
        if shape != (SPEAKER_EMBEDDING_SIZE,) or kind.kind not in "fiu":
            raise InputError(f"{path}: must hold {SPEAKER_EMBEDDING_SIZE} finite numbers")
        with np.errstate(over="ignore"):
            embedding = np.frombuffer(content.read(SPEAKER_EMBEDDING_SIZE * kind.itemsize), kind).astype(np.float32)
    except InputError:
        raise
    except Exception as error:  # the header is Python's own syntax, and whatever that says of bad ones
        raise InputError(f"{path}: not readable as an array ({reason(error)})") from None
    if embedding.shape != (SPEAKER_EMBEDDING_SIZE,) or not np.isfinite(embedding).all():
        raise InputError(f"{path}: must hold {SPEAKER_EMBEDDING_SIZE} finite numbers")
    if not embedding.any():
        raise InputError(
            f"{path}: holds zeros only, which is nobody's voice; make it anew, see 'kb-client enroll --help'"
        )
    return np.ascontiguousarray(embedding)


def check_name(name: str, speech: Path | None) -> None:
    """Whether somebody can be enrolled under that name, by the speech of a file if there is one.

    Raises:
        InputError: it is no name, or its file cannot be written.
    """
    path = _path(name)
    check_files([speech] if speech is not None else [], [], {path.parent: [path.name]})


def _path(name: str) -> Path:
    if not name.replace("-", "").replace("_", "").isalnum():
        raise InputError(f"{name}: must be of letters, digits, - and _, to be the name of a speaker")
    return user_config_path("knowledge-boosting", appauthor=False) / "speakers" / f"{name}.npy"
