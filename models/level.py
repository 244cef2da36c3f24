"""The running level: networks receive every signal at one level, and their output gets the original level back.

The level of frame ``t`` is that of the loudest frame up to ``t``, and fades by 10 dB a second. It follows immediately
when a signal begins or grows, and slowly when it falls. So the level of the output follows that of the input exactly,
from -60 dBFS to full scale, and no initial estimate of the level is needed. The level and the gain of a frame depend
only on the samples up to that frame, so they are the same on device and server.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knowledge_boosting.models.config import Framing

REFERENCE = 0.1  # RMS of the loudest frame at the input of the networks, full scale 1
FADING_DB = 10.0  # a second
FLOOR = 1e-10  # power, -100 dBFS; quieter signals are not amplified
# The output for frames this far below the running level, such as digital silence, comes only from the biases of the
# network. It is faded out.
SILENCE = 1e-6  # power, -60 dB
# Power, -120 dBFS, far below the noise of 16 bits. Rounding leaves this much of silence with a DC offset.
INAUDIBLE = 1e-12


@dataclass(frozen=True)
class Levels:
    """The output of :class:`RunningLevel` for T frames."""

    spectrum: Tensor  # [B, T, F, 2M], at the reference level
    gain: Tensor  # [B, T, 1, 1], the factor that restores the level in spectra of estimates
    scale: Tensor  # [B, T, 1, 1], the divisor of the spectrum
    power: Tensor  # [B], the power of the running level after the last frame, which is the state


class RunningLevel(nn.Module):
    """Divides spectra by their running level. Its state is the power of that level, ``[B]``, zeros at the start."""

    def __init__(self, framing: Framing, microphones: int) -> None:
        super().__init__()
        # The window is on the CPU, because its sum must be available even if the model is built on the meta device.
        window = torch.hamming_window(framing.n_fft, periodic=True, dtype=torch.float64, device="cpu")
        # Converts the sum of the squared spectrum, of which half is stored, to the power of the samples of a frame.
        self.unit = 2 / (framing.n_fft * float(window.square().sum()) * microphones)
        self.fading = (
            FADING_DB / 10 * math.log(10) * framing.chunk_seconds
        )  # of the logarithm of the power in each frame

    @torch.no_grad()
    def forward(self, spectrum: Tensor, past: Tensor) -> Levels:
        """Compute the levels of T >= 1 frames.

        Args:
            spectrum: ``[B, T, F, 2M]``.
            past: the state after the frame before, ``[B]``.
        """
        power = spectrum.square().sum((-2, -1)) * self.unit  # [B, T]
        # The running power is the maximum over s <= t of power[s] exp(-fading (t - s)). It is computed by logarithms,
        # in double precision, because a signal can have an hour of frames.
        faded = self.fading * torch.arange(1, power.shape[1] + 1, dtype=torch.float64, device=power.device)
        logarithms = torch.cat([past[:, None], power], dim=1).double().log()
        logarithms[:, 1:] += faded
        running = (logarithms.cummax(1).values[:, 1:] - faded).exp().to(power)
        scale = running.clamp_min(FLOOR).sqrt() / REFERENCE
        audible = power / (power + SILENCE * running + INAUDIBLE)
        gain = (scale * audible)[..., None, None]
        scale = scale[..., None, None]
        return Levels(spectrum / scale, gain, scale, running[:, -1])
