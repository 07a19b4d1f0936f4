"""What the client needs of a connection, and how one is opened."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

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
