"""Analysis and synthesis equal NumPy and a closed form."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.signal import get_window

from knowledge_boosting.models.config import Framing
from knowledge_boosting.models.framing import Stft, pad_to_frames


@pytest.mark.parametrize("framing", [Framing(), Framing(chunk=32, lookahead=16), Framing(chunk=80, lookahead=80)])
def test_analysis_is_the_fourier_transform_of_windowed_frames(framing: Framing) -> None:
    samples = np.random.default_rng(0).standard_normal((2, 1000)).astype(np.float32)
    padded = pad_to_frames(torch.from_numpy(samples)[None], framing)
    ours = Stft(framing).analyse(padded)[0].numpy()
    frames, bins = framing.frames(1000), framing.bins
    assert ours.shape == (frames, bins, 4)
    window = get_window("hamming", framing.n_fft)
    theirs = np.stack(
        [
            np.fft.rfft(np.asarray(padded[0])[:, t * framing.chunk : t * framing.chunk + framing.n_fft] * window)
            for t in range(frames)
        ]
    )
    expected = np.concatenate([theirs.real, theirs.imag], axis=1).transpose(0, 2, 1)
    assert np.abs(ours - expected).max() < 1e-4


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 700), chunk=st.sampled_from([32, 64, 128]), half=st.booleans())
def test_synthesis_of_the_analysis_is_the_signal(length: int, chunk: int, half: bool) -> None:
    """The sum of w^2 x over the sum of w^2 is x, except in the first samples, which lack the frame before."""
    framing = Framing(chunk=chunk, lookahead=chunk // 2 if half else chunk)
    stft = Stft(framing)
    samples = torch.randn(1, 2, length, generator=torch.Generator().manual_seed(length))
    spectrum = stft.analyse(pad_to_frames(samples, framing))
    # The synthesis expects (real, imaginary) for each signal, and the analysis gives all real parts first.
    spectrum = spectrum.unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2)
    back, _ = stft.synthesise(spectrum, stft.initial_overlap(1, 2))
    squared = torch.hamming_window(framing.n_fft).square()
    share = torch.ones(framing.frames(length) * chunk)
    look = framing.lookahead
    share[:look] = squared[:look] / (squared[:look] + squared[chunk:])
    assert torch.allclose(back[..., :length], samples * share[:length], atol=1e-5)


@pytest.mark.parametrize(("chunk", "lookahead"), [(128, 129), (128, 63), (0, 64), (128, 0)])
def test_impossible_framings_are_refused(chunk: int, lookahead: int) -> None:
    with pytest.raises(ValidationError):
        Framing(chunk=chunk, lookahead=lookahead)
