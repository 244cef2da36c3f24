"""Why calls end, in terms of no transport."""

from enum import StrEnum, auto


class Status(StrEnum):
    """How a call ends; the names are gRPC's."""

    INVALID_ARGUMENT = auto()  # what was sent is at fault
    FAILED_PRECONDITION = auto()  # device and server do not fit each other
    NOT_FOUND = auto()
    UNIMPLEMENTED = auto()
    UNAUTHENTICATED = auto()
    PERMISSION_DENIED = auto()
    RESOURCE_EXHAUSTED = auto()  # no place now
    DEADLINE_EXCEEDED = auto()
    UNAVAILABLE = auto()  # another server may serve it
    CANCELLED = auto()
    INTERNAL = auto()  # the server is at fault


class Refused(Exception):
    """Why a call ends: a text for people, and the status."""

    def __init__(self, text: str, status: Status = Status.INVALID_ARGUMENT) -> None:
        super().__init__(text)
        self.status = status
