"""Addresses and URLs in a configuration: splitting, joining, checking and redacting them."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from ..errors import ConfigError

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^\s:\[\]/]+)):(?P<port>\d{1,5})")


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port`, and drop the brackets of an IPv6 address. Raises `ConfigError`."""
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65_535:
        raise ConfigError(f'expected an address with a port, like "127.0.0.1:8080", not {address[:60]!r}')
    return match["v6"] or match["host"], int(match["port"])


def join_address(host: str, port: int) -> str:
    """Join a host and a port, the inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host name or IP address is a loopback address, which only this machine can reach."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_url(text: str) -> bool:
    """Whether the path of a file, or a URL, is a URL."""
    return "://" in text


def check_key_set_url(url: str) -> None:
    """Raise `ValueError` unless this is an https URL, or an http URL of a loopback address, without credentials."""
    parts = urlsplit(url)
    safe = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
    if not safe or not parts.hostname or "@" in parts.netloc or parts.fragment or not url.isprintable() or " " in url:
        raise ValueError
    # It raises for a port that is none.
    _ = parts.port


def redact_url(url: str) -> str:
    """Return a URL without its password and its parameters, which may be secret."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    rest, question, parameters = rest.partition("?")
    credentials, at, place = rest.rpartition("@")
    if not at and "@" in parameters and ":" in rest:
        # The question mark is part of a password that was not escaped.
        return f"{scheme}://***"
    user, colon, _ = credentials.partition(":")
    return f"{scheme}://{user}{':***' if colon else ''}{at}{place}{'?***' if question else ''}"
