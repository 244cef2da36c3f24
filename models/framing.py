"""The short-time Fourier transform of both networks, and its inverse.

Frame ``t`` covers samples ``[chunk t, chunk t + n_fft)``. So T frames need ``chunk T + lookahead`` samples and yield
``chunk T`` samples.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from knowledge_boosting.models.config import Framing
from knowledge_boosting.models.transforms import transforms


def pad_to_frames(samples: Tensor, framing: Framing) -> Tensor:
    """Pad a whole signal ``[..., N]`` with zeros at the end, so that T = ceil(N / chunk) frames cover it.

    Returns:
        Samples ``[..., chunk T + lookahead]``.
    """
    length = samples.shape[-1]
    return functional.pad(samples, (0, framing.frames(length) * framing.chunk + framing.lookahead - length))


class Stft(nn.Module):
    """Analysis and synthesis for one framing, as products with the matrices of :mod:`models.transforms`."""

    analysis: Tensor  # [n_fft, 2F]: all real parts, then all imaginary parts
    synthesis: Tensor  # [2F, n_fft]: for each bin (real, imaginary)
    head_gain: Tensor  # [lookahead], 1 / window sum where two frames overlap
    body_gain: Tensor  # [chunk - lookahead], 1 / window sum where frames do not overlap

    def __init__(self, framing: Framing, *, remove_offset: bool = False) -> None:
        """Make the transforms. With ``remove_offset``, a constant in the samples does not affect their spectrum."""
        super().__init__()
        self.framing = framing
        for name, value in vars(transforms(framing, remove_offset=remove_offset)).items():
            # Copies to the default device, which can be the meta device.
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)

    def analyse(self, samples: Tensor) -> Tensor:
        """Transform samples ``[B, M, chunk T + lookahead]``.

        Returns:
            Spectra ``[B, T, F, 2M]``, with all real parts before all imaginary parts.
        """
        frames = samples.unfold(-1, self.framing.n_fft, self.framing.chunk)
        # The frames are copied into one matrix, because torch would split a product of overlapping frames.
        spectrum = (frames.reshape(-1, self.framing.n_fft) @ self.analysis).view(
            *frames.shape[:3], 2, self.framing.bins
        )
        return spectrum.permute(0, 2, 4, 3, 1).flatten(-2)

    def initial_overlap(self, batch: int, signals: int) -> Tensor:
        """Return the overlap at the start of a stream, the tail of a frame of zeros, ``[B, S', lookahead]``."""
        return self.synthesis.new_zeros(batch, signals, self.framing.lookahead)

    def synthesise(self, spectrum: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
        """Overlap and add the inverse transforms of frames, and divide by the sum of the squared windows.

        Args:
            spectrum: ``[B, T, F, 2S']``, for each output signal (real, imaginary).
            overlap: ``[B, S', lookahead]``, the windowed tail of the frame before. At the start of a stream this is a
                frame of zeros, which also counts in the window sum.

        Returns:
            Samples ``[B, S', chunk T]``, and the overlap for the next call.
        """
        chunk, lookahead = self.framing.chunk, self.framing.lookahead
        frames = spectrum.unflatten(-1, (-1, 2)).permute(0, 3, 1, 2, 4).flatten(-2) @ self.synthesis
        tails = torch.cat([overlap[:, :, None], frames[..., chunk:]], dim=2)
        head = (frames[..., :lookahead] + tails[:, :, :-1]) * self.head_gain
        body = frames[..., lookahead:chunk] * self.body_gain
        return torch.cat([head, body], dim=-1).flatten(-2), tails[:, :, -1]
