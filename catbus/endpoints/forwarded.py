"""What proxies say of the client's own request: `Forwarded` (RFC 7239), and the headers from before there was one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..certificates import host_name

if TYPE_CHECKING:
    from .routes import Request

# `name=value`, where the value may be quoted, or nothing; then what ends it. Colons and brackets belong between quotes,
# and not all proxies put them there.
_PAIR = re.compile(
    r"""[ \t]*+(?:([\w!#$%&'*+.^`|~-]++)=(?:"((?:[^"\\]|\\.)*+)"|([^\s",;]*+)))?[ \t]*+([;,]|$)""", re.ASCII
)

_SECURE = {"http": False, "ws": False, "https": True, "wss": True}


def origin_of(request: Request, *, tls: bool) -> tuple[bool, str]:
    """Whether the client speaks TLS, and the host that it has asked for: to the proxy next to it, where there are some.

    `tls`: whether the port of the broker speaks TLS itself. What makes no sense is ignored.
    """
    said = _forwarded(request.header(b"forwarded").decode("latin-1"))
    scheme = said.get("proto") or _first(request, b"x-forwarded-proto")
    host = said.get("host") or _first(request, b"x-forwarded-host")
    return _SECURE.get(scheme.lower(), tls), host if host_name(host) else request.host


def _first(request: Request, name: bytes) -> str:
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
