"""The table of QUIC connections by connection ID, and the way of each datagram to its connection."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from time import perf_counter, thread_time

import trio

from ...limits.token_bucket import TokenBucket
from ...observability.loggers import RateLimitedLog, get_logger
from ...webtransport import (
    ConnectionIdIssued,
    ConnectionIdRetired,
    ConnectionLost,
    SessionRequested,
    Terminated,
    WebTransportConfiguration,
    WebTransportConnection,
)
from ...webtransport.connection_ids import ALL_CONNECTION_IDS, ConnectionIdShare
from ...webtransport.connectionless_packets import (
    MAX_PACKET_SIZE,
    MIN_INITIAL_SIZE,
    PacketHeader,
    read_header,
)
from ..connection_eviction import EvictionQueue
from ..ip_networks import network_of
from ..replica_interface import ReplicaInterface
from ..trusted_proxies import TrustedProxies
from .connection_timers import ConnectionTimers
from .connectionless_replies import ConnectionlessReplies
from .datagram_scheduler import TURN_TIME, DatagramQueue, DatagramScheduler
from .quic_peer import QueuedDatagram, QuicPeer
from .retry_and_reset_tokens import StatelessTokens
from .udp_socket import PeerAddress, UdpSocket, send_datagrams
from .webtransport_session import WebTransportSession

RECEIVE_BATCH = 128
"""Datagrams read from a socket at a time. If more wait, the kernel drops datagrams of all peers alike."""
RETRY_THRESHOLD = 256
"""Half-open connections from which on clients must validate their address first."""
UNVALIDATED_PER_SECOND = 100
"""Connections per second without address validation. Most packets that only look like the first one of a connection
cannot be recognized without the work of accepting a connection."""
MAX_HALF_OPEN = 2048
"""Maximum number of half-open connections. For one more, the oldest of the network with the most is closed, because an
honest client completes its handshake within a few round trips."""
PEER_EVENT_LOG_BURST = 5
"""Log lines of one kind about actions of peers, per minute."""
PING_INTERVAL = 20.0
"""Seconds without a datagram after which a peer is pinged, to keep NAT entries alive and to detect lost peers."""

_SHORTEST_CHOSEN_ID = 8

logger = get_logger("catbus.endpoints")


class PacketRouter:
    """Receives datagrams, and drives the connection that each is for. Nothing here waits for a peer."""

    def __init__(
        self,
        replica: ReplicaInterface,
        sockets: list[UdpSocket],
        configuration: Callable[[], WebTransportConfiguration],
        sessions: trio.Nursery,
        share: ConnectionIdShare = ALL_CONNECTION_IDS,
    ) -> None:
        secrets = replica.config.auth.secrets
        self.sockets = sockets
        self.peers: set[QuicPeer] = set()
        self.handshakes_begun = 0
        """Handshakes begun."""
        self.handshakes_completed = 0
        """Handshakes after which the client requested a session."""
        self.dropped = 0
        self.dropped_over_share = 0
        """Datagrams dropped because too many of the same client or network were waiting."""
        self.dropped_misrouted = 0
        """Datagrams dropped because their connection ID names another worker."""
        self.evicted = 0
        """Half-open connections closed to make room for others."""
        self.rejected = 0
        """Connections over `limits.connections`, while no half-open one could be evicted."""
        self.rejected_by_address = 0
        """Connections over `limits.address_connections`."""
        self.internal_errors = 0
        self.violations = 0
        """Connections that ended because the peer violated QUIC or HTTP/3."""
        self._internal_error_log = RateLimitedLog(logger.error)
        self._peer_event_log = RateLimitedLog(logger.info, burst=PEER_EVENT_LOG_BURST)
        self.closed = False
        self._replica = replica
        self._configuration = configuration
        self._sessions = sessions
        self._limit = replica.config.limits.connections
        self._trusted_proxies = TrustedProxies(replica.config.websocket.trusted_proxies)
        self._origins = frozenset(replica.config.websocket.allowed_origins)
        self._tokens = StatelessTokens(secrets[0] if secrets else None)
        self._share = share
        self._routes: dict[bytes, QuicPeer] = {}
        self._half_open: EvictionQueue[QuicPeer] = EvictionQueue()
        """Connections without a session yet."""
        self._scheduler: DatagramScheduler[QueuedDatagram] = DatagramScheduler(
            self._serve_source, self._receive_waiting
        )
        self._timers = ConnectionTimers(self._on_timer)
        now = trio.current_time()
        self._connectionless_replies = ConnectionlessReplies(self._tokens, share, now)
        self._unvalidated_connections = TokenBucket(UNVALIDATED_PER_SECOND, UNVALIDATED_PER_SECOND, now)
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def half_open(self) -> int:
        """The number of connections without a session."""
        return len(self._half_open)

    async def run(self, scope: trio.CancelScope) -> None:
        """Run all loops within `scope`."""
        with scope:
            async with trio.open_nursery() as nursery:
                for socket in self.sockets:
                    nursery.start_soon(self._receive, socket)
                nursery.start_soon(self._timers.run)
                nursery.start_soon(self._keep_alive)

    # Closing

    def close(self) -> None:
        self.closed = True
        self._changed.unpark_all()

    async def wait_closed(self) -> None:
        """Wait until the router is closed and no connection is left."""
        while not self.closed or self.peers:
            await self._changed.park()

    async def close_sessions(self) -> None:
        """Close all sessions, and wait until the peers have acknowledged."""
        self.closed = True
        ends = perf_counter() + TURN_TIME
        for peer in tuple(self.peers):
            if peer.session is not None:
                peer.session.stop()
            else:
                peer.connection.close()
            self.process(peer)
            if perf_counter() >= ends:
                await trio.lowlevel.checkpoint()
                ends = perf_counter() + TURN_TIME
        while not all(peer.lost for peer in self.peers):
            await self._changed.park()

    def close_connections(self) -> None:
        """Close the remaining connections at once."""
        for peer in tuple(self.peers):
            if not peer.lost:
                peer.connection.close()
                self.process(peer)

    # Receiving

    async def _receive(self, socket: UdpSocket) -> None:
        """Receive datagrams, forever."""
        while True:
            await socket.wait()
            self._receive_waiting()
            await self._scheduler.run()

    def _receive_waiting(self) -> None:
        """Queue the datagrams that have arrived, by client or network."""
        now = trio.current_time()
        for socket in self.sockets:
            for data, peer_address in socket.receive(RECEIVE_BATCH):
                try:
                    taken = self._enqueue(data, peer_address, now)
                except Exception as error:  # noqa: BLE001 (it is logged)
                    self.log_internal_error("processing a datagram failed", error)
                    taken = False
                self.dropped += not taken

    def _enqueue(self, data: bytes, peer_address: PeerAddress, now: float) -> bool:
        """Queue a datagram, or reply at once if it belongs to no connection. Returns whether it was queued."""
        if len(data) > MAX_PACKET_SIZE or (header := read_header(data)) is None:
            return False
        peer = self._routes.get(header.destination)
        if peer is not None:
            queue, key = self._queue_of(peer)
            queued = queue.put(key, peer, (data, peer_address, header, None), now)
        elif header.destination not in self._share:
            # A stateless reset would end a connection of the other worker.
            self.dropped_misrouted += 1
            return False
        elif header.is_initial:
            if len(data) < MIN_INITIAL_SIZE or len(header.destination) < _SHORTEST_CHOSEN_ID or self.closed:
                return False
            # A valid Retry token validates the address, so no flood with forged addresses delays this packet.
            proof = self._tokens.read_retry_token(header.token, peer_address.address, header.destination, time.time())
            queue = self._scheduler.unvalidated if proof is None else self._scheduler.unauthenticated
            queued = queue.put(
                network_of(peer_address.address[0]), peer_address.address, (data, peer_address, header, proof), now
            )
        else:
            self._connectionless_replies.reply(header, len(data), peer_address, now)
            return False
        self.dropped_over_share += not queued
        return queued

    def _queue_of(self, peer: QuicPeer) -> tuple[DatagramQueue[QueuedDatagram], Hashable]:
        """Return the queue of a peer's datagrams, and the key that its CPU time is charged to."""
        session, scheduler = peer.session, self._scheduler
        if session is not None and peer.authenticated:
            return scheduler.authenticated, session.client
        return scheduler.unauthenticated if peer.connection.address_validated else scheduler.unvalidated, peer.network

    def _serve_source(self, items: deque[QueuedDatagram], ends: float) -> float:
        """Process datagrams of one source until `ends`, and send replies. Returns the seconds of CPU to charge."""
        began, now, count = thread_time(), trio.current_time(), len(items)
        touched: dict[QuicPeer, None] = {}
        while items:
            peer = self._deliver(*items.popleft(), now)
            if peer is not None:
                peer.last_received = now
                touched[peer] = None
            if perf_counter() >= ends:
                break
        received, sent = thread_time(), 0
        for peer in touched:
            sent += self._process(peer)
        # Datagrams sent beyond those received are deliveries, for which the flusher is fair.
        part = min(1.0, (count - len(items)) / max(sent, 1))
        return received - began + (thread_time() - received) * part

    def _deliver(
        self, data: bytes, peer_address: PeerAddress, header: PacketHeader, proof: bytes | None, now: float
    ) -> QuicPeer | None:
        """Pass a datagram to its connection, or accept a new one. Returns the connection."""
        try:
            peer = self._routes.get(header.destination)
            if peer is not None:
                peer.connection.receive_datagram(data, peer_address, now)
            elif header.is_initial:
                peer = self._accept(header, data, peer_address, proof, now)
        except Exception as error:  # noqa: BLE001 (it is logged)
            self.log_internal_error("processing a datagram failed", error)
            peer = None
        self.dropped += peer is None
        return peer

    def _accept(
        self, header: PacketHeader, data: bytes, peer_address: PeerAddress, proof: bytes | None, now: float
    ) -> QuicPeer | None:
        """Accept a connection, or send a Retry, or do nothing. `proof` is the original ID in a valid Retry token."""
        full = len(self.peers) >= self._limit
        if self.closed:
            return None
        if full and not self._half_open:
            self.rejected += 1
            return None
        limited_network, addresses = (
            self._trusted_proxies.connection_address(peer_address.address[0]).limited_network,
            self._replica.addresses,
        )
        if not addresses.allows(limited_network, now):
            self.rejected_by_address += 1
            return None
        # An address without validation may be forged, so such packets may use only half of its limit.
        half = addresses.count(limited_network) >= addresses.limit // 2
        original, retry_source = header.destination, None
        if proof is not None:
            original, retry_source = proof, header.destination
        elif full or half or self.half_open >= RETRY_THRESHOLD or not self._unvalidated_connections.take(1, now):
            self._connectionless_replies.send_retry(header, peer_address)
            return None
        connection = WebTransportConnection.server(
            self._configuration(),
            original,
            retry_source=retry_source,
            reset_token=self._tokens.reset_token,
            share=self._share,
        )
        connection.receive_datagram(data, peer_address, now)
        peer = QuicPeer(connection, network_of(peer_address.address[0]), limited_network, now)
        datagrams = connection.datagrams_to_send(now)
        if not datagrams:
            # A readable packet would have been acknowledged, so this one was not, and nothing is kept of it.
            for event in connection.events():
                if isinstance(event, ConnectionLost):
                    self._log_connection_end(peer, event)
            return None
        send_datagrams(datagrams)
        if full or self.half_open >= MAX_HALF_OPEN:
            self._evict()
        self.peers.add(peer)
        addresses.add(limited_network)
        # Connections with possibly forged addresses do not count for a network.
        self._half_open.add(peer, "" if proof is None else peer.network)
        self.handshakes_begun += 1
        for connection_id in connection.connection_ids:
            self._routes[connection_id] = peer
        return peer

    def _evict(self) -> None:
        """Close a half-open connection to make room."""
        peer = self._half_open.next_to_evict()
        if peer is not None:
            self.evicted += 1
            peer.connection.close()
            self.process(peer)
            self._forget(peer)

    # Sending

    def process(self, peer: QuicPeer) -> None:
        """Process a connection's events, send its datagrams, and set its timer."""
        if peer.authenticated:
            self._process(peer)
            return
        began, now = thread_time(), trio.current_time()
        self._process(peer)
        self._charge(peer, thread_time() - began, now)

    def _charge(self, peer: QuicPeer, seconds: float, now: float) -> None:
        """Charge a peer for work outside of `_serve_source`."""
        self._scheduler.charge(*self._queue_of(peer), seconds, now)

    def _process(self, peer: QuicPeer) -> int:
        """Process a connection without charging for it. Returns the number of sent datagrams."""
        if peer.processing:
            return 0  # A caller further up is doing it.
        peer.processing = True
        datagrams: Sequence[tuple[bytes, PeerAddress]] = ()
        try:
            self._take_events(peer)
            if peer.session is not None:
                peer.session.send_blocked()
            datagrams = peer.connection.datagrams_to_send(trio.current_time())
            self._take_events(peer)
            if datagrams:
                send_datagrams(datagrams)
            if peer.lost and not peer.authenticated:
                # Nothing is kept of an unauthenticated peer. Later packets of it get a stateless reset.
                send_datagrams(peer.connection.datagrams_to_send(trio.current_time()))
                self._forget(peer)
            else:
                self._timers.set(peer, peer.timer)
        except Exception as error:  # noqa: BLE001 (it is logged)
            self.log_internal_error("a connection failed", error)
            self._forget(peer)
        finally:
            peer.processing = False
        return len(datagrams)

    def _take_events(self, peer: QuicPeer) -> None:
        for event in peer.connection.events():
            match event:
                case ConnectionIdIssued():
                    self._routes[event.connection_id] = peer
                case ConnectionIdRetired():
                    self._routes.pop(event.connection_id, None)
                case SessionRequested():
                    self._open_session(peer, event)
                case Terminated():
                    self._forget(peer)
                case _:
                    if isinstance(event, ConnectionLost):
                        self._log_connection_end(peer, event)
                        self._mark_lost(peer)
                    if peer.session is not None:
                        peer.session.handle_event(event)

    def _open_session(self, peer: QuicPeer, request: SessionRequested) -> None:
        connection = peer.connection
        self.handshakes_completed += 1
        self._half_open.discard(peer)
        if self.closed:
            connection.refuse(503, trio.current_time())
        elif self._origins and request.origin is not None and request.origin not in self._origins:
            connection.refuse(403, trio.current_time())
        elif connection.accept():
            session = WebTransportSession(
                self._replica,
                connection,
                lambda: self.process(peer),
                self.log_internal_error,
                self._log_peer_event,
                peer.network,
            )
            peer.session = session
            try:
                self._sessions.start_soon(session.run)
            except RuntimeError:  # The nursery was closed before this port.
                session.abandon()

    def _mark_lost(self, peer: QuicPeer) -> None:
        peer.lost = True
        self._half_open.discard(peer)
        self._changed.unpark_all()

    def _forget(self, peer: QuicPeer) -> None:
        if not peer.lost:
            self._mark_lost(peer)
            if peer.session is not None:
                peer.session.handle_event(ConnectionLost("forgotten"))
        self._timers.set(peer, None)
        if peer in self.peers:
            self.peers.remove(peer)
            self._replica.addresses.remove(peer.limited_network)
        for connection_id in peer.connection.connection_ids:
            if self._routes.get(connection_id) is peer:
                del self._routes[connection_id]
        self._changed.unpark_all()

    # Timers

    def _on_timer(self, peer: QuicPeer, now: float) -> None:
        began = thread_time()
        peer.connection.handle_timer(now)
        self._process(peer)
        self._charge(peer, thread_time() - began, now)

    async def _keep_alive(self) -> None:
        """Ping silent peers and close stalled sessions, forever. One task serves all connections."""
        interval = PING_INTERVAL / 4
        while True:
            await trio.sleep(interval)
            now = trio.current_time()
            ends = perf_counter() + TURN_TIME
            for peer in tuple(self.peers):
                if perf_counter() >= ends:
                    await trio.lowlevel.checkpoint()
                    ends = perf_counter() + TURN_TIME
                session = peer.session
                if session is None or peer.lost:
                    continue
                if now - max(peer.last_received, peer.last_pinged) >= PING_INTERVAL - interval:
                    peer.last_pinged = now
                    peer.connection.ping()
                session.check_stalled(now)
                self.process(peer)

    def _log_connection_end(self, peer: QuicPeer, event: ConnectionLost) -> None:
        violation = peer.connection.violation
        if event.fault is not None:
            self.log_internal_error("a WebTransport connection failed", event.fault)
        elif violation is not None:
            self.violations += 1
            # A fixed reason, logged at a limited rate, because peers choose the violation and its number.
            self._log_peer_event("a peer violated QUIC or HTTP/3", reason=violation)

    def _log_peer_event(self, event: str, **fields: str) -> None:
        """Log an action of a peer at a limited rate, because peers may repeat it as often as they like."""
        self._peer_event_log.log(trio.current_time(), event, exception=None, **fields)

    def log_internal_error(self, event: str, error: BaseException) -> None:
        """Count an internal error, and log it at a limited rate, because peers may cause it as often as they like."""
        self.internal_errors += 1
        self._internal_error_log.log(trio.current_time(), event, exception=error)
