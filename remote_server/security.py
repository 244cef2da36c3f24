"""Check the security flags of ``kb-server`` together: encryption, tokens and client certificates."""

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
    """The security settings of a server."""

    access: Access | None  # None: no tokens are required
    credentials: grpc.ServerCredentials | None  # for TLS; None: no encryption
    reflection: bool

    def interceptors(self, refused: Callable[[str, str, Refused], None]) -> list[grpc.aio.ServerInterceptor]:
        """Return the interceptors of all calls. ``refused`` is called as for :class:`Guard`."""
        return [Guard(self.access, refused)] if self.access is not None else []

    def add_port(self, server: grpc.aio.Server, address: str) -> int:
        """Make a server listen on an address, and return its port.

        Raises:
            RuntimeError: The server cannot listen on that address.
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
    """Check the security flags of ``kb-server``, and print a warning if they leave the server open.

    Args:
        host: The address on which the server listens.
        auth_tokens: TOML file with the accepted tokens.
        tls_cert: PEM file of the server's certificate.
        tls_key: PEM file of its private key.
        tls_client_ca: PEM file of the authority that issues client certificates.
        insecure: Whether other machines can connect without encryption.
        reflection: Whether to provide gRPC reflection. None: only on a loopback address.

    Raises:
        InputError: A file cannot be used, flags are missing, or other machines could connect without encryption.
    """
    local = is_loopback(host)
    tls = None
    if tls_cert is not None and tls_key is not None:
        tls = TlsFiles(tls_cert, tls_key, tls_client_ca)
    elif tls_cert is not None or tls_key is not None or tls_client_ca is not None:
        raise InputError("TLS needs both --tls-cert and --tls-key; give the certificate and its key")
    if tls is not None and insecure:
        raise InputError("--insecure: contradicts the TLS flags; leave it out")
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
        warn(f"everyone who can reach {host} can use this server; give --auth-tokens or --tls-client-ca")
    return Security(access, credentials, local if reflection is None else reflection)
