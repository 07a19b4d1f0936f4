"""Connections to the simulated database, and their disturbances, in the place of the bridge to asyncpg."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from heapq import heappop, heappush
from itertools import count
from typing import Any, NamedTuple

import asyncpg  # type: ignore[import-untyped]
import trio

from catbus.postgres.access.asyncpg_bridge import NotificationCallback, Row
from catbus.postgres.append import append_batch
from catbus.postgres.follow import log_reader
from catbus.postgres.listen import notification_listener
from catbus.postgres.maintenance import log_retention

from .simulated_database import SimulatedDatabase, SimulatedSqlError

LOCK_TIMEOUT = 0.4
QUERY_TIMEOUT = 2.0
_APPENDS = (append_batch.APPEND, append_batch.APPEND_AND_MOVE, append_batch.MOVE)
_WRITES = {*_APPENDS, notification_listener._NEW_EPOCH, log_retention._STEP}
"""Statements that wait for the head row, and fail on a standby."""

KINDS = ("append", "look", "page", "epoch", "connect")
_KIND = {
    **dict.fromkeys(_APPENDS, "append"),
    notification_listener._POLL: "look",
    **dict.fromkeys((log_reader._PAGE, log_reader._POSITION), "page"),
    **dict.fromkeys(
        (
            notification_listener._ERASED_SEQS,
            notification_listener._FINGERPRINT,
            notification_listener._EPOCHS,
            notification_listener._NEW_EPOCH,
        ),
        "epoch",
    ),
}

DISTURBANCES = ("lost", "unanswered", "late", "slow", "slowly answered", "refused", "before", "after")


class Disturbance(NamedTuple):
    """What happens to the next statement of a kind.

    lost             the connection is lost before the server has read it
    unanswered       the connection is lost when the server has committed it
    late             the connection is lost, and the server reads it `delay` later
    slow             the server reads it `delay` later
    slowly answered  the answer comes `delay` later
    refused          the server fails it, as it does all it is about when it shuts down
    before, after    `event` happens just before the server reads it, or just after it has committed it
    """

    what: str
    delay: float
    event: Callable[[], None]


POOLED = "?pooled"
"""The end of a URL that leads through a pooler."""

UNDISTURBED = Disturbance("", 0, lambda: None)


class SimulatedNetwork:
    """All connections to one database. The owner of a connection is the URL by which it was made."""

    def __init__(self) -> None:
        self.database = SimulatedDatabase(trio.current_time, self._notify)
        self.connections: set[SimulatedConnection] = set()
        self.pids = count(1)
        self.unreachable = False
        self.locked = 0.0
        """Until when another transaction holds the head row."""
        self.frozen: dict[str, float] = defaultdict(float)
        """Until when an owner neither sends nor receives anything."""
        self.disturbances: dict[tuple[str, str], deque[Disturbance]] = defaultdict(deque)
        self.notifications_to_drop: dict[str, int] = defaultdict(int)
        """How many notifications an owner will lose."""
        self.notification_delays: dict[tuple[str, int], float] = {}
        """By how much an owner's notifications from one sender are delayed."""
        self._due: dict[tuple[SimulatedConnection, int], float] = {}
        self._scheduled: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._work = trio.Event()

    # Time

    async def run(self) -> None:
        """Run what is scheduled, in order."""
        while True:
            while self._scheduled and self._scheduled[0][0] <= trio.current_time():
                heappop(self._scheduled)[2]()
            with trio.move_on_at(self._scheduled[0][0] if self._scheduled else trio.current_time() + 1e9):
                await self._work.wait()
            self._work = trio.Event()

    def schedule(self, delay: float, do: Callable[[], None]) -> None:
        heappush(self._scheduled, (trio.current_time() + delay, next(self._numbers), do))
        self._work.set()

    @property
    def busy(self) -> bool:
        """Whether something is still scheduled."""
        return bool(self._scheduled)

    # Disturbances

    def cut(self, owner: str | None = None) -> None:
        """Close the connections of one owner, or of all."""
        for connection in sorted(self.connections, key=lambda c: c.pid):
            if owner in (None, connection.owner):
                connection.disconnect()

    def stop(self) -> None:
        """Stop the server, with what has not reached it. Idle connections through a pooler do not notice."""
        self.database.server += 1
        self.locked = 0.0
        for connection in sorted(self.connections, key=lambda c: c.pid):
            if connection.busy or not connection.pooled:
                connection.disconnect()

    def heal(self) -> None:
        """Stop starting new disturbances."""
        self.unreachable = self.database.standby = False
        self.locked = 0.0
        for planned in (self.frozen, self.disturbances, self.notifications_to_drop, self.notification_delays):
            planned.clear()

    # What connections use

    async def connect(self, owner: str) -> SimulatedConnection:
        disturbance = self.disturbance(owner, "connect")
        if disturbance.what == "before":
            disturbance.event()
        await self.wait_unfrozen(owner)
        await trio.sleep(disturbance.delay if disturbance.what in ("slow", "slowly answered", "late") else 0)
        if self.unreachable or disturbance.what in ("lost", "unanswered", "refused"):
            raise ConnectionRefusedError(owner)
        return SimulatedConnection(self, owner)

    async def execute(self, connection: SimulatedConnection, query: str, args: Sequence[Any]) -> list[Row]:
        owner = connection.owner
        disturbance = self.disturbance(owner, _KIND.get(query, ""))
        if disturbance.what == "lost":
            connection.disconnect()
        delay = max(self.frozen[owner] - trio.current_time(), 0)
        if disturbance.what in ("slow", "late"):
            delay = max(delay, disturbance.delay)
        await trio.lowlevel.checkpoint()
        request = StatementInFlight(self, self.database.server, connection.pid, query, args, disturbance)
        if delay:
            self.schedule(delay, request.arrive)
        else:
            request.arrive()
        if disturbance.what == "late":
            connection.disconnect()
        await request.done.wait()
        if disturbance.what == "unanswered":
            connection.disconnect()
        if disturbance.what == "slowly answered":
            await trio.sleep(disturbance.delay)
        await self.wait_unfrozen(owner)
        await trio.lowlevel.checkpoint()
        if request.error is not None:
            raise request.error
        return request.rows

    def disturbance(self, owner: str, kind: str) -> Disturbance:
        disturbances = self.disturbances.get((owner, kind))
        return disturbances.popleft() if disturbances else UNDISTURBED

    async def wait_unfrozen(self, owner: str) -> None:
        """Wait until the owner is no longer frozen."""
        while self.frozen and (wait := self.frozen[owner] - trio.current_time()) > 0:
            await trio.sleep(wait)

    def arrive(self, request: StatementInFlight) -> None:
        """Deliver a statement to the server, which may have to wait for the head row, even if the client is gone."""
        if request.server != self.database.server:
            return
        wait = self.locked - trio.current_time() if request.query in _WRITES else 0
        if wait <= 0:
            request.execute(self.database)
        elif wait > LOCK_TIMEOUT:
            self.schedule(LOCK_TIMEOUT, lambda: request.fail(SimulatedSqlError("55P03")))
        else:
            self.schedule(wait, request.arrive)

    def _notify(self, pid: int, channel: str, payload: str) -> None:
        """Deliver a notification to all listeners: in order for one sender, in any order for several."""
        now = trio.current_time()
        for connection in sorted(self.connections, key=lambda c: c.pid):
            owner = connection.owner
            if channel not in connection.heard:
                continue
            if self.notifications_to_drop[owner] > 0:
                self.notifications_to_drop[owner] -= 1
                continue
            delay = max(
                self.notification_delays.get((owner, pid % 2), 0),
                self.frozen[owner] - now,
                self._due.get((connection, pid), 0) - now,
            )
            if delay > 0:
                self._due[connection, pid] = now + delay
                self.schedule(delay, lambda c=connection: c.receive_notification(pid, channel, payload))  # type: ignore[misc]
            else:
                connection.receive_notification(pid, channel, payload)

    @asynccontextmanager
    async def open_bridge(self) -> AsyncIterator[SimulatedBridge]:
        yield SimulatedBridge(self)


