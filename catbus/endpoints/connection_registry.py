"""The open connections of one endpoint, their counters, and what they share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import trio

from ..observability.loggers import RateLimitedLog, get_logger
from .connection_eviction import EvictionQueue
from .http.event_encoder import make_event_encoder
from .trusted_proxies import TrustedProxies
from .websocket.frame_encoder import make_frame_encoder

logger = get_logger("catbus.endpoints")

_CHECKS_PER_TURN = 500
"""Connections that are checked before other tasks run."""


class KeepAliveTarget(Protocol):
    """A connection that is checked regularly."""

    def check(self, now: float) -> None:
        """Ping a silent peer, or close the connection of one that no longer answers. `now` is a Trio time."""


class ByteCounter(Protocol):
    """The byte counters of one connection."""

    @property
    def sent(self) -> int: ...

    @property
    def received(self) -> int: ...


class ConnectionRegistry:
    """All connections of one endpoint.

    After `close` the endpoint accepts no more: connections that wait for a request end at once, and the others end
    after their request.
    """

    def __init__(self, proxies: Iterable[str] = ()) -> None:
        self.proxies = TrustedProxies(proxies)
        self.closed = False
        self.connections = 0
        self.rejected = 0
        """Connections over `limits.connections`."""
        self.rejected_by_address = 0
        """Connections, and requests through proxies, over `limits.address_connections`."""
        self.rejecting = 0
        """Connections that are being sent a rejection."""
        self.evicted = 0
        """Connections that were closed to make room for others."""
        self.accept_failures = 0
        """Failed accepts, because no file was left."""
        self.internal_errors = 0
        """Exceptions in the broker that ended a request or a connection."""
        self._internal_error_log = RateLimitedLog(logger.error)
        self._peer_event_log = RateLimitedLog(logger.info)
        self.requests: Counter[tuple[str, int]] = Counter()
        """Answered HTTP requests by path and status; all unknown paths count as `other`."""
        self.frame_encoder = make_frame_encoder()
        self.event_encoder = make_event_encoder()
        self.websockets: set[KeepAliveTarget] = set()
        self.event_streams: set[KeepAliveTarget] = set()
        self._byte_counters: set[ByteCounter] = set()
        self._sent = self._received = 0
        self._idle: set[trio.CancelScope] = set()
        self._evictable: EvictionQueue[trio.CancelScope] = EvictionQueue()
        self._changed = trio.lowlevel.ParkingLot()

    def close(self) -> None:
        """End connections that wait for a request. The others end after their request."""
        self.closed = True
        for scope in self._idle:
            scope.cancel()

    def log_internal_error(self, event: str, error: BaseException) -> None:
        """Count an internal error, and log it at a limited rate, because peers may cause it as often as they like."""
        self.internal_errors += 1
        self._internal_error_log.log(trio.current_time(), event, exception=error)

    def log_peer_event(self, event: str, **fields: object) -> None:
        """Log an action of a peer at a limited rate, because peers may repeat it as often as they like."""
        self._peer_event_log.log(trio.current_time(), event, exception=None, **fields)

    @contextmanager
    def admit(self, network: str = "") -> Iterator[Callable[[], None]]:
        """Count a connection while the context lasts. Yields a function to call when the peer has authenticated.

        Until that call, the connection may be evicted: see `evict`.
        """
        self.connections += 1
        scope = trio.CancelScope()
        self._evictable.add(scope, network)
        try:
            with scope:
                yield partial(self._evictable.discard, scope)
        finally:
            self._evictable.discard(scope)
            self.connections -= 1
            self._changed.unpark_all()

    def evict(self) -> bool:
        """Close one unauthenticated connection to make room. Returns whether there was one."""
        scope = self._evictable.next_to_evict()
        if scope is None:
            return False
        self._evictable.discard(scope)
        self.evicted += 1
        scope.cancel()
        return True

    @contextmanager
    def idle(self, scope: trio.CancelScope) -> Iterator[None]:
        """Let `close` cancel `scope` while the context lasts, because the connection waits for a request."""
        self._idle.add(scope)
        if self.closed:
            scope.cancel()
        try:
            yield
        finally:
            self._idle.discard(scope)

    @contextmanager
    def count_bytes(self, carrier: ByteCounter) -> Iterator[None]:
        """Include the bytes of one connection in `traffic`."""
        self._byte_counters.add(carrier)
        try:
            yield
        finally:
            self._byte_counters.remove(carrier)
            self._sent += carrier.sent
            self._received += carrier.received

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far by all counted connections."""
        carriers = self._byte_counters
        return self._sent + sum(c.sent for c in carriers), self._received + sum(c.received for c in carriers)

    @contextmanager
    def kept_alive(self, connection: KeepAliveTarget, connections: set[KeepAliveTarget]) -> Iterator[None]:
        """Check a connection regularly while the context lasts. `connections`: `websockets` or `event_streams`."""
        connections.add(connection)
        try:
            yield
        finally:
            connections.discard(connection)

    async def wait_empty(self) -> None:
        """Wait until no connection is open."""
        while self.connections:
            await self._changed.park()

    async def check_connections(self, interval: float) -> None:
        """Check every registered connection in turn, forever. One task serves all of them."""
        while True:
            await trio.sleep(interval)
            for index, connection in enumerate((*self.websockets, *self.event_streams)):
                if index % _CHECKS_PER_TURN == 0:
                    await trio.lowlevel.checkpoint()
                try:
                    connection.check(trio.current_time())
                except Exception as error:  # noqa: BLE001 (it is logged)
                    self.log_internal_error("keeping a connection alive failed", error)
