"""The WebTransport port: its UDP sockets, its QUIC connections, and one task for each session."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from ...webtransport import WebTransportConfiguration
from ...webtransport.connection_ids import ALL_CONNECTION_IDS, ConnectionIdShare
from ...webtransport.packet_loss import lost_packets
from ..replica_interface import ReplicaInterface
from .packet_router import PacketRouter
from .udp_socket import UdpSocket, open_udp_sockets

CLOSE_TIMEOUT = 2.0
"""Seconds for the end of the sessions to arrive when the endpoint is cancelled."""


@dataclass(frozen=True, slots=True)
class QuicEndpointStatistics:
    """Open `connections` and `half_open` ones (those without a session yet), and counters since the start.

    - `handshakes_begun`, `handshakes_completed`: a handshake is complete when the client requests a session
    - `datagrams_in`, `datagrams_out`, and their bytes `received` and `sent`
    - `lost`: sent packets that did not arrive, of all servers in this process
    - `dropped`: received datagrams that no connection took
    - `dropped_over_share`: those of them whose client or network had too many waiting
    - `dropped_misrouted`: those of them whose connection ID names another worker
    - `rejected`: connections over `limits.connections`
    - `rejected_by_address`: connections over `limits.address_connections`
    - `evicted`: half-open connections that were closed to make room for newer ones
    - `violations`: connections that ended because the peer violated the protocol
    - `internal_errors`: exceptions in the broker
    """

    connections: int
    half_open: int
    handshakes_begun: int
    handshakes_completed: int
    datagrams_in: int
    datagrams_out: int
    received: int
    sent: int
    lost: int
    dropped: int
    dropped_over_share: int
    dropped_misrouted: int
    rejected: int
    rejected_by_address: int
    evicted: int
    violations: int
    internal_errors: int


class QuicEndpoint:
    """An open WebTransport port. `addresses` are its addresses, such as `127.0.0.1:4433`."""

    def __init__(self, router: PacketRouter) -> None:
        self.addresses = [socket.address for socket in router.sockets]
        self._router = router

    def close(self) -> None:
        """Accept no more connections, and no session on those without one. Sessions stay open."""
        self._router.close()

    def statistics(self) -> QuicEndpointStatistics:
        router = self._router
        return QuicEndpointStatistics(
            len(router.peers),
            router.half_open,
            router.handshakes_begun,
            router.handshakes_completed,
            sum(socket.received for socket in router.sockets),
            sum(socket.sent for socket in router.sockets),
            sum(socket.received_bytes for socket in router.sockets),
            sum(socket.sent_bytes for socket in router.sockets),
            lost_packets.count,
            router.dropped,
            router.dropped_over_share,
            router.dropped_misrouted,
            router.rejected,
            router.rejected_by_address,
            router.evicted,
            router.violations,
            router.internal_errors,
        )


async def serve_quic(
    replica: ReplicaInterface,
    binds: Sequence[str],
    configuration: Callable[[], WebTransportConfiguration],
    sessions: trio.Nursery,
    *,
    inherited: Sequence[socket.socket] = (),
    share: ConnectionIdShare = ALL_CONNECTION_IDS,
    task_status: trio.TaskStatus[QuicEndpoint] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve WebTransport on the addresses `binds`, such as `0.0.0.0:4433` or `[::]:0`.

    `configuration` is called for every new connection. Each session is a task in `sessions` that raises no exception.
    Instead of opening sockets it uses those that are `inherited`, if any. The connection IDs that it issues are in
    `share`. The task status is the endpoint. Returns after that was closed and the last connection has ended. When
    cancelled, it ends the sessions first, which takes 2 s at most. Raises `ConfigError` if it cannot listen.
    """
    sockets = [UdpSocket(each) for each in inherited] or await open_udp_sockets(binds)
    router = PacketRouter(replica, sockets, configuration, sessions, share)
    loops = trio.CancelScope(shield=True)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(router.run, loops)
            task_status.started(QuicEndpoint(router))
            try:
                await router.wait_closed()
            finally:
                # Ending the sessions needs the loops, so a cancellation does not reach them.
                with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                    await router.close_sessions()
                router.close_connections()
                loops.cancel()
    finally:
        for socket in router.sockets:
            socket.close()
