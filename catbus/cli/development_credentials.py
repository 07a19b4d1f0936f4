"""The development secret, token and certificate of a broker on loopback addresses.

The secret is kept in the state directory, so that its tokens remain valid as long as the data.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from ..auth.grants import Grants
from ..auth.tokens import sign
from ..config import default_state_directory, is_loopback, load
from ..errors import ConfigError

SECRET_FILE = "development-secret"
CERTIFICATE_FILE = "development-certificate.pem"
"""The name that `catbus.certificates` uses. It is repeated here, because that module imports QUIC, which is slow."""

DEFAULT_URL = "ws://127.0.0.1:8080/ws"
"""The default URL of the broker."""


def read_or_create_secret(directory: Path) -> str:
    """Return the development secret in `directory`. Create it if there is none. Raises `ConfigError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (secret := read_secret(directory)) is None:
            _create_file(directory, secrets.token_urlsafe(32))
            secret = read_secret(directory)
    except OSError as error:
        raise ConfigError(
            f"{directory}: the development secret cannot be written: {error.strerror}; "
            "set CATBUS_STATE to a writable directory, or CATBUS_SECRET to a secret"
        ) from None
    if secret is None:
        raise ConfigError(f"{directory / SECRET_FILE} is empty: delete it, and a new secret is created")
    return secret


def read_secret(directory: Path) -> str | None:
    """Return the development secret in `directory`, if it exists and this user can read it."""
    try:
        return (directory / SECRET_FILE).read_text(encoding="ascii").strip() or None
    except (FileNotFoundError, NotADirectoryError, PermissionError, UnicodeDecodeError):
        return None


def development_token(secret: str) -> str:
    """Sign a token that may do all that the admin key may do with channels. It is the same every time."""
    return sign(secret, client_id="development", grants=Grants.ADMIN)


def find_token(url: str) -> str | None:
    """Sign a token for all channels, if the broker at `url` is on this machine and this user has its secret.

    The secret is CATBUS_SECRET, as in a sidecar container of the broker, or else the development secret.
    """
    if not is_loopback(urlsplit(url).hostname or ""):
        return None
    if given := configured_secret():
        return sign(given, client_id="operator", grants=Grants.ADMIN, issued_at=time.time())
    secret = read_secret(default_state_directory(os.environ))
    return development_token(secret) if secret else None


def configured_secret() -> str | None:
    """Return the signing secret of CATBUS_SECRET, if set."""
    secrets = load(None, {"CATBUS_SECRET": os.environ.get("CATBUS_SECRET", "")}).auth.secrets
    return secrets[0] if secrets else None


def find_signing_secret(urls: Sequence[str]) -> str | None:
    """Return CATBUS_SECRET, or the development secret if all of `urls` are on this machine."""
    if given := configured_secret():
        return given
    if all(is_loopback(urlsplit(url).hostname or "") for url in urls):
        return read_secret(default_state_directory(os.environ))
    return None


def find_certificate(url: str) -> str | None:
    """Return the development certificate as PEM, for a broker at `url` on this machine."""
    parts = urlsplit(url)
    if parts.scheme not in ("https", "wss") or not is_loopback(parts.hostname or ""):
        return None
    try:
        text = (default_state_directory(os.environ) / CERTIFICATE_FILE).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    begin = text.find("-----BEGIN CERTIFICATE-----")
    return text[begin:] if begin >= 0 else None


def _create_file(directory: Path, secret: str) -> None:
    # Written atomically, and the first writer wins, because two brokers can start at the same time.
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{SECRET_FILE}-")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(f"{secret}\n")
        with suppress(FileExistsError):
            (directory / SECRET_FILE).hardlink_to(temporary)
    finally:
        Path(temporary).unlink()
