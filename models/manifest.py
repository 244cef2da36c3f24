"""What a bundle says of itself: ``bundle.json``. Needs no torch.

A bundle is a directory: ``bundle.json``; ``small.safetensors``, the device's network, and ``small.onnx``, one frame of
it as a graph; ``large.safetensors``, the server's network and hint encoder; ``README.md``, the model card. A device
needs the small part, a server the large.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.models.config import ModelConfig, Strict

SCHEMA_VERSION: Final = 1
_LARGEST_JSON = 4 * 2**20  # bytes; a list of ten thousand training speakers takes a fifth of a MiB
MANIFEST_FILE = "bundle.json"
GRAPH_FILE = "small.onnx"
PRETRAINED = Path(__file__).parent / "pretrained"
DEFAULT_BUNDLE = "ss-48ms-compact"
UNTRAINED_NOTICE = "UNTRAINED: random weights, nothing here says how a trained model sounds"

Part = Literal["small", "large"]
Record = TypeVar("Record", bound=Strict)


class Provenance(Strict):
    """Where a bundle's weights come from."""

    created: str = Field(description="UTC, ISO 8601")
    software: str
    torch: str
    source: str = Field(description="checkpoint file and its digest, or the seed of random weights")
    configuration: str = Field(description="file the network sizes were read from")
    training_speakers: list[str] = Field(
        default_factory=list, description="whom the weights were trained on, as far as known: never to be measured on"
    )


class Manifest(Strict):
    """The content of ``bundle.json``."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    id: str = Field(description="digest over configuration and weights: equal ids, equal hints")
    untrained: bool
    model: ModelConfig
    digests: dict[Part, str] = Field(description="SHA-256 of each safetensors file")
    graph_digest: str | None = Field(
        default=None, description="SHA-256 of small.onnx; none for bundles made before there were graphs"
    )
    quality: dict[str, float] = Field(default_factory=dict, description="measured figures, such as SI-SDRi in dB")
    provenance: Provenance

    @model_validator(mode="after")
    def _id_matches(self) -> Self:
        parts = {"small"} if self.model.large is None else {"small", "large"}
        if set(self.digests) != parts:
            raise ValueError(f"digests must name exactly {sorted(parts)}")
        if self.id != bundle_id(self.model, self.digests):
            raise ValueError("id does not match configuration and digests")
        return self

    @property
    def label(self) -> str:
        """The name as a person should see it: untrained weights are called so."""
        return f"{self.name} (UNTRAINED)" if self.untrained else self.name


def bundle_id(model: ModelConfig, digests: dict[Part, str]) -> str:
    """The digest that tells whether two bundles compute the same hints, 16 hexadecimal digits."""
    content = {"model": model.model_dump(mode="json"), "digests": digests}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as ``sha256:<hex>``."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def find_bundle(name_or_path: str) -> Path:
    """The directory of a bundle, given as a path or as the name of a shipped one.

    Raises:
        InputError: there is no such bundle; the message names those there are.
    """
    for candidate in (Path(name_or_path), PRETRAINED / name_or_path):
        if (candidate / MANIFEST_FILE).is_file():
            return candidate
    if Path(name_or_path).is_dir():
        raise InputError(f"{name_or_path}: has no {MANIFEST_FILE}; make a bundle with kb-export")
    shipped = [path.parent.name for path in _shipped()]
    there_are = f"shipped ones: {', '.join(shipped)}" if shipped else "none is shipped yet, make one with kb-export"
    raise InputError(f"{name_or_path}: no bundle of that name or path ({there_are})")


def shipped_bundles() -> list[Manifest]:
    """The manifests of all bundles that come with the software, by name."""
    return [read_manifest(path.parent) for path in _shipped()]


def _shipped() -> list[Path]:
    return sorted(PRETRAINED.glob(f"*/{MANIFEST_FILE}"))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a bundle, checked.

    Raises:
        InputError: the file is missing, not JSON, of another schema version, or inconsistent.
    """
    path = existing_file(directory / MANIFEST_FILE, "a bundle's manifest")
    document = read_json(path)
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version is {version!r}, this program reads {SCHEMA_VERSION}; export it again")
    return validate(Manifest, document, path)


def verify_part(directory: Path, manifest: Manifest, part: Part) -> Path:
    """The path of one part's weights, whose digest has been compared with the manifest.

    Raises:
        InputError: this copy of the bundle lacks the part, or the file was changed.
    """
    if part not in manifest.digests:
        raise InputError(f"{directory}: is one network alone and has no {part} part; choose a bundle of a pair")
    path = directory / f"{part}.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; this copy of the bundle lacks its {part} part")
    try:
        digest = file_digest(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    if digest != manifest.digests[part]:
        raise InputError(f"{path}: digest differs from {MANIFEST_FILE}; the file was changed or cut, copy it again")
    return path


def verify_graph(directory: Path, manifest: Manifest) -> Path:
    """The path of the device's graph, whose digest has been compared with the manifest.

    Raises:
        InputError: this copy of the bundle lacks the graph, or the file was changed.
    """
    path = directory / GRAPH_FILE
    if manifest.graph_digest is None or not path.is_file():
        raise InputError(f"{path}: no such file; export the bundle again with kb-export, or use --engine torch")
    try:
        digest = file_digest(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    if digest != manifest.graph_digest:
        raise InputError(f"{path}: digest differs from {MANIFEST_FILE}; the file was changed or cut, copy it again")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: the file cannot be read or is no JSON object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_JSON + 1)
        if len(content) > _LARGEST_JSON:
            raise InputError(f"{path}: is larger than the {_LARGEST_JSON >> 20} MiB that such a file may have")
        document = json.loads(content.decode())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({reason(error)})") from None
    except RecursionError:
        raise InputError(f"{path}: not readable as JSON (it is nested too deep)") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: must hold a JSON object")
    return document


def validate(kind: type[Record], document: dict[str, Any], source: Path) -> Record:
    """The document as a record of its kind.

    Raises:
        InputError: a key is unknown, missing, or has a wrong or impossible value; it is named.
    """
    try:
        return kind.model_validate_json(json.dumps(document))
    except ValidationError as error:
        raise InputError(f"{source}: {first_fault(error)}") from None
    except RecursionError:
        raise InputError(f"{source}: is nested too deep") from None


def first_fault(error: ValidationError, rename: Callable[[str], str] = str) -> str:
    """The first thing that validation found, with its key, which ``rename`` gives the name that the user wrote."""
    fault = error.errors()[0]
    key = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")  # pydantic's, before a validator's own words
    return f"{rename(key)}: {message}" if key else message
