"""Samples to spectra and back: the short-time Fourier transform that both networks work in.

Frame ``t`` covers samples ``[chunk t, chunk t + n_fft)``; periodic Hamming window, no centring, no normalisation.
A stretch of T frames therefore needs ``chunk T + lookahead`` samples and yields ``chunk T``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from knowledge_boosting.models.config import Framing


def pad_to_frames(samples: Tensor, framing: Framing) -> Tensor:
    """Zero-pad a whole signal ``[..., N]`` on the right so that T = ceil(N / chunk) frames cover it.

    Returns:
        ``[..., chunk T + lookahead]``.
    """
    length = samples.shape[-1]
    return functional.pad(samples, (0, framing.frames(length) * framing.chunk + framing.lookahead - length))


class Stft(nn.Module):
    """Analysis and synthesis for one framing.

    The transforms are products with matrices that hold window and Fourier basis: for frames this short that takes less
    time than a call of an FFT, and it exports to any runtime.
    """

    analysis: Tensor  # [n_fft, 2F]: real parts, then imaginary parts
    synthesis: Tensor  # [2F, n_fft]: bins, each (real, imaginary)
    head_gain: Tensor  # [lookahead], 1 / window sum where two frames overlap
    body_gain: Tensor  # [chunk - lookahead], 1 / window sum where one frame stands alone

    def __init__(self, framing: Framing, *, remove_offset: bool = False) -> None:
        """Transforms of one framing; with ``remove_offset`` a constant in the samples has no part in their spectrum."""
        super().__init__()
        self.framing = framing
        window = torch.hamming_window(framing.n_fft, periodic=True, dtype=torch.float64)
        identity = torch.eye(framing.n_fft, dtype=torch.float64)
        basis = torch.fft.rfft(identity * window)
        if remove_offset:
            # A constant under a Hamming window is in bins 0 and 1 alone, in a fixed proportion.
            constant = torch.fft.rfft(window)
            basis[:, 1] -= basis[:, 0] * (constant[1] / constant[0])
            basis[:, 0] = 0
        # The inverse transform is linear in (real, imaginary): its matrix is its value on each unit spectrum.
        units = torch.eye(2 * framing.bins, dtype=torch.float64).view(-1, framing.bins, 2)
        inverse = torch.fft.irfft(torch.view_as_complex(units), n=framing.n_fft) * window
        squared = window.square()
        overlapping = squared[: framing.lookahead] + squared[framing.chunk :]
        for name, value in (
            ("analysis", torch.cat([basis.real, basis.imag], dim=-1)),
            ("synthesis", inverse),
            ("head_gain", 1 / overlapping),
            ("body_gain", 1 / squared[framing.lookahead : framing.chunk]),
        ):
            self.register_buffer(name, value.float(), persistent=False)

    def analyse(self, samples: Tensor) -> Tensor:
        """Samples ``[B, M, chunk T + lookahead]`` to spectra ``[B, T, F, 2M]``: all real parts, then all imaginary."""
        frames = samples.unfold(-1, self.framing.n_fft, self.framing.chunk)
        # As one matrix: of overlapping frames torch would make many small products.
        spectrum = (frames.reshape(-1, self.framing.n_fft) @ self.analysis).view(
            *frames.shape[:3], 2, self.framing.bins
        )
        return spectrum.permute(0, 2, 4, 3, 1).flatten(-2)

    def initial_overlap(self, batch: int, signals: int) -> Tensor:
        """The overlap at the start of a stream: the tail of a frame of zeros, ``[B, S', lookahead]``."""
        return self.synthesis.new_zeros(batch, signals, self.framing.lookahead)

    def synthesise(self, spectrum: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
        """Overlap-add of the frames' inverse transforms, divided by the sum of the squared windows.

        Args:
            spectrum: ``[B, T, F, 2S']``, per output signal (real, imaginary).
            overlap: ``[B, S', lookahead]``, the windowed tail of the frame before. At the start of a stream that is
                a frame of zeros, which still counts in the window sum.

        Returns:
            Samples ``[B, S', chunk T]``, and the overlap for the next call.
        """
        chunk, lookahead = self.framing.chunk, self.framing.lookahead
        frames = spectrum.unflatten(-1, (-1, 2)).permute(0, 3, 1, 2, 4).flatten(-2) @ self.synthesis
        tails = torch.cat([overlap[:, :, None], frames[..., chunk:]], dim=2)
        head = (frames[..., :lookahead] + tails[:, :, :-1]) * self.head_gain
        body = frames[..., lookahead:chunk] * self.body_gain
        return torch.cat([head, body], dim=-1).flatten(-2), tails[:, :, -1]
