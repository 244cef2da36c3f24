"""Authorization: bearer tokens from a file, and the permissions of each token."""

import hmac
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, StringConstraints, ValidationError

from knowledge_boosting.common.credentials import read_secret
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.models.config import Strict
from knowledge_boosting.remote_server.core.refusals import Refused, Status
from knowledge_boosting.remote_server.core.reloading import Reloading

_MIN_TOKEN_LENGTH = 16  # characters
_MAX_FILE_BYTES = 2**18  # enough for more than a thousand tokens


class Denied(Refused):
    """A call that is refused because of its token."""

    def __init__(self, text: str, status: Status, token: str) -> None:
        """Create a refusal.

        Args:
            text: The message for the caller.
            status: The status of the call.
            token: The reason for the log: ``missing``, ``unknown``, ``revoked`` or ``not enough``.
        """
        super().__init__(text, status)
        self.token = token


@dataclass(frozen=True)
class Caller:
    """The owner of a token, and the permissions of the token. A permission that is None has no limit."""

    name: str | None = None
    sessions: int | None = None  # maximum number of open sessions
    bundles: frozenset[str] | None = None
    _open: Counter[str | None] = field(default_factory=Counter, repr=False, compare=False)  # open sessions by owner
    _current: "Callable[[], Caller | None] | None" = field(default=None, repr=False, compare=False)

    def may_use(self, bundle: str) -> bool:
        """Return whether this caller has permission to use the bundle with a name."""
        return self.bundles is None or bundle in self.bundles

    def check_bundle(self, bundle: str) -> None:
        """Check that this caller has permission to use a bundle.

        Raises:
            Denied: It has none (PERMISSION_DENIED).
        """
        if not self.may_use(bundle):
            text = f"the token of {self.name} is not for the bundle {bundle}; ask the operator of this server"
            raise Denied(text, Status.PERMISSION_DENIED, "not enough")

    def check_current(self, bundle: str) -> None:
        """Check that the token of an open session is still accepted and still permits its bundle.

        Raises:
            Denied: The token was removed (UNAUTHENTICATED), or it no longer permits the bundle (PERMISSION_DENIED).
        """
        if self._current is not None:
            current = self._current()
            if current is None:
                raise Denied("this server no longer accepts the token", Status.UNAUTHENTICATED, "revoked")
            current.check_bundle(bundle)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Count one open session of this caller for the duration of the block.

        Raises:
            Denied: All sessions of the token are open (RESOURCE_EXHAUSTED).
        """
        if self.sessions is not None and self._open[self.name] >= self.sessions:
            text = f"all sessions of the token of {self.name} ({self.sessions}) are in use; end one or try again later"
            raise Denied(text, Status.RESOURCE_EXHAUSTED, "not enough")
        self._open[self.name] += 1
        try:
            yield
        finally:
            self._open[self.name] -= 1


ANONYMOUS = Caller()  # the caller if the server requires no tokens
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANONYMOUS)  # the caller of the call that a coroutine handles


class _Token(Strict):
    """An entry ``[[token]]`` of the file."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.@-]{1,64}$")]
    token: SecretStr
    sessions: int | None = Field(None, ge=1)
    bundles: list[str] | None = None


class Access:
    """The tokens of a file, which is read again when it changes. Only the digests of the tokens are kept."""

    def __init__(self, path: Path) -> None:
        """Read the tokens.

        Raises:
            InputError: The file cannot be read, or a token in it is invalid. The message quotes only names from the
                file, never a token.
        """
        self._open: Counter[str | None] = Counter()
        self._callers = Reloading([path], lambda: _read(path, self._open))

    def _find(self, digest: bytes) -> Caller | None:
        return dict(self._callers.get()).get(digest)

    def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Return the caller that the metadata of a call identify.

        Raises:
            Denied: The token is missing or unknown (UNAUTHENTICATED).
        """
        values = [value for key, value in metadata if key == "authorization"]
        scheme, _, token = values[0].partition(" ") if values and isinstance(values[0], str) else ("", "", "")
        if scheme.lower() != "bearer" or len(values) > 1:
            text = "this server requires a token in the metadata 'authorization: Bearer TOKEN'"
            raise Denied(text, Status.UNAUTHENTICATED, "missing")
        digest = sha256(token.encode()).digest()
        # The digest is compared with all others, so that the time reveals nothing about the known tokens.
        matches = [caller for other, caller in self._callers.get() if hmac.compare_digest(other, digest)]
        if not matches:
            raise Denied("this server does not know the token", Status.UNAUTHENTICATED, "unknown")
        return replace(matches[0], _current=lambda: self._find(digest))


def _read(path: Path, open_sessions: Counter[str | None]) -> list[tuple[bytes, Caller]]:
    """Read a file of tokens. Return the digest of each token with its caller."""
    try:
        content = read_secret(path, "tokens")
        if len(content) > _MAX_FILE_BYTES:
            raise InputError(f"{path}: is larger than {_MAX_FILE_BYTES >> 10} KiB; give a file with tokens")
        document = tomllib.loads(content.decode())
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text; give a TOML file") from None
    except RecursionError:
        raise InputError(f"{path}: is not valid TOML (it is nested too deeply)") from None
    except tomllib.TOMLDecodeError as error:
        # The rest of the parser's message can quote the file, and so a token.
        position = re.search(r"at line \d+, column \d+|at end of document", str(error))
        raise InputError(f"{path}: is not valid TOML ({position[0] if position else 'unknown position'})") from None
    except ValueError:  # the parser passes on what the interpreter says of a number with thousands of digits
        raise InputError(f"{path}: is not valid TOML (it has a value that cannot be read)") from None
    entries = document.get("token")
    if set(document) != {"token"} or not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: must contain one or more [[token]] and nothing else")
    callers: dict[bytes, Caller] = {}
    for number, entry in enumerate(entries, start=1):
        token = _check_token(entry, f"{path}: [[token]] number {number}")
        bundles = frozenset(token.bundles) if token.bundles is not None else None
        caller = Caller(token.name, token.sessions, bundles, open_sessions)
        if token.name in (other.name for other in callers.values()):
            raise InputError(f"{path}: the name {token.name} appears twice; give each token its own name")
        digest = sha256(token.token.get_secret_value().encode()).digest()
        if digest in callers:
            text = f"{path}: {token.name} has the token of {callers[digest].name}; give each name its own token"
            raise InputError(text)
        callers[digest] = caller
    return list(callers.items())


def _check_token(entry: object, where: str) -> _Token:
    try:
        token = _Token.model_validate(entry)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        key = fault["loc"][0] if fault["loc"] else ""
        if key not in _Token.model_fields:  # the unknown key can be the token itself, so it is not quoted
            raise InputError(f"{where}: can have only {', '.join(_Token.model_fields)}") from None
        raise InputError(f"{where}: {key}: {fault['msg']}") from None
    secret = token.token.get_secret_value()
    if len(secret) < _MIN_TOKEN_LENGTH or not re.fullmatch(r"[!-~]+", secret):
        text = f"must have at least {_MIN_TOKEN_LENGTH} ASCII characters without spaces"
        raise InputError(f"{where}: token: {text}; openssl rand -base64 32 creates one")
    return token
