"""What runs the small network on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Protocol

from common.errors import Failure
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


def load_model(directory: Path, engine: EngineName) -> Model:
    """A bundle's small network under an engine.

    Raises:
        InputError: the bundle cannot be used.
        Failure: the engine is not installed.
    """
    if engine == "onnx":
        from device_client.onnx_engine import OnnxModel

        return OnnxModel(str(directory))
    with needs_torch("--engine torch"):
        from device_client.torch_engine import TorchModel
    return TorchModel(str(directory))


@contextmanager
def needs_torch(flag: str) -> Iterator[None]:
    """Say what to install if an import in this block fails."""
    try:
        yield
    except ImportError as error:
        raise Failure(f"{flag}: needs torch ({error}): pip install 'knowledge-boosting[server]'") from None
