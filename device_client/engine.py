"""What runs the small network on the device."""

from typing import Literal, Protocol

from models.manifest import Manifest
from protos.codec import Samples

EngineName = Literal["onnx", "torch"]


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


class Model(Protocol):
    """A bundle's small network, from which sessions are made."""

    manifest: Manifest

    def session(self, speaker_embedding: Samples | None) -> Engine:
        """A session from its start; ``speaker_embedding`` is ``[256]`` for TSE."""
        ...
