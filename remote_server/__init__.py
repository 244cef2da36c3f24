"""The large network as a gRPC service that sends hints to many devices."""

import common  # noqa: F401  # before any library is loaded
