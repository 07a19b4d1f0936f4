"""What proxies say of a client and of its own request: `Forwarded` (RFC 7239), and the headers from before that."""

from __future__ import annotations

import re

from .host_header import host_name
from .http_request import HttpRequest

# `name=value`, where the value may be quoted, or nothing; then what ends it. Colons and brackets belong between quotes,
# and not all proxies put them there.
_PAIR = re.compile(
    r"""[ \t]*+(?:([\w!#$%&'*+.^`|~-]++)=(?:"((?:[^"\\]|\\.)*+)"|([^\s",;]*+)))?[ \t]*+([;,]|$)""", re.ASCII
)

# An address, in brackets if a port may follow and it is one of IPv6.
_NODE = re.compile(
    r"\[([0-9a-fA-F:.]{2,45})\](?::\d{1,5})?|([\d.]{7,15}(?=:|\Z)|[0-9a-fA-F:.]{2,45})(?::\d{1,5})?", re.ASCII
)

_MOST_HOPS = 32
"""TrustedProxies that are looked at, one behind the other."""

_SECURE = {"http": False, "ws": False, "https": True, "wss": True}


def origin_of(request: HttpRequest, *, tls: bool) -> tuple[bool, str]:
    """Whether the client speaks TLS, and the host that it has asked for: to the proxy next to it, where there are some.

    `tls`: whether the port of the broker speaks TLS itself. What makes no sense is ignored.
    """
    said = _forwarded(request.header(b"forwarded").decode("latin-1"))
    scheme = said.get("proto") or _first(request, b"x-forwarded-proto")
    host = said.get("host") or _first(request, b"x-forwarded-host")
    return _SECURE.get(scheme.lower(), tls), host if host_name(host) else request.host


def _first(request: HttpRequest, name: bytes) -> str:
    """The first item of a list: each proxy adds its own at the end."""
    return request.header(name).decode("latin-1").split(",")[0].strip()


def _forwarded(text: str) -> dict[str, str]:
    """The parameters of a `Forwarded`, of each the one that was said first. Empty where it is not well-formed."""
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


def hops(request: HttpRequest) -> list[str]:
    """The addresses that proxies have added, each that of its own peer, the last one at the end; "" for no address.

    `Forwarded` counts only where there is no `X-Forwarded-For`: most proxies add the second and pass the first on as it
    came. Either is cut at its commas, whatever is between quotes: what a client has left open there must not hide what
    a proxy has added, and no address has a comma.
    """
    if said := request.header(b"x-forwarded-for").decode("latin-1"):
        return [_host(item) for item in said.rsplit(",", _MOST_HOPS)[-_MOST_HOPS:]]
    if said := request.header(b"forwarded").decode("latin-1"):
        items = said.rsplit(",", _MOST_HOPS)[-_MOST_HOPS:]
        return [_host(_forwarded(item).get("for", "")) for item in items]
    return []


def _host(text: str) -> str:
    """An address without its port, and without the brackets of IPv6; "" for what is neither."""
    found = _NODE.fullmatch(text.strip())
    return "" if found is None else found[1] or found[2]
