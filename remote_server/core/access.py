"""Who may call: bearer tokens from a file, and what each of them allows."""

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

_SHORTEST_TOKEN = 16  # characters
_LARGEST_FILE = 2**18  # bytes; a thousand tokens and more


class Denied(Refused):
    """A call that its caller may not make."""

    def __init__(self, text: str, status: Status, token: str) -> None:
        """``token`` says what is wrong with it: ``missing``, ``unknown``, ``revoked``, or ``not enough``."""
        super().__init__(text, status)
        self.token = token


@dataclass(frozen=True)
class Caller:
    """Whose token a call came with, and what it allows; None: everything."""

    name: str | None = None
    sessions: int | None = None  # most at once
    bundles: frozenset[str] | None = None
    _open: Counter[str | None] = field(default_factory=Counter, repr=False, compare=False)
    _now: "Callable[[], Caller | None] | None" = field(default=None, repr=False, compare=False)  # of the token

    def may_use(self, bundle: str) -> bool:
        """Whether this caller may use a bundle of that name."""
        return self.bundles is None or bundle in self.bundles

    def check_bundle(self, bundle: str) -> None:
        """Refuse a bundle that this caller may not use.

        Raises:
            Denied: not: PERMISSION_DENIED.
        """
        if not self.may_use(bundle):
            text = f"the token of {self.name} is not for the bundle {bundle}; ask whoever runs this server"
            raise Denied(text, Status.PERMISSION_DENIED, "not enough")

    def check_still(self, bundle: str) -> None:
        """Refuse a session that goes on when its token has been taken away, or is for other bundles now.

        Raises:
            Denied: UNAUTHENTICATED, or as :meth:`check_bundle`.
        """
        if self._now is not None:
            now = self._now()
            if now is None:
                raise Denied("this server does not know the token any more", Status.UNAUTHENTICATED, "revoked")
            now.check_bundle(bundle)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Count one session of this caller as long as the block lasts.

        Raises:
            Denied: it has all its token allows: RESOURCE_EXHAUSTED.
        """
        if self.sessions is not None and self._open[self.name] >= self.sessions:
            text = f"all sessions of the token of {self.name} ({self.sessions}) are taken; end one, or try again later"
            raise Denied(text, Status.RESOURCE_EXHAUSTED, "not enough")
        self._open[self.name] += 1
        try:
            yield
        finally:
            self._open[self.name] -= 1


ANYBODY = Caller()  # where a server has no tokens
CALLER: ContextVar[Caller] = ContextVar("caller", default=ANYBODY)  # of the call that a coroutine answers


class _Token(Strict):
    """A ``[[token]]`` of the file."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.@-]{1,64}$")]
    token: SecretStr
    sessions: int | None = Field(None, ge=1)
    bundles: list[str] | None = None


class Access:
    """The tokens of a file, read again when it changes. Only their digests are kept."""

    def __init__(self, path: Path) -> None:
        """Read the tokens.

        Raises:
            InputError: the file cannot be read, or a token in it not be used. The text has nothing of the content but
                names.
        """
        self._open: Counter[str | None] = Counter()
        self._callers = Reloading([path], lambda: _read(path, self._open))

    def _of(self, digest: bytes) -> Caller | None:
        return dict(self._callers.get()).get(digest)

    def caller(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Whom a call is from, by its metadata.

        Raises:
            Denied: it has no token, or one that is not known: UNAUTHENTICATED.
        """
        given = [value for key, value in metadata if key == "authorization"]
        scheme, _, token = given[0].partition(" ") if given and isinstance(given[0], str) else ("", "", "")
        if scheme.lower() != "bearer" or len(given) > 1:
            text = "this server wants a token, in the metadata 'authorization: Bearer TOKEN'"
            raise Denied(text, Status.UNAUTHENTICATED, "missing")
        digest = sha256(token.encode()).digest()
        # All are compared, so that the time it takes tells nothing of where, or whether, one fits.
        known = [caller for other, caller in self._callers.get() if hmac.compare_digest(other, digest)]
        if not known:
            raise Denied("this server does not know the token", Status.UNAUTHENTICATED, "unknown")
        return replace(known[0], _now=lambda: self._of(digest))


def _read(path: Path, open_sessions: Counter[str | None]) -> list[tuple[bytes, Caller]]:
    """Callers by their tokens' digests."""
    try:
        content = read_secret(path, "tokens")
        if len(content) > _LARGEST_FILE:
            raise InputError(f"{path}: is larger than {_LARGEST_FILE >> 10} KiB; give a file of tokens")
        document = tomllib.loads(content.decode())
    except UnicodeDecodeError:
        raise InputError(f"{path}: is no text in UTF-8") from None
    except RecursionError:
        raise InputError(f"{path}: is no TOML (it is nested too deep)") from None
    except tomllib.TOMLDecodeError as error:
        # The rest of the parser's text can quote the file.
        where = re.search(r"at line \d+, column \d+|at end of document", str(error))
        raise InputError(f"{path}: is no TOML ({where[0] if where else 'somewhere'})") from None
    entries = document.get("token")
    if set(document) != {"token"} or not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: must hold one or more [[token]] and nothing else")
    callers: dict[bytes, Caller] = {}
    for number, entry in enumerate(entries, start=1):
        token = _check_token(entry, f"{path}: [[token]] number {number}")
        bundles = frozenset(token.bundles) if token.bundles is not None else None
        caller = Caller(token.name, token.sessions, bundles, open_sessions)
        if token.name in (other.name for other in callers.values()):
            raise InputError(f"{path}: the name {token.name} is there twice; each token needs one of its own")
        digest = sha256(token.token.get_secret_value().encode()).digest()
        if digest in callers:
            raise InputError(f"{path}: {token.name} has the token of {callers[digest].name}; each needs one of its own")
        callers[digest] = caller
    return list(callers.items())


def _check_token(entry: object, where: str) -> _Token:
    try:
        token = _Token.model_validate(entry)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        key = fault["loc"][0] if fault["loc"] else ""
        if key not in _Token.model_fields:  # somebody may have put the token itself there
            raise InputError(f"{where}: may have {', '.join(_Token.model_fields)}, and nothing else") from None
        raise InputError(f"{where}: {key}: {fault['msg']}") from None
    secret = token.token.get_secret_value()
    if len(secret) < _SHORTEST_TOKEN or not re.fullmatch(r"[!-~]+", secret):
        text = (
            f"must have {_SHORTEST_TOKEN} characters or more, of ASCII and no spaces; openssl rand -base64 32 makes one"
        )
        raise InputError(f"{where}: token: {text}")
    return token
