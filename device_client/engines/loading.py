"""Load the small network of a bundle with the engine that the user selects."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.device_client.engines.engine import Model
from knowledge_boosting.models.bundle import Bundle

EngineName = Literal["onnx", "torch"]


def load_model(bundle: Bundle, engine: EngineName) -> Model:
    """Load the small network of a bundle.

    Raises:
        InputError: The bundle cannot be used, or there is no such engine.
        Failure: The engine is not installed.
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
    """Report how to install torch if an import in this block fails. ``flag`` is the flag that needs it."""
    try:
        yield
    except ImportError as error:
        raise Failure(f"{flag}: needs torch ({error}); run pip install 'knowledge-boosting[server]'") from None
