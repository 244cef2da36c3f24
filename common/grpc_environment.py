"""What gRPC reads of the environment when it is loaded, as this project wants it."""

import os

_SETTINGS = {
    # What goes wrong is told by us, once.
    "GRPC_VERBOSITY": "NONE",
    # Its newer way to read and write sockets hands every message to further threads. For a stream of small messages the
    # one before takes a quarter less of a processor, at both ends.
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
}


def prepare_grpc() -> None:
    """Set what the user has not set; call it before ``grpc`` is imported."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
