"""What libraries read of the environment as they are loaded, as this project wants it."""

import os

# gRPC's newer way to read and write sockets hands every message to further threads; the one before takes a tenth to a
# quarter less of a processor. But in that one whoever floods a connection keeps all others waiting. So a server has the
# newer one, and devices, who choose whom they connect to, the older.
_SERVER, _DEVICE = "-event_engine_client", "-event_engine_client,-event_engine_listener"
_SETTINGS = {
    # What goes wrong is told by us, once.
    "GRPC_VERBOSITY": "NONE",
    "GRPC_EXPERIMENTS": _DEVICE,
    # Else it writes an identity of this machine into the home folder and reports to its maker.
    "ORT_DISABLE_TELEMETRY": "1",
}


def prepare_environment() -> None:
    """Set what the user has not set, for this process and those it starts."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)


def prepare_to_serve() -> None:
    """Change what a server wants otherwise, where the user has not set it; before ``grpc`` is imported."""
    if os.environ["GRPC_EXPERIMENTS"] == _DEVICE:
        os.environ["GRPC_EXPERIMENTS"] = _SERVER