class StatementInFlight:
    """One statement between its client and the server."""

    def __init__(
        self,
        network: SimulatedNetwork,
        server: int,
        pid: int,
        query: str,
        args: Sequence[Any],
        disturbance: Disturbance,
    ) -> None:
        self.server = server
        self.query = query
        self.done = trio.Event()
        self.rows: list[Row] = []
        self.error: Exception | None = None
        self._network = network
        self._call = pid, query, args
        self._fate = disturbance

    def arrive(self) -> None:
        self._network.arrive(self)

    def execute(self, database: SimulatedDatabase) -> None:
        disturbance = self._fate
        if disturbance.what == "before":
            disturbance.event()
            if self.server != self._network.database.server:
                return
        try:
            if disturbance.what == "refused":
                raise SimulatedSqlError("57P01")
            if database.standby and self.query in _WRITES:
                raise SimulatedSqlError("25006")
            self.rows = database.execute(*self._call)
        except SimulatedSqlError as error:
            self.error = error
        self.done.set()
        if disturbance.what == "after":
            disturbance.event()

    def fail(self, error: Exception) -> None:
        self.error = error
        self.done.set()


class SimulatedBridge:
    stray_errors = 0

    def __init__(self, network: SimulatedNetwork) -> None:
        self._network = network

    async def connect(self, url: str, timeout: float = QUERY_TIMEOUT, *, setting: str = "url") -> SimulatedConnection:
        with trio.move_on_after(timeout):
            return await self._network.connect(url)
        raise TimeoutError(f"no connection within {timeout:g} s")


