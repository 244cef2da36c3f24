"""Dynamic mixing: every example is a new mixture of speech and room responses, mixed on the training device."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

from knowledge_boosting.common.cli import warn
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.config import ModelConfig
from knowledge_boosting.models.speaker_encoder import NoSpeech, speaker_embedding
from knowledge_boosting.training.config import DynamicData
from knowledge_boosting.training.data.corpus import (
    SAMPLE_RATE,
    VOICE_SEPARATOR,
    BrokenFile,
    Samples,
    Segment,
    find_noise,
    find_speech,
    read_noise,
    read_segment,
    read_speaker_names,
    read_speech,
)
from knowledge_boosting.training.data.loading import Address, Batch
from knowledge_boosting.training.data.responses import read_bank
from knowledge_boosting.training.data.speakers import Speaker, draw_segments, select_speakers

_ENROLLMENT_SECONDS = 3
_SPEEDS = 8  # the number of slower speeds, and of faster speeds
_DRAWS = 20


class DynamicMixing:
    """Examples with two random speakers in a random room. :func:`render` mixes them on the training device."""

    def __init__(self, data: DynamicData, model: ModelConfig, *, seed: int, skip_broken: bool) -> None:
        """List the speakers and read the bank.

        Raises:
            InputError: the speech or the bank of responses cannot be used, or fewer than two speakers have enough.
        """
        self._data, self._model, self._seed = data, model, seed
        self._length = round(data.seconds * SAMPLE_RATE)
        # At the fastest playback speed a mixture needs this much speech.
        self._segment = round(self._length * (1 + data.speed)) + 1
        enrollment = round(_ENROLLMENT_SECONDS * SAMPLE_RATE * (1 + data.speed))
        self._enrollment = enrollment if model.needs_speaker else 0
        self._skip_broken = skip_broken
        self._folders = " and ".join(data.speech)
        excluded = (
            read_speaker_names(Path(data.excluded_speakers)) if data.excluded_speakers is not None else frozenset()
        )
        self._speakers: list[Speaker] = []
        # The indices of the speakers of each corpus. Every corpus has its own sound, of its microphones and rooms. Two
        # voices from different ones could be told apart by that sound, which is of no use for two voices in one room.
        self._corpora: list[NDArray[np.int64]] = []
        left_out = 0
        for folder in data.speech:
            corpus = find_speech(Path(folder), skip_broken=skip_broken)
            for line in corpus.broken:
                warn(f"skipped: {line}")
            found = select_speakers(corpus, self._segment, self._enrollment)
            # The voices that kb-make-voices derived from an excluded speaker are excluded too.
            kept = [own for name, own in found.items() if name.partition(VOICE_SEPARATOR)[0] not in excluded]
            if len(kept) < (needed := 1 + data.candidates):
                raise InputError(
                    f"{folder}: has {len(kept)} speakers with enough speech; {needed} are needed, add speech"
                )
            self._corpora.append(np.arange(len(self._speakers), len(self._speakers) + len(kept)))
            self._speakers += kept
            left_out += len(found) - len(kept)
        if excluded and not left_out:
            warn(
                f"{data.excluded_speakers}: names {len(excluded)} speakers, but {self._folders} has none of them; "
                "if it should, give the folder with a folder for each speaker"
            )
        self.speakers = frozenset(speaker.name for speaker in self._speakers)
        if len(self.speakers) < len(self._speakers):
            raise InputError(f"{self._folders}: a speaker is in two of the folders; give every folder once")
        self._bank = read_bank(Path(data.responses))
        # Noise comes from another room, but the listener must be the same.
        self._rooms_by_listener = {
            number: np.flatnonzero(self._bank.listeners == number) for number in set(self._bank.listeners)
        }
        self._noise = find_noise(Path(data.noise)) if data.noise is not None else ()
        self._embeddings: dict[tuple[Segment, float], torch.Tensor] = {}
        if data.candidates > 1:
            if not model.needs_speaker:
                raise InputError("train.candidates: must be 1 for separation")
            self._speaker_embeddings = self.speaker_embeddings()

    def __len__(self) -> int:
        return self._data.items

    def example(self, address: Address) -> dict[str, Any]:
        """Return one example by epoch and index.

        Raises:
            InputError: a speech file is damaged and broken files are not skipped, or twenty draws gave no speech.
        """
        rng = np.random.default_rng([self._seed, *address])
        why = ""
        for _ in range(_DRAWS):  # every draw continues the same generator, so examples stay reproducible
            try:
                return self._draw(rng)
            except NoSpeech as error:
                why = str(error)
            except BrokenFile as error:
                if not self._skip_broken:
                    raise
                why = str(error)
                warn(f"skipped: {why}")
        raise InputError(
            f"{self._folders}: no usable speech in {_DRAWS} draws (the last fault was: {why}); give other speech"
        )

    def _draw(self, rng: np.random.Generator) -> dict[str, Any]:
        corpus = self._corpora[0]
        if len(self._corpora) > 1:
            corpus = self._corpora[
                rng.choice(len(self._corpora), p=[len(own) / len(self._speakers) for own in self._corpora])
            ]
        first, *others = corpus[rng.choice(len(corpus), 1 + self._data.candidates, replace=False)]
        second = others[0]
        if len(others) > 1:
            similarity = self._speaker_embeddings @ self._speaker_embeddings[first]
            second = min(others, key=lambda index: float(similarity[index]))
        speakers = [self._speakers[first], self._speakers[second]]
        segments = [draw_segments(rng, speaker, self._segment, self._enrollment) for speaker in speakers]
        # Another playback speed makes another voice, so the enrollment must have the same speed.
        speeds = (1 + self._data.speed * rng.integers(-_SPEEDS, _SPEEDS + 1, size=2) / _SPEEDS).tolist()
        speech = []
        for (mixed, _), speed in zip(segments, speeds, strict=True):
            samples = _change_speed(read_speech(mixed), speed)
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
            _insert_pause(rng, example["speech"])
        if self._model.needs_speaker:
            example["speaker_embedding"] = torch.stack(
                [self._embedding(*pair, speed) for pair, speed in zip(segments, speeds, strict=True)]
            )
        return example

    def _draw_conditions(self, rng: np.random.Generator, listener: int) -> dict[str, Tensor]:
        """Draw noise and changes of level."""
        data = self._data
        drawn: dict[str, Tensor] = {}
        if data.ear_difference_db:
            drawn["ear_difference_db"] = torch.tensor(data.ear_difference_db * (rng.uniform() - rng.uniform()))
        if data.level_change_db:
            drawn["level_change_db"] = torch.tensor(data.level_change_db * rng.uniform(-1, 1))
        if self._noise:
            recording = self._noise[rng.integers(len(self._noise))]
            places = [read_noise(rng, recording, self._length) for _ in range(2)]
            room = rng.choice(self._rooms_by_listener[listener])
            drawn["noise"] = torch.from_numpy(np.stack(places))
            drawn["noise_responses"] = torch.from_numpy(self._bank.responses[room])
            drawn["noise_db"] = torch.tensor(rng.uniform(*data.noise_db))
        return drawn

    def speaker_embeddings(self) -> Tensor:
        """Return a d-vector of every speaker, ``[speakers, 256]``.

        The result is always the same. A speaker whose drawn segment has no speech gets the mean of the others.

        Raises:
            InputError: no speaker has usable speech, or a file is damaged.
        """
        rng = np.random.default_rng(0)
        found: dict[int, Tensor] = {}
        for index, speaker in enumerate(self._speakers):
            with suppress(NoSpeech):
                found[index] = self._embedding(*draw_segments(rng, speaker, self._segment, self._enrollment), 1.0)
        if not found:
            raise InputError(f"{self._folders}: no usable speech; give other speech")
        mean = torch.stack(list(found.values())).mean(0)
        return torch.stack([found.get(index, mean) for index in range(len(self._speakers))])

    def _embedding(self, mixed: Segment, enrollment: Segment, speed: float) -> Tensor:
        """Return the d-vector of an enrollment.

        A d-vector takes longer than the rest of an example. So the enrollment is moved to the start of a second, unless
        it would then overlap the segment that is mixed, and the d-vectors of these positions are cached.
        """
        whole = replace(enrollment, start=enrollment.start - enrollment.start % SAMPLE_RATE)
        if (
            whole.utterance != mixed.utterance
            or whole.start + whole.length <= mixed.start
            or whole.start >= mixed.start + mixed.length
        ):
            enrollment = whole
        if (enrollment, speed) not in self._embeddings:
            speech = _change_speed(read_segment(enrollment), speed)[: _ENROLLMENT_SECONDS * SAMPLE_RATE]
            self._embeddings[enrollment, speed] = torch.from_numpy(speaker_embedding(speech))
        return self._embeddings[enrollment, speed]


_MIN_SPEECH = 0.3  # the share of a mixture that a pause leaves at least


def _insert_pause(rng: np.random.Generator, speech: Tensor) -> None:
    """Insert a pause into speech ``[2, N]`` in place: of one speaker anywhere, or of both at the start."""
    length = speech.shape[-1]
    pause = round(rng.uniform(0, 1 - _MIN_SPEECH) * length)
    if rng.uniform() < 0.25:
        speech[:, :pause] = 0
        return
    start = int(rng.integers(-pause // 2, length - pause // 2))
    speech[int(rng.integers(2)), max(start, 0) : start + pause] = 0


def _change_speed(samples: Samples, speed: float) -> Samples:
    return soxr.resample(samples, SAMPLE_RATE * speed, SAMPLE_RATE) if speed != 1 else samples


_HEADROOM = 0.99


def _to_gain(decibels: Tensor) -> Tensor:
    gain: Tensor = 10 ** (decibels / 20)
    return gain


def _convolve(signals: Tensor, responses: Tensor) -> Tensor:
    """Convolve signals ``[B, 2, N]`` with responses ``[B, 2, M, K]``. Returns ``[B, 2, M, N]``."""
    length = signals.shape[-1]
    # A transform of an arbitrary length can take several times as long.
    size = scipy.fft.next_fast_len(length + responses.shape[-1] - 1, real=True)
    spectrum = torch.fft.rfft(signals, n=size)[:, :, None] * torch.fft.rfft(responses, n=size)
    convolved: Tensor = torch.fft.irfft(spectrum, n=size)[..., :length]
    return convolved


def render(batch: Batch) -> Batch:
    """Make the mixture and the sources of a batch of dynamic mixing, on the device of the batch.

    For TSE every mixture appears twice, once with each speaker as the target, so that only the speaker embedding tells
    the two examples apart. Batches from other kinds of data are returned unchanged.
    """
    if "speech" not in batch:
        return batch
    convolved = _convolve(batch["speech"], batch["responses"])  # [B, 2, M, N]
    level = convolved.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-8)
    signs = torch.tensor([1.0, -1.0], device=convolved.device)
    sources = convolved / level * _to_gain(batch["level_difference_db"][:, None] / 2 * signs)[..., None, None]
    if "ear_difference_db" in batch:
        sources = sources * _to_gain(batch["ear_difference_db"][:, None] / 2 * signs)[:, None, :, None]
    mixture = sources.sum(1)
    if "noise" in batch:
        noise = _convolve(batch["noise"], batch["noise_responses"]).sum(1)
        if "ear_difference_db" in batch:
            noise = noise * _to_gain(batch["ear_difference_db"][:, None] / 2 * signs)[..., None]
        ratio = mixture.square().mean((-2, -1)) / noise.square().mean((-2, -1)).clamp_min(1e-16)
        mixture = mixture + noise * (ratio.sqrt() * _to_gain(-batch["noise_db"]))[:, None, None]
    if "level_change_db" in batch:
        way = torch.linspace(-0.5, 0.5, mixture.shape[-1], device=mixture.device)
        change = _to_gain(batch["level_change_db"][:, None] * way)[:, None]
        mixture, sources = mixture * change, sources * change[:, None]
    gain = _to_gain(batch["level_dbfs"]) / mixture.square().mean((-2, -1)).sqrt()
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
