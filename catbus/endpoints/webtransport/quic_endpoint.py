"""The WebTransport port: its UDP sockets, the connections on them, and a task for each session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from ...webtransport import WebTransportConfiguration
from ...webtransport.packet_loss import lost_packets
from .packet_router import PacketRouter
from .udp_socket import open_ports

if TYPE_CHECKING:
    from ...replica import Replica

GOODBYE_TIME = 2.0
"""Seconds for the last words to arrive when the endpoint is cancelled."""


@dataclass(frozen=True, slots=True)
class QuicEndpointStatistics:
    """`connections` and `half_open` (those without a session yet) are here now; the rest counts from the start.

    `begun` and `completed`: handshakes, which are complete when a session is asked for. `received` and `sent`: bytes.
    `lost`: packets that did not arrive; of all servers in this process. `dropped`: datagrams in that no connection
    took; `overdrawn` of them because too much waited already of the client or the network. `refused`: connections over
    the limit; `crowded`: those over the limit of an address. `evicted`: half-open connections that gave way to newer
    ones. `violations`: connections that ended because the peer broke the rules. `faults`: exceptions of ours that ended
    something.
    """

    connections: int
    half_open: int
    begun: int
    completed: int
    datagrams_in: int
    datagrams_out: int
    received: int
    sent: int
    lost: int
    dropped: int
    overdrawn: int
    refused: int
    crowded: int
    evicted: int
    violations: int
    faults: int


class QuicEndpoint:
    """A WebTransport port that is open. `addresses` is where, such as `127.0.0.1:4433`."""

    def __init__(self, router: PacketRouter) -> None:
        self.addresses = [port.address for port in router.ports]
        self._router = router

    def close(self) -> None:
        """Accept no more connections, and no session on those that have none. Sessions stay."""
        self._router.close()

    def statistics(self) -> QuicEndpointStatistics:
        router = self._router
        return QuicEndpointStatistics(
            len(router.peers),
            router.half_open,
            router.begun,
            router.completed,
            sum(port.received for port in router.ports),
            sum(port.sent for port in router.ports),
            sum(port.received_bytes for port in router.ports),
            sum(port.sent_bytes for port in router.ports),
            lost_packets.count,
            router.dropped,
            router.overdrawn,
            router.refused,
            router.crowded,
            router.evicted,
            router.violations,
            router.faults,
        )


async def serve_quic(
    replica: Replica,
    binds: Sequence[str],
    configuration: Callable[[], WebTransportConfiguration],
    sessions: trio.Nursery,
    *,
    task_status: trio.TaskStatus[QuicEndpoint] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve WebTransport on the addresses `binds`, such as `0.0.0.0:4433` or `[::]:0`.

    `configuration` is asked for every new connection. Each session is a task of its own in `sessions`, out of which no
    exception comes. Started with the endpoint; returns when that has been closed and the last connection has gone, or
    when it is cancelled and the peers have been told, which takes 2 s at most. Raises `ConfigError` when it cannot
    listen.
    """
    router = PacketRouter(replica, await open_ports(binds), configuration, sessions)
    loops = trio.CancelScope(shield=True)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(router.run, loops)
            task_status.started(QuicEndpoint(router))
            try:
                await router.wait_closed()
            finally:
                # The goodbyes need the loops, which is why a cancellation does not reach those.
                with trio.move_on_after(GOODBYE_TIME, shield=True):
                    await router.say_goodbye()
                router.hang_up()
                loops.cancel()
    finally:
        for port in router.ports:
            port.close()
