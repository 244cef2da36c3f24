"""The work of one worker of ``kb-make-dataset``: it makes an item of a dataset, or a room of a response bank.

Every random value of item i of a split is drawn from ``default_rng([seed, split, i])``, and every item is computed on
one thread. So the bytes of an item depend only on the flags, not on the number of workers or on earlier items.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from knowledge_boosting.common.files import write_buffered
from knowledge_boosting.training.data.corpus import SAMPLE_RATE, Samples, Utterance, read_noise
from knowledge_boosting.training.data.layout import NOISE_FILE, SPLITS
from knowledge_boosting.training.data.responses import HEADROOM, RESPONSE_LENGTH, Renderer, level_gains, render
from knowledge_boosting.training.data.rooms import Listener, Range, RoomRanges, draw_room
from knowledge_boosting.training.data.speakers import Speaker, draw_sources

ITEM_FILE = "metadata.json"
RESPONSE_FILE = "responses.npy"
BANK_SPLIT = "rooms"  # the folder of the rooms of a bank until all are made
SPLIT_NUMBERS = {split: number for number, split in enumerate((*SPLITS, BANK_SPLIT))}
_BLOCK = 4096  # bytes; a file occupies whole blocks of a disk


@dataclass(frozen=True)
class MixtureMaker:
    """Makes mixtures in a worker process. Lengths are in samples at 16 kHz."""

    renderer: Renderer
    rooms: RoomRanges
    seed: int
    speakers: Mapping[str, tuple[Speaker, ...]]  # by split
    length: int
    enrollment: int  # 0 for SS
    difference: Range  # dB
    level: Range  # dBFS
    noise: tuple[Utterance, ...]  # recordings of noise; empty for mixtures without noise
    noise_ratio: Range  # dB, level of the speech over the noise
    skip_broken: bool

    def make(self, split: str, index: int, folder: Path) -> dict[Path, str]:
        """Write one item into a folder. Returns the broken files that were drawn and left out, with their faults."""
        rng = np.random.default_rng([self.seed, SPLIT_NUMBERS[split], index])
        room = draw_room(rng, self.rooms, self.renderer.heads)
        difference, level = rng.uniform(*self.difference), rng.uniform(*self.level)
        dry_sources, broken = draw_sources(
            rng, self.speakers[split], self.length, self.enrollment, skip_broken=self.skip_broken
        )
        responses = self.renderer.responses(room)
        sources = [render(dry.speech, response) for dry, response in zip(dry_sources, responses, strict=True)]
        gains = level_gains(sources, difference, level)
        sources = [gain * source for gain, source in zip(gains, sources, strict=True)]
        record: dict[str, object] = {"item": item_name(index), **room.record()}
        if self.noise:
            noise, drawn = self._noise(rng, sources[0] + sources[1], room.listener)
            factor = min(1.0, HEADROOM / float(np.abs(sources[0] + sources[1] + noise).max()))
            sources = [factor * source for source in sources]
            gains = (factor * gains[0], factor * gains[1])
            _write_wav(folder / NOISE_FILE, factor * noise)
            record |= drawn
        for number, dry, source, gain in zip(("00", "01"), dry_sources, sources, gains, strict=True):
            _write_wav(folder / f"source{number}.wav", source)
            if dry.embedding is not None:
                _write_embedding(folder / f"spk_id{number}.pt", dry.embedding)
            record |= {**dry.record(number), f"gain{number}": gain}
        _write_record(folder, {**record, "level_difference_db": difference, "mixture_level_dbfs": level})
        return broken

    def _noise(
        self, rng: np.random.Generator, mixture: Samples, listener: Listener
    ) -> tuple[Samples, dict[str, object]]:
        """Return noise ``[2, N]`` and its record.

        The noise comes from two places in another room, received by the same listener.
        """
        recording = self.noise[rng.integers(len(self.noise))]
        ratio = rng.uniform(*self.noise_ratio)
        places = [read_noise(rng, recording, mixture.shape[1]) for _ in range(2)]
        room = replace(draw_room(rng, self.rooms, self.renderer.heads), listener=listener)
        noise = np.sum([render(*pair) for pair in zip(places, self.renderer.responses(room), strict=True)], axis=0)
        power = max(float(np.mean(np.square(noise))), 1e-16)
        gain = math.sqrt(float(np.mean(np.square(mixture))) / power) * 10 ** (-ratio / 20)
        return gain * noise, {"noise": recording.name, "noise_ratio_db": ratio}


@dataclass(frozen=True)
class ResponseMaker:
    """Makes the rooms of a response bank in a worker process."""

    renderer: Renderer
    rooms: RoomRanges
    seed: int

    def make(self, split: str, index: int, folder: Path) -> dict[Path, str]:
        """Write the responses of one room into a folder. Returns no broken files, because it reads none."""
        rng = np.random.default_rng([self.seed, SPLIT_NUMBERS[split], index])
        room = draw_room(rng, self.rooms, self.renderer.heads)
        write_buffered(folder / RESPONSE_FILE, lambda file: np.save(file, self.renderer.responses(room)))
        _write_record(folder, {"room": item_name(index), **room.record()})
        return {}


def mixture_bytes(length: int, *, embeddings: bool, noise: bool) -> int:
    """Return the disk space of an item of ``length`` samples, in bytes, with its record and its folder."""
    return (3 if noise else 2) * _on_disk(44 + 4 * length) + (4 if embeddings else 2) * _BLOCK


def room_bytes() -> int:
    """Return the disk space of a room, in bytes. Its responses exist twice while the bank is being written."""
    return 2 * _on_disk(4 * 4 * RESPONSE_LENGTH) + 3 * _BLOCK


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def item_name(index: int) -> str:
    """Return the folder name of an item, or of a room of a bank."""
    return f"{index:06d}"


def _write_wav(path: Path, samples: Samples) -> None:
    """Write samples ``[2, N]``, whose magnitude is below full scale, as 16-bit PCM."""
    import soundfile

    pcm = np.rint(samples.T * 32768).astype(np.int16)
    write_buffered(path, lambda file: soundfile.write(file, pcm, SAMPLE_RATE, format="WAV", subtype="PCM_16"))


def _write_embedding(path: Path, embedding: Samples) -> None:
    import torch

    write_buffered(path, lambda file: torch.save(torch.from_numpy(embedding), file))


def _write_record(folder: Path, record: Mapping[str, object]) -> None:
    rounded = {name: round(value, 6) if isinstance(value, float) else value for name, value in record.items()}
    (folder / ITEM_FILE).write_text(json.dumps(rounded, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, object]:
    """Read the record of an item or of a room from its folder."""
    return dict(json.loads((folder / ITEM_FILE).read_text()))
