"""Training examples: mixtures from a folder in the published layout, or mixed anew from speech and room responses.

An example is addressed by (epoch, index), and every random draw follows from seed, epoch and index alone. A run can be
interrupted, resumed and spread over any number of workers and devices without a change to what it sees.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict

import numpy as np
import scipy.fft
import soxr
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from knowledge_boosting.common import sound_files
from knowledge_boosting.common.cli import end_signals, warn
from knowledge_boosting.common.errors import InputError, reason
from knowledge_boosting.models.config import SPEAKER_EMBEDDING_SIZE, ModelConfig
from knowledge_boosting.training.config import DynamicData, FolderData
from knowledge_boosting.training.data.corpus import (
    NOISE_FILE,
    SAMPLE_RATE,
    BrokenFile,
    NoSpeech,
    Samples,
    Segment,
    draw_segments,
    find_clips,
    find_speech,
    find_talkers,
    mixture_speakers,
    read_names,
    read_noise,
    read_segment,
    read_speech,
    speaker_embedding,
)
from knowledge_boosting.training.data.rooms import read_bank

Address = tuple[int, int]  # epoch, index


class Examples(Protocol):
    """Where examples come from."""

    speakers: frozenset[str]

    def __len__(self) -> int: ...

    def example(self, address: Address) -> dict[str, Any]: ...

    def speaker_embeddings(self) -> Tensor: ...


_ENROLLMENT_SECONDS = 3
_SPEEDS = 8  # slower and faster ones that are drawn from
_DRAWS = 20


class Batch(TypedDict):
    """Examples, batch axis first. The sources of TSE are the target alone."""

    names: list[str]
    mixture: NotRequired[Tensor]  # [B, M, N]
    sources: NotRequired[Tensor]  # [B, S, M, N]
    embedding: NotRequired[Tensor]  # [B, T, F, 2S'], of stored hints
    speaker_embedding: NotRequired[Tensor]  # [B, 256], TSE; of dynamic mixing [B, 2, 256], of both talkers
    # Of dynamic mixing, before `render` makes mixture and sources of them:
    speech: NotRequired[Tensor]  # [B, 2, N], dry
    responses: NotRequired[Tensor]  # [B, 2, M, K]
    noise: NotRequired[Tensor]  # [B, 2, N], from two places in a room of its own
    noise_responses: NotRequired[Tensor]  # [B, 2, M, K]
    noise_db: NotRequired[Tensor]  # [B], of the voices' mixture over it
    level_difference_db: NotRequired[Tensor]  # [B], of talkers
    ear_difference_db: NotRequired[Tensor]  # [B]
    level_change_db: NotRequired[Tensor]  # [B]
    level_dbfs: NotRequired[Tensor]  # [B]


class MixtureFolder:
    """A split in the published layout: ``<root>/<split>/<number>/source00.wav, source01.wav[, noise.wav, …]``."""

    def __init__(self, data: FolderData, model: ModelConfig, *, seed: int, training: bool, skip_broken: bool) -> None:
        """List the items.

        Args:
            training: whether the target of TSE is drawn anew every epoch; else it is fixed for each item.
            skip_broken: whether the item after a broken one takes its place, with a warning; else it is an error.

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
        """One example by epoch and index.

        Raises:
            InputError: a file of it is missing or cannot be used, or, skipping broken items, all are broken.
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
        raise InputError(f"{self.items[0].parent}: every item is broken")

    def speaker_embeddings(self) -> Tensor:
        """The d-vectors of the first 1000 items' speakers, ``[2 items, 256]``.

        Raises:
            InputError: one is missing or cannot be used.
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
        if self._model.task == "tse":
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
            samples = sound.read(sound_files.promised(sound), dtype="float32", always_2d=True)
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
    except Exception as error:  # torch raises nearly anything on files that are not its own
        raise InputError(f"{path}: not a readable speaker embedding ({reason(error).split('. ')[0]})") from None
    if not isinstance(embedding, Tensor) or embedding.numel() != SPEAKER_EMBEDDING_SIZE:
        raise InputError(f"{path}: must hold {SPEAKER_EMBEDDING_SIZE} values")
    if not torch.isfinite(embedding).all():
        raise InputError(f"{path}: has values that are not finite")
    return embedding.float().flatten()


