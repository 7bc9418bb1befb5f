"""Certificates of the picker's ports: from files, read again when they change, or self-signed."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import ssl
import tempfile
from pathlib import Path

from pointsman.errors import SettingsError

log = logging.getLogger(__name__)

RELOAD_S = 5.0
"""How often the files are looked at; those who renew certificates do so hours before the old ones end."""
_VALID = datetime.timedelta(days=3650)


class Certificate:
    """A certificate chain and key in PEM files, and the TLS context of servers that use them."""

    def __init__(self, chain: Path, key: Path) -> None:
        self._chain = chain
        self._key = key
        self.context = _context(chain, key)
        self._seen = self._marks()

    def reload(self) -> bool:
        """Use the files as they are now, for new connections; whether they have changed.

        Files that do not fit together, as while they are being replaced, leave everything as it was.
        """
        marks = self._marks()
        if marks == self._seen or None in marks:
            return False
        try:
            _context(self._chain, self._key)  # a failure must not leave a new certificate with an old key
            self.context.load_cert_chain(self._chain, self._key)
        except (SettingsError, OSError, ssl.SSLError) as exc:
            log.warning("the certificate cannot be read again, the old one stays: %s", exc)
            return False
        self._seen = marks
        log.info("the certificate has been read again")
        return True

    async def run(self) -> None:
        """Watch the files, until cancelled."""
        while True:
            await asyncio.sleep(RELOAD_S)
            self.reload()

    def _marks(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes when a file is written or replaced."""
        return tuple(map(_mark, (self._chain, self._key)))


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def from_directory(directory: Path) -> Certificate:
    """``tls.crt`` and ``tls.key``, as a Kubernetes secret is mounted."""
    return Certificate(directory / "tls.crt", directory / "tls.key")


def _context(chain: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(chain, key)
    except (OSError, ssl.SSLError) as exc:
        raise SettingsError(f"{chain}, {key}: cannot be used as certificate and key: {exc}") from exc
    return context


def self_signed(name: str = "localhost") -> ssl.SSLContext:
    """A context with a throw-away certificate: encrypts, and proves nothing."""
    with tempfile.TemporaryDirectory() as directory:
        chain, key = Path(directory, "tls.crt"), Path(directory, "tls.key")
        write_self_signed(chain, key, name)
        return _context(chain, key)


def write_self_signed(chain: Path, key: Path, name: str = "localhost") -> None:
    """Write a new certificate and its key; only their owner may read the key."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as exc:
        raise SettingsError(
            "--secure-serving without --cert-path: a self-signed certificate needs another package; "
            "pip install 'pointsman[picker]'"
        ) from exc
    secret = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(secret.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + _VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(secret, hashes.SHA256())
    )
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem = secret.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with open(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(pem)