class SimulatedConnection:
    """Stands for `catbus.postgres.access.asyncpg_bridge.DatabaseConnection`."""

    version = 16
    encrypted = False

    def __init__(self, network: SimulatedNetwork, owner: str) -> None:
        self.owner = owner
        self.pid = next(network.pids)
        self.pooled = owner.endswith(POOLED)
        self.closed = False
        self.heard: dict[str, NotificationCallback] = {}
        self._network = network
        self._callbacks: list[Callable[[], None]] = []
        self._scope: trio.CancelScope | None = None
        network.connections.add(self)

    def __enter__(self) -> SimulatedConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.terminate()

    def when_closed(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def terminate(self) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._network.connections.discard(self)
        self.heard.clear()
        for callback in self._callbacks:
            callback()
        if self._scope is not None:
            self._scope.cancel()

    @property
    def busy(self) -> bool:
        """Whether it waits for a reply."""
        return self._scope is not None

    def receive_notification(self, pid: int, channel: str, payload: str) -> None:
        if channel in self.heard:
            self.heard[channel](pid, payload)

    async def fetch(self, query: str, *args: object, timeout: float = QUERY_TIMEOUT) -> list[Row]:
        if self.closed:
            raise asyncpg.InterfaceError("connection is closed")
        if self._scope is not None:
            raise asyncpg.InterfaceError("another operation is in progress")
        try:
            with trio.move_on_after(timeout) as self._scope:
                return await self._network.execute(self, query, args)
        except trio.Cancelled:
            self.disconnect()
            raise
        finally:
            self._scope = None
        if self.closed:
            raise asyncpg.exceptions.ConnectionDoesNotExistError("connection was closed in the middle of operation")
        self.disconnect()
        raise TimeoutError(f"no answer within {timeout:g} s")

    async def fetchrow(self, query: str, *args: object, timeout: float = QUERY_TIMEOUT) -> Row:
        (row,) = await self.fetch(query, *args, timeout=timeout)
        return row

    async def listen(self, channel: str, callback: NotificationCallback, *, timeout: float = QUERY_TIMEOUT) -> None:
        await trio.lowlevel.checkpoint()
        if self.closed:
            raise asyncpg.InterfaceError("connection is closed")
        self.heard[channel] = callback

    async def unlisten(self, *, timeout: float = QUERY_TIMEOUT) -> None:
        await trio.lowlevel.checkpoint()
        self.heard.clear()
