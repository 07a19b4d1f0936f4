"""The headers that proxies add to a request: `Forwarded` (RFC 7239) and the older `X-Forwarded-*`."""

from __future__ import annotations

import re

from .host_header import host_name
from .http_request import HttpRequest

# `name=value`, where the value may be quoted, or nothing; then a separator. RFC 7239 requires quotes around colons and
# brackets, but not all proxies write them.
_PAIR = re.compile(
    r"""[ \t]*+(?:([\w!#$%&'*+.^`|~-]++)=(?:"((?:[^"\\]|\\.)*+)"|([^\s",;]*+)))?[ \t]*+([;,]|$)""", re.ASCII
)

# An address. An IPv6 address stands in brackets if a port may follow.
_NODE = re.compile(
    r"\[([0-9a-fA-F:.]{2,45})\](?::\d{1,5})?|([\d.]{7,15}(?=:|\Z)|[0-9a-fA-F:.]{2,45})(?::\d{1,5})?", re.ASCII
)

_MOST_HOPS = 32
"""Addresses that are read from a list, from its end."""

_SECURE = {"http": False, "ws": False, "https": True, "wss": True}


def forwarded_origin(request: HttpRequest, *, tls: bool) -> tuple[bool, str]:
    """Return whether the client speaks TLS, and the host that it requested, as the first proxy reports them.

    `tls` says whether the port of the broker speaks TLS itself. Invalid values are ignored.
    """
    said = _forwarded(request.header(b"forwarded").decode("latin-1"))
    scheme = said.get("proto") or _first(request, b"x-forwarded-proto")
    host = said.get("host") or _first(request, b"x-forwarded-host")
    return _SECURE.get(scheme.lower(), tls), host if host_name(host) else request.host


def _first(request: HttpRequest, name: bytes) -> str:
    """Return the first item of a list, because each proxy appends its own."""
    return request.header(name).decode("latin-1").split(",")[0].strip()


def _forwarded(text: str) -> dict[str, str]:
    """Parse a `Forwarded` header: the first value of each parameter, or nothing if the header is malformed."""
    found: dict[str, str] = {}
    position = 0
    while position <= len(text):
        pair = _PAIR.match(text, position)
        if pair is None:
            return {}
        name, quoted, plain, _ = pair.groups()
        if name:
            found.setdefault(name.lower(), plain if quoted is None else re.sub(r"\\(.)", r"\1", quoted))
        position = pair.end() if pair[4] else len(text) + 1
    return found


def forwarded_addresses(request: HttpRequest) -> list[str]:
    """Return the addresses that proxies appended, each the address of its own peer; "" for an invalid one.

    `Forwarded` is read only without an `X-Forwarded-For`: most proxies add the second and pass on the first unchanged.
    Both are split at every comma, also between quotes: a quote that a client left open must not hide an address that a
    proxy appended, and no address contains a comma.
    """
    if said := request.header(b"x-forwarded-for").decode("latin-1"):
        return [_host(item) for item in said.rsplit(",", _MOST_HOPS)[-_MOST_HOPS:]]
    if said := request.header(b"forwarded").decode("latin-1"):
        items = said.rsplit(",", _MOST_HOPS)[-_MOST_HOPS:]
        return [_host(_forwarded(item).get("for", "")) for item in items]
    return []


def _host(text: str) -> str:
    """Return an address without its port and without IPv6 brackets, or "" if it is not valid."""
    found = _NODE.fullmatch(text.strip())
    return "" if found is None else found[1] or found[2]
