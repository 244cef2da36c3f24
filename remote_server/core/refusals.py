"""The statuses with which calls end, independent of the transport."""

from enum import StrEnum, auto


class Status(StrEnum):
    """The status with which a call ends. The names are those of gRPC."""

    INVALID_ARGUMENT = auto()  # the request is at fault
    FAILED_PRECONDITION = auto()  # device and server do not match
    NOT_FOUND = auto()
    UNIMPLEMENTED = auto()
    UNAUTHENTICATED = auto()
    PERMISSION_DENIED = auto()
    RESOURCE_EXHAUSTED = auto()  # the server is full, or a limit is exceeded
    DEADLINE_EXCEEDED = auto()
    UNAVAILABLE = auto()  # another server can serve the call
    CANCELLED = auto()
    INTERNAL = auto()  # the server is at fault


class Refused(Exception):
    """A call is refused or ended. The exception has a text for the user and a status."""

    def __init__(self, text: str, status: Status = Status.INVALID_ARGUMENT) -> None:
        super().__init__(text)
        self.status = status
