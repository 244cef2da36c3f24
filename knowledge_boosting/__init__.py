"""A small speech network on a device, boosted by delayed hints from a large network on a server.

The names in ``__all__`` are the public interface, which ``docs/api.md`` describes. Everything else can change.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from knowledge_boosting.common.environment import prepare_environment

# Libraries read these variables while they are loaded, so this comes before all other modules of this package.
prepare_environment()

if TYPE_CHECKING:
    from knowledge_boosting.common.call_credentials import Credentials, read_credentials
    from knowledge_boosting.common.errors import Error, Failure, InputError
    from knowledge_boosting.device_client.enhancer import Enhancer, Statistics, enhance
    from knowledge_boosting.models.bundle import Bundle

__all__ = [
    "Bundle",
    "Credentials",
    "Enhancer",
    "Error",
    "Failure",
    "InputError",
    "Statistics",
    "enhance",
    "read_credentials",
]

_MODULES = {
    "Bundle": "models.bundle",
    "Credentials": "common.call_credentials",
    "Enhancer": "device_client.enhancer",
    "Error": "common.errors",
    "Failure": "common.errors",
    "InputError": "common.errors",
    "Statistics": "device_client.enhancer",
    "enhance": "device_client.enhancer",
    "read_credentials": "common.call_credentials",
}


def __getattr__(name: str) -> Any:
    # Each module is loaded on first access, so that a server or a training machine needs no audio libraries.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
