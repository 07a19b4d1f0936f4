"""asyncpg in Trio, through trio-asyncio. No other module imports either of them.

A call into asyncio costs about 100 us: make one per batch, never one per message.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import asyncpg  # type: ignore[import-untyped]
import trio
import trio_asyncio  # type: ignore[import-untyped]

from ...errors import ConfigError
from ...observability.loggers import RateLimitedLog, get_logger
from .connection_url import ConnectionTarget, find_targets
from .session_settings import POOLER_ERROR_CODES, STARTUP_SETTINGS, begin_script, complete_script

logger = get_logger("catbus.postgres")

T = TypeVar("T")
Row = Sequence[Any]
NotificationCallback = Callable[[int, str], None]

DATABASE_ERRORS = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""The errors of a database that is unreachable or not as it should be.

asyncpg raises the last one when the server has closed the connection before a call.
"""

QUERY_TIMEOUT = 10.0
# A connection whose data or probes are not acknowledged ends after 4 s.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 4_000),
)
_LOAD_TYPES = "SELECT $1::text[], $2::bytea[], $3::bigint[], $4::boolean[]"
"""A statement with all types of arguments and results that asyncpg does not know by itself."""


def sqlstate(error: BaseException) -> str:
    """The SQLSTATE of an error; empty for an error that is not from PostgreSQL."""
    return getattr(error, "sqlstate", None) or ""


