"""The interface of a transport: what the client needs of a WebSocket or a WebTransport session."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

MAIN_STREAM = 0
"""The stream that carries messages both ways."""

DATAGRAM = -1
"""In place of a stream number: a whole datagram."""


class Chunk(NamedTuple):
    """Received bytes, split anywhere, and their stream.

    `ended`: these are the last bytes of the stream. `reset`: the broker has reset the stream.
    """

    data: bytes
    stream: int = MAIN_STREAM
    ended: bool = False
    reset: bool = False


class Transport(Protocol):
    """A connection that carries JSON objects both ways.

    The broker may send several streams of them. One task sends and one receives at a time. Both raise `Disconnected`,
    with the close code if the broker sent one, and neither can be used after that.
    """

    @property
    def kind(self) -> str:
        """The kind of transport: "websocket" or "webtransport"."""

    @property
    def pending(self) -> bool:
        """Whether the transport itself has something to send, such as a pong. `send(b"")` sends it."""

    async def send(self, data: bytes) -> None:
        """Send whole objects together. After a cancellation, part of them may be sent: only `aclose` may follow."""

    async def receive(self) -> Chunk:
        """Return the next bytes, or no bytes if only something is `pending` now. Cancelling it loses nothing."""

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        """Close, after a close handshake of at most two seconds. Cancelling it closes without the handshake."""


@runtime_checkable
class DrivenTransport(Protocol):
    """A transport that needs a task of its own."""

    async def run(self) -> None:
        """Run while the transport is open. Ends by itself after `aclose`. Safe to cancel."""
