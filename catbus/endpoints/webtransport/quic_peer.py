"""One QUIC connection as the router keeps it, and what waits of it."""

from __future__ import annotations

from ...webtransport import WebTransportConnection
from ...webtransport.connectionless_packets import PacketHeader
from .udp_socket import PeerAddress
from .webtransport_session import WebTransportSession

QueuedDatagram = tuple[bytes, PeerAddress, PacketHeader, bytes | None]
"""A datagram that waits, and what its Retry token says."""


class QuicPeer:
    """One connection, and its session once it has one."""

    __slots__ = ("connection", "conversation", "heard", "limited", "lost", "network", "pinged", "settling")

    def __init__(self, connection: WebTransportConnection, network: str, limited: str, now: float) -> None:
        self.connection = connection
        self.network = network
        """Where it has come from."""
        self.limited = limited
        """The network among whose connections it counts, if it does."""
        self.conversation: WebTransportSession | None = None
        self.lost = False
        self.heard = self.pinged = now
        self.settling = False

    @property
    def proven(self) -> bool:
        """Whether it has shown a token that was good."""
        return self.connection.trusted

    @property
    def timer(self) -> float | None:
        """When it wants to be called."""
        at, due = self.connection.timer, None if self.conversation is None else self.conversation.due
        return at if due is None or (at is not None and at < due) else due
