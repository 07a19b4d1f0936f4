"""The address of a broker, and the TLS context for it."""

from __future__ import annotations

import os
import ssl
from typing import NamedTuple
from urllib.parse import urlsplit

DEFAULT_PATH = "/ws"


class Address(NamedTuple):
    """Where a broker is. `socket` is the path of a unix socket, for which host and port stand only in the request.

    `quic` says that it is one for WebTransport.
    """

    url: str
    host: str
    port: int
    target: str
    secure: bool = False
    socket: str | None = None
    quic: bool = False

    @property
    def authority(self) -> str:
        """What the `Host` header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_address(url: str) -> Address:
    """Understand `ws://host:port/path`, `wss://...`, `ws+unix:/path/of.sock:/path`, and `https://...` for WebTransport.

    The path is `/ws` where none is, and `/` for WebTransport. Raises `ValueError`.
    """
    parts = urlsplit(url)
    if parts.scheme == "ws+unix":
        socket, _, path = parts.path.partition(":")
        if parts.netloc or not socket.startswith("/"):
            raise ValueError("a unix socket is written ws+unix:/path/of.sock:/ws")
        return Address(url, "localhost", 80, _target(path, parts.query), socket=socket)
    if parts.scheme not in ("ws", "wss", "https"):
        raise ValueError(f"the URL of a broker begins with ws://, wss:// or https://, not {url[:64]!r}")
    if not parts.hostname:
        raise ValueError(f"no host in {url[:64]!r}")
    try:
        parts.hostname.encode("idna")
    except UnicodeError:
        raise ValueError(f"no host has such a name: {parts.hostname[:64]!r}") from None
    if parts.username is not None or parts.fragment:
        raise ValueError("the URL of a broker has no user and no fragment; the token is given apart")
    secure = parts.scheme != "ws"
    quic = parts.scheme == "https"
    port = parts.port if parts.port is not None else 443 if secure else 80
    target = _target(parts.path or ("/" if quic else ""), parts.query)
    return Address(url, parts.hostname, port, target, secure, quic=quic)


def is_pem(ca: str | os.PathLike[str]) -> bool:
    """Whether this is certificates themselves, not the file that has them."""
    return isinstance(ca, str) and "-----BEGIN" in ca


def make_ssl_context(ca: str | os.PathLike[str] | None) -> ssl.SSLContext:
    """Verify against the system's authorities, or only those in `ca`, PEM or a file of it. Raises `OSError`."""
    if ca is not None and is_pem(ca):
        context = ssl.create_default_context(cadata=str(ca))
    else:
        context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _target(path: str, query: str) -> str:
    target = (path or DEFAULT_PATH) + (f"?{query}" if query else "")
    if not target.startswith("/") or not target.isascii() or not target.isprintable() or " " in target:
        raise ValueError("the path of the URL has characters that must be percent-encoded")
    return target
