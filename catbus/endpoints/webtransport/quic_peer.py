"""One QUIC connection as the packet router keeps it."""

from __future__ import annotations

from ...webtransport import WebTransportConnection
from ...webtransport.connectionless_packets import PacketHeader
from .udp_socket import PeerAddress
from .webtransport_session import WebTransportSession

QueuedDatagram = tuple[bytes, PeerAddress, PacketHeader, bytes | None]
"""A received datagram, its sender, its header, and the connection ID in its Retry token."""


class QuicPeer:
    """A QUIC connection, its session once it has one, and the times of the last datagram and ping."""

    __slots__ = (
        "connection",
        "last_pinged",
        "last_received",
        "limited_network",
        "lost",
        "network",
        "processing",
        "session",
    )

    def __init__(self, connection: WebTransportConnection, network: str, limited_network: str, now: float) -> None:
        self.connection = connection
        self.network = network
        """The network of the peer."""
        self.limited_network = limited_network
        """The network whose limit the connection counts for, or ""."""
        self.session: WebTransportSession | None = None
        self.lost = False
        self.last_received = self.last_pinged = now
        self.processing = False

    @property
    def authenticated(self) -> bool:
        """Whether the client has shown a valid token."""
        return self.connection.trusted

    @property
    def timer(self) -> float | None:
        """The time at which the connection or its session has something to do."""
        at, next_send_time = self.connection.timer, None if self.session is None else self.session.next_send_time
        return at if next_send_time is None or (at is not None and at < next_send_time) else next_send_time
