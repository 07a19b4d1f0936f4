"""asyncpg on trio-asyncio, seen from Trio. Nothing else imports either of them.

Crossing costs some 100 us: cross once per batch, never once per message.
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

OUTAGE = (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What a database that is away, or that is not as it should be, makes its users see.

The last one is how asyncpg puts it when the server had said goodbye before it was asked.
"""

QUERY_TIMEOUT = 10.0
# What is not acknowledged, or asks a peer that is gone, ends after 4 s.
_KEEPALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 4_000),
)
_MENTION_TYPES = "SELECT $1::text[], $2::bytea[], $3::bigint[]"
"""All that arguments and results are of, beside those that asyncpg knows."""


def sqlstate(error: BaseException) -> str:
    """The five characters by which PostgreSQL tells errors apart; empty for an error of another kind."""
    return getattr(error, "sqlstate", None) or ""


def leaf_exceptions(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that a group is made of, or the one that is none."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from leaf_exceptions(part)
    else:
        yield error


class _NameLookupExecutor(trio_asyncio.TrioExecutor):  # type: ignore[misc]
    """Runs name look-ups in threads that may be left behind: a silent name server must not hold up a stop."""

    async def submit(self, func: Callable[..., Any], *args: Any) -> Any:
        return await trio.to_thread.run_sync(func, *args, abandon_on_cancel=True)


@asynccontextmanager
async def open_bridge() -> AsyncIterator[Bridge]:
    """Run an asyncio loop inside Trio for as long as the context lasts. A lone exception leaves it as it is."""
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
    """The way into the asyncio loop. Its connections may be used by any task of the same Trio run."""

    def __init__(self, loop: Any) -> None:
        self.is_open = True
        self.stray_errors = 0
        self._strays = RateLimitedLog(logger.error)
        self._loop = loop
        self._connections: set[DatabaseConnection] = set()
        self._pooled: set[str] = set()
        """The URLs that led to a pooler."""
        self._plain: set[str] = set()
        """Those where a session cannot be started with settings, as behind many a pooler."""
        self._good: set[str] = set()
        """Those that have led somewhere."""

    def close(self) -> None:
        """Terminate every connection: whoever still waits for one sees an outage."""
        self.is_open = False
        for connection in list(self._connections):
            connection.terminate()

    def note_stray_error(self, loop: object, context: dict[str, Any]) -> None:
        """Log and count what went wrong in a callback: by default it would end the loop and all beside it."""
        self.stray_errors += 1
        text, error = context.get("message"), context.get("exception")
        # asyncio says some of it while objects are collected, when Trio need not be running.
        self._strays.log(monotonic(), "error in a callback", kind=text, reason=text, exception=error)

    async def connect(self, url: str, timeout: float = QUERY_TIMEOUT, *, setting: str = "url") -> DatabaseConnection:
        """Connect within `timeout` seconds. Raises one of `OUTAGE`, or `ConfigError` where the URL itself is wrong.

        libpq's parameters in the URL mean what `urls.PARAMETERS` says. `setting` is the one that the URL stands in.
        """
        with trio.move_on_after(timeout):
            while True:
                pooled = url in self._pooled
                try:
                    targets = find_targets(url)
                except ConfigError as error:
                    text = f"[database] {setting}: {error}"
                    if url in self._good:
                        # It was right, and files come and go: no reason to end everything.
                        raise OSError(text) from None
                    raise ConfigError(text) from None
                share = timeout if len(targets) == 1 else timeout / len(targets)
                try:
                    start = partial(self._open, targets, share, pooled, plain=url in self._plain)
                    connection: DatabaseConnection = await self.cross(start, _give_up)
                except asyncpg.PostgresError as error:
                    if url in self._plain or sqlstate(error) not in POOLER_ERROR_CODES:
                        raise
                    self._plain.add(url)
                    self._pooled.add(url)
                    continue
                self._good.add(url)
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
        """A connection, with prepared statements unless it is expected to lead to a pooler.

        Behind a pooler the next statement may meet another server process, which has not prepared the same. `plain`
        starts the session without settings.
        """
        options: dict[str, Any] = {"connection_class": _AsyncpgConnection}
        options |= {"statement_cache_size": 0} if pooled else {"max_cached_statement_lifetime": 0}
        raw = await _dial(targets, share, {} if plain else STARTUP_SETTINGS, options)
        try:
            # In a transaction a pooler does not give the server to somebody else. Without a name: it may have that.
            await _begin(raw)
            statement = await raw.prepare("SELECT pg_catalog.pg_backend_pid()", name="")
            connection = DatabaseConnection(self, raw, await statement.fetchval())
            if connection.pooled:
                # asyncpg asks about types when it meets them, by names that a session may have given another meaning.
                await raw.prepare(_MENTION_TYPES, name="")
            await raw.execute("COMMIT" if connection.pooled else complete_script(connection.version, started=not plain))
            return connection
        except BaseException:
            raw.terminate()
            raise

    async def cross(self, start: Callable[[], Coroutine[Any, Any, T]], stop: Callable[[asyncio.Task[T]], object]) -> T:
        """Run an asyncio coroutine. When this is cancelled, call `stop` and wait for the coroutine to end."""
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
                future.exception()  # seen, so that asyncio does not complain of it
            raise_cancel()
        if future.cancelled():
            raise OSError("the connection was given up")
        return future.result()


async def _dial(
    targets: Sequence[ConnectionTarget], share: float, settings: Mapping[str, str], options: Mapping[str, Any]
) -> Any:
    """The first of the hosts that takes us, each within `share` seconds; raises what the last one has said.

    As with libpq, a host that refuses the user or the password ends the search: the others would do the same.
    """
    for number, target in enumerate(targets, 1):
        timeout = min(target.timeout or share, share)
        try:
            return await _dial_host(target, timeout, settings, options)
        except (OSError, asyncpg.CannotConnectNowError, asyncpg.TargetServerAttributeNotMatched) as error:
            if number == len(targets):
                if isinstance(error, TimeoutError):
                    raise TimeoutError(f"no connection within {timeout:g} s") from None
                raise
    raise AssertionError("there is always a host")


async def _dial_host(
    target: ConnectionTarget, timeout: float, settings: Mapping[str, str], options: Mapping[str, Any]
) -> Any:
    """Connect to one host, with TLS or without, as its ways have it. `settings` are those of the session."""
    arguments = {**target.arguments, "server_settings": {**target.arguments["server_settings"], **settings}}
    *ways, last = target.ways
    refusal: asyncpg.PostgresError | None = None
    for way in ways:
        try:
            return await asyncpg.connect(**arguments, ssl=way, timeout=timeout, **options)
        except (ConnectionRefusedError, asyncpg.InvalidPasswordError, asyncpg.CannotConnectNowError):
            # It would be the same the other way, and its error tells more.
            raise
        except asyncpg.PostgresError as error:
            refusal = error if sqlstate(error) in POOLER_ERROR_CODES else None
        except (ConnectionError, ssl.SSLError):
            pass
    try:
        return await asyncpg.connect(**arguments, ssl=last, timeout=timeout, **options)
    except ConnectionError:
        if refusal is not None:
            # There is no other way: it is the settings that a pooler does not take.
            raise refusal from None
        raise


async def _begin(raw: Any) -> None:
    """Begin a transaction with the settings of `environment`."""
    version = raw.get_server_version().major
    try:
        await raw.execute(begin_script(version))
    except asyncpg.FeatureNotSupportedError:
        await raw.execute(begin_script(version, read_write=False))  # a standby


def _stays_here(peer: socket.socket) -> bool:
    return peer.family == socket.AF_UNIX or ipaddress.ip_address(peer.getpeername()[0]).is_loopback


def _give_up(connecting: asyncio.Task[Any]) -> None:
    """Stop connecting; a connection that has come about all the same is not for anybody."""

    def discard(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is None:
            task.result().terminate()

    connecting.cancel()
    connecting.add_done_callback(discard)


class _AsyncpgConnection(asyncpg.Connection):  # type: ignore[misc]
    """A connection of asyncpg that hands notifications on where they are read.

    asyncpg makes a callback of the event loop of each, which costs 45 us: a role that sends as many as it can would
    take all of our time.
    """

    __slots__ = ("heard",)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.heard: dict[str, NotificationCallback] = {}

    def _process_notification(self, pid: int, channel: str, payload: str) -> None:
        heard = self.heard.get(channel)
        if heard is None:
            return
        try:
            heard(pid, payload)
        except Exception as error:  # noqa: BLE001
            self._loop.call_exception_handler({"message": "a listener failed", "exception": error})


class DatabaseConnection:
    """A connection to PostgreSQL: a context manager that terminates it in the end.

    After a time-out, or when a call was cancelled, nobody can say what the server did: the connection is terminated.
    asyncpg would open a second one to send a cancel request, which is worse than nothing while an append is in doubt.
    """

    def __init__(self, bridge: Bridge, raw: Any, pid: int) -> None:
        self._bridge = bridge
        self._raw = raw
        self.version: int = raw.get_server_version().major
        self.pid = pid
        """The process that serves this connection, or behind a pooler one that did."""
        self.pooled: bool = pid != raw.get_server_pid()
        """Whether this leads to a pooler: what answers is not the process that it was said to be on connecting."""
        self.encrypted: bool = raw._transport.get_extra_info("ssl_object") is not None
        """Whether it goes through TLS."""
        peer = raw._transport.get_extra_info("socket")
        self.remote = peer is not None and not _stays_here(peer)
        """Whether it leaves this machine."""
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
        """Whether the connection is known to be gone."""
        return bool(self._raw.is_closed())

    def when_closed(self, callback: Callable[[], None]) -> None:
        """Call `callback`, once, when the connection is lost or terminated."""
        self._raw.add_termination_listener(lambda _: callback())

    def terminate(self) -> None:
        """Drop the connection without waiting for anything. What runs on it fails with one of `OUTAGE`."""
        self._raw.terminate()

    async def fetch(self, query: str, *args: object, timeout: float = QUERY_TIMEOUT) -> list[Row]:
        """All rows of one statement. It runs with the settings of `environment`, unless it is a CALL.

        Behind a pooler a session keeps no settings, so a transaction has them. That costs two round trips, through
        which locks are held. A procedure begins a transaction by itself instead.
        """
        wrapped = self.pooled and not query.startswith("CALL ")
        fetch = self._fetch_in_transaction if wrapped else self._raw.fetch
        return await self._call(lambda: fetch(query, *args), timeout)

    async def fetchrow(self, query: str, *args: object, timeout: float = QUERY_TIMEOUT) -> Row:
        """The one row of a statement that always has one."""
        rows = await self.fetch(query, *args, timeout=timeout)
        if not rows:
            raise OSError("the database gave no answer where there always is one")
        return rows[0]

    async def begin(self, *, timeout: float = QUERY_TIMEOUT) -> None:
        """Begin a transaction with the settings of `environment`. Until it ends, statements run in it."""
        await self._call(lambda: _begin(self._raw), timeout)

    async def execute(self, script: str, *, timeout: float = QUERY_TIMEOUT) -> None:
        """Any number of statements, in one transaction unless they say otherwise."""
        await self._call(lambda: self._raw.execute(script), timeout)

    async def listen(self, channel: str, callback: NotificationCallback, *, timeout: float = QUERY_TIMEOUT) -> None:
        """Call `callback` with the sender's process id and the payload of each notification from now on.

        It stands inside the reader, which it holds up. What it raises is logged and counted.
        """
        self._raw.heard[channel] = callback
        await self.execute(f'LISTEN "{channel}"', timeout=timeout)

    async def unlisten(self, *, timeout: float = QUERY_TIMEOUT) -> None:
        """Listen to nothing any more."""
        self._raw.heard.clear()
        await self.execute("UNLISTEN *", timeout=timeout)

    async def _fetch_in_transaction(self, query: str, *args: object) -> list[Row]:
        raw = self._raw
        if raw.is_in_transaction():
            return list(await raw.fetch(query, *args))
        await _begin(raw)
        try:
            rows: list[Row] = await raw.fetch(query, *args)
        except asyncpg.PostgresError:
            with suppress(*OUTAGE):
                await raw.execute("ROLLBACK")
            raise
        await raw.execute("COMMIT")
        return rows

    async def _call(self, start: Callable[[], Coroutine[Any, Any, T]], timeout: float) -> T:
        with trio.move_on_after(timeout):
            return await self._bridge.cross(start, lambda _: self.terminate())
        raise TimeoutError(f"no answer within {timeout:g} s")
