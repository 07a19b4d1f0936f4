"""Who is connected to an endpoint, and what those connections share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import trio

from ..observability.loggers import RateLimitedLog, get_logger
from .eviction_queue import EvictionQueue
from .trusted_proxies import TrustedProxies
from .websocket.frame_encoder import FrameEncoder

logger = get_logger("catbus.endpoints")

_AT_A_TIME = 500
"""Connections that are looked at before other tasks get a turn."""


class KeepAliveTarget(Protocol):
    """A connection that is kept alive."""

    def check(self, now: float) -> None:
        """See whether the peer is still there, and do what is due. `now` is a Trio time."""


class ByteCounter(Protocol):
    """What counts the bytes of one connection."""

    @property
    def sent(self) -> int: ...

    @property
    def received(self) -> int: ...


class ConnectionRegistry:
    """All connections of one endpoint.

    It has been closed when the endpoint takes no more of them: then those that wait for a request are ended, and
    those in the middle of one end after it.
    """

    def __init__(self, proxies: Iterable[str] = ()) -> None:
        self.proxies = TrustedProxies(proxies)
        self.closed = False
        self.connections = 0
        self.refused = 0
        """Connections over the limit of all."""
        self.crowded = 0
        """Connections, and requests through proxies, over the limit of an address."""
        self.turning_away = 0
        """Connections that are being told that there are too many."""
        self.evicted = 0
        """Connections that were ended because others needed their places."""
        self.starved = 0
        """How often a connection could not be accepted, as no file was left for it."""
        self.faults = 0
        """Exceptions of ours that ended a request or a connection."""
        self._mistakes = RateLimitedLog(logger.error)
        self._remarks = RateLimitedLog(logger.info)
        self.requests: Counter[tuple[str, int]] = Counter()
        """HTTP requests that were answered, by path and status; paths that mean nothing here count as one."""
        self.packer = FrameEncoder()
        self.watched: set[KeepAliveTarget] = set()
        self._carriers: set[ByteCounter] = set()
        self._sent = self._received = 0
        self._idle: set[trio.CancelScope] = set()
        self._newcomers: EvictionQueue[trio.CancelScope] = EvictionQueue()
        self._changed = trio.lowlevel.ParkingLot()

    def close(self) -> None:
        """Take no more."""
        self.closed = True
        for scope in self._idle:
            scope.cancel()

    def fault(self, event: str, error: BaseException) -> None:
        """Count a mistake of ours, and log it: peers may set it off as often as they like."""
        self.faults += 1
        self._mistakes.log(trio.current_time(), event, exception=error)

    def remark(self, event: str, **fields: object) -> None:
        """Log what a peer has done, or count it: peers may do it as often as they like."""
        self._remarks.log(trio.current_time(), event, exception=None, **fields)

    @contextmanager
    def admit(self, network: str = "") -> Iterator[Callable[[], None]]:
        """While a connection is here. What is yielded is to be called when it has shown who it is.

        Until then it is ended where others need its place: see `evict`.
        """
        self.connections += 1
        scope = trio.CancelScope()
        self._newcomers.add(scope, network)
        try:
            with scope:
                yield partial(self._newcomers.discard, scope)
        finally:
            self._newcomers.discard(scope)
            self.connections -= 1
            self._changed.unpark_all()

    def evict(self) -> bool:
        """End a connection that has not shown yet who it is, so that there is room; whether there was one."""
        scope = self._newcomers.next_to_go()
        if scope is None:
            return False
        self._newcomers.discard(scope)
        self.evicted += 1
        scope.cancel()
        return True

    @contextmanager
    def idle(self, scope: trio.CancelScope) -> Iterator[None]:
        """While a connection has nothing to do, and can be ended through its scope."""
        self._idle.add(scope)
        if self.closed:
            scope.cancel()
        try:
            yield
        finally:
            self._idle.discard(scope)

    @contextmanager
    def carry(self, carrier: ByteCounter) -> Iterator[None]:
        """While its bytes are to be counted."""
        self._carriers.add(carrier)
        try:
            yield
        finally:
            self._carriers.remove(carrier)
            self._sent += carrier.sent
            self._received += carrier.received

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far by all that were carried."""
        carriers = self._carriers
        return self._sent + sum(c.sent for c in carriers), self._received + sum(c.received for c in carriers)

    @contextmanager
    def watch(self, connection: KeepAliveTarget) -> Iterator[None]:
        """While a connection is to be kept alive."""
        self.watched.add(connection)
        try:
            yield
        finally:
            self.watched.discard(connection)

    async def wait_empty(self) -> None:
        """Wait until nobody is connected."""
        while self.connections:
            await self._changed.park()

    async def keep_alive(self, interval: float) -> None:
        """Check every watched connection, again and again: one task for all of them."""
        while True:
            await trio.sleep(interval)
            for index, connection in enumerate(tuple(self.watched)):
                if index % _AT_A_TIME == 0:
                    await trio.lowlevel.checkpoint()
                try:
                    connection.check(trio.current_time())
                except Exception as error:  # noqa: BLE001 (it is logged)
                    self.fault("keeping a connection alive failed", error)
