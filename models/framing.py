"""The short-time Fourier transform of both networks, and its inverse.

Frame ``t`` covers samples ``[chunk t, chunk t + n_fft)``. The window is a periodic Hamming window, without centring or
normalisation. So T frames need ``chunk T + lookahead`` samples and yield ``chunk T`` samples.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from knowledge_boosting.models.config import Framing


def pad_to_frames(samples: Tensor, framing: Framing) -> Tensor:
    """Pad a whole signal ``[..., N]`` with zeros at the end, so that T = ceil(N / chunk) frames cover it.

    Returns:
        Samples ``[..., chunk T + lookahead]``.
    """
    length = samples.shape[-1]
    return functional.pad(samples, (0, framing.frames(length) * framing.chunk + framing.lookahead - length))


class Stft(nn.Module):
    """Analysis and synthesis for one framing.

    The transforms are products with matrices that include the window and the Fourier basis. For such short frames this
    is faster than a call of an FFT, and every runtime supports it.
    """

    analysis: Tensor  # [n_fft, 2F]: all real parts, then all imaginary parts
    synthesis: Tensor  # [2F, n_fft]: for each bin (real, imaginary)
    head_gain: Tensor  # [lookahead], 1 / window sum where two frames overlap
    body_gain: Tensor  # [chunk - lookahead], 1 / window sum where frames do not overlap

    def __init__(self, framing: Framing, *, remove_offset: bool = False) -> None:
        """Make the transforms. With ``remove_offset``, a constant in the samples does not affect their spectrum."""
        super().__init__()
        self.framing = framing
        window = torch.hamming_window(framing.n_fft, periodic=True, dtype=torch.float64)
        identity = torch.eye(framing.n_fft, dtype=torch.float64)
        basis = torch.fft.rfft(identity * window)
        if remove_offset:
            # With a Hamming window, a constant appears only in bins 0 and 1, in a fixed proportion.
            constant = torch.fft.rfft(window)
            basis[:, 1] -= basis[:, 0] * (constant[1] / constant[0])
            basis[:, 0] = 0
        # The inverse transform is linear in (real, imaginary), so the rows of its matrix are its values for unit
        # spectra.
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
