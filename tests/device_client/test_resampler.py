"""Tests for the resampler of live sound."""

import numpy as np
import pytest
from numpy.typing import NDArray

from knowledge_boosting.device_client.audio.resampler import LowDelayResampler

BUNDLE = 16000  # Hz
RATES = [32000, 44100, 48000, 96000]
Samples = NDArray[np.float32]


def resample(rate: int, target: int, samples: Samples, blocks: tuple[int, ...] | None = None) -> Samples:
    """Resample ``[N]`` in blocks of 8 ms, or of the given lengths in turn."""
    resampler, lengths = LowDelayResampler(rate, target, 1), blocks or (round(rate / 125),)
    pieces, start, turn = [], 0, 0
    while start < len(samples):
        length = lengths[turn % len(lengths)]
        pieces.append(resampler(samples[start : start + length, None]))
        start, turn = start + length, turn + 1
    return np.concatenate(pieces)[:, 0]


def tone(rate: int, frequency: float) -> Samples:
    return np.sin(2 * np.pi * frequency * np.arange(rate // 2) / rate).astype(np.float32)


def spectrum(samples: Samples, rate: int) -> tuple[Samples, Samples]:
    """Return frequencies in Hz, multiples of 2.5, and the levels of sines in dB, without the start of the signal."""
    steady = samples[rate // 20 :][: rate * 2 // 5]
    window = np.blackman(len(steady))
    amplitudes = np.abs(np.fft.rfft(steady * window)) / (window.sum() / 2)
    return np.fft.rfftfreq(len(steady), 1 / rate), 20 * np.log10(amplitudes + 1e-9)


@pytest.mark.parametrize("rate", RATES)
def test_the_pass_band_is_flat_and_all_else_is_weak(rate: int) -> None:
    for frequency in (50, 440, 3000, 6000, 7000):
        levels = spectrum(resample(rate, BUNDLE, tone(rate, frequency)), BUNDLE)[1]
        assert levels.max() == pytest.approx(0, abs=0.05)
        frequencies, levels = spectrum(resample(BUNDLE, rate, tone(BUNDLE, frequency)), rate)
        assert levels.max() == pytest.approx(0, abs=0.05)
        assert levels[frequencies > 9000].max() < -60
    for frequency in np.linspace(9000, rate / 2 - 100, 7):
        assert spectrum(resample(rate, BUNDLE, tone(rate, frequency)), BUNDLE)[1].max() < -60


@pytest.mark.parametrize("rate", RATES)
def test_the_delay_is_as_stated_and_below_a_millisecond(rate: int) -> None:
    for source, target in ((rate, BUNDLE), (BUNDLE, rate)):
        impulse = np.zeros(source, np.float32)
        impulse[source // 4] = 1
        response = resample(source, target, impulse)
        # The centre of the response, at a resolution that is finer than a sample.
        centre = np.average(np.arange(len(response)), weights=np.square(response)) / target
        delay = LowDelayResampler(source, target, 1).delay
        assert centre - 0.25 == pytest.approx(delay, abs=5e-5)
        assert delay < 1e-3


@pytest.mark.parametrize("rate", [8000, *RATES])
def test_the_blocks_do_not_matter(rate: int) -> None:
    noise = np.random.default_rng(0).normal(size=rate // 4).astype(np.float32)
    for source, target in ((rate, BUNDLE), (BUNDLE, rate)):
        whole = resample(source, target, noise, (len(noise),))
        assert len(whole) == -(-len(noise) * target // source)
        np.testing.assert_allclose(resample(source, target, noise, (1, 7, 353, 2, 1000)), whole, atol=1e-6)


def test_there_are_no_bursts() -> None:
    down, up = LowDelayResampler(44100, BUNDLE, 2), LowDelayResampler(BUNDLE, 44100, 2)
    lengths = [len(up(down(np.zeros((353, 2), np.float32)))) for _ in range(200)]
    assert all(abs(length - 353) <= 3 for length in lengths)
    assert sum(lengths) == pytest.approx(200 * 353, abs=3)


def test_an_equal_rate_passes_through() -> None:
    samples = np.random.default_rng(0).normal(size=(128, 2)).astype(np.float32)
    resampler = LowDelayResampler(BUNDLE, BUNDLE, 2)
    assert resampler.delay == 0
    np.testing.assert_array_equal(resampler(samples), samples)
