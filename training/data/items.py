"""What a worker of ``kb-make-dataset`` makes: the files of an item of a data set, or of a room of a bank.

Everything of item i of a split is drawn from ``default_rng([seed, split, i])`` and computed on one thread, so that an
item's bytes follow from the flags alone, not from the number of workers or from what was made before.
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
from knowledge_boosting.training.data.talkers import Talker, draw_voices

ITEM_FILE = "metadata.json"
RESPONSE_FILE = "responses.npy"
BANK = "rooms"  # where the rooms of a bank wait until all are there
SPLIT_NUMBERS = {split: number for number, split in enumerate((*SPLITS, BANK))}
_BLOCK = 4096  # bytes; a file takes whole blocks of a disk


@dataclass(frozen=True)
class Mixtures:
    """What a worker needs to make mixtures. Lengths are samples at 16 kHz."""

    renderer: Renderer
    rooms: RoomRanges
    seed: int
    talkers: Mapping[str, tuple[Talker, ...]]  # of every split
    length: int
    enrollment: int  # 0 for SS
    difference: Range  # dB
    level: Range  # dBFS
    noise: tuple[Utterance, ...]  # recordings, perhaps none
    noise_ratio: Range  # dB, of the voices over the noise
    skip_broken: bool

    def make(self, split: str, index: int, folder: Path) -> dict[Path, str]:
        """Write one item; gives the broken files that were drawn and left out."""
        rng = np.random.default_rng([self.seed, SPLIT_NUMBERS[split], index])
        room = draw_room(rng, self.rooms, self.renderer.heads)
        difference, level = rng.uniform(*self.difference), rng.uniform(*self.level)
        voices, broken = draw_voices(
            rng, self.talkers[split], self.length, self.enrollment, skip_broken=self.skip_broken
        )
        responses = self.renderer.responses(room)
        sources = [render(voice.speech, own) for voice, own in zip(voices, responses, strict=True)]
        gains = level_gains(sources, difference, level)
        heard = [gain * source for gain, source in zip(gains, sources, strict=True)]
        record: dict[str, object] = {"item": item_name(index), **room.record()}
        if self.noise:
            noise, drawn = self._noise(rng, heard[0] + heard[1], room.listener)
            factor = min(1.0, HEADROOM / float(np.abs(heard[0] + heard[1] + noise).max()))
            heard = [factor * source for source in heard]
            gains = (factor * gains[0], factor * gains[1])
            _write_wav(folder / NOISE_FILE, factor * noise)
            record |= drawn
        for number, voice, source, gain in zip(("00", "01"), voices, heard, gains, strict=True):
            _write_wav(folder / f"source{number}.wav", source)
            if voice.embedding is not None:
                _write_embedding(folder / f"spk_id{number}.pt", voice.embedding)
            record |= {**voice.record(number), f"gain{number}": gain}
        _write_record(folder, {**record, "level_difference_db": difference, "mixture_level_dbfs": level})
        return broken

    def _noise(
        self, rng: np.random.Generator, mixture: Samples, listener: Listener
    ) -> tuple[Samples, dict[str, object]]:
        """Noise ``[2, N]`` from two places in a room of its own, as the same listener hears it, and its record."""
        clip = self.noise[rng.integers(len(self.noise))]
        ratio = rng.uniform(*self.noise_ratio)
        places = [read_noise(rng, clip, mixture.shape[1]) for _ in range(2)]
        room = replace(draw_room(rng, self.rooms, self.renderer.heads), listener=listener)
        noise = np.sum([render(*pair) for pair in zip(places, self.renderer.responses(room), strict=True)], axis=0)
        power = max(float(np.mean(np.square(noise))), 1e-16)
        gain = math.sqrt(float(np.mean(np.square(mixture))) / power) * 10 ** (-ratio / 20)
        return gain * noise, {"noise": clip.name, "noise_ratio_db": ratio}


@dataclass(frozen=True)
class Responses:
    """What a worker needs to make the rooms of a bank."""

    renderer: Renderer
    rooms: RoomRanges
    seed: int

    def make(self, split: str, index: int, folder: Path) -> dict[Path, str]:
        """Write one room's responses; nothing can be broken."""
        rng = np.random.default_rng([self.seed, SPLIT_NUMBERS[split], index])
        room = draw_room(rng, self.rooms, self.renderer.heads)
        write_buffered(folder / RESPONSE_FILE, lambda file: np.save(file, self.renderer.responses(room)))
        _write_record(folder, {"room": item_name(index), **room.record()})
        return {}


def mixture_bytes(length: int, *, embeddings: bool, noise: bool) -> int:
    """What an item of ``length`` samples takes of a disk: sources, record, folder, perhaps embeddings and noise."""
    return (3 if noise else 2) * _on_disk(44 + 4 * length) + (4 if embeddings else 2) * _BLOCK


def room_bytes() -> int:
    """What a room takes of a disk, where its responses lie twice while the bank is put together."""
    return 2 * _on_disk(4 * 4 * RESPONSE_LENGTH) + 3 * _BLOCK


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def item_name(index: int) -> str:
    """The folder of an item, or of a room of a bank."""
    return f"{index:06d}"


def _write_wav(path: Path, samples: Samples) -> None:
    """Samples ``[2, N]`` below full scale."""
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
    """What the folder of an item or of a room says of it."""
    return dict(json.loads((folder / ITEM_FILE).read_text()))
