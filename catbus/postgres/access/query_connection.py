"""A connection for queries that is opened by the first query, and again after it was lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from .asyncpg_bridge import QUERY_TIMEOUT, DatabaseConnection, Row


class QueryConnection:
    """Runs one statement at a time, on a connection that it opens when needed."""

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]]) -> None:
        self.statements = 0
        """The number of statements so far."""
        self._connect = connect
        self._connection: DatabaseConnection | None = None
        self._lock = trio.Lock()

    async def connect(self) -> None:
        """Connect, unless there is a connection. Raises one of `DATABASE_ERRORS`."""
        async with self._lock:
            await self._connected()

    async def fetch(self, query: str, *args: object, timeout: float = QUERY_TIMEOUT) -> list[Row]:
        """Fetch all rows of one statement. Raises one of `DATABASE_ERRORS`. Cancellation closes the connection."""
        async with self._lock:
            connection = await self._connected()
            self.statements += 1
            return await connection.fetch(query, *args, timeout=timeout)

    def drop(self) -> None:
        """Close the connection: the next statement opens another one."""
        if self._connection is not None:
            self._connection.terminate()

    async def _connected(self) -> DatabaseConnection:
        if self._connection is None or self._connection.closed:
            self._connection = None
            self._connection = await self._connect()
        return self._connection
