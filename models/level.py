"""The running level: networks receive every signal at one level, and their output gets the original level back.

The level of frame ``t`` is that of the loudest frame up to ``t``, and fades by 10 dB a second. It follows immediately
when a signal begins or grows, and slowly when it falls. So the level of the output follows that of the input exactly,
from -60 dBFS to full scale, and no initial estimate of the level is needed. The level and the gain of a frame depend
only on the samples up to that frame, so they are the same on device and server.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knowledge_boosting.models.config import Framing
from knowledge_boosting.models.transforms import FLOOR, INAUDIBLE, REFERENCE, SILENCE, level_fading, level_unit


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
        self.unit, self.fading = level_unit(framing, microphones), level_fading(framing)

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
        # An overflow must reach the output, or all later frames would be divided by infinity unnoticed.
        scale = running.clamp_min(FLOOR).sqrt() / REFERENCE + 0 * power
        audible = power / (power + SILENCE * running + INAUDIBLE)
        gain = (scale * audible)[..., None, None]
        scale = scale[..., None, None]
        return Levels(spectrum / scale, gain, scale, running[:, -1])
