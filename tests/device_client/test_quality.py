"""Tests for the quality figures, which are compared with torchmetrics and closed forms."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio, signal_noise_ratio

from knowledge_boosting.device_client.replay.quality import match_sources, si_sdr, snr


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.floats(0.01, 10), scale=st.floats(0.1, 10), offset=st.floats(-1, 1))
def test_figures_agree_with_torchmetrics(seed: int, noise: float, scale: float, offset: float) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.standard_normal((2, 2, 500)).astype(np.float32)
    estimate = (scale * reference + noise * rng.standard_normal((2, 2, 500)) + offset).astype(np.float32)
    theirs = torch.from_numpy(estimate).double(), torch.from_numpy(reference).double()
    expected = scale_invariant_signal_distortion_ratio(*theirs, zero_mean=True).numpy()
    assert np.allclose(si_sdr(estimate, reference), expected, atol=1e-3)
    assert np.allclose(snr(estimate, reference), signal_noise_ratio(*theirs).numpy(), atol=1e-3)


def test_orthogonal_noise_of_a_tenth_of_the_amplitude_is_20_db() -> None:
    time = np.arange(1600)
    tone, other = np.sin(2 * np.pi * time / 16), np.cos(2 * np.pi * time / 16)
    estimate = (tone + 0.1 * other).astype(np.float32)
    assert np.isclose(si_sdr(5 * estimate, tone.astype(np.float32)), 20, atol=1e-3)
    assert np.isclose(snr(estimate, tone.astype(np.float32)), 20, atol=1e-3)


def test_silence_and_perfect_estimates_have_finite_figures() -> None:
    reference = np.random.default_rng(0).standard_normal((2, 100)).astype(np.float32)
    assert np.isfinite(si_sdr(np.zeros_like(reference), reference)).all()
    assert np.isfinite(si_sdr(reference, reference)).all()


def test_sources_are_matched_whatever_their_order() -> None:
    rng = np.random.default_rng(0)
    references = rng.standard_normal((3, 2, 400)).astype(np.float32)
    order = [2, 0, 1]
    estimates = 0.5 * references[order] + 0.1 * rng.standard_normal((3, 2, 400)).astype(np.float32)
    matched = match_sources(estimates.astype(np.float32), references)
    assert [order[index] for index in matched] == [0, 1, 2]
