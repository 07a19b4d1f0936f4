"""`consume`: the loop of a worker on asyncio and on Trio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any, Protocol, overload

import anyio
import sniffio

from ..client.reconnect_policy import Backoff
from ..errors import ConsumerError
from .async_sessions import AsyncSession, Closer, cleanup, listens_directly, make_session, open_connection
from .work_cycle import COALESCE_PAUSE, ConsumerMessage, Turn, WorkCycle, WorkStatistics
from .work_log import WorkLog

DEFAULT_BACKOFF = Backoff(1.0, 60.0)


class StopEvent(Protocol):
    """An `Event` of asyncio, Trio or anyio."""

    def is_set(self) -> bool: ...

    async def wait(self) -> object: ...


@overload
async def consume(
    connect: str | Callable[[], Any],
    name: str,
    handler: Callable[[Any, ConsumerMessage], Awaitable[object]],
    *,
    batch: None = None,
    attempts: int | None = 5,
    backoff: Backoff = DEFAULT_BACKOFF,
    poll: float = 1.0,
    stop: StopEvent | None = None,
    statistics: WorkStatistics | None = None,
) -> None: ...


@overload
async def consume(
    connect: str | Callable[[], Any],
    name: str,
    handler: Callable[[Any, Sequence[ConsumerMessage]], Awaitable[object]],
    *,
    batch: int,
    attempts: int | None = 5,
    backoff: Backoff = DEFAULT_BACKOFF,
    poll: float = 1.0,
    stop: StopEvent | None = None,
    statistics: WorkStatistics | None = None,
) -> None: ...


async def consume(
    connect: str | Callable[[], Any],
    name: str,
    handler: Callable[[Any, Any], Awaitable[object]],
    *,
    batch: int | None = None,
    attempts: int | None = 5,
    backoff: Backoff = DEFAULT_BACKOFF,
    poll: float = 1.0,
    stop: StopEvent | None = None,
    statistics: WorkStatistics | None = None,
) -> None:
    """Process the messages of the consumer `name`, each in a transaction of your database, until `stop` is set.

    `handler` gets the connection of an open transaction and a message; with `batch`, up to so many messages, in order.
    What it does with the connection and the position of the consumer are committed together. If it raises an
    exception, its effects are rolled back. Then several messages are tried one at a time, and a single message again
    after the pause of `backoff`, while its partition waits. After so many `attempts` of its own it becomes a dead
    letter; None: never. An attempt counts also if the process or the connection ends in it.

    connect     the URL of the database, for asyncpg; or a function that returns a connection of asyncpg, psycopg or
                SQLAlchemy, or a context manager or an awaitable of one, for example `pool.acquire`. On Trio: a URL, or
                a coroutine function of asyncpg, and handlers get a `TrioConnection`
    poll        seconds between two looks while nothing happens. Notifications make it look at once, except through a
                pooler such as PgBouncer: those do not pass notifications on
    stop        an Event. The current transaction is finished first
    statistics  what it has done; yours to read at any time

    A lost or unreachable database is logged and tried again, with a backoff of up to 30 s. Cancellation rolls the
    current transaction back. Raises `ConsumerError` if a retry is of no use: messages were removed before they were
    received, no such consumer or no rights, another isolation level than READ COMMITTED.
    """
    cycle = WorkCycle(
        name, statistics or WorkStatistics(), batch=batch, attempts=attempts, backoff=backoff, poll=poll
    )  # fmt: skip
    worker = _AsyncWorker(cycle, connect, handler, stop, single=batch is None)
    if sniffio.current_async_library() != "trio":
        await worker.run(_open_session)
        return
    from .trio_session import open_asyncio_loop, open_trio_session

    try:
        async with open_asyncio_loop():
            await worker.run(open_trio_session)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from error.__cause__


async def _open_session(connect: Callable[[], Any]) -> tuple[AsyncSession, Closer]:
    connection, close = await open_connection(connect)
    try:
        return await make_session(connection), close
    except BaseException:
        with cleanup():
            await close()
        raise


async def _connect_url(url: str) -> Any:
    """A connection of asyncpg, without prepared statements if it leads to a pooler."""
    import asyncpg  # type: ignore[import-untyped]

    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            # The statement has no name: behind a pooler, another session of the server could have it.
            statement = await connection.prepare("SELECT pg_backend_pid()", name="")
            direct = await statement.fetchval() == connection.get_server_pid()
        if direct:
            return connection
    except BaseException:
        connection.terminate()
        raise
    connection.terminate()
    return await asyncpg.connect(url, statement_cache_size=0)


class _AsyncWorker:
    def __init__(
        self,
        cycle: WorkCycle,
        connect: str | Callable[[], Any],
        handler: Callable[[Any, Any], Awaitable[object]],
        stop: StopEvent | None,
        *,
        single: bool,
    ) -> None:
        self._cycle = cycle
        self._connect = partial(_connect_url, connect) if isinstance(connect, str) else connect
        self._handler = handler
        self._stop = stop
        self._single = single
        self._log = WorkLog(cycle)

    @property
    def _stopped(self) -> bool:
        return self._stop is not None and self._stop.is_set()

    async def run(self, open_session: Callable[[Callable[[], Any]], Awaitable[tuple[Any, Closer]]]) -> None:
        """Work on one connection after the other."""
        while not self._stopped:
            session: AsyncSession | None = None
            close: Closer | None = None
            try:
                session, close = await open_session(self._connect)
                await self._work(session)
            except ConsumerError:
                raise
            except Exception as error:  # noqa: BLE001 (others are raised again)
                seconds = self._log.lose(error, session, anyio.current_time())
            else:
                return
            finally:
                if close is not None:
                    with cleanup():
                        await close()
            await self._wait(anyio.sleep, seconds)

    async def _work(self, session: AsyncSession) -> None:
        direct = await listens_directly(session)
        self._log.begin(notifications=direct)
        while not self._stopped:
            turn = await self._turn(session)
            if not turn.messages and not self._stopped:
                await self._wait(
                    session.wait_notified if direct else anyio.sleep, self._cycle.pause(anyio.current_time())
                )
                await anyio.sleep(COALESCE_PAUSE)
        self._log.stop()

    async def _turn(self, session: AsyncSession) -> Turn:
        """One transaction."""
        cycle = self._cycle
        async with _finishing(session.transaction()):
            turn = cycle.begin(await session.fetch(cycle.receive))
            if turn.messages and turn.statement is None:
                try:
                    async with _finishing(session.transaction()):
                        await self._handler(session.connection, turn.messages[0] if self._single else turn.messages)
                except Exception as error:
                    if session.lost:
                        raise
                    self._log.fail(turn, error, anyio.current_time())
            if turn.statement is not None:
                await session.fetch(turn.statement)
        self._log.end(turn, anyio.current_time())
        return turn

    async def _wait(self, wait: Callable[[float], Awaitable[object]], seconds: float) -> None:
        """Wait for so many seconds, or until `stop` is set. Raises what `wait` raises."""
        if self._stop is None:
            await wait(seconds)
            return
        raised: Exception | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(_cancel_when_set, self._stop, group.cancel_scope)
            try:
                await wait(seconds)
            except Exception as error:  # noqa: BLE001
                raised = error
            group.cancel_scope.cancel()
        if raised is not None:
            raise raised


async def _cancel_when_set(stop: StopEvent, scope: anyio.CancelScope) -> None:
    await stop.wait()
    scope.cancel()


@asynccontextmanager
async def _finishing(transaction: AbstractAsyncContextManager[Any]) -> AsyncIterator[None]:
    """A transaction that is rolled back also while the task is cancelled. The first error is the one that counts."""
    await transaction.__aenter__()
    try:
        yield
    except BaseException as error:
        with cleanup(), suppress(Exception):
            await transaction.__aexit__(type(error), error, error.__traceback__)
        raise
    await transaction.__aexit__(None, None, None)
