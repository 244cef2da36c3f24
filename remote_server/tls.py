"""The server's end of TLS."""

from dataclasses import dataclass
from pathlib import Path

import grpc

from knowledge_boosting.common.credentials import read_authorities, read_identity
from knowledge_boosting.remote_server.core.reloading import Reloading


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: the server's certificate and key, and whose word is taken for those of devices, if they need one."""

    certificate: Path
    key: Path
    client_authorities: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """What a port is opened with. New connections get what the files hold then.

        Raises:
            InputError: a file cannot be used.
        """
        paths = [path for path in (self.certificate, self.key, self.client_authorities) if path is not None]
        files = Reloading(paths, self._read)
        current = files.get()

        def newer() -> "grpc.ServerCertificateConfiguration | None":
            nonlocal current
            before, current = current, files.get()
            return current if current is not before else None

        return grpc.dynamic_ssl_server_credentials(
            current,
            newer,  # type: ignore[arg-type] # the stubs do not know that None stands for no change
            require_client_authentication=self.client_authorities is not None,
        )

    def _read(self) -> "grpc.ServerCertificateConfiguration":
        identity = read_identity(self.certificate, self.key)
        authorities = read_authorities(self.client_authorities) if self.client_authorities is not None else None
        return grpc.ssl_server_certificate_configuration([(identity.key, identity.certificates)], authorities)
