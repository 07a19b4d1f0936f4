"""The connections on which an asynchronous worker runs its transactions: asyncpg, psycopg, SQLAlchemy."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from inspect import isawaitable
from typing import Any, Protocol

import anyio

from ..errors import ConsumerError
from .database_errors import driver_of
from .work_cycle import NOTIFIED_CHANNEL, PROBE, Statement

CLEANUP_TIMEOUT = 5.0
"""Seconds for what has to be done after a cancellation. Afterwards the connection is dropped as it is."""


class AsyncSession(Protocol):
    """One connection. `connection` is what handlers get."""

    connection: Any

    @property
    def lost(self) -> bool: ...

    @property
    def process_id(self) -> int:
        """The process of the server, as it was named on connecting."""

    async def fetch(self, statement: Statement) -> Sequence[Sequence[Any]]: ...

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """A transaction; within a transaction a savepoint."""

    async def wait_notified(self, seconds: float) -> None:
        """Wait for a notification, outside of a transaction. The session listens only meanwhile.

        A connection that listens keeps all notifications of the cluster while it is in a transaction.
        """


@contextmanager
def cleanup() -> Iterator[None]:
    """Let something end although the task is cancelled. Its errors say no more than that the connection is lost."""
    with suppress(Exception), anyio.move_on_after(CLEANUP_TIMEOUT, shield=True):
        yield


class AsyncpgSession:
    """A connection of asyncpg. `cross` makes what it returns usable on this event loop."""

    def __init__(self, raw: Any, cross: Callable[[Any], Any] = lambda thing: thing) -> None:
        self.connection = raw
        self._raw = raw
        self._cross = cross

    @property
    def lost(self) -> bool:
        return bool(self._raw.is_closed())

    @property
    def process_id(self) -> int:
        return int(self._raw.get_server_pid())

    async def fetch(self, statement: Statement) -> Sequence[Sequence[Any]]:
        sql, arguments = statement
        numbered = sql.format(*(f"${number}" for number in range(1, len(arguments) + 1)))
        rows: Sequence[Sequence[Any]] = await self._cross(self._raw.fetch)(numbered, *arguments)
        return rows

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        context: AbstractAsyncContextManager[Any] = self._cross(self._raw.transaction())
        return context

    async def wait_notified(self, seconds: float) -> None:
        notified = anyio.Event()

        def callback(*_: object) -> None:
            notified.set()

        try:
            await self._cross(self._raw.add_listener)(NOTIFIED_CHANNEL, callback)
            with anyio.move_on_after(seconds):
                await notified.wait()
        finally:
            with cleanup():
                await self._cross(self._raw.remove_listener)(NOTIFIED_CHANNEL, callback)


class PsycopgAsyncSession:
    """An `AsyncConnection` of psycopg."""

    def __init__(self, raw: Any) -> None:
        from psycopg.rows import tuple_row  # psycopg is imported already

        self.connection = raw
        self._raw = raw
        self._row_factory = tuple_row

    @property
    def lost(self) -> bool:
        return bool(self._raw.closed)

    @property
    def process_id(self) -> int:
        return int(self._raw.info.backend_pid)

    async def fetch(self, statement: Statement) -> Sequence[Sequence[Any]]:
        async with self._raw.cursor(row_factory=self._row_factory) as cursor:
            await cursor.execute(*statement.with_names("%({})s"))
            rows: Sequence[Sequence[Any]] = await cursor.fetchall()
            return rows

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        context: AbstractAsyncContextManager[Any] = self._raw.transaction()
        return context

    async def wait_notified(self, seconds: float) -> None:
        await self._run(f"LISTEN {NOTIFIED_CHANNEL}")
        try:
            async for _ in self._raw.notifies(timeout=seconds, stop_after=1):
                pass
        finally:
            with cleanup():
                await self._run(f"UNLISTEN {NOTIFIED_CHANNEL}")

    async def _run(self, command: str) -> None:
        async with self._raw.transaction():
            await self._raw.execute(command)


class SQLAlchemyAsyncSession:
    """An `AsyncConnection` of SQLAlchemy, over asyncpg or psycopg."""

    def __init__(self, connection: Any, driver: AsyncpgSession | PsycopgAsyncSession) -> None:
        self.connection = connection
        self._driver = driver
        self.process_id = driver.process_id
        self.wait_notified = driver.wait_notified

    @property
    def lost(self) -> bool:
        return self.connection.closed or self.connection.invalidated or self._driver.lost

    async def fetch(self, statement: Statement) -> Sequence[Sequence[Any]]:
        from sqlalchemy import text  # SQLAlchemy is imported already

        sql, arguments = statement.with_names(":{}")
        result = await self.connection.execute(text(sql), arguments)
        rows: Sequence[Sequence[Any]] = result.all()
        return rows

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        nested = self.connection.in_transaction()
        context: AbstractAsyncContextManager[Any] = (
            self.connection.begin_nested() if nested else self.connection.begin()
        )
        return context


async def make_session(connection: Any) -> AsyncpgSession | PsycopgAsyncSession | SQLAlchemyAsyncSession:
    """The session of a connection. Raises `TypeError` for an object that is none."""
    driver = driver_of(connection)
    if driver == "sqlalchemy" and hasattr(connection, "get_raw_connection"):
        raw = (await connection.get_raw_connection()).driver_connection
        inner = await make_session(raw)
        if not isinstance(inner, SQLAlchemyAsyncSession):
            return SQLAlchemyAsyncSession(connection, inner)
    elif driver == "asyncpg":
        return AsyncpgSession(connection)
    elif driver == "psycopg" and hasattr(connection, "notifies") and hasattr(connection, "__aenter__"):
        return PsycopgAsyncSession(connection)
    raise TypeError(
        f"consume works on asynchronous connections of asyncpg, psycopg and SQLAlchemy, not on {connection!r}"
    )


async def listens_directly(session: AsyncSession) -> bool:
    """Whether notifications reach this session: the process that answers is that of the connection, not of a pooler.

    Raises `ConsumerError` if each statement is a transaction of its own.
    """
    async with session.transaction():
        ((pid, began),) = await session.fetch(Statement(PROBE, ()))
        ((_, again),) = await session.fetch(Statement(PROBE, ()))
    check_transaction(began, again)
    return bool(pid == session.process_id)


def check_transaction(began: object, again: object) -> None:
    """Raise `ConsumerError` if two statements of a transaction had different transactions."""
    if began != again:
        raise ConsumerError(
            "the connection commits each statement by itself, so messages would be acknowledged before they are "
            "processed. Use another isolation level than AUTOCOMMIT",
            "25001",
        )


Closer = Callable[[], Awaitable[object]]


async def open_connection(connect: Callable[[], Any]) -> tuple[Any, Closer]:
    """What `connect` returns, opened: a connection, and how to close it or give it back to its pool."""
    made = connect()
    if hasattr(made, "__aenter__"):
        return await made.__aenter__(), lambda: made.__aexit__(None, None, None)
    if not isawaitable(made):
        raise TypeError(f"consume works on asynchronous connections, not on {close_wrong(made)!r}")
    connection = await made
    return connection, connection.close


def close_wrong(made: Any) -> Any:
    """Close a connection of the wrong kind."""
    if driver_of(made) is not None:
        made.close()
    return made
