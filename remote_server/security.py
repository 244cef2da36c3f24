"""What keeps strangers out of a server: the flags that say so, checked together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from knowledge_boosting.common.addresses import is_loopback
from knowledge_boosting.common.cli import warn
from knowledge_boosting.common.errors import InputError
from knowledge_boosting.remote_server.core.access import Access
from knowledge_boosting.remote_server.core.refusals import Refused
from knowledge_boosting.remote_server.guard import Guard
from knowledge_boosting.remote_server.tls import TlsFiles


@dataclass(frozen=True)
class Security:
    """How a server is reached, and by whom."""

    access: Access | None
    credentials: grpc.ServerCredentials | None  # of TLS
    reflection: bool

    def interceptors(self, refused: Callable[[str, str, Refused], None]) -> list[grpc.aio.ServerInterceptor]:
        """What stands before every call; ``refused`` gets peer, method and reason of those it stops."""
        return [Guard(self.access, refused)] if self.access is not None else []

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Have a server listen on an address; the port it got.

        Raises:
            RuntimeError: it cannot have that address.
        """
        if self.credentials is not None:
            return server.add_secure_port(address, self.credentials)
        return server.add_insecure_port(address)


def check_security(
    host: str,
    *,
    auth_tokens: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    tls_client_ca: Path | None = None,
    insecure: bool = False,
    reflection: bool | None = None,
) -> Security:
    """The flags of ``kb-server`` for a host to listen on; warns of what they leave open.

    Args:
        reflection: None: only for callers of this machine.

    Raises:
        InputError: a file cannot be used, flags are missing, or other machines could connect without encryption.
    """
    local = is_loopback(host)
    tls = None
    if tls_cert is not None and tls_key is not None:
        tls = TlsFiles(tls_cert, tls_key, tls_client_ca)
    elif tls_cert is not None or tls_key is not None or tls_client_ca is not None:
        raise InputError("TLS needs both --tls-cert and --tls-key; give the certificate and its key")
    if tls is not None and insecure:
        raise InputError("--insecure: is for a server without TLS; leave it out")
    if tls is None and not local and not insecure:
        raise InputError(
            f"--host {host}: other machines could connect without encryption; give --tls-cert and --tls-key, "
            "or --insecure on a network you trust"
        )
    access = Access(auth_tokens) if auth_tokens is not None else None
    credentials = tls.credentials() if tls is not None else None
    if tls is None and not local:
        missing = "encryption" if access is not None else "encryption or authentication"
        warn(f"listening on {host} without {missing}; use it only on a network you trust")
    elif not local and access is None and tls_client_ca is None:
        warn(f"whoever can reach {host} can use this server; give --auth-tokens or --tls-client-ca")
    return Security(access, credentials, local if reflection is None else reflection)
