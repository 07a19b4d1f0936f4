"""The certificate of a replica: read from files, and again when they change, or made for development."""

from __future__ import annotations

import errno
import fcntl
import ipaddress
import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .config import WebTransportSettings
from .errors import ConfigError
from .observability.loggers import get_logger
from .webtransport import ConnectionLimits, WebTransportConfiguration, server_configuration

logger = get_logger("catbus.certificates")

DEVELOPMENT_FILE = "development-certificate.pem"
"""The file with key and certificate. With one file, no crash and no other process can separate them."""

LIFETIME = timedelta(days=12)
"""The validity of a development certificate. Browsers accept one by its hash only up to 14 days."""

RENEWAL_MARGIN = timedelta(days=2)
"""A development certificate is renewed when it expires within this time."""

CHECK_INTERVAL = timedelta(seconds=1)
"""The minimum time between two checks for changed files."""

_BACKDATED = timedelta(hours=1)  # for clients with a slow clock
_BEGIN = "-----BEGIN CERTIFICATE-----"
_NAMES = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate with its private key, both PEM. `sha256` is the hash of its DER form."""

    certificate_pem: str
    key_pem: str = field(repr=False)
    sha256: bytes
    expires: datetime


# The development certificate.


def development_certificate(directory: Path, now: datetime) -> Certificate:
    """Return the self-signed certificate in `directory`, and make it if it is missing or expires soon.

    Concurrent calls, also in other processes, return the same one. Raises `ConfigError` if it cannot be stored.
    """
    try:
        # Mostly it exists, and then nothing is written, and no lock is needed.
        if kept := _read_kept(directory, now):
            return kept
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory):
            if kept := _read_kept(directory, now):
                return kept
            made = _make(now)
            _replace(directory, made)
    except OSError as error:
        raise ConfigError(
            f"{directory}: a development certificate cannot be stored here: {error.strerror}; set CATBUS_STATE to a "
            "directory that can be written, or CATBUS_CERT and CATBUS_KEY to a certificate and its key"
        ) from None
    logger.info("created a development certificate", sha256=made.sha256.hex(), expires=made.expires.isoformat())
    return made


def _is_fresh(expires: datetime, now: datetime) -> bool:
    # The upper bound is for a clock that was fast: such a certificate is not valid yet.
    return RENEWAL_MARGIN <= expires - now <= LIFETIME


def _read_kept(directory: Path, now: datetime) -> Certificate | None:
    """Return the stored certificate if it is valid long enough and equals those that `_make` makes."""
    try:
        with (directory / DEVELOPMENT_FILE).open(encoding="ascii") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                os.fchmod(file.fileno(), 0o600)
            text = file.read(65_536)
        key_pem, _, rest = text.partition(_BEGIN)
        kept = x509.load_pem_x509_certificate((_BEGIN + rest).encode())
        key = serialization.load_pem_private_key(key_pem.encode(), None)
        ours = (
            isinstance(key, ec.EllipticCurvePrivateKey)
            and isinstance(key.curve, ec.SECP256R1)
            and key.public_key() == kept.public_key()
            and kept.not_valid_after_utc - kept.not_valid_before_utc == LIFETIME
            and not kept.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        )
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # The file may exist.
        return None
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.ExtensionNotFound):
        return None
    return _certificate(kept, key_pem) if ours and _is_fresh(kept.not_valid_after_utc, now) else None


def _make(now: datetime) -> Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "catbus development")])
    start = now.astimezone(UTC).replace(microsecond=0) - _BACKDATED
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + LIFETIME)
        .add_extension(x509.SubjectAlternativeName(_NAMES), critical=False)
        # rustls refuses the certificate of an authority as that of a server. OpenSSL, aioquic and rustls all accept a
        # self-signed certificate that is no authority from a client that loads it as its only trusted one.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return _certificate(made, pem.decode())


def _certificate(certificate: x509.Certificate, key_pem: str) -> Certificate:
    return Certificate(
        certificate.public_bytes(serialization.Encoding.PEM).decode(),
        key_pem,
        certificate.fingerprint(hashes.SHA256()),
        certificate.not_valid_after_utc,
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    # The lock ends with the descriptor, so also with the process. The file stays, because a lock on a file that others
    # delete and create again would exclude nobody.
    handle = os.open(directory / f".{DEVELOPMENT_FILE}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(directory: Path, certificate: Certificate) -> None:
    # A temporary file has mode 0600 from the start. If a power cut leaves it empty, a new one is made, so no fsync.
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{DEVELOPMENT_FILE}-")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(certificate.key_pem + certificate.certificate_pem)
        Path(temporary).replace(directory / DEVELOPMENT_FILE)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


# The credentials of new connections.

_Stamp = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Credentials:
    """One certificate, as QUIC and TLS over TCP use it."""

    quic: WebTransportConfiguration
    tls: ssl.SSLContext

    @property
    def expires(self) -> datetime:
        certificate = self.quic.quic.certificate
        assert certificate is not None
        expires: datetime = certificate.not_valid_after_utc
        return expires


class CertificateSource:
    """The current credentials for new connections.

    They come from the files in `settings`, which are read again when they change, or from the development certificate
    in `directory`, which is renewed before it expires. If new credentials are invalid, the old ones stay in use. Raises
    `ConfigError` if the first ones are invalid.
    """

    def __init__(
        self, settings: WebTransportSettings, directory: Path, now: datetime, limits: ConnectionLimits | None = None
    ) -> None:
        self._directory = directory
        self._limits = limits
        self._files = (Path(settings.cert), Path(settings.key)) if settings.cert and settings.key else None
        self._stamp: _Stamp | None = None
        self._development: Certificate | None = None
        self._last_error: str | None = None
        self._checked = now
        self._credentials = self._load(now)

    def credentials(self, now: datetime) -> Credentials:
        """Return the credentials for a connection that begins now. Checks the files at most once per second."""
        # Also check after the clock was set back.
        if not timedelta(0) <= now - self._checked < CHECK_INTERVAL:
            self._checked = now
            self._refresh(now)
        return self._credentials

    def current(self, now: datetime) -> WebTransportConfiguration:
        """Return the configuration for a QUIC connection that begins now."""
        return self.credentials(now).quic

    def latest_quic(self) -> WebTransportConfiguration:
        """Return the configuration for a QUIC connection, by the system's clock."""
        return self.current(datetime.now(UTC))

    def latest_tls(self) -> ssl.SSLContext:
        """Return the context for a TLS connection, by the system's clock."""
        return self.credentials(datetime.now(UTC)).tls

    def reload(self, now: datetime) -> None:
        """Read the files again, even if they seem unchanged, and log the result."""
        self._last_error = None
        self._checked = now
        self._refresh(now, anew=True)

    def development(self, now: datetime) -> Certificate | None:
        """Return the development certificate in use, or None if the certificate comes from files."""
        self.current(now)
        return self._development

    def _refresh(self, now: datetime, *, anew: bool = False) -> None:
        try:
            if anew or not self._is_current(now):
                self._credentials = self._load(now)
                logger.info("loaded a new certificate", expires=self._credentials.expires.isoformat())
            self._last_error = None
        except ConfigError as error:
            if str(error) != self._last_error:
                self._last_error = str(error)
                logger.warning("a new certificate cannot be used, the old one stays", reason=self._last_error)

    def _is_current(self, now: datetime) -> bool:
        if self._files:
            return self._stamp == _stamp(*self._files)
        return self._development is not None and _is_fresh(self._development.expires, now)

    def _load(self, now: datetime) -> Credentials:
        if self._files is None:
            made = development_certificate(self._directory, now)
            credentials = _credentials(made.certificate_pem.encode(), made.key_pem.encode(), self._limits)
            self._development = made
            return credentials
        # Before reading, so that a change in between is seen the next time.
        stamp = _stamp(*self._files)
        credentials = _read_pair(*self._files, self._limits)
        self._stamp = stamp
        return credentials


