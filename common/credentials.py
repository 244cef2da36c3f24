"""Tokens, certificates and keys in files: read and checked, so that a bad one is told before anything is started."""

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
    """What one end of a connection shows of itself: its certificates, its own first, and the private key, in PEM."""

    certificates: bytes
    key: bytes = field(repr=False)


def read_secret(path: Path, what: str) -> bytes:
    """The content of a file that only its owner should be able to read; warns where others can.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    content = _read(path, what)
    if os.name == "posix" and path.stat().st_mode & stat.S_IROTH:
        warn(f"{path}: every user of this machine can read it; chmod 600 it")
    return content


def read_identity(certificate_file: Path, key_file: Path) -> Identity:
    """A certificate, with those that vouch for it if they follow in the file, and its key.

    Raises:
        InputError: a file cannot be read or holds something else, they do not belong together, or the certificate is
            not valid now.
    """
    certificates = _read(certificate_file, "a certificate in PEM")
    certificate = _certificates(certificates, certificate_file)[0]
    _check_dates(certificate, certificate_file)
    key = read_secret(key_file, "a private key in PEM")
    try:
        private = load_pem_private_key(key, None)
    except TypeError:
        raise InputError(f"{key_file}: the key has a passphrase; give it without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{key_file}: holds no private key in PEM") from None
    if private.public_key() != certificate.public_key():
        raise InputError(f"{key_file}: is not the key of the certificate in {certificate_file}")
    # What TLS libraries agree on.
    curve = private.curve.name if isinstance(private, ec.EllipticCurvePrivateKey) else ""
    if curve not in ("secp256r1", "secp384r1") and not isinstance(private, rsa.RSAPrivateKey):
        raise InputError(f"{key_file}: must be an RSA key, or one on the elliptic curve P-256 or P-384")
    return Identity(certificates, key)


def read_authorities(path: Path) -> bytes:
    """Certificates in PEM, of those whose word is taken for other certificates.

    Raises:
        InputError: the file cannot be read, holds something else, or a certificate in it is not valid now.
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
        raise InputError(f"{path}: holds no certificate in PEM") from None


def _check_dates(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise InputError(f"{path}: the certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d}; renew it")
    if now < certificate.not_valid_before_utc:
        start = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        raise InputError(f"{path}: the certificate is not valid before {start}; is this machine's clock right?")
