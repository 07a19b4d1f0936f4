"""The address of a broker, parsed from its URL, and the TLS context for it."""

from __future__ import annotations

import os
import ssl
from typing import NamedTuple
from urllib.parse import urlsplit

DEFAULT_PATH = "/ws"


class BrokerAddress(NamedTuple):
    """The address of a broker.

    `socket` is the path of a Unix socket; host and port are only for the request then. `quic`: for WebTransport.
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
        """The value of the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_address(url: str) -> BrokerAddress:
    """Parse `ws://host:port/path`, `wss://...`, `ws+unix:/path/of.sock:/path`, or `https://...` for WebTransport.

    The default path is `/ws`, or `/` for WebTransport. Raises `ValueError`.
    """
    parts = urlsplit(url)
    if parts.scheme == "ws+unix":
        socket, _, path = parts.path.partition(":")
        if parts.netloc or not socket.startswith("/"):
            raise ValueError("a unix socket is written ws+unix:/path/of.sock:/ws")
        return BrokerAddress(url, "localhost", 80, _target(path, parts.query), socket=socket)
    if parts.scheme not in ("ws", "wss", "https"):
        raise ValueError(f"the URL of a broker begins with ws://, wss:// or https://, not {url[:64]!r}")
    if not parts.hostname:
        raise ValueError(f"no host in {url[:64]!r}")
    try:
        parts.hostname.encode("idna")
    except UnicodeError:
        raise ValueError(f"not a valid host name: {parts.hostname[:64]!r}") from None
    if parts.username is not None or parts.fragment:
        raise ValueError("the URL of a broker has no user and no fragment; the token is a separate argument")
    secure = parts.scheme != "ws"
    quic = parts.scheme == "https"
    port = parts.port if parts.port is not None else 443 if secure else 80
    target = _target(parts.path or ("/" if quic else ""), parts.query)
    return BrokerAddress(url, parts.hostname, port, target, secure, quic=quic)


def is_pem(ca: str | os.PathLike[str]) -> bool:
    """Whether `ca` is PEM text, not the path of a file."""
    return isinstance(ca, str) and "-----BEGIN" in ca


def make_ssl_context(ca: str | os.PathLike[str] | None) -> ssl.SSLContext:
    """Make a TLS context that trusts the authorities of the system, or only `ca`: PEM or a file. Raises `OSError`."""
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
