"""The secret of a broker that nobody but this machine can reach, kept so that its tokens live as long as its data."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from ..auth.tokens import Grants, sign
from ..config import default_state_directory, is_loopback, load
from ..errors import ConfigError

SECRET_FILE = "development-secret"
CERTIFICATE_FILE = "development-certificate.pem"
"""As `catbus.certificates` names it, which takes QUIC to import."""

DEFAULT_URL = "ws://127.0.0.1:8080/ws"
"""Where a broker is looked for, unless something else is said."""


def read_or_create_secret(directory: Path) -> str:
    """The secret that is kept in `directory`, made now if there is none. Raises `ConfigError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if (secret := read_secret(directory)) is None:
            _create_file(directory, secrets.token_urlsafe(32))
            secret = read_secret(directory)
    except OSError as error:
        raise ConfigError(
            f"{directory}: a development secret cannot be kept here: {error.strerror}; "
            "set CATBUS_STATE to a directory that can be written, or CATBUS_SECRET to a secret"
        ) from None
    if secret is None:
        raise ConfigError(f"{directory / SECRET_FILE} is empty: delete it, and a new secret is made")
    return secret


def read_secret(directory: Path) -> str | None:
    """The secret that is kept in `directory`, if there is one and this user may read it."""
    try:
        return (directory / SECRET_FILE).read_text(encoding="ascii").strip() or None
    except (FileNotFoundError, NotADirectoryError, PermissionError, UnicodeDecodeError):
        return None


def development_token(secret: str) -> str:
    """A token for everything that a token can be for. The same every time."""
    return sign(secret, client_id="development", grants=Grants(read=("*",), write=("*",)))


def find_token(url: str) -> str | None:
    """A token for everything for a broker at `url`, when that is on this machine and this user has its secret.

    That is CATBUS_SECRET, as in a container beside the broker, or else the development secret.
    """
    if not is_loopback(urlsplit(url).hostname or ""):
        return None
    if given := configured_secret():
        return sign(given, client_id="operator", grants=Grants.ALL)
    secret = read_secret(default_state_directory(os.environ))
    return development_token(secret) if secret else None


def configured_secret() -> str | None:
    """What CATBUS_SECRET says that tokens are signed with."""
    secrets = load(None, {"CATBUS_SECRET": os.environ.get("CATBUS_SECRET", "")}).auth.secrets
    return secrets[0] if secrets else None


def find_signing_secret(urls: Sequence[str]) -> str | None:
    """What tokens are signed with: CATBUS_SECRET, or the development secret where all of `urls` are on this machine."""
    if given := configured_secret():
        return given
    if all(is_loopback(urlsplit(url).hostname or "") for url in urls):
        return read_secret(default_state_directory(os.environ))
    return None


def find_certificate(url: str) -> str | None:
    """The development certificate, as PEM, for a broker at `url` on this machine."""
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
    # Whole or not at all, and whoever is first wins: two brokers may start at the same moment.
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{SECRET_FILE}-")
    try:
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(f"{secret}\n")
        with suppress(FileExistsError):
            (directory / SECRET_FILE).hardlink_to(temporary)
    finally:
        Path(temporary).unlink()
