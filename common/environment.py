"""What libraries read of the environment as they are loaded, as this project wants it."""

import os

_SETTINGS = {
    # What goes wrong is told by us, once.
    "GRPC_VERBOSITY": "NONE",
    # Its newer way to read and write sockets hands every message to further threads. For a stream of small messages the
    # one before takes a quarter less of a processor, at both ends.
    "GRPC_EXPERIMENTS": "-event_engine_client,-event_engine_listener",
    # Else it writes an identity of this machine into the home folder and reports to its maker.
    "ORT_DISABLE_TELEMETRY": "1",
}


def prepare_environment() -> None:
    """Set what the user has not set, for this process and those it starts."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
