"""The speakers of mixtures: selects them, divides them into splits, and draws their speech."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.speaker_encoder import NoSpeech, speaker_embedding
from knowledge_boosting.training.data.corpus import (
    BrokenFile,
    Corpus,
    Samples,
    Segment,
    Utterance,
    read_segment,
    read_speech,
)
from knowledge_boosting.training.data.layout import SPLITS

_DRAWS = 20


@dataclass(frozen=True)
class Speaker:
    """A speaker, with the utterances that are long enough to be mixed and those that are long enough to enroll with."""

    name: str
    mixable: tuple[Utterance, ...]
    enrollable: tuple[Utterance, ...]


def select_speakers(corpus: Corpus, length: int, enrollment: int) -> dict[str, Speaker]:
    """Return the speakers who have ``length`` samples to mix and ``enrollment`` other samples to enroll with.

    An ``enrollment`` of 0 means that no enrollment is needed. Speakers and utterances with too little speech are left
    out.
    """
    found = {}
    for name, utterances in corpus.speakers.items():
        enrollable = tuple(utterance for utterance in utterances if enrollment and utterance.length >= enrollment)
        mixable = tuple(
            utterance
            for utterance in utterances
            if utterance.length >= length + enrollment
            or (utterance.length >= length and any(other != utterance for other in enrollable))
        )
        if mixable:
            found[name] = Speaker(name, mixable, enrollable)
    return found


def split_speakers(speakers: Mapping[str, Speaker], splits: Sequence[str], seed: int) -> dict[str, tuple[Speaker, ...]]:
    """Divide the speakers among splits, so that no speaker is in two of them.

    If there is a train split, each other split gets a tenth of the speakers, at least two, and train gets the rest.
    Without a train split all splits get equal shares.

    Raises:
        ValueError: there are fewer than two speakers a split.
    """
    if len(speakers) < 2 * len(splits):
        raise ValueError(f"{len(speakers)} speakers for {len(splits)} splits")
    names = sorted(speakers)
    order = [names[i] for i in np.random.default_rng([seed, len(SPLITS)]).permutation(len(names))]
    share = max(2, len(names) // 10) if "train" in splits else len(names) // max(1, len(splits))
    shares = {}
    for split in splits[1:]:
        shares[split], order = order[:share], order[share:]
    shares.update(dict.fromkeys(splits[:1], order))
    return {split: tuple(speakers[name] for name in sorted(shares[split])) for split in splits}


def draw_segments(rng: np.random.Generator, speaker: Speaker, length: int, enrollment: int) -> tuple[Segment, Segment]:
    """Draw a segment of ``length`` samples to mix, and a segment of ``enrollment`` samples that does not overlap it.

    The enrollment comes from another utterance if the speaker has one that is long enough. Its length is 0 for a task
    without enrollment.
    """
    mixed = speaker.mixable[rng.integers(len(speaker.mixable))]
    others = [utterance for utterance in speaker.enrollable if utterance != mixed]
    if others:
        other = others[rng.integers(len(others))]
        return (
            Segment(mixed, int(rng.integers(mixed.length - length + 1)), length),
            Segment(other, int(rng.integers(other.length - enrollment + 1)), enrollment),
        )
    first, second = np.sort(rng.integers(mixed.length - length - enrollment + 1, size=2))
    if rng.integers(2):
        return Segment(mixed, int(first), length), Segment(mixed, int(second) + length, enrollment)
    return Segment(mixed, int(second) + enrollment, length), Segment(mixed, int(first), enrollment)


@dataclass(frozen=True)
class DrySource:
    """The speech of one speaker in a mixture, before the room is applied."""

    speaker: str
    segment: Segment
    enrollment: Segment
    speech: Samples  # [N]
    embedding: Samples | None  # [1, 256], the d-vector of the enrollment

    def record(self, number: str) -> dict[str, object]:
        """Return where the speech comes from, as the columns of ``metadata.csv`` for source ``number``."""
        record: dict[str, object] = {
            f"speaker{number}": self.speaker,
            f"utterance{number}": self.segment.utterance.name,
            f"offset{number}_samples": self.segment.start,
        }
        if self.embedding is not None:
            record |= {
                f"enrollment{number}": self.enrollment.utterance.name,
                f"enrollment_offset{number}_samples": self.enrollment.start,
            }
        return record


def draw_sources(
    rng: np.random.Generator, speakers: Sequence[Speaker], length: int, enrollment: int, *, skip_broken: bool
) -> tuple[list[DrySource], dict[Path, str]]:
    """Draw the speech of two different speakers, with embeddings if ``enrollment`` is not 0.

    If a drawn segment is silent, both are drawn again. The same happens for a broken file if ``skip_broken`` is true.

    Returns:
        The two sources, and the broken files that were drawn, with the fault of each.

    Raises:
        InputError: twenty draws gave no usable speech.
        BrokenFile: a broken file was drawn, and ``skip_broken`` is false.
    """
    broken: dict[Path, str] = {}
    why = ""
    for _ in range(_DRAWS):
        chosen = [speakers[i] for i in rng.choice(len(speakers), 2, replace=False)]
        segments = [draw_segments(rng, speaker, length, enrollment) for speaker in chosen]
        try:
            return [
                DrySource(
                    speaker.name,
                    mixed,
                    other,
                    read_speech(mixed),
                    speaker_embedding(read_segment(other))[None] if enrollment else None,
                )
                for speaker, (mixed, other) in zip(chosen, segments, strict=True)
            ], broken
        except NoSpeech as error:
            why = str(error)
        except BrokenFile as error:
            if not skip_broken:
                raise
            why = str(error)
            broken[error.path] = error.fault
    raise InputError(f"no usable speech in {_DRAWS} draws (the last fault was: {why}); give other speech")
