"""The embeddings of enrolled speakers, stored by name in the user's configuration folder."""

import io
from pathlib import Path

import numpy as np
from platformdirs import user_config_path

from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.common.files import atomic_file, check_files
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE
from knowledge_boosting.protos.codec import Samples

_MAX_NAME_LENGTH = 60  # characters; a file name has at most 255 bytes
_MAX_FILE_BYTES = 8192  # a file with an embedding has 1152


def is_embedding(values: Samples) -> bool:
    """Return whether an array is a speaker embedding: 256 finite numbers, which are not all zero."""
    return values.shape == (SPEAKER_EMBEDDING_SIZE,) and bool(np.isfinite(values).all() and values.any())


def save(name: str, embedding: Samples) -> Path:
    """Store a speaker embedding ``[256]`` under a name, and return the path of its file.

    Raises:
        InputError: The name cannot be used, or the folder cannot be written.
    """
    path = _path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        np.save(temporary, embedding)
    return path


def load(name: str) -> Samples:
    """Load the embedding ``[256]`` of an enrolled speaker, or of a file if the name ends in ``.npy``.

    Raises:
        InputError: No speaker with this name is enrolled, or the file cannot be used.
    """
    if name.endswith(".npy"):
        return read_embedding(Path(name))
    path = _path(name)
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.npy"))) or "none"
        raise InputError(f"--speaker {name}: not enrolled (enrolled speakers: {known}); see 'kb-client enroll --help'")
    return read_embedding(path)


def read_embedding(path: Path) -> Samples:
    """Read a speaker embedding ``[256]`` from an ``.npy`` file.

    Raises:
        InputError: The file cannot be read, or it contains something else.
    """
    existing_file(path, "a speaker embedding")
    try:
        with path.open("rb") as file:
            content = io.BytesIO(file.read(_MAX_FILE_BYTES))
        if np.lib.format.read_magic(content) != (1, 0):
            raise ValueError("it has another version of the format")
        # The size in the header can be false, so it is checked before anything of that size is allocated.
        shape, _, kind = np.lib.format.read_array_header_1_0(content)
        if shape != (SPEAKER_EMBEDDING_SIZE,) or kind.kind not in "fiu":
            raise InputError(f"{path}: must contain {SPEAKER_EMBEDDING_SIZE} finite numbers")
        with np.errstate(over="ignore"):
            embedding = np.frombuffer(content.read(SPEAKER_EMBEDDING_SIZE * kind.itemsize), kind).astype(np.float32)
    except InputError:
        raise
    except Exception as error:  # the header is parsed as a Python literal, which can raise many exceptions
        raise InputError(f"{path}: not readable as an array ({reason(error)})") from None
    if not is_embedding(embedding):
        text = f"must contain {SPEAKER_EMBEDDING_SIZE} finite numbers, not all of them zero"
        raise InputError(f"{path}: {text}; create it again with 'kb-client enroll'")
    return np.ascontiguousarray(embedding)


def check_name(name: str, speech: Path | None) -> None:
    """Check that a speaker can be enrolled under a name.

    Args:
        name: The name of the speaker.
        speech: The file with the enrollment speech, which must not be overwritten. None if there is none.

    Raises:
        InputError: The name cannot be used, or its file cannot be written.
    """
    path = _path(name)
    check_files([speech] if speech is not None else [], [], {path.parent: [path.name]})


def _path(name: str) -> Path:
    if not name.replace("-", "").replace("_", "").isalnum() or len(name) > _MAX_NAME_LENGTH:
        text = f"{name}: the name of a speaker can contain only letters, digits, - and _, {_MAX_NAME_LENGTH} at most"
        raise InputError(text)
    return user_config_path("knowledge-boosting", appauthor=False) / "speakers" / f"{name}.npy"
