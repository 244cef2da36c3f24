"""Certificates and tokens for tests, made when they are needed."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import grpc
import trustme

PAST = datetime(2020, 1, 1, tzinfo=UTC)
# Of the tokens file, by name.
TOKENS = {
    "laptop": "laptop-0123456789-9fGkq2",
    "single": "single-0123456789-Ab3kZx",
    "elsewhere": "elsewhere-0123456789-Qw7",
}
TOKENS_FILE = f"""
[[token]]
name = "laptop"
token = "{TOKENS["laptop"]}"

[[token]]
name = "single"
token = "{TOKENS["single"]}"
sessions = 1

[[token]]
name = "elsewhere"
token = "{TOKENS["elsewhere"]}"
bundles = ["another-bundle"]
"""


@dataclass(frozen=True)
class Certificates:
    """A folder of PEM files: NAME.pem and NAME.key of each that has been issued, and the two authorities'."""

    folder: Path
    authority: trustme.CA
    foreign: trustme.CA

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    @property
    def foreign_ca(self) -> Path:
        return self.folder / "foreign-ca.pem"

    def pair(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def issue(
        self, name: str, *hosts: str, authority: trustme.CA | None = None, not_after: datetime | None = None
    ) -> tuple[Path, Path]:
        leaf = (authority or self.authority).issue_cert(*hosts, not_before=datetime(2000, 1, 1), not_after=not_after)
        certificate, key = self.pair(name)
        certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        key.touch(0o600)
        key.write_bytes(leaf.private_key_pem.bytes())
        return certificate, key


def make_certificates(folder: Path) -> Certificates:
    """Of a server on loopback, of devices, and of others that should not be accepted."""
    made = Certificates(folder, trustme.CA(), trustme.CA())
    made.authority.cert_pem.write_to_path(made.ca)
    made.foreign.cert_pem.write_to_path(made.foreign_ca)
    made.issue("server", "localhost", "127.0.0.1")
    made.issue("device", "device")
    made.issue("foreign-device", "device", authority=made.foreign)
    made.issue("expired-device", "device", not_after=PAST)
    made.issue("expired", "localhost", "127.0.0.1", not_after=PAST)
    made.issue("other-name", "elsewhere.example")
    return made


def write_private(path: Path, content: str) -> Path:
    path.touch(0o600)
    path.write_text(content)
    return path


def channel(address: str, authority: Path, identity: tuple[Path, Path] | None = None) -> grpc.Channel:
    """An encrypted connection of its own."""
    certificate, key = (path.read_bytes() for path in identity) if identity is not None else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.read_bytes(), key, certificate)
    return grpc.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)])


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
