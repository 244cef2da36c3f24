"""The configurable limits of a server: ``kb-server --limit NAME=VALUE``."""

from collections.abc import Sequence

from pydantic import Field, ValidationError

from knowledge_boosting.common.addresses import is_loopback
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.config import Strict
from knowledge_boosting.models.manifest import first_fault
from knowledge_boosting.protos.codec import MAX_CHUNKS_PER_MESSAGE


class Limits(Strict):
    """The limits of each session and each peer. A peer is a host, so that its ports do not matter."""

    message_bytes: int = Field(
        default=2 * 1024 * 1024,
        ge=1024,
        le=2**31 - 1,
        description="maximum size of a message; 30 s of enrollment need 1.9 MB",
    )
    chunks: int = Field(
        default=MAX_CHUNKS_PER_MESSAGE,
        ge=1,
        le=MAX_CHUNKS_PER_MESSAGE,
        description="maximum number of chunks in a message",
    )
    speed: float = Field(
        default=4.0, ge=0, description="maximum speed of audio relative to real time; faster audio waits; 0: no limit"
    )
    sessions_per_peer: int | None = Field(
        default=None,
        ge=0,
        description="maximum number of open sessions of a peer; 0: no limit. By default half of the sessions of a "
        "bundle, and no limit for this machine",
    )
    config_seconds: float = Field(default=10.0, gt=0, description="time until the configuration must have arrived")
    idle_seconds: float = Field(default=60.0, ge=0, description="maximum time without audio; 0: no limit")
    least_speed: float = Field(
        default=0.05, ge=0, le=1, description="minimum speed of audio relative to real time, over slow_seconds"
    )
    slow_seconds: float = Field(default=60.0, gt=0, description="maximum time below least_speed")
    session_seconds: float = Field(default=0.0, ge=0, description="maximum duration of a session; 0: no limit")
    unread_seconds: float = Field(
        default=10.0, gt=0, description="maximum time that hints wait for a device that does not read them"
    )
    enrollment_seconds: float = Field(
        default=30.0, ge=1, le=30, description="maximum duration of enrollment speech, seconds"
    )
    enrollments_per_minute: int = Field(
        default=20, ge=0, description="maximum number of enrollments of a peer in a minute; 0: no limit"
    )

    def sessions_of(self, host: str, slots: int) -> int:
        """Return the maximum number of open sessions of a host in a bundle with ``slots`` slots. 0: no limit.

        By default, a host can use half of the slots. This machine has no limit, because it can be a proxy for others.
        """
        if self.sessions_per_peer is not None:
            return self.sessions_per_peer
        return 0 if is_loopback(host) else -(-slots // 2)


def read_limits(settings: Sequence[str]) -> Limits:
    """Parse limits of the form ``NAME=VALUE``.

    Raises:
        InputError: A name is unknown, or a value is invalid.
    """
    values = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator or name not in Limits.model_fields:
            raise InputError(f"--limit {setting}: must be NAME=VALUE with one of {', '.join(Limits.model_fields)}")
        values[name] = value
    try:
        return Limits.model_validate_strings(values)
    except ValidationError as error:
        raise InputError(f"--limit {first_fault(error)}") from None
