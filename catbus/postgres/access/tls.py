"""The TLS context of a connection to PostgreSQL, from libpq's parameters."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from pathlib import Path

from ...errors import ConfigError

CERTIFICATES = (
    "sslrootcert",
    "sslcert",
    "sslkey",
    "sslpassword",
    "sslcertmode",
    "sslcrl",
    "sslcrldir",
    "sslkeylogfile",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
)
"""The parameters of a context."""

_FILES = "sslrootcert", "sslcert", "sslkey", "sslcrl"

SYSTEM = "system"
"""The value of `sslrootcert` that stands for the authorities that the operating system trusts."""


def make_context(mode: str, given: Mapping[str, str | None]) -> ssl.SSLContext:
    """A context for `sslmode`. `given` contains all of `CERTIFICATES`, with None for missing ones.

    Nothing else is read: no file below the home directory, and no variable. Raises `ConfigError` for unusable files.
    """
    for name in _FILES:
        path = given[name]
        if path is not None and (name, path) != ("sslrootcert", SYSTEM):
            _check_readable(name, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = mode == "verify-full"
    # PostgreSQL 17 requires ALPN for a connection that begins with TLS.
    context.set_alpn_protocols(["postgresql"])
    context.minimum_version = _version(given["ssl_min_protocol_version"] or "TLSv1.2")
    if newest := given["ssl_max_protocol_version"]:
        context.maximum_version = _version(newest)
    authorities = given["sslrootcert"]
    if mode in ("allow", "prefer"):
        context.verify_mode = ssl.CERT_NONE
    elif authorities is not None:
        file = _system_authorities() if authorities == SYSTEM else authorities
        _load("sslrootcert", file, lambda: context.load_verify_locations(cafile=file))
    elif mode == "require":
        context.verify_mode = ssl.CERT_NONE
    else:
        raise ConfigError(f"sslmode={mode} takes sslrootcert: a file with certificates of authorities, or system")
    _load_revoked(context, given)
    certificate, key = given["sslcert"], given["sslkey"]
    if certificate is not None and given["sslcertmode"] != "disable":
        password = given["sslpassword"] or ""
        _load("sslcert", certificate, lambda: context.load_cert_chain(certificate, key, password=lambda: password))
    if (secrets := given["sslkeylogfile"]) is not None:
        try:
            context.keylog_filename = secrets
        except OSError as error:
            raise ConfigError(f"sslkeylogfile: {secrets}: {error.strerror}") from None
    return context


def _load_revoked(context: ssl.SSLContext, given: Mapping[str, str | None]) -> None:
    file, directory = given["sslcrl"], given["sslcrldir"]
    if file is not None:
        _load("sslcrl", file, lambda: context.load_verify_locations(cafile=file))
    if directory is not None:
        if not Path(directory).is_dir():
            raise ConfigError(f"sslcrldir: {directory}: not a directory")
        context.load_verify_locations(capath=directory)
    if (file or directory) and context.verify_mode is not ssl.CERT_NONE:
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN


def _version(name: str) -> ssl.TLSVersion:
    return ssl.TLSVersion[name.replace(".", "_")]


def _system_authorities() -> str:
    found = ssl.get_default_verify_paths().cafile
    if found is None:
        raise ConfigError("sslrootcert=system: no certificates of authorities are installed here")
    return found


def _load(name: str, path: str, load: Callable[[], None]) -> None:
    try:
        load()
    except ssl.SSLError as error:
        raise ConfigError(f"{name}: {path}: {error.reason or 'no certificate in it'}") from None


def _check_readable(name: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{name}: {path}: {error.strerror}") from None
