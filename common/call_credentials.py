"""The TLS settings and the token with which a client calls a server."""

import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from knowledge_boosting.common.addresses import is_loopback, split_address
from knowledge_boosting.common.credentials import Identity, read_authorities, read_identity, read_secret
from knowledge_boosting.common.errors import InputError

TOKEN_VARIABLE = "KB_TOKEN"
_PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Credentials:
    """The TLS settings and the token for calls to a server. The default is plain TCP without a token."""

    tls: bool = False
    authorities: bytes | None = None  # certificates of the trusted authorities, PEM; None: those built into gRPC
    identity: Identity | None = None  # for mutual TLS
    identity_files: tuple[Path, Path] | None = None  # the certificate and key files of the identity
    token: str | None = field(default=None, repr=False)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The gRPC metadata that every call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token is not None else ()

    def check(self, server: str) -> None:
        """Check that these credentials can be used with a server ``HOST:PORT``.

        Raises:
            InputError: The address is malformed, or the token would be sent to another machine without encryption.
        """
        host, _ = split_address(server)
        if self.token is not None and not self.tls and not is_loopback(host):
            raise InputError(f"--server {server}: the token would be sent unencrypted; give --tls or --tls-ca FILE")


def read_credentials(
    servers: Sequence[str],
    *,
    tls: bool = False,
    tls_ca: _PathLike | None = None,
    tls_cert: _PathLike | None = None,
    tls_key: _PathLike | None = None,
    token_file: _PathLike | None = None,
) -> Credentials:
    """Read the credentials for calls to servers.

    Args:
        servers: Their addresses, each ``HOST:PORT``.
        tls: Whether to encrypt. The flags ``tls_ca`` and ``tls_cert`` imply it.
        tls_ca: PEM file of the trusted certificates. None: those that this machine trusts.
        tls_cert: PEM file of the client's certificate, for mutual TLS.
        tls_key: PEM file of its private key.
        token_file: File with the token. None: the environment variable ``KB_TOKEN``, if it is set.

    Raises:
        InputError: A file cannot be used, the flags contradict each other, or they cannot be used with a server.
    """
    flags = {"--tls": tls, "--tls-ca": tls_ca, "--tls-cert": tls_cert, "--tls-key": tls_key, "--token-file": token_file}
    used = [flag for flag, value in flags.items() if value]
    if not servers:
        if used:
            raise InputError(f"{used[0]}: needs a server; give --server HOST:PORT too")
        return Credentials()
    identity, identity_files = None, None
    if tls_cert is not None and tls_key is not None:
        identity_files = (Path(tls_cert), Path(tls_key))
        identity = read_identity(*identity_files)
    elif tls_cert is not None or tls_key is not None:
        raise InputError("a client certificate needs its private key; give both --tls-cert and --tls-key")
    encrypted = tls or tls_ca is not None or identity is not None
    authorities = None
    if encrypted:
        authorities = read_authorities(Path(tls_ca)) if tls_ca is not None else _system_authorities()
    token = _token(Path(token_file) if token_file is not None else None)
    credentials = Credentials(encrypted, authorities, identity, identity_files, token)
    for server in servers:
        credentials.check(server)
    return credentials


def _token(file: Path | None) -> str | None:
    if file is not None:
        token, source = read_secret(file, "a token").decode(errors="replace").strip(), str(file)
    else:
        token, source = os.environ.get(TOKEN_VARIABLE, "").strip(), TOKEN_VARIABLE
        if not token:
            return None
    if not re.fullmatch(r"[!-~]+", token):
        raise InputError(f"{source}: must contain only the token: one line of ASCII characters without spaces")
    return token


def _system_authorities() -> bytes | None:
    """Return the certificates that this machine trusts, in PEM. None if they cannot be found."""
    certificates = ssl.create_default_context().get_ca_certs(binary_form=True)
    if certificates:
        return "".join(map(ssl.DER_cert_to_PEM_cert, certificates)).encode()
    # OpenSSL reads a folder of certificates, named by their digests, only on demand, so they are not listed above.
    folder = ssl.get_default_verify_paths().capath
    files = sorted(Path(folder).glob("*.[0-9]")) if folder is not None else []
    return b"\n".join(file.read_bytes() for file in files if file.is_file()) or None
