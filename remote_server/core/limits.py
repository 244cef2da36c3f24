"""What one device may ask of a server, all of it configurable: ``kb-server --limit NAME=VALUE``."""

from collections.abc import Sequence

from pydantic import Field, ValidationError

from knowledge_boosting.common.addresses import is_loopback
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.config import Strict
from knowledge_boosting.models.manifest import first_fault
from knowledge_boosting.protos.codec import MAX_CHUNKS_PER_MESSAGE


class Limits(Strict):
    """Limits of every session and every peer (a host, whatever its ports). 0 lifts a limit where it says so."""

    message_bytes: int = Field(
        default=2 * 1024 * 1024, ge=1024, description="size of a message; 30 s of enrollment take 1.9 MB"
    )
    chunks: int = Field(
        default=MAX_CHUNKS_PER_MESSAGE, ge=1, le=MAX_CHUNKS_PER_MESSAGE, description="chunks of a message"
    )
    speed: float = Field(default=4.0, ge=0, description="audio against real time: what comes faster waits; 0: no limit")
    sessions_per_peer: int | None = Field(
        default=None,
        ge=0,
        description="sessions of a peer at once; 0: no limit. If not given: half of the places; all for this machine",
    )
    config_seconds: float = Field(default=10.0, gt=0, description="until a call's configuration must have come")
    idle_seconds: float = Field(default=60.0, ge=0, description="without audio; 0: no limit")
    least_speed: float = Field(default=0.05, ge=0, le=1, description="audio against real time, over slow_seconds")
    slow_seconds: float = Field(default=60.0, gt=0, description="that a session may be slower")
    session_seconds: float = Field(default=0.0, ge=0, description="length of a session; 0: no limit")
    unread_seconds: float = Field(
        default=10.0, gt=0, description="that hints may wait for a device that does not read them"
    )
    enrollment_seconds: float = Field(default=30.0, ge=1, le=30, description="length of enrollment speech")
    enrollments_per_minute: int = Field(default=20, ge=0, description="of a peer; 0: no limit")

    def sessions_of(self, host: str, places: int) -> int:
        """The most sessions of a host at once, of a bundle with so many places; 0: no limit.

        One host cannot take all. This machine can: it may be a proxy, behind which are many.
        """
        if self.sessions_per_peer is not None:
            return self.sessions_per_peer
        return 0 if is_loopback(host) else -(-places // 2)


def read_limits(settings: Sequence[str]) -> Limits:
    """Limits from ``NAME=VALUE`` texts.

    Raises:
        InputError: a name there is not, or a value it cannot have.
    """
    values = {}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator or name not in Limits.model_fields:
            raise InputError(f"--limit {setting}: must be NAME=VALUE; names: {', '.join(Limits.model_fields)}")
        values[name] = value
    try:
        return Limits.model_validate_strings(values)
    except ValidationError as error:
        raise InputError(f"--limit {first_fault(error)}") from None