def leaf_exceptions(error: BaseException) -> Iterator[BaseException]:
    """The single exceptions in a group, or an exception that is not a group."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaf_exceptions(part)
    else:
        yield error


class _NameLookupExecutor(trio_asyncio.TrioExecutor):  # type: ignore[misc]
    """Runs name lookups in threads that may be abandoned: a silent name server must not delay a shutdown."""

    async def submit(self, func: Callable[..., Any], *args: Any) -> Any:
        return await trio.to_thread.run_sync(func, *args, abandon_on_cancel=True)


@asynccontextmanager
async def open_bridge() -> AsyncIterator[Bridge]:
    """Run an asyncio loop inside Trio while the context lasts. A single exception is raised without a group."""
    try:
        async with trio_asyncio.open_loop() as loop:
            bridge = Bridge(loop)
            loop.set_default_executor(_NameLookupExecutor())
            loop.set_exception_handler(bridge.note_stray_error)
            try:
                yield bridge
            finally:
                bridge.close()
    except BaseExceptionGroup as group:
        errors = list(leaf_exceptions(group))
        if len(errors) > 1:
            raise
        raise errors[0] from errors[0].__cause__


class Bridge:
    """The asyncio loop. All tasks of the same Trio run may use its connections."""

    def __init__(self, loop: Any) -> None:
        self.is_open = True
        self.stray_errors = 0
        self._strays = RateLimitedLog(logger.error)
        self._loop = loop
        self._connections: set[DatabaseConnection] = set()
        self._pooled: set[str] = set()
        """The URLs that led to a pooler."""
        self._plain: set[str] = set()
        """The URLs of servers that reject startup parameters, as many poolers do."""
        self._reached: set[str] = set()
        """The URLs that have led to a server."""

    def close(self) -> None:
        """Terminate all connections. Calls that wait for one fail with one of `DATABASE_ERRORS`."""
        self.is_open = False
        for connection in list(self._connections):
            connection.terminate()

    def note_stray_error(self, loop: object, context: dict[str, Any]) -> None:
        """Log and count an error in a callback. By default it would end the loop and everything beside it."""
        self.stray_errors += 1
        text, error = context.get("message"), context.get("exception")
        # asyncio reports some errors during garbage collection, when Trio need not be running.
        self._strays.log(monotonic(), "error in a callback", kind=text, reason=text, exception=error)

    async def connect(self, url: str, timeout: float = QUERY_TIMEOUT, *, setting: str = "url") -> DatabaseConnection:
        """Connect within `timeout` seconds. Raises one of `DATABASE_ERRORS`, or `ConfigError` for a wrong URL.

        `connection_url.PARAMETERS` describes the parameters of the URL. `setting` names the setting of the URL.
        """
        with trio.move_on_after(timeout):
            while True:
                pooled = url in self._pooled
                try:
                    targets = find_targets(url)
                except ConfigError as error:
                    text = f"[database] {setting}: {error}"
                    if url in self._reached:
                        # The URL worked before, and files may come and go. That must not end the broker.
                        raise OSError(text) from None
                    raise ConfigError(text) from None
                share = timeout if len(targets) == 1 else timeout / len(targets)
                try:
                    start = partial(self._open, targets, share, pooled, plain=url in self._plain)
                    connection: DatabaseConnection = await self.run_in_asyncio(start, _stop_connecting)
                except asyncpg.PostgresError as error:
                    if url in self._plain or sqlstate(error) not in POOLER_ERROR_CODES:
                        raise
                    self._plain.add(url)
                    self._pooled.add(url)
                    continue
                self._reached.add(url)
                if connection.pooled == pooled:
                    self._connections.add(connection)
                    connection.when_closed(partial(self._connections.discard, connection))
                    return connection
                connection.terminate()
                (self._pooled.add if connection.pooled else self._pooled.discard)(url)
        raise TimeoutError(f"no connection within {timeout:g} s")

    async def _open(
        self, targets: Sequence[ConnectionTarget], share: float, pooled: bool, *, plain: bool
    ) -> DatabaseConnection:
        """Connect, with prepared statements unless `pooled`.

        Behind a pooler the next statement may reach another server process, which has not prepared it. `plain` starts
        the session without settings.
        """
        options: dict[str, Any] = {"connection_class": _AsyncpgConnection}
        options |= {"statement_cache_size": 0} if pooled else {"max_cached_statement_lifetime": 0}
        raw = await _connect_any(targets, share, {} if plain else STARTUP_SETTINGS, options)
        try:
            # Within a transaction a pooler keeps the server process. The statement has no name, as names may be taken.
            await _begin(raw)
            statement = await raw.prepare("SELECT pg_catalog.pg_backend_pid()", name="")
            connection = DatabaseConnection(self, raw, await statement.fetchval())
            if connection.pooled:
                # asyncpg queries types when it first meets them, by names that a session may have redefined.
                await raw.prepare(_LOAD_TYPES, name="")
            await raw.execute("COMMIT" if connection.pooled else complete_script(connection.version, started=not plain))
            return connection
        except BaseException:
            raw.terminate()
            raise

    async def run_in_asyncio(
        self, start: Callable[[], Coroutine[Any, Any, T]], stop: Callable[[asyncio.Task[T]], object]
    ) -> T:
        """Run an asyncio coroutine. On cancellation, call `stop` and wait for the coroutine to end."""
        if not self.is_open:
            raise OSError("the log is not running")
        future: asyncio.Task[T] = self._loop.create_task(start())
        waiting = trio.lowlevel.current_task()
        raise_cancel: Callable[[], NoReturn] | None = None

        def abort(raise_it: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
            nonlocal raise_cancel
            raise_cancel = raise_it
            stop(future)
            return trio.lowlevel.Abort.FAILED

        future.add_done_callback(lambda _: trio.lowlevel.reschedule(waiting))
        await trio.lowlevel.wait_task_rescheduled(abort)
        if raise_cancel is not None:
            if not future.cancelled():
                future.exception()  # retrieved, so that asyncio does not log it
            raise_cancel()
        if future.cancelled():
            raise OSError("the connection was given up")
        return future.result()


async def _connect_any(
    targets: Sequence[ConnectionTarget], share: float, settings: Mapping[str, str], options: Mapping[str, Any]
) -> Any:
    """Connect to the first host that accepts, each within `share` seconds. Raises the error of the last host.

    As with libpq, a host that rejects the user or the password ends the search: the others would do the same.
    """
    for number, target in enumerate(targets, 1):
        timeout = min(target.timeout or share, share)
        try:
            return await _connect_host(target, timeout, settings, options)
        except (OSError, asyncpg.CannotConnectNowError, asyncpg.TargetServerAttributeNotMatched) as error:
            if number == len(targets):
                if isinstance(error, TimeoutError):
                    raise TimeoutError(f"no connection within {timeout:g} s") from None
                raise
    raise AssertionError("there is always a host")


async def _connect_host(
    target: ConnectionTarget, timeout: float, settings: Mapping[str, str], options: Mapping[str, Any]
) -> Any:
    """Connect to one host, with or without TLS, in the order of `target.ways`. `settings` are those of the session."""
    arguments = {**target.arguments, "server_settings": {**target.arguments["server_settings"], **settings}}
    *ways, last = target.ways
    refusal: asyncpg.PostgresError | None = None
    for way in ways:
        try:
            return await asyncpg.connect(**arguments, ssl=way, timeout=timeout, **options)
        except (ConnectionRefusedError, asyncpg.InvalidPasswordError, asyncpg.CannotConnectNowError):
            # The other way would fail, too, with a less helpful error.
            raise
        except asyncpg.PostgresError as error:
            refusal = error if sqlstate(error) in POOLER_ERROR_CODES else None
        except (ConnectionError, ssl.SSLError):
            pass
    try:
        return await asyncpg.connect(**arguments, ssl=last, timeout=timeout, **options)
    except ConnectionError:
        if refusal is not None:
            # No other way works: a pooler rejects the settings.
            raise refusal from None
        raise


async def _begin(raw: Any) -> None:
    """Begin a transaction with the settings of `session_settings`."""
    version = raw.get_server_version().major
    try:
        await raw.execute(begin_script(version))
    except asyncpg.FeatureNotSupportedError:
        await raw.execute(begin_script(version, read_write=False))  # a standby


def _is_local(peer: socket.socket) -> bool:
    return peer.family == socket.AF_UNIX or ipaddress.ip_address(peer.getpeername()[0]).is_loopback


def _stop_connecting(connecting: asyncio.Task[Any]) -> None:
    """Stop connecting. If a connection is established all the same, terminate it."""

    def discard(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is None:
            task.result().terminate()

    connecting.cancel()
    connecting.add_done_callback(discard)


class _AsyncpgConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection of asyncpg that calls the callbacks of notifications directly while it reads them.

    asyncpg schedules a callback of the event loop for each notification, which costs 45 us: a role that sends as many
    as it can would use up the CPU of the replica.
    """

    __slots__ = ("callbacks",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.callbacks: dict[str, NotificationCallback] = {}

    def _process_notification(self, pid: int, channel: str, payload: str) -> None:
        callback = self.callbacks.get(channel)
        if callback is None:
            return
        try:
            callback(pid, payload)
        except Exception as error:  # noqa: BLE001
            self._loop.call_exception_handler({"message": "a listener failed", "exception": error})


class DatabaseConnection:
    """A connection to PostgreSQL: a context manager that terminates it at the end.

    After a timeout or the cancellation of a call, the state of the server is unknown, so the connection is terminated.
    asyncpg would open a second one to send a cancel request, which does harm while an append is in doubt.
    """

    def __init__(self, bridge: Bridge, raw: Any, pid: int) -> None:
        self._bridge = bridge
        self._raw = raw
        self.version: int = raw.get_server_version().major
        self.pid = pid
        """The server process of this connection; behind a pooler, a former one."""
        self.pooled: bool = pid != raw.get_server_pid()
        """Whether this leads to a pooler: the process that answers is not the one named on connecting."""
        self.encrypted: bool = raw._transport.get_extra_info("ssl_object") is not None
        """Whether the connection uses TLS."""
        peer = raw._transport.get_extra_info("socket")
        self.remote = peer is not None and not _is_local(peer)
        """Whether the server is on another machine."""
        if peer is not None and peer.family != socket.AF_UNIX:
            for level, option, value in _KEEPALIVE:
                peer.setsockopt(level, option, value)

    def __enter__(self) -> DatabaseConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.terminate()

    @property
    def closed(self) -> bool:
        """Whether the connection is known to be lost."""
        return bool(self._raw.is_closed())

    def when_closed(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the connection is lost or terminated."""
        self._raw.add_termination_listener(lambda _: callback())

    def terminate(self) -> None:
        """Drop the connection without waiting. Running calls fail with one of `DATABASE_ERRORS`."""
        self._raw.terminate()

    async def fetch(self, query: str, *args: object, timeout: float = QUERY_TIMEOUT) -> list[Row]:
        """Fetch all rows of one statement. It runs with the settings of `session_settings`, unless it is a CALL.

        Behind a pooler a session keeps no settings, so the statement gets a transaction with them. That costs two round
        trips, during which locks are held. A procedure begins a transaction by itself instead.
        """
        wrapped = self.pooled and not query.startswith("CALL ")
        fetch = self._fetch_in_transaction if wrapped else self._raw.fetch
        return await self._call(lambda: fetch(query, *args), timeout)

    async def fetchrow(self, query: str, *args: object, timeout: float = QUERY_TIMEOUT) -> Row:
        """Fetch the one row of a statement that always returns one."""
        rows = await self.fetch(query, *args, timeout=timeout)
        if not rows:
            raise OSError("the database returned no row for a statement that always returns one")
        return rows[0]

    async def begin(self, *, timeout: float = QUERY_TIMEOUT) -> None:
        """Begin a transaction with the settings of `session_settings`. Until it ends, statements run in it."""
        await self._call(lambda: _begin(self._raw), timeout)

    async def execute(self, script: str, *, timeout: float = QUERY_TIMEOUT) -> None:
        """Run any number of statements, in one transaction unless they say otherwise."""
        await self._call(lambda: self._raw.execute(script), timeout)

    async def listen(self, channel: str, callback: NotificationCallback, *, timeout: float = QUERY_TIMEOUT) -> None:
        """Call `callback` with the sender's process id and the payload of each notification from now on.

        The callback runs while the connection is read, and delays that. Its exceptions are logged and counted.
        """
        self._raw.callbacks[channel] = callback
        await self.execute(f'LISTEN "{channel}"', timeout=timeout)

    async def unlisten(self, *, timeout: float = QUERY_TIMEOUT) -> None:
        """Stop listening on all channels."""
        self._raw.callbacks.clear()
        await self.execute("UNLISTEN *", timeout=timeout)

    async def _fetch_in_transaction(self, query: str, *args: object) -> list[Row]:
        raw = self._raw
        if raw.is_in_transaction():
            return list(await raw.fetch(query, *args))
        await _begin(raw)
        try:
            rows: list[Row] = await raw.fetch(query, *args)
        except asyncpg.PostgresError:
            with suppress(*DATABASE_ERRORS):
                await raw.execute("ROLLBACK")
            raise
        await raw.execute("COMMIT")
        return rows

    async def _call(self, start: Callable[[], Coroutine[Any, Any, T]], timeout: float) -> T:
        with trio.move_on_after(timeout):
            return await self._bridge.run_in_asyncio(start, lambda _: self.terminate())
        raise TimeoutError(f"no answer within {timeout:g} s")
