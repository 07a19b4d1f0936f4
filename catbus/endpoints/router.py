"""Which datagram is for which QUIC connection, and what becomes of those that are for none."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from time import perf_counter, thread_time
from typing import TYPE_CHECKING

import trio

from ..bucket import TokenBucket
from ..loggers import Recurring, get_logger
from ..webtransport import (
    Configuration,
    Connection,
    ConnectionLost,
    IdIssued,
    IdRetired,
    SessionRequested,
    Terminated,
)
from ..webtransport.packets import (
    ID_LENGTH,
    MAX_PACKET,
    SMALLEST_INITIAL,
    Header,
    read_header,
    retry,
    stateless_reset,
    version_negotiation,
)
from .datagrams import Place, Port, transmit
from .networks import Newcomers, network_of
from .proxies import Proxies
from .tickets import Tickets
from .timers import Timers
from .webtransport import Conversation

if TYPE_CHECKING:
    from ..hub import Hub

BATCH = 32
"""Datagrams that are taken from a socket before others have their turn."""
TURN = 0.002
"""Seconds after which others have their turn, however few datagrams were dealt with."""
SHARE, SAVED = 0.4, 0.2
"""Of each second, how many seconds of CPU one peer's packets may take, and how many it may save for later. What comes
beyond that is dropped, by which QUIC tells a peer to send less."""
RETRY_FROM = 256
"""Half-open connections from which on a client has to prove its address first."""
UNPROVED = 100
"""Connections in a second that may begin without that. Most packets that look like the first one of a connection and
are none can be told apart only by the work of beginning one."""
MAX_HALF_OPEN = 2048
"""Half-open connections. Of the network that has most of them, the oldest gives way to one more: an honest client is
through with its handshake in some round trips."""
ANSWERS = 100
"""Packets for nobody that are answered, in a second."""
PING_INTERVAL = 20.0
"""Seconds of silence after which a peer is pinged: it keeps NATs awake, and tells who has gone."""

_SHORTEST_CHOSEN_ID = 8
_AT_A_TIME = 100

logger = get_logger("catbus.endpoints")


class Peer:
    """One connection, and its session once it has one."""

    __slots__ = ("connection", "conversation", "heard", "limited", "lost", "network", "pinged", "settling", "share")

    def __init__(self, connection: Connection, network: str, limited: str, now: float) -> None:
        self.connection = connection
        self.network = network
        self.limited = limited
        """The network among whose connections it counts, if it does."""
        self.conversation: Conversation | None = None
        self.lost = False
        self.heard = self.pinged = now
        self.settling = False
        self.share = TokenBucket(SHARE, SAVED, now)

    @property
    def timer(self) -> float | None:
        """When it wants to be called."""
        at, due = self.connection.timer, None if self.conversation is None else self.conversation.due
        return at if due is None or (at is not None and at < due) else due


class Router:
    """Knows which packet is for which connection. Nothing in here waits for a peer."""

    def __init__(
        self, hub: Hub, ports: list[Port], configuration: Callable[[], Configuration], sessions: trio.Nursery
    ) -> None:
        secrets = hub.config.auth.secrets
        self.ports = ports
        self.peers: set[Peer] = set()
        self.begun = 0
        """How many handshakes have begun."""
        self.completed = 0
        """How many of them led to a session, or to a refusal of one."""
        self.dropped = 0
        self.overdrawn = 0
        """Datagrams that were dropped because their peers had had more than their share."""
        self.evicted = 0
        """Half-open connections that gave way to others."""
        self.refused = 0
        """Connections over the limit of all, while none of them is half-open."""
        self.crowded = 0
        """Connections over the limit of an address."""
        self.faults = 0
        self._mistakes = Recurring(logger.error)
        self.closed = False
        self._hub = hub
        self._configuration = configuration
        self._sessions = sessions
        self._limit = hub.config.limits.connections
        self._proxies = Proxies(hub.config.websocket.trusted_proxies)
        self._origins = frozenset(hub.config.websocket.allowed_origins)
        self._tickets = Tickets(secrets[0] if secrets else None)
        self._routes: dict[bytes, Peer] = {}
        self._half_open: Newcomers[Peer] = Newcomers()
        """Those that have no session yet."""
        self._timers = Timers(self._fire)
        now = trio.current_time()
        self._answers = TokenBucket(ANSWERS, ANSWERS, now)
        self._unproved = TokenBucket(UNPROVED, UNPROVED, now)
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def half_open(self) -> int:
        """How many connections have no session yet."""
        return len(self._half_open)

    async def run(self, scope: trio.CancelScope) -> None:
        """All loops, within `scope`."""
        with scope:
            async with trio.open_nursery() as nursery:
                for port in self.ports:
                    nursery.start_soon(self._receive, port)
                nursery.start_soon(self._timers.run)
                nursery.start_soon(self._keep_alive)

    # The end.

    def close(self) -> None:
        self.closed = True
        self._changed.unpark_all()

    async def wait_closed(self) -> None:
        """Wait until it has been closed and nobody is connected any more."""
        while not self.closed or self.peers:
            await self._changed.park()

    async def say_goodbye(self) -> None:
        """End all sessions, and wait until the peers know."""
        self.closed = True
        for peer in tuple(self.peers):
            if peer.conversation is not None:
                peer.conversation.stop()
            else:
                peer.connection.close()
            self.settle(peer)
        while not all(peer.lost for peer in self.peers):
            await self._changed.park()

    def hang_up(self) -> None:
        """Close what is left, at once."""
        for peer in tuple(self.peers):
            if not peer.lost:
                peer.connection.close()
                self.settle(peer)

    # In.

    async def _receive(self, port: Port) -> None:
        """Take in whatever comes, for ever; then let each connection that got something send, once."""
        while True:
            await port.wait()
            arrived = deque(port.receive(BATCH))
            while arrived:
                touched: dict[Peer, None] = {}
                now, ends = trio.current_time(), perf_counter() + TURN
                while arrived and perf_counter() < ends:
                    peer = self._take_in(*arrived.popleft(), now)
                    if peer is not None:
                        peer.heard = now
                        touched[peer] = None
                for peer in touched:
                    self.settle(peer)
                if arrived:
                    await trio.lowlevel.checkpoint()

    def _take_in(self, data: bytes, place: Place, now: float) -> Peer | None:
        """Take a datagram; returns the connection that took it."""
        try:
            peer = self._route(data, place, now)
        except Exception as error:  # noqa: BLE001 (it is logged)
            self.fault("a datagram could not be dealt with", error)
            return None
        self.dropped += peer is None
        return peer

    def _route(self, data: bytes, place: Place, now: float) -> Peer | None:
        if len(data) > MAX_PACKET or (header := read_header(data)) is None:
            return None
        peer = self._routes.get(header.destination)
        if peer is not None:
            if peer.share.level(now) < 0:
                self.overdrawn += 1
                return None
            began = thread_time()
            peer.connection.receive_datagram(data, place, now)
            peer.share.spend(thread_time() - began)
            return peer
        if header.initial:
            return self._accept(header, data, place, now)
        if header.version is None:
            token = self._tickets.reset_token(header.destination)
            self._answer(stateless_reset(token, len(data)), place, now)
        elif not header.supported and not header.negotiation and len(data) >= SMALLEST_INITIAL:
            self._answer(version_negotiation(header), place, now)
        return None

    def _answer(self, data: bytes | None, place: Place, now: float) -> None:
        """Answer a packet that belongs to nobody, unless that has been done too often just now."""
        if data is not None and self._answers.take(1, now):
            place.port.send((data,), place)

    def _accept(self, header: Header, data: bytes, place: Place, now: float) -> Peer | None:
        """A client's first packet: a new connection, or a Retry, or nothing."""
        if len(data) < SMALLEST_INITIAL or len(header.destination) < _SHORTEST_CHOSEN_ID or self.closed:
            return None
        full = len(self.peers) >= self._limit
        if full and not self._half_open:
            self.refused += 1
            return None
        limited, addresses = self._proxies.source_of(place.address[0]).limited, self._hub.addresses
        if not addresses.has_room(limited, now):
            self.crowded += 1
            return None
        # What is not proved may be forged: by that nobody shall take more than half of what an address may have.
        half = addresses.of(limited) >= addresses.most // 2
        original, retry_source = header.destination, None
        proved = self._tickets.read_retry_token(header.token, place.address, header.destination, time.time())
        if proved is not None:
            original, retry_source = proved, header.destination
        elif full or half or self.half_open >= RETRY_FROM or not self._unproved.take(1, now):
            again = os.urandom(ID_LENGTH)
            token = self._tickets.retry_token(place.address, header.destination, again, time.time())
            place.port.send((retry(header, again, token),), place)
            return None
        connection = Connection.server(
            self._configuration(), original, retry_source=retry_source, reset_token=self._tickets.reset_token
        )
        connection.receive_datagram(data, place, now)
        datagrams = connection.datagrams_to_send(now)
        if not datagrams:
            return None  # Nothing in it could be read, or it would be acknowledged; so nothing is kept of it.
        transmit(datagrams)
        if full or self.half_open >= MAX_HALF_OPEN:
            self._evict()
        peer = Peer(connection, network_of(place.address[0]), limited, now)
        self.peers.add(peer)
        addresses.enter(limited)
        self._half_open.add(peer, peer.network)
        self.begun += 1
        for connection_id in connection.connection_ids:
            self._routes[connection_id] = peer
        return peer

    def _evict(self) -> None:
        """Give up a half-open connection."""
        peer = self._half_open.next_to_go()
        if peer is not None:
            self.evicted += 1
            peer.connection.close()
            self.settle(peer)
            self._forget(peer)

    # Out.

    def settle(self, peer: Peer) -> None:
        """Take a connection's events, send what it has to send, and note when it wants to be called."""
        if peer.settling:
            return  # It is being done, further out.
        peer.settling = True
        try:
            self._take_events(peer)
            if peer.conversation is not None:
                peer.conversation.make_room()
            datagrams = peer.connection.datagrams_to_send(trio.current_time())
            self._take_events(peer)
            if datagrams:
                transmit(datagrams)
            self._timers.set(peer, peer.timer)
        except Exception as error:  # noqa: BLE001 (it is logged)
            self.fault("a connection failed", error)
            self._forget(peer)
        finally:
            peer.settling = False

    def _take_events(self, peer: Peer) -> None:
        for event in peer.connection.events():
            match event:
                case IdIssued():
                    self._routes[event.connection_id] = peer
                case IdRetired():
                    self._routes.pop(event.connection_id, None)
                case SessionRequested():
                    self._open_session(peer, event)
                case Terminated():
                    self._forget(peer)
                case _:
                    if isinstance(event, ConnectionLost):
                        self._lose(peer)
                    if peer.conversation is not None:
                        peer.conversation.handle(event)

    def _open_session(self, peer: Peer, request: SessionRequested) -> None:
        connection = peer.connection
        self.completed += 1
        self._half_open.discard(peer)
        if self.closed:
            connection.refuse(503, trio.current_time())
        elif self._origins and request.origin is not None and request.origin not in self._origins:
            connection.refuse(403, trio.current_time())
        elif connection.accept():
            conversation = Conversation(self._hub, connection, lambda: self.settle(peer), self.fault, peer.network)
            peer.conversation = conversation
            try:
                self._sessions.start_soon(conversation.run)
            except RuntimeError:  # The nursery has been closed before this port.
                conversation.abandon()

    def _lose(self, peer: Peer) -> None:
        peer.lost = True
        self._half_open.discard(peer)
        self._changed.unpark_all()

    def _forget(self, peer: Peer) -> None:
        if not peer.lost:
            self._lose(peer)
            if peer.conversation is not None:
                peer.conversation.handle(ConnectionLost("forgotten"))
        self._timers.set(peer, None)
        if peer in self.peers:
            self.peers.remove(peer)
            self._hub.addresses.leave(peer.limited)
        for connection_id in peer.connection.connection_ids:
            if self._routes.get(connection_id) is peer:
                del self._routes[connection_id]
        self._changed.unpark_all()

    # Time.

    def _fire(self, peer: Peer, now: float) -> None:
        peer.connection.handle_timer(now)
        self.settle(peer)

    async def _keep_alive(self) -> None:
        """Ping those that were silent for a while, and give up those that take nothing: one task for all of them."""
        interval = PING_INTERVAL / 4
        while True:
            await trio.sleep(interval)
            now = trio.current_time()
            for index, peer in enumerate(tuple(self.peers)):
                if index % _AT_A_TIME == 0:
                    await trio.lowlevel.checkpoint()
                conversation = peer.conversation
                if conversation is None or peer.lost:
                    continue
                if now - max(peer.heard, peer.pinged) >= PING_INTERVAL - interval:
                    peer.pinged = now
                    peer.connection.ping()
                conversation.check(now)
                self.settle(peer)

    def fault(self, event: str, error: BaseException) -> None:
        """Count a mistake of ours, and log it: peers may set it off as often as they like."""
        self.faults += 1
        self._mistakes.note(trio.current_time(), event, exception=error)
