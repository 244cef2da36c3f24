"""Load the small network of a bundle with the engine that the user selects."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from knowledge_boosting.common.errors import Failure, InputError
from knowledge_boosting.device_client.engines.engine import Model
from knowledge_boosting.models.bundle import Bundle

EngineName = Literal["auto", "compiled", "onnx", "torch"]


def load_model(bundle: Bundle, engine: EngineName) -> Model:
    """Load the small network of a bundle.

    The engine ``auto`` is ``compiled`` if that is available here and much faster than ``onnx``, otherwise ``onnx``.

    Raises:
        InputError: The bundle cannot be used, or there is no such engine.
        Failure: The engine is not installed, or the network cannot be compiled.
    """
    if engine not in get_args(EngineName):
        raise InputError(f"engine {engine!r}: must be one of {', '.join(get_args(EngineName))}")
    if engine == "compiled":
        from knowledge_boosting.device_client.engines.compiled_engine import CompiledModel

        return CompiledModel(bundle)
    if engine != "torch":
        from knowledge_boosting.device_client.engines.compiled_engine import faster_model
        from knowledge_boosting.device_client.engines.onnx_engine import OnnxModel

        model = OnnxModel(bundle)
        return faster_model(model, bundle) if engine == "auto" else model
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