class DynamicMixing:
    """Two talkers and a room drawn for every example; :func:`render` mixes them on the training device."""

    def __init__(self, data: DynamicData, model: ModelConfig, *, seed: int, skip_broken: bool) -> None:
        """List the talkers and read the bank.

        Raises:
            InputError: no speech, fewer than two talkers with enough of it, or no bank of responses.
        """
        self._data, self._model, self._seed = data, model, seed
        self._length = round(data.seconds * SAMPLE_RATE)
        # The fastest playback needs the most speech.
        self._segment = round(self._length * (1 + data.speed)) + 1
        enrollment = round(_ENROLLMENT_SECONDS * SAMPLE_RATE * (1 + data.speed))
        self._enrollment = enrollment if model.task == "tse" else 0
        self._skip_broken = skip_broken
        corpus = find_speech(Path(data.speech), skip_broken=skip_broken)
        for line in corpus.broken:
            warn(f"skipped: {line}")
        talkers = find_talkers(corpus, self._segment, self._enrollment)
        if data.excluded_speakers is not None:
            excluded = read_names(Path(data.excluded_speakers))
            talkers = {name: talker for name, talker in talkers.items() if name not in excluded}
        self.speakers = frozenset(talkers)
        self._talkers = list(talkers.values())
        if len(self._talkers) < 2:
            raise InputError(f"{data.speech}: has {len(self._talkers)} speakers with enough speech, two are needed")
        self._bank = read_bank(Path(data.responses))
        # Noise has a room of its own, with the same listener.
        self._alike = {number: np.flatnonzero(self._bank.listeners == number) for number in set(self._bank.listeners)}
        self._noise = find_clips(Path(data.noise)) if data.noise is not None else ()
        self._embeddings: dict[tuple[Segment, float], torch.Tensor] = {}
        if data.candidates > 1:
            if model.task != "tse" or data.candidates >= len(self._talkers):
                raise InputError(f"train.candidates: must be 1 for separation, and less than {len(self._talkers)}")
            self._voices = self.speaker_embeddings()

    def __len__(self) -> int:
        return self._data.items

    def example(self, address: Address) -> dict[str, Any]:
        """One example by epoch and index.

        Raises:
            InputError: a speech file is damaged (skipping broken ones, another is drawn), or there is only silence.
        """
        rng = np.random.default_rng([self._seed, *address])
        why = ""
        for _ in range(_DRAWS):  # the next draw is as reproducible as the one before
            try:
                return self._draw(rng)
            except NoSpeech as error:
                why = str(error)
            except BrokenFile as error:
                if not self._skip_broken:
                    raise
                why = str(error)
                warn(f"skipped: {why}")
        raise InputError(f"{self._data.speech}: no usable speech in {_DRAWS} draws, at last {why}; give other speech")

    def _draw(self, rng: np.random.Generator) -> dict[str, Any]:
        first, *others = rng.choice(len(self._talkers), 1 + self._data.candidates, replace=False)
        second = others[0]
        if len(others) > 1:
            likeness = self._voices @ self._voices[first]
            second = min(others, key=lambda index: float(likeness[index]))
        talkers = [self._talkers[first], self._talkers[second]]
        segments = [draw_segments(rng, talker, self._segment, self._enrollment) for talker in talkers]
        # Speech that plays faster is another voice, and so its enrollment must play as fast.
        speeds = (1 + self._data.speed * rng.integers(-_SPEEDS, _SPEEDS + 1, size=2) / _SPEEDS).tolist()
        speech = []
        for (mixed, _), speed in zip(segments, speeds, strict=True):
            samples = _at_speed(read_speech(mixed), speed)
            speech.append(np.pad(samples, (0, max(0, self._length - len(samples))))[: self._length])
        room = rng.integers(len(self._bank.responses))
        example: dict[str, Any] = {
            "names": " + ".join(mixed.utterance.name for mixed, _ in segments),
            "speech": torch.from_numpy(np.stack(speech)),
            "responses": torch.from_numpy(self._bank.responses[room][rng.permutation(2)]),
            "level_difference_db": torch.tensor(self._data.level_difference_db * rng.uniform(-1, 1)),
        }
        example["level_dbfs"] = torch.tensor(rng.uniform(*self._data.level_dbfs))
        example |= self._draw_conditions(rng, int(self._bank.listeners[room]))
        if rng.uniform() < self._data.pauses:
            _pause(rng, example["speech"])
        if self._model.task == "tse":
            example["speaker_embedding"] = torch.stack(
                [self._embedding(*pair, speed) for pair, speed in zip(segments, speeds, strict=True)]
            )
        return example

    def _draw_conditions(self, rng: np.random.Generator, listener: int) -> dict[str, Tensor]:
        """What disturbs the mixture besides the room."""
        data = self._data
        drawn: dict[str, Tensor] = {}
        if data.ear_difference_db:
            drawn["ear_difference_db"] = torch.tensor(data.ear_difference_db * (rng.uniform() - rng.uniform()))
        if data.level_change_db:
            drawn["level_change_db"] = torch.tensor(data.level_change_db * rng.uniform(-1, 1))
        if self._noise:
            clip = self._noise[rng.integers(len(self._noise))]
            places = [read_noise(rng, clip, self._length) for _ in range(2)]
            room = rng.choice(self._alike[listener])
            drawn["noise"] = torch.from_numpy(np.stack(places))
            drawn["noise_responses"] = torch.from_numpy(self._bank.responses[room])
            drawn["noise_db"] = torch.tensor(rng.uniform(*data.noise_db))
        return drawn

    def speaker_embeddings(self) -> Tensor:
        """A d-vector of every talker, ``[talkers, 256]``, always the same; the mean where one has no speech."""
        rng = np.random.default_rng(0)
        found: dict[int, Tensor] = {}
        for index, talker in enumerate(self._talkers):
            with suppress(NoSpeech):
                found[index] = self._embedding(*draw_segments(rng, talker, self._segment, self._enrollment), 1.0)
        if not found:
            raise InputError(f"{self._data.speech}: no usable speech; give other speech")
        mean = torch.stack(list(found.values())).mean(0)
        return torch.stack([found.get(index, mean) for index in range(len(self._talkers))])

    def _embedding(self, mixed: Segment, enrollment: Segment, speed: float) -> Tensor:
        """The d-vector of an enrollment that begins with a whole second, unless what is mixed is in the way.

        A d-vector takes longer than all else of an example, and so the same ones come again and are kept.
        """
        whole = replace(enrollment, start=enrollment.start - enrollment.start % SAMPLE_RATE)
        if (
            whole.utterance != mixed.utterance
            or whole.start + whole.length <= mixed.start
            or whole.start >= mixed.start + mixed.length
        ):
            enrollment = whole
        if (enrollment, speed) not in self._embeddings:
            speech = _at_speed(read_segment(enrollment), speed)[: _ENROLLMENT_SECONDS * SAMPLE_RATE]
            self._embeddings[enrollment, speed] = torch.from_numpy(speaker_embedding(speech)[0])
        return self._embeddings[enrollment, speed]


