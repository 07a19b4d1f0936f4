"""What the client needs of a connection, and how one is opened."""

from __future__ import annotations

import os
import ssl
from typing import NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

DEFAULT_PATH = "/ws"


MAIN = 0
"""The stream on which both sides speak."""

DATAGRAM = -1
"""In the place of a stream: a datagram, which is whole."""


class Chunk(NamedTuple):
    """Bytes as they came, cut anywhere; their stream; whether they are its last, or it was reset and has no last."""

    data: bytes
    stream: int = MAIN
    ended: bool = False
    reset: bool = False


class Transport(Protocol):
    """A connection that carries whole JSON objects, one after another, both ways.

    From the broker there may come more than one stream of them. One task sends and one receives at a time. Both raise
    `Disconnected`, with the closing code where the broker gave one; neither can be used after that.
    """

    @property
    def kind(self) -> str:
        """What it is: "websocket" or "webtransport"."""

    @property
    def pending(self) -> bool:
        """Whether the transport has something of its own to send; `send(b"")` sends it."""

    async def send(self, data: bytes) -> None:
        """Send whole objects together. If it is cancelled, some of it may be on its way: only `aclose` may follow."""

    async def receive(self) -> Chunk:
        """The next bytes; none where there is only something `pending` now. Cancelling it loses none."""

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        """Say goodbye, for two seconds at most, and close. When it is cancelled, it closes without a goodbye."""


@runtime_checkable
class Driven(Protocol):
    """A transport that needs a task of its own."""

    async def run(self) -> None:
        """What is to be running from the moment that it is open; ends by itself after `aclose`. May be cancelled."""


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
