"""What runs the small network on the device."""

from typing import Protocol

from protos.codec import Samples


class Engine(Protocol):
    """The small network of one session, frame by frame."""

    def step(self, window: Samples, hint: Samples | None) -> Samples:
        """The next frame.

        Args:
            window: ``[M, n_fft]``, the frame's samples.
            hint: ``[hint channels, F]`` of ``delay`` frames ago; None for a hint that is missing or not due yet.

        Returns:
            ``[S, M, chunk]`` samples of the estimate.
        """
        ...
