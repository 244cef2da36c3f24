"""Read and check tokens, certificates and keys in files, so that a bad file is reported before anything is started."""

import os
import stat
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from knowledge_boosting.common.cli import warn
from knowledge_boosting.common.errors import InputError, existing_file, reason


@dataclass(frozen=True)
class Identity:
    """The certificate chain with which one end of a connection identifies itself, and the private key."""

    certificates: bytes  # PEM, its own certificate first
    key: bytes = field(repr=False)  # PEM


def read_secret(path: Path, what: str) -> bytes:
    """Read a file that only its owner should be able to read. Print a warning if all users can read it.

    Args:
        path: The path of the file.
        what: What the file contains, for error messages.

    Raises:
        InputError: The file does not exist or cannot be read.
    """
    content = _read(path, what)
    if os.name == "posix" and path.stat().st_mode & stat.S_IROTH:
        warn(f"{path}: every user of this machine can read it; run chmod 600 on it")
    return content


def read_identity(certificate_file: Path, key_file: Path) -> Identity:
    """Read a certificate and its private key. Intermediate certificates can follow in the same file.

    Raises:
        InputError: A file cannot be read or contains something else, the key is not that of the certificate, or the
            certificate is not valid now.
    """
    certificates = _read(certificate_file, "a certificate in PEM")
    certificate = _certificates(certificates, certificate_file)[0]
    _check_dates(certificate, certificate_file)
    key = read_secret(key_file, "a private key in PEM")
    try:
        private = load_pem_private_key(key, None)
    except TypeError:
        raise InputError(f"{key_file}: the key has a passphrase; give a key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{key_file}: contains no private key in PEM") from None
    if private.public_key() != certificate.public_key():
        raise InputError(f"{key_file}: is not the key of the certificate in {certificate_file}")
    # All TLS libraries support these key types.
    curve = private.curve.name if isinstance(private, ec.EllipticCurvePrivateKey) else ""
    if curve not in ("secp256r1", "secp384r1") and not isinstance(private, rsa.RSAPrivateKey):
        raise InputError(f"{key_file}: must be an RSA key or a key on the elliptic curve P-256 or P-384")
    return Identity(certificates, key)


def read_authorities(path: Path) -> bytes:
    """Read the certificates of trusted authorities, in PEM.

    Raises:
        InputError: The file cannot be read or contains something else, or a certificate in it is not valid now.
    """
    content = _read(path, "a certificate in PEM")
    for certificate in _certificates(content, path):
        _check_dates(certificate, path)
    return content


def _read(path: Path, what: str) -> bytes:
    try:
        return existing_file(path, what).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None


def _certificates(content: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise InputError(f"{path}: contains no certificate in PEM") from None


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise InputError(f"{path}: the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}; renew it")
    if now < certificate.not_valid_before_utc:
        start = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        raise InputError(f"{path}: the certificate is not valid before {start}; check the clock of this machine")