_LEAST_SPEECH = 0.3  # share of a mixture that a talker speaks for, however long the pause


def _pause(rng: np.random.Generator, speech: Tensor) -> None:
    """Silence one talker's speech ``[2, N]`` for a while, or that of both at first, in place."""
    length = speech.shape[-1]
    pause = round(rng.uniform(0, 1 - _LEAST_SPEECH) * length)
    if rng.uniform() < 0.25:
        speech[:, :pause] = 0
        return
    start = int(rng.integers(-pause // 2, length - pause // 2))
    speech[int(rng.integers(2)), max(start, 0) : start + pause] = 0


def _at_speed(samples: Samples, speed: float) -> Samples:
    return soxr.resample(samples, SAMPLE_RATE * speed, SAMPLE_RATE) if speed != 1 else samples


_HEADROOM = 0.99


def _gain(decibels: Tensor) -> Tensor:
    gain: Tensor = 10 ** (decibels / 20)
    return gain


def _heard(signals: Tensor, responses: Tensor) -> Tensor:
    """Signals ``[B, 2, N]`` through responses ``[B, 2, M, K]``: ``[B, 2, M, N]``."""
    length = signals.shape[-1]
    # A transform of any other length takes several times as long.
    size = scipy.fft.next_fast_len(length + responses.shape[-1] - 1, real=True)
    spectrum = torch.fft.rfft(signals, n=size)[:, :, None] * torch.fft.rfft(responses, n=size)
    heard: Tensor = torch.fft.irfft(spectrum, n=size)[..., :length]
    return heard


def render(batch: Batch) -> Batch:
    """Mixture and sources of a batch of dynamic mixing, on the device the batch is on; other batches as they are.

    For TSE every mixture comes twice, with either talker as the target: only whom to listen to tells the two apart.
    """
    if "speech" not in batch:
        return batch
    heard = _heard(batch["speech"], batch["responses"])  # [B, 2, M, N]
    level = heard.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-8)
    signs = torch.tensor([1.0, -1.0], device=heard.device)
    sources = heard / level * _gain(batch["level_difference_db"][:, None] / 2 * signs)[..., None, None]
    if "ear_difference_db" in batch:
        sources = sources * _gain(batch["ear_difference_db"][:, None] / 2 * signs)[:, None, :, None]
    mixture = sources.sum(1)
    if "noise" in batch:
        noise = _heard(batch["noise"], batch["noise_responses"]).sum(1)
        if "ear_difference_db" in batch:
            noise = noise * _gain(batch["ear_difference_db"][:, None] / 2 * signs)[..., None]
        ratio = mixture.square().mean((-2, -1)) / noise.square().mean((-2, -1)).clamp_min(1e-16)
        mixture = mixture + noise * (ratio.sqrt() * _gain(-batch["noise_db"]))[:, None, None]
    if "level_change_db" in batch:
        way = torch.linspace(-0.5, 0.5, mixture.shape[-1], device=mixture.device)
        change = _gain(batch["level_change_db"][:, None] * way)[:, None]
        mixture, sources = mixture * change, sources * change[:, None]
    gain = _gain(batch["level_dbfs"]) / mixture.square().mean((-2, -1)).sqrt()
    peak = torch.maximum(mixture.abs().amax((-2, -1)), sources.abs().amax((-3, -2, -1)))
    gain = torch.minimum(gain, _HEADROOM / peak)[:, None, None]
    sources, mixture = (sources * gain[:, None]).float(), (mixture * gain).float()
    if "speaker_embedding" not in batch:
        return {"names": batch["names"], "mixture": mixture, "sources": sources}
    return {
        "names": [name for name in batch["names"] for _ in range(2)],
        "mixture": mixture.repeat_interleave(2, 0),
        "sources": sources.flatten(0, 1)[:, None],
        "speaker_embedding": batch["speaker_embedding"].flatten(0, 1),
    }


@dataclass(frozen=True)
class _Fault:
    """What was wrong with an example."""

    message: str


class _Batches(Dataset[Batch | _Fault]):
    """Examples by lists of addresses, collated."""

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, addresses: Sequence[Address]) -> Batch | _Fault:
        try:
            return self._collate([self._examples.example(address) for address in addresses])
        except InputError as error:
            # As a value: an exception would leave a worker process with its traceback for a message.
            return _Fault(str(error))

    def _collate(self, examples: list[dict[str, Any]]) -> Batch:
        batch: dict[str, Any] = {"names": [example["names"] for example in examples]}
        for key in examples[0].keys() - {"names"}:
            values = [example[key] for example in examples]
            if len({value.shape for value in values}) > 1:
                raise InputError(f"{examples[0]['names']}: its length differs from others of its batch; cut all alike")
            batch[key] = torch.stack(values)
        return batch  # type: ignore[return-value]


