"""The manifest of a bundle, ``bundle.json``. It does not need torch."""

import hashlib
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.models.config import MODEL, Alone, ModelConfig, Pair, Strict

SCHEMA_VERSION: Final = 2
_OLD_VERSIONS = (1,)  # these can be read too; in version 1, one network alone was called "small"
_MAX_DOCUMENT_BYTES = 4 * 2**20  # a list of ten thousand training speakers takes a fifth of a MiB
MANIFEST_FILE = "bundle.json"
GRAPH_FILE = "small.onnx"
UNTRAINED_NOTICE = "UNTRAINED: random weights, the results say nothing about a trained model"

Part = Literal["small", "large"]
Record = TypeVar("Record", bound=Strict)
Kind = TypeVar("Kind")


class Provenance(Strict):
    """The origin of the weights of a bundle."""

    created: str = Field(description="UTC, ISO 8601")
    software: str
    torch: str
    source: str = Field(description="checkpoint file with its digest, or the seed of random weights")
    configuration: str = Field(description="file with the network sizes")
    training_speakers: list[str] = Field(
        default_factory=list, description="known speakers of the training data; the bundle must not be measured on them"
    )


class Manifest(Strict):
    """The content of ``bundle.json``."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    id: str = Field(description="digest of configuration and weights; bundles with the same id give the same hints")
    untrained: bool
    model: ModelConfig
    digests: dict[Part, str] = Field(description="SHA-256 of each safetensors file")
    graph_digest: str | None = Field(
        default=None, description="SHA-256 of small.onnx; null for old bundles without a graph"
    )
    quality: dict[str, float] = Field(default_factory=dict, description="measured figures, such as SI-SDRi in dB")
    provenance: Provenance

    @model_validator(mode="after")
    def _id_matches(self) -> Self:
        if set(self.digests) != set(parts_of(self.model)):
            raise ValueError(f"digests must name exactly {sorted(parts_of(self.model))}")
        if self.id != bundle_id(self.model, self.digests):
            raise ValueError("id does not match configuration and digests")
        return self

    @property
    def label(self) -> str:
        """The name for people, which marks untrained weights."""
        return f"{self.name} (UNTRAINED)" if self.untrained else self.name


def parts_of(model: ModelConfig) -> tuple[Part, ...]:
    """Return the parts of a bundle with this model."""
    return ("small", "large") if isinstance(model, Pair) else ("small",)


def bundle_id(model: ModelConfig, digests: dict[Part, str]) -> str:
    """Return the id of a bundle, 16 hexadecimal digits. Bundles with the same id compute the same hints."""
    described = model.model_dump(mode="json")
    if isinstance(model, Alone):
        # This is the form of schema version 1, so that a new version of the schema does not change the id.
        described |= {"small": described.pop("network"), "large": None, "boosting": None}
    content = {"model": described, "digests": digests}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file as ``sha256:<hex>``."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest of a bundle.

    Raises:
        InputError: the file is missing, is no JSON, has an unknown schema version, or is inconsistent.
    """
    path = existing_file(directory / MANIFEST_FILE, "a bundle's manifest")
    document = read_json(path)
    version = document.get("schema_version")
    if version not in (*_OLD_VERSIONS, SCHEMA_VERSION) or isinstance(version, bool):
        raise InputError(
            f"{path}: schema_version is {version!r}, but this program reads at most {SCHEMA_VERSION}; export it again"
        )
    return validate(Manifest, {**document, "schema_version": SCHEMA_VERSION}, path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        InputError: the file cannot be read, is too large, or is no JSON object.
    """
    document = _parse(path, json.loads, "JSON")
    if not isinstance(document, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return document


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML document from a file.

    Raises:
        InputError: the file cannot be read, is too large, or is no TOML document.
    """
    return _parse(path, tomllib.loads, "TOML")


def _parse(path: Path, parse: Callable[[str], Kind], language: str) -> Kind:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_DOCUMENT_BYTES + 1)
        if len(content) > _MAX_DOCUMENT_BYTES:
            raise InputError(f"{path}: is larger than the {_MAX_DOCUMENT_BYTES >> 20} MiB that such a file can have")
        return parse(content.decode())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as {language} ({reason(error)})") from None
    except RecursionError:
        raise InputError(f"{path}: not readable as {language} (it is nested too deep)") from None


def validate(kind: type[Record], document: dict[str, Any], source: Path) -> Record:
    """Convert a document to a record of type ``kind``.

    Raises:
        InputError: a key is unknown, missing, or has an impossible value. The message names the key.
    """
    return _validate(kind.model_validate_json, document, source)


def validate_model(document: dict[str, Any], source: Path) -> ModelConfig:
    """Convert a document to the model configuration that it describes.

    Raises:
        InputError: see :func:`validate`.
    """
    return _validate(MODEL.validate_json, document, source)


def _validate(read: Callable[[str], Kind], document: dict[str, Any], source: Path) -> Kind:
    try:
        return read(json.dumps(document))
    except ValidationError as error:
        raise InputError(f"{source}: {first_fault(error)}") from None
    except RecursionError:
        raise InputError(f"{source}: is nested too deep") from None


_TAGS = ("alone", "pair", "fixed", "arrival")  # of the kinds of a model and of its hints, which are not keys


def first_fault(error: ValidationError, rename: Callable[[str], str] = str) -> str:
    """Return the first fault that validation found, with its key.

    ``rename`` converts the key to the name that the user wrote.
    """
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"] if part not in _TAGS)
    message = fault["msg"].removeprefix("Value error, ")  # pydantic adds it to the message of a validator
    return f"{rename(key)}: {message}" if key else message
