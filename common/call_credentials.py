"""How a device knows its server, and shows who it is: the flags for that, and the files they name."""

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


@dataclass(frozen=True)
class Credentials:
    """What calls to a server go with; at first nothing, over plain TCP."""

    tls: bool = False
    authorities: bytes | None = None  # PEM, of those that vouch for the server; None: those gRPC brings along
    identity: Identity | None = None  # for mutual TLS
    identity_files: tuple[Path, Path] | None = None  # where it is from
    token: str | None = field(default=None, repr=False)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return (("authorization", f"Bearer {self.token}"),) if self.token is not None else ()

    def check(self, server: str) -> None:
        """Whether they can be used with a server ``HOST:PORT``.

        Raises:
            InputError: the address is malformed, or a token would go to another machine unencrypted.
        """
        host, _ = split_address(server)
        if self.token is not None and not self.tls and not is_loopback(host):
            raise InputError(f"--server {server}: the token would travel unencrypted; give --tls, or --tls-ca FILE")


def read_credentials(
    servers: Sequence[str],
    *,
    tls: bool = False,
    tls_ca: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    token_file: Path | None = None,
) -> Credentials:
    """The flags of the commands that take ``--server``, and the token in ``KB_TOKEN`` if no file is given.

    Raises:
        InputError: a file cannot be used, flags do not fit each other, or a server does not fit them.
    """
    flags = {"--tls": tls, "--tls-ca": tls_ca, "--tls-cert": tls_cert, "--tls-key": tls_key, "--token-file": token_file}
    given = [flag for flag, value in flags.items() if value]
    if not servers:
        if given:
            raise InputError(f"{given[0]}: is for a server; give --server HOST:PORT too")
        return Credentials()
    identity, identity_files = None, None
    if tls_cert is not None and tls_key is not None:
        identity_files = (tls_cert, tls_key)
        identity = read_identity(*identity_files)
    elif tls_cert is not None or tls_key is not None:
        raise InputError("a certificate and its key belong together; give both --tls-cert and --tls-key")
    encrypted = tls or tls_ca is not None or identity is not None
    authorities = None
    if encrypted:
        authorities = read_authorities(tls_ca) if tls_ca is not None else _system_authorities()
    credentials = Credentials(encrypted, authorities, identity, identity_files, _token(token_file))
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
        raise InputError(f"{source}: must hold a token and nothing else: ASCII without spaces, on one line")
    return token


def _system_authorities() -> bytes | None:
    """Whom this machine trusts, in PEM; None if that cannot be found out."""
    certificates = ssl.create_default_context().get_ca_certs(binary_form=True)
    if certificates:
        return "".join(map(ssl.DER_cert_to_PEM_cert, certificates)).encode()
    # A folder of certificates, named by their digests, is only looked into when one is needed.
    folder = ssl.get_default_verify_paths().capath
    files = sorted(Path(folder).glob("*.[0-9]")) if folder is not None else []
    return b"\n".join(file.read_bytes() for file in files if file.is_file()) or None
