"""A bundle's small network under the engine that was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.device_client.engines.engine import Model
from knowledge_boosting.models.bundle import Bundle

EngineName = Literal["onnx", "torch"]


def load_model(bundle: Bundle, engine: EngineName) -> Model:
    """A bundle's small network under an engine.

    Raises:
        InputError: the bundle cannot be used, or there is no such engine.
        Failure: the engine is not installed.
    """
    if engine not in get_args(EngineName):
        raise InputError(f"engine {engine!r}: must be {' or '.join(get_args(EngineName))}")
    if engine == "onnx":
        from knowledge_boosting.device_client.engines.onnx_engine import OnnxModel

        return OnnxModel(bundle)
    with needs_torch("--engine torch"):
        from knowledge_boosting.device_client.engines.torch_engine import TorchModel
    return TorchModel(bundle)


@contextmanager
def needs_torch(flag: str) -> Iterator[None]:
    """Say what to install if an import in this block fails."""
    try:
        yield
    except ImportError as error:
        raise Failure(f"{flag}: needs torch ({error}): pip install 'knowledge-boosting[server]'") from None
