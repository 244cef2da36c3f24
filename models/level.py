"""A running level: networks hear every signal at one level, and what they make of it gets its level back.

The level of frame ``t`` is that of the loudest frame up to it, which fades by 10 dB a second: it follows at once where
a signal begins or grows, and slowly where it falls. So a network's output follows its input's level exactly, from
-60 dBFS to full scale, and no constant has to be right for the first word. Level and gain of a frame depend on the
samples up to that frame alone, the same on the device and on the server.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knowledge_boosting.models.config import Framing

REFERENCE = 0.1  # RMS, full scale 1, at which networks hear the loudest frame
FADING_DB = 10.0  # a second
FLOOR = 1e-10  # power, -100 dBFS: what is below is not made louder
# What a network makes of frames this far below the running level, digital silence above all, is what its biases make of
# nothing; it fades out.
SILENCE = 1e-6  # power, -60 dB
INAUDIBLE = 1e-12  # power, -120 dBFS, far below the noise of 16 bits: what rounding leaves of silence with an offset


@dataclass(frozen=True)
class Levels:
    """What :class:`RunningLevel` makes of T frames."""

    spectrum: Tensor  # [B, T, F, 2M], at the reference level
    gain: Tensor  # [B, T, 1, 1], what brings spectra of estimates to the level of the signal
    scale: Tensor  # [B, T, 1, 1], what the spectrum was divided by
    power: Tensor  # [B], of the running level, the state after the last frame


class RunningLevel(nn.Module):
    """Divides spectra by their running level. Its state is that level's power, ``[B]``, zeros at the start."""

    def __init__(self, framing: Framing, microphones: int) -> None:
        super().__init__()
        # Its sum is a number of Python's, which must be there also where tensors are made on no real device.
        window = torch.hamming_window(framing.n_fft, periodic=True, dtype=torch.float64, device="cpu")
        # The power of a frame's samples from the sum of its squared spectrum, of which the other half mirrors this one.
        self.unit = 2 / (framing.n_fft * float(window.square().sum()) * microphones)
        self.fading = FADING_DB / 10 * math.log(10) * framing.chunk_seconds  # of the power's logarithm, a frame

    @torch.no_grad()
    def forward(self, spectrum: Tensor, past: Tensor) -> Levels:
        """Levels of the spectra ``[B, T, F, 2M]`` of T >= 1 frames, after those whose running power was ``past``."""
        power = spectrum.square().sum((-2, -1)) * self.unit  # [B, T]
        # The maximum over s <= t of power[s] exp(-fading (t - s)), by its logarithm; an hour of frames needs doubles.
        faded = self.fading * torch.arange(1, power.shape[1] + 1, dtype=torch.float64, device=power.device)
        logarithms = torch.cat([past[:, None], power], dim=1).double().log()
        logarithms[:, 1:] += faded
        running = (logarithms.cummax(1).values[:, 1:] - faded).exp().to(power)
        scale = running.clamp_min(FLOOR).sqrt() / REFERENCE
        audible = power / (power + SILENCE * running + INAUDIBLE)
        gain = (scale * audible)[..., None, None]
        scale = scale[..., None, None]
        return Levels(spectrum / scale, gain, scale, running[:, -1])
