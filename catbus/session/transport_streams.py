"""What a session asks of a transport that has several streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..delivery.send_queue import SendQueue


class Streams(Protocol):
    """What a transport with several streams and with datagrams can do."""

    def open_stream(self, on_stopped: Callable[[SendQueue], None]) -> SendQueue | None:
        """Open a stream and return its send queue; None when the peer allows no more streams.

        `on_stopped` is called with the send queue when the peer stops the stream, or has read nothing of it for too
        long. Nothing of it is sent afterwards.
        """

    def end_stream(self, send_queue: SendQueue) -> None:
        """End a stream after the contents of its send queue. Nothing is put into the send queue afterwards."""

    def send_datagram(self, data: bytes) -> bool:
        """Send a datagram, at most once. Return False when it is too large."""
