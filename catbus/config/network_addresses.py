"""Addresses and URLs as they stand in a configuration."""

from __future__ import annotations

import ipaddress
import re

from ..errors import ConfigError

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.]+)\]|(?P<host>[^\s:\[\]/]+)):(?P<port>\d{1,5})")


def split_address(address: str) -> tuple[str, int]:
    """`host:port` as its two parts, without the brackets of an IPv6 address; raises `ConfigError`."""
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65_535:
        raise ConfigError(f'expected an address with a port, like "127.0.0.1:8080", not {address[:60]!r}')
    return match["v6"] or match["host"], int(match["port"])


def join_address(host: str, port: int) -> str:
    """What `split_address` takes apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a host, by name or number, is this machine as only this machine can reach it."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def redact(url: str) -> str:
    """A URL without what it may keep secret: the password and every parameter."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    rest, question, parameters = rest.partition("?")
    credentials, at, place = rest.rpartition("@")
    if not at and "@" in parameters and ":" in rest:
        # The question mark stands in a password that was not escaped.
        return f"{scheme}://***"
    user, colon, _ = credentials.partition(":")
    return f"{scheme}://{user}{':***' if colon else ''}{at}{place}{'?***' if question else ''}"
