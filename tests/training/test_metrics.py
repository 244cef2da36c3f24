"""The metrics equal closed forms, or behave as expected for a real clip."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from knowledge_boosting.training.evaluation.metrics import (
    SAMPLE_RATE,
    pesq,
    si_sdr_improvement,
    snr_improvement,
    stoi,
    word_error_rate,
)
from knowledge_boosting.training.evaluation.si_sdr import match_sources

SAMPLES = Path(__file__).parents[2] / "samples"
LENGTH = 1600
TOLERANCE = 1e-3  # dB


def tone(cycles: int) -> Tensor:
    """Return one of many orthogonal zero-mean signals ``[N]`` of power 1."""
    return math.sqrt(2) * torch.sin(2 * math.pi * cycles * torch.arange(LENGTH, dtype=torch.float64) / LENGTH)


@pytest.fixture(scope="module")
def references() -> Tensor:
    """Two items of two sources at two microphones; all eight signals are orthogonal."""
    return torch.stack([tone(3 * index + 5) for index in range(8)]).view(2, 2, 2, LENGTH)


def with_error(references: Tensor, level: float) -> Tensor:
    """Add an orthogonal error of ``level`` dB to references."""
    return references + 10 ** (level / 20) * tone(101)


def test_si_sdr_improvement_is_what_error_and_mixture_say(references: Tensor) -> None:
    """Both sources are equally loud, so the SI-SDR of the mixture is 0 dB. The error is 12 dB below, with any gain."""
    mixture = references.sum(1)
    estimates = 0.3 * with_error(references, -12) + 0.7
    assert torch.allclose(si_sdr_improvement(estimates, references, mixture), mixture.new_tensor([12.0, 12.0]))


def test_snr_improvement_is_what_error_and_mixture_say(references: Tensor) -> None:
    mixture = references.sum(1)
    assert torch.allclose(
        snr_improvement(with_error(references, -12), references, mixture), mixture.new_tensor([12.0, 12.0])
    )
    # If the estimate is halved, the error is half the signal, because SNR, unlike SI-SDR, depends on the gain.
    halved = snr_improvement(0.5 * references, references, mixture)
    assert torch.allclose(halved, halved.new_tensor([20 * math.log10(2)] * 2), atol=TOLERANCE)


@pytest.mark.parametrize("improvement", [si_sdr_improvement, snr_improvement])
def test_improvement_is_over_the_mixture(
    improvement: Callable[[Tensor, Tensor, Tensor], Tensor], references: Tensor
) -> None:
    """One source is 6 dB louder than the other, so the mixture has +6 and -6 dB, 0 dB on average."""
    scale = torch.tensor([2.0, 1.0], dtype=torch.float64)[:, None, None]
    sources = scale * references
    mixture = sources.sum(1)
    same = improvement(mixture[:, None].expand_as(sources).contiguous(), sources, mixture)
    assert torch.allclose(same, torch.zeros_like(same), atol=TOLERANCE)
    target = improvement(with_error(sources, -20)[:, :1], sources[:, :1], mixture)
    # The target has a power of 4, and the other source of 1. The error is at 1/100 of its source.
    assert torch.allclose(target, target.new_tensor([20.0, 20.0]), atol=TOLERANCE)


def test_items_are_scored_separately(references: Tensor) -> None:
    level = torch.tensor([-10.0, -20.0], dtype=torch.float64)[:, None, None, None]
    estimates = references + 10 ** (level / 20) * tone(101)
    expected = estimates.new_tensor([10.0, 20.0])
    for improvement in (si_sdr_improvement, snr_improvement):
        assert torch.allclose(improvement(estimates, references, references.sum(1)), expected, atol=TOLERANCE)


def test_estimates_are_put_in_the_order_of_the_references(references: Tensor) -> None:
    estimates = with_error(references, -12)
    mixed = torch.stack([estimates[0], estimates[1].flip(0)])
    assert torch.equal(match_sources(mixed, references), estimates)
    assert torch.equal(match_sources(estimates[:, :1], references[:, :1]), estimates[:, :1])
    mixture = references.sum(1)
    for improvement in (si_sdr_improvement, snr_improvement):
        assert torch.allclose(
            improvement(mixed, references, mixture), improvement(estimates, references, mixture), atol=TOLERANCE
        )


def test_one_assignment_holds_for_all_microphones(references: Tensor) -> None:
    """Sources that are swapped at one ear lower the metrics, unlike the training loss."""
    crossed = references.clone()
    crossed[:, :, 1] = references[:, :, 1].flip(1)
    assert (si_sdr_improvement(with_error(crossed, -12), references, references.sum(1)) < 0).all()


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """Three seconds of both sample speakers, ``[1, 2, 2, N]``."""
    voices = [
        soundfile.read(SAMPLES / f"source{number}.flac", 3 * SAMPLE_RATE, SAMPLE_RATE, dtype="float32")[0].T
        for number in (1, 2)
    ]
    return torch.stack([torch.from_numpy(voice.copy()) for voice in voices])[None]


def test_stoi_and_pesq_of_the_clean_voices_are_perfect(clip: Tensor) -> None:
    assert float(stoi(clip, clip)) == pytest.approx(1, abs=1e-4)
    assert float(pesq(clip, clip)) == pytest.approx(4.64, abs=0.01)


@pytest.mark.parametrize("score", [stoi, pesq])
def test_stoi_and_pesq_fall_with_what_is_left_of_the_other_voice(
    score: Callable[[Tensor, Tensor], Tensor], clip: Tensor
) -> None:
    faint = clip + 0.1 * clip.flip(1)
    loud = clip + 0.8 * clip.flip(1)
    assert float(score(clip, clip)) > float(score(faint, clip)) > float(score(loud, clip))
    assert torch.equal(score(faint.flip(1), clip), score(faint, clip))  # in any order


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # pesq divides by the peak
def test_pesq_is_nan_without_speech(clip: Tensor) -> None:
    silent = clip.clone()
    silent[:, 1] = 0
    assert float(pesq(silent, silent)) == pytest.approx(4.64, abs=0.01)
    nothing = torch.zeros_like(clip)
    both = pesq(torch.cat([clip, nothing]), torch.cat([clip, nothing]))
    assert torch.isnan(both).tolist() == [False, True]
    assert torch.isnan(pesq(nothing, clip)).all()
    assert torch.isnan(pesq(clip[..., :3000], clip[..., :3000])).all()  # PESQ needs a quarter of a second


def test_words_are_those_of_the_reference(clip: Tensor) -> None:
    clip = clip[..., SAMPLE_RATE : 5 * SAMPLE_RATE // 2]
    other = clip.flip(1)
    both = torch.cat([clip, 0.05 * clip + other])
    found = word_error_rate(both, torch.cat([clip, clip]))
    # A level does not matter, and neither does the order of the estimates, so the second item is nearly right too.
    assert float(found[0]) == 0
    assert float(found[1]) < 0.6
    halves = clip + 0.8 * other
    assert float(word_error_rate(halves, clip)) > 0.5
    assert float(word_error_rate(torch.zeros_like(clip), clip)) == 1  # every word is missing
    assert torch.isnan(word_error_rate(clip, torch.zeros_like(clip))).all()
