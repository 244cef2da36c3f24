"""Reads rendered mixtures from a folder in the published layout."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knowledge_boosting.common import sound_files
from knowledge_boosting.common.cli import warn
from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, ModelConfig
from knowledge_boosting.training.config import FolderData
from knowledge_boosting.training.data.corpus import SAMPLE_RATE
from knowledge_boosting.training.data.layout import NOISE_FILE, mixture_speakers
from knowledge_boosting.training.data.loading import Address


class MixtureFolder:
    """The examples of a split in the published layout.

    The files of an item are ``<root>/<split>/<number>/source00.wav``, ``source01.wav`` and, if it has noise,
    ``noise.wav``.
    """

    def __init__(self, data: FolderData, model: ModelConfig, *, seed: int, training: bool, skip_broken: bool) -> None:
        """List the items.

        Args:
            data: the folder and the split.
            model: the model that the examples are for.
            seed: the seed of the targets of TSE.
            training: whether the target of TSE is drawn again in every epoch; else it is fixed for each item.
            skip_broken: whether the next item replaces a broken one, with a warning; else a broken item is an error.

        Raises:
            InputError: the folder does not exist or has no items.
        """
        folder = Path(data.root) / data.split
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; give the root of a dataset with --data, or make one first")
        found = sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
        if not found:
            raise InputError(f"{folder}: has no numbered items; kb-make-dataset makes them")
        self.items = found[: data.items]
        self.speakers = mixture_speakers(folder)
        self._model, self._seed, self._training, self._skip_broken = model, seed, training, skip_broken

    def __len__(self) -> int:
        return len(self.items)

    def example(self, address: Address) -> dict[str, Any]:
        """Return one example by epoch and index.

        Raises:
            InputError: a file of the item is missing or cannot be used. If broken items are skipped: all are broken.
        """
        epoch, index = address
        for offset in range(len(self.items)):
            item = self.items[(index + offset) % len(self.items)]
            try:
                return self._read(item, epoch, index)
            except InputError as error:
                if not self._skip_broken:
                    raise
                warn(f"skipped: {error}")
        raise InputError(f"{self.items[0].parent}: every item is broken; make the dataset again")

    def speaker_embeddings(self) -> Tensor:
        """Return the d-vectors of the speakers of the first 1000 items, ``[2 items, 256]``.

        Raises:
            InputError: a d-vector is missing or cannot be used.
        """
        files = [item / f"spk_id{number:02d}.pt" for item in self.items[:1000] for number in (0, 1)]
        return torch.stack([_read_embedding(file) for file in files])

    def _read(self, item: Path, epoch: int, index: int) -> dict[str, Any]:
        voices = [_read_source(item / f"source{number:02d}.wav", self._model.microphones) for number in (0, 1)]
        if voices[0].shape != voices[1].shape:
            raise InputError(f"{item / 'source01.wav'}: must be as long as source00.wav")
        sources = torch.stack(voices)
        mixture = sources.sum(0)
        if (item / NOISE_FILE).is_file():
            noise = _read_source(item / NOISE_FILE, self._model.microphones)
            if noise.shape != mixture.shape:
                raise InputError(f"{item / NOISE_FILE}: must be as long as source00.wav")
            mixture = mixture + noise
        example = {"names": str(item), "mixture": mixture, "sources": sources}
        if self._model.needs_speaker:
            target = index % 2
            if self._training:
                target = int(np.random.default_rng([self._seed, epoch, index]).integers(2))
            example["sources"] = sources[target : target + 1]
            example["speaker_embedding"] = _read_embedding(item / f"spk_id{target:02d}.pt")
        return example


def _read_source(path: Path, microphones: int) -> Tensor:
    if not path.is_file():
        raise InputError(f"{path}: no such file; the item is incomplete")
    try:
        with sound_files.open_sound(path) as sound:
            samples = sound.read(sound_files.declared_length(sound), dtype="float32", always_2d=True)
            rate = sound.samplerate
    except sound_files.UnusableSound as error:
        raise InputError(f"{path}: {error}") from None
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: not readable as audio ({reason(error).rstrip('.')})") from None
    if rate != SAMPLE_RATE or samples.shape[1] != microphones:
        raise InputError(
            f"{path}: has {samples.shape[1]} channels at {rate} Hz, must have {microphones} at {SAMPLE_RATE}"
        )
    if not len(samples) or not np.isfinite(samples).all():
        raise InputError(f"{path}: has no samples, or some that are not finite")
    return torch.from_numpy(np.ascontiguousarray(samples.T))


def _read_embedding(path: Path) -> Tensor:
    try:
        embedding = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises exceptions of many types for files that it did not write
        raise InputError(f"{path}: not a readable speaker embedding ({reason(error).split('. ')[0]})") from None
    if not isinstance(embedding, Tensor) or embedding.numel() != SPEAKER_EMBEDDING_SIZE:
        raise InputError(f"{path}: must hold {SPEAKER_EMBEDDING_SIZE} values")
    if not torch.isfinite(embedding).all():
        raise InputError(f"{path}: has values that are not finite")
    return embedding.float().flatten()
