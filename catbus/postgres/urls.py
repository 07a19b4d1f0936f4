"""What libpq takes in a database's URL for TLS, and asyncpg does not, or not with an error that helps."""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

from ..errors import ConfigError

FILES = "sslrootcert", "sslcert", "sslkey", "sslcrl"
SYSTEM = "system"
"""As `sslrootcert` it stands for the authorities that the operating system trusts."""


def for_asyncpg(url: str) -> str:
    """The same URL as asyncpg understands it. Raises `ConfigError` for files that cannot be read.

    Both may change while we run, so it is done for each connection.
    """
    parts = urlsplit(url)
    parameters = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parameters.get("sslrootcert") == SYSTEM:
        # https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNECT-SSLROOTCERT
        if parameters.setdefault("sslmode", "verify-full") != "verify-full":
            raise ConfigError("[database] url: sslrootcert=system is safe with sslmode=verify-full only")
        parameters["sslrootcert"] = _system_authorities()
        url = parts._replace(query=urlencode(parameters)).geturl()
    for name in FILES:
        if name in parameters:
            _check_readable(name, parameters[name])
    return url


def _system_authorities() -> str:
    found = ssl.get_default_verify_paths().cafile
    if found is None:
        raise ConfigError("[database] url: sslrootcert=system: no certificates of authorities are installed here")
    return found


def _check_readable(name: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"[database] url: {name}: {path}: {error.strerror}") from None