def _stamp(certificate: Path, key: Path) -> _Stamp:
    """Return a value that changes when either file changes. Links are followed, because they may be replaced."""
    return _stamp_one("cert", certificate), _stamp_one("key", key)


def _stamp_one(name: str, path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError as error:
        raise _unusable(name, path, error) from None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _read_pair(certificate: Path, key: Path, limits: ConnectionLimits | None) -> Credentials:
    certificate_pem, key_pem = _read("cert", certificate), _read("key", key)
    try:
        return _credentials(certificate_pem, key_pem, limits)
    except (ConfigError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"[webtransport] cert / CATBUS_CERT ({certificate}) and key / CATBUS_KEY ({key}): {error}"
        ) from None


def _credentials(certificate_pem: bytes, key_pem: bytes, limits: ConnectionLimits | None) -> Credentials:
    """Make credentials from PEM. Raises `ConfigError` if they are invalid."""
    # First, because its errors explain best what is wrong.
    quic = server_configuration(certificate_pem, key_pem, limits)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    # A renegotiation would need writes while a stream only reads (TLS 1.2 only).
    context.options |= ssl.OP_NO_RENEGOTIATION
    # `load_cert_chain` takes a file. A memory file cannot change while it is read, and leaves no key on a disk.
    try:
        with os.fdopen(os.memfd_create("certificate"), "wb") as file:
            file.write(key_pem.rstrip() + b"\n" + certificate_pem)
            file.flush()
            context.load_cert_chain(f"/proc/self/fd/{file.fileno()}", password="")
    except ssl.SSLError as error:
        raise ConfigError(f"TLS cannot use them: {error.reason or error}") from None
    except OSError as error:
        raise ConfigError(f"TLS cannot load them: {error.strerror or error}") from None
    return Credentials(quic, context)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unusable(name, path, error) from None


def _unusable(name: str, path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"[webtransport] {name} / CATBUS_{name.upper()}: {path}: {error.strerror}")
