"""Set the environment variables that libraries read while they are loaded."""

import os

# gRPC's event engine passes every message to further threads. The older socket layer takes a tenth to a quarter less
# processor time, but one peer that floods a connection makes all others wait. So a server listens with the event
# engine. Devices choose their servers, and use the older layer.
_SERVER, _DEVICE = "-event_engine_client", "-event_engine_client,-event_engine_listener"
_SETTINGS = {
    # This project reports every failure itself, once.
    "GRPC_VERBOSITY": "NONE",
    "GRPC_EXPERIMENTS": _DEVICE,
    # Otherwise ONNX Runtime writes an identifier of this machine into the home folder and sends telemetry.
    "ORT_DISABLE_TELEMETRY": "1",
}


def prepare_environment() -> None:
    """Set the variables that the user has not set, for this process and its child processes."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def prepare_to_serve() -> None:
    """Adapt the variables to a server, unless the user has set them. Call this before ``grpc`` is imported."""
    if os.environ["GRPC_EXPERIMENTS"] == _DEVICE:
        os.environ["GRPC_EXPERIMENTS"] = _SERVER
