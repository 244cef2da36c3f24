"""Stored hints: mixtures with the outputs of a large network, so that training a pair costs the small network only.

``kb-store-hints`` draws mixtures by the configuration of a pair, runs its large network, which must be frozen, and
stores both. ``"train": {"kind": "stored", "root": …}`` trains on them for any number of epochs.

A folder has a file ``hints.json``, which describes its content, and shards ``000000.safetensors``, … A shard has
tensors in half precision with a leading axis of examples: ``mixture`` ``[B, M, N]``, ``sources`` ``[B, S, M, N]``,
``embedding`` ``[B, T, F, 2S']`` (the input of the hint encoder) and for TSE ``speaker_embedding`` ``[B, 256]``. The
samples of an example are scaled to a peak of one; multiplying them by ``scale`` ``[B]``, in single precision, restores
their level.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from knowledge_boosting.common.errors import InputError, existing_file, reason
from knowledge_boosting.common.files import atomic_file
from knowledge_boosting.models.config import ModelConfig, Strict
from knowledge_boosting.models.manifest import read_json, validate
from knowledge_boosting.models.pair import BoostedPair
from knowledge_boosting.training.config import StoredData

RECORD_FILE = "hints.json"
SHARD_SIZE = 32  # examples
STORED_LARGE = "stored_large"  # the key of the digest of the large network in the checkpoint of a run
# Examples in one call of the large network. On a CPU, those of one fit into the cache.
_LARGE_BATCH_SIZE = {"cpu": 1, "cuda": 8}


class Record(Strict):
    """The content of ``hints.json``."""

    large: Annotated[str, Field(description="digest of the large network")]
    mixtures: Annotated[str, Field(description="the number of mixtures, and how they are drawn")]
    shards: Annotated[int, Field(ge=1, description="number of files; all but the last are full")]
    examples: Annotated[int, Field(ge=1)]
    speakers: list[str]


def large_digest(model: ModelConfig, network: nn.Module) -> str:
    """Return a digest of the large network of a pair: of its weights and of the configuration that affects it."""
    hidden = {"small", "boosting"}
    text = json.dumps(model.model_dump(mode="json", exclude=hidden), sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


class StoredHints:
    """The examples in a folder of ``kb-store-hints``."""

    def __init__(self, data: StoredData, model: ModelConfig, large: str | None) -> None:
        """Open a folder.

        Args:
            data: the folder.
            model: the model that the examples are for.
            large: the digest that the large network of the hints must have.

        Raises:
            InputError: the folder does not exist, is incomplete, or has hints of another large network.
        """
        self._root = Path(data.root)
        record = read_record(self._root)
        if record.large != large:
            raise InputError(
                f"{self._root}: has hints of another large network than the configuration's; make them again with "
                "kb-store-hints"
            )
        missing = first_missing_shard(self._root, record)
        if missing < record.shards:
            path = shard_path(self._root, missing)
            raise InputError(f"{path}: no such file; the same kb-store-hints command makes what is missing")
        self.speakers = frozenset(record.speakers)
        self._examples = min(record.examples, data.items or record.examples)
        self._needs_speaker = model.needs_speaker

    def __len__(self) -> int:
        return self._examples

    def example(self, address: tuple[int, int]) -> dict[str, Any]:
        """Return one example by epoch and index.

        Raises:
            InputError: the file of the example cannot be used.
        """
        shard, number = divmod(address[1], SHARD_SIZE)
        path = shard_path(self._root, shard)
        names = ["mixture", "sources", "embedding", "scale", *(["speaker_embedding"] if self._needs_speaker else [])]
        try:
            with safe_open(path, "pt") as file:
                found = {name: file.get_slice(name)[number].float() for name in names}
        except (OSError, SafetensorError, IndexError) as error:
            raise InputError(f"{path}: not a readable file of stored hints ({reason(error)}); make it again") from None
        scale = found.pop("scale")
        found["mixture"] *= scale
        found["sources"] *= scale
        return {"names": f"{path.name}[{number}]", **found}

    def speaker_embeddings(self) -> Tensor:
        """Return the d-vectors of the first 2000 examples, ``[N, 256]``."""
        count = min(len(self), 2000)
        return torch.stack([self.example((0, index))["speaker_embedding"] for index in range(count)])


def read_record(root: Path) -> Record:
    """Read the record of a folder of stored hints.

    Raises:
        InputError: the folder has no record, or the record is damaged.
    """
    path = existing_file(root / RECORD_FILE, "the record of stored hints; kb-store-hints makes it")
    return validate(Record, read_json(path), path)


def shard_path(root: Path, shard: int) -> Path:
    """Return the path of a shard."""
    return root / f"{shard:06d}.safetensors"


def open_folder(root: Path, record: Record) -> None:
    """Make a folder of stored hints, or check that an existing one has the same record.

    Raises:
        InputError: the folder has other content, or cannot be written.
    """
    if (root / RECORD_FILE).is_file():
        if read_record(root) != record:
            raise InputError(f"{root}: has hints of other mixtures or of another large network; give another --output")
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root}: exists already and holds no stored hints; give another --output")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{root}: cannot make the folder ({reason(error)})") from None
    with atomic_file(root / RECORD_FILE) as temporary:
        temporary.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")


def first_missing_shard(root: Path, record: Record) -> int:
    """Return the number of the first shard that does not exist; ``record.shards`` if all exist."""
    return next((shard for shard in range(record.shards) if not shard_path(root, shard).is_file()), record.shards)


def write_shard(path: Path, pair: BoostedPair, batch: Mapping[str, Any]) -> None:
    """Write a shard of rendered examples.

    Raises:
        InputError: the folder cannot be written.
    """
    packed = _pack(pair, batch)
    with atomic_file(path) as temporary:
        temporary.write_bytes(save(packed))


@torch.no_grad()
def _pack(pair: BoostedPair, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    mixture, sources, speakers = batch["mixture"], batch["sources"], batch.get("speaker_embedding")
    embeddings = [
        pair.large.embed(mixture[some], None if speakers is None else speakers[some]).half()
        for some in torch.arange(len(mixture)).split(_LARGE_BATCH_SIZE[mixture.device.type])
    ]
    scale = torch.maximum(mixture.abs().amax((-2, -1)), sources.abs().amax((-3, -2, -1))).clamp_min(1e-8)
    packed = {
        "mixture": (mixture / scale[:, None, None]).half(),
        "sources": (sources / scale[:, None, None, None]).half(),
        "embedding": torch.cat(embeddings),
        "scale": scale,
    }
    if speakers is not None:
        packed["speaker_embedding"] = speakers.half()
    return {name: value.contiguous().cpu() for name, value in packed.items()}