class EpochOrder(Sampler[list[Address]]):
    """The batches of one epoch for one of several devices, as lists of addresses.

    Device r of R takes every R-th example of each batch, so that the batches are the same however many devices share
    them. An epoch begun and interrupted can be gone on with at a later batch.
    """

    def __init__(
        self,
        items: int,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        devices: int = 1,
        first_batch: int = 0,
    ) -> None:
        """The order of ``items`` examples.

        Args:
            batch_size: over all devices; the last batch of an epoch may be smaller unless shuffled, when what is left
                over is for another epoch.
            first_batch: of the first epoch that is gone through.
        """
        self._items, self._batch_size, self._seed, self._shuffle = items, batch_size, seed, shuffle
        self._rank, self._devices = rank, devices
        self.first_batch = first_batch
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is gone through next."""
        self._epoch = epoch

    def __len__(self) -> int:
        whole, rest = divmod(self._items, self._batch_size)
        return max(whole, 1) if self._shuffle else whole + bool(rest)

    def __iter__(self) -> Iterator[list[Address]]:
        order = np.arange(self._items)
        if self._shuffle:
            order = np.random.default_rng([self._seed, self._epoch]).permutation(self._items)
        first, self.first_batch = self.first_batch, 0
        for number in range(first, len(self)):
            batch = order[number * self._batch_size : (number + 1) * self._batch_size]
            own = batch[self._rank :: self._devices]
            # A device left without one repeats the first, because all must take as many steps.
            yield [(self._epoch, int(index)) for index in (own if len(own) else batch[:1])]


def _leave_signals(_worker: int) -> None:
    """Leave SIGTERM, SIGHUP and Ctrl-C to the trainer, though its whole group gets them; it ends its workers."""
    for number in (signal.SIGINT, *end_signals()):
        signal.signal(number, signal.SIG_IGN)


class Loader(DataLoader[Any]):
    """Batches in an order that can be gone on with; the order's place is the trainer's step, so it keeps no state."""

    def __init__(self, examples: Examples, order: EpochOrder, workers: int) -> None:
        """Batches of examples, read by ``workers`` processes (0: by this one)."""
        super().__init__(
            _Batches(examples),
            sampler=order,
            batch_size=None,
            num_workers=workers,
            worker_init_fn=_leave_signals,
            persistent_workers=workers > 0,  # which keep the d-vectors they have made
            pin_memory=torch.cuda.is_available(),
        )
        self.order = order

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if isinstance(batch, _Fault):
                raise InputError(batch.message)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
