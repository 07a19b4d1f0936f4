"""Which datagram is for which QUIC connection, and what becomes of those that are for none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from ..loggers import get_logger
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
from .tickets import Tickets
from .timers import Timers
from .webtransport import Conversation

if TYPE_CHECKING:
    from ..hub import Hub

BATCH = 32
"""Datagrams that are taken from a socket before others have their turn."""
RETRY_FROM = 256
"""Half-open connections from which on a client has to prove its address first."""
MAX_HALF_OPEN = 2048
ANSWERS = 100
"""Packets for nobody that are answered, in a second."""
PING_INTERVAL = 20.0
"""Seconds of silence after which a peer is pinged: it keeps NATs awake, and tells who has gone."""

_SHORTEST_CHOSEN_ID = 8
_AT_A_TIME = 100

logger = get_logger("catbus.endpoints")


class Peer:
    """One connection, and its session once it has one."""

    __slots__ = ("connection", "conversation", "half_open", "heard", "lost", "pinged", "settling")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.conversation: Conversation | None = None
        self.half_open = True
        self.lost = False
        self.heard = self.pinged = trio.current_time()
        self.settling = False


class Router:
    """Knows which packet is for which connection. Nothing in here waits for a peer."""

    def __init__(
        self, hub: Hub, ports: list[Port], configuration: Callable[[], Configuration], sessions: trio.Nursery
    ) -> None:
        secrets = hub.config.auth.secrets
        self.ports = ports
        self.peers: set[Peer] = set()
        self.half_open = 0
        self.begun = 0
        """How many handshakes have begun."""
        self.completed = 0
        """How many of them led to a session, or to a refusal of one."""
        self.dropped = 0
        self.faults = 0
        self.closed = False
        self._hub = hub
        self._configuration = configuration
        self._sessions = sessions
        self._limit = hub.config.limits.connections
        self._origins = frozenset(hub.config.websocket.allowed_origins)
        self._tickets = Tickets(secrets[0] if secrets else None)
        self._routes: dict[bytes, Peer] = {}
        self._timers = Timers(self._fire)
        self._allowance = float(ANSWERS)
        self._allowed_at = trio.current_time()
        self._changed = trio.lowlevel.ParkingLot()

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
            touched: dict[Peer, None] = {}
            now = trio.current_time()
            for data, place in port.receive(BATCH):
                try:
                    peer = self._route(data, place, now)
                except Exception:
                    logger.exception("a datagram could not be dealt with")
                    self.fault()
                    continue
                if peer is None:
                    self.dropped += 1
                else:
                    peer.heard = now
                    touched[peer] = None
            for peer in touched:
                self.settle(peer)

    def _route(self, data: bytes, place: Place, now: float) -> Peer | None:
        if len(data) > MAX_PACKET or (header := read_header(data)) is None:
            return None
        peer = self._routes.get(header.destination)
        if peer is not None:
            peer.connection.receive_datagram(data, place, now)
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
        self._allowance = min(float(ANSWERS), self._allowance + (now - self._allowed_at) * ANSWERS)
        self._allowed_at = now
        if data is not None and self._allowance >= 1:
            self._allowance -= 1
            place.port.send((data,), place)

    def _accept(self, header: Header, data: bytes, place: Place, now: float) -> Peer | None:
        """A client's first packet: a new connection, or a Retry, or nothing."""
        if len(data) < SMALLEST_INITIAL or len(header.destination) < _SHORTEST_CHOSEN_ID or self.closed:
            return None
        if len(self.peers) >= self._limit or self.half_open >= MAX_HALF_OPEN:
            return None
        original, retry_source = header.destination, None
        proved = self._tickets.read_retry_token(header.token, place.address, header.destination, time.time())
        if proved is not None:
            original, retry_source = proved, header.destination
        elif self.half_open >= RETRY_FROM:
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
        peer = Peer(connection)
        self.peers.add(peer)
        self.half_open += 1
        self.begun += 1
        for connection_id in connection.connection_ids:
            self._routes[connection_id] = peer
        return peer

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
            self._timers.set(peer, peer.connection.timer)
        except Exception:
            logger.exception("a connection failed")
            self.fault()
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
        self._opened(peer)
        if self.closed:
            connection.refuse(503, trio.current_time())
        elif self._origins and request.origin is not None and request.origin not in self._origins:
            connection.refuse(403, trio.current_time())
        elif connection.accept():
            conversation = Conversation(self._hub, connection, lambda: self.settle(peer), self.fault)
            peer.conversation = conversation
            try:
                self._sessions.start_soon(conversation.run)
            except RuntimeError:  # The nursery has been closed before this port.
                conversation.abandon()

    def _opened(self, peer: Peer) -> None:
        if peer.half_open:
            peer.half_open = False
            self.half_open -= 1

    def _lose(self, peer: Peer) -> None:
        peer.lost = True
        self._opened(peer)
        self._changed.unpark_all()

    def _forget(self, peer: Peer) -> None:
        if not peer.lost:
            self._lose(peer)
            if peer.conversation is not None:
                peer.conversation.handle(ConnectionLost("forgotten"))
        self._timers.set(peer, None)
        self.peers.discard(peer)
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

    def fault(self) -> None:
        """Count a mistake of ours."""
        self.faults += 1
