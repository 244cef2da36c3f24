"""The numbers of the transform of frames and of their running level. This module does not need torch.

Frame ``t`` covers samples ``[chunk t, chunk t + n_fft)``. The window is a periodic Hamming window, without centring or
normalisation.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knowledge_boosting.models.config import Framing

Matrix = NDArray[np.float64]

REFERENCE = 0.1  # RMS of the loudest frame at the input of networks with a running level, full scale 1
FADING_DB = 10.0  # of the running level, a second
FLOOR = 1e-10  # power, -100 dBFS; quieter signals are not amplified
# The output for frames this far below the running level, such as digital silence, comes only from the biases of the
# network. It is faded out.
SILENCE = 1e-6  # power, -60 dB
# Power, -120 dBFS, far below the noise of 16 bits. Rounding leaves this much of silence with a DC offset.
INAUDIBLE = 1e-12


@dataclass(frozen=True)
class Transforms:
    """The transforms as matrices, which include the window. For such short frames, products are faster than FFTs."""

    analysis: Matrix  # [n_fft, 2F]: all real parts, then all imaginary parts
    synthesis: Matrix  # [2F, n_fft]: for each bin (real, imaginary)
    head_gain: Matrix  # [lookahead], 1 / window sum where two frames overlap
    body_gain: Matrix  # [chunk - lookahead], 1 / window sum where frames do not overlap


def hamming_window(size: int) -> Matrix:
    """Return a periodic Hamming window."""
    window: Matrix = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(size) / size)
    return window


def transforms(framing: Framing, *, remove_offset: bool = False) -> Transforms:
    """Return the transforms. With ``remove_offset``, a constant in the samples does not affect their spectrum."""
    window = hamming_window(framing.n_fft)
    basis = np.fft.rfft(np.diag(window))
    if remove_offset:
        # With a Hamming window, a constant appears only in bins 0 and 1, in a fixed proportion.
        constant = np.fft.rfft(window)
        basis[:, 1] -= basis[:, 0] * (constant[1] / constant[0])
        basis[:, 0] = 0
    # The inverse transform is linear in (real, imaginary), so the rows of its matrix are its values for unit spectra.
    units = np.eye(2 * framing.bins).view(np.complex128)
    squared = np.square(window)
    overlapping = squared[: framing.lookahead] + squared[framing.chunk :]
    return Transforms(
        analysis=np.concatenate([basis.real, basis.imag], axis=1),
        synthesis=np.fft.irfft(units, n=framing.n_fft) * window,
        head_gain=1 / overlapping,
        body_gain=1 / squared[framing.lookahead : framing.chunk],
    )


def level_unit(framing: Framing, microphones: int) -> float:
    """Return the factor from the sum of a squared spectrum, of which half is stored, to the power of the samples."""
    window = hamming_window(framing.n_fft)
    return 2 / (framing.n_fft * float(np.square(window).sum()) * microphones)


def level_fading(framing: Framing) -> float:
    """Return how much the logarithm of the power of the running level falls in each frame."""
    return FADING_DB / 10 * math.log(10) * framing.chunk_seconds
