"""The TLS credentials of the server."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from knowledge_boosting.common.credentials import read_authorities, read_identity
from knowledge_boosting.remote_server.core.reloading import Reloading


@dataclass(frozen=True)
class TlsFiles:
    """The PEM files for TLS."""

    certificate: Path
    key: Path
    client_authorities: Path | None = None  # authorities for client certificates; None: no client certificate is needed

    def credentials(self) -> grpc.ServerCredentials:
        """Return credentials that follow changes of the files: new connections use their current content.

        Raises:
            InputError: A file cannot be used.
        """
        paths = [path for path in (self.certificate, self.key, self.client_authorities) if path is not None]
        files = Reloading(paths, self._read)
        current = files.get()

        def changed_configuration() -> "grpc.ServerCertificateConfiguration | None":
            nonlocal current
            previous, current = current, files.get()
            return current if current is not previous else None

        return grpc.dynamic_ssl_server_credentials(
            current,
            changed_configuration,  # type: ignore[arg-type] # the stubs do not allow None, which means no change
            require_client_authentication=self.client_authorities is not None,
        )

    def _read(self) -> "grpc.ServerCertificateConfiguration":
        identity = read_identity(self.certificate, self.key)
        authorities = read_authorities(self.client_authorities) if self.client_authorities is not None else None
        return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificates)], authorities)
