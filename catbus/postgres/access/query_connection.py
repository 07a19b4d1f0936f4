"""A connection for questions, which need not be there before the first of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from .asyncpg_bridge import QUERY_TIMEOUT, DatabaseConnection, Row


class QueryConnection:
    """A connection that is made when it is first needed and again after it was lost. One statement at a time."""

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]]) -> None:
        self.statements = 0
        """How many it has asked."""
        self._connect = connect
        self._connection: DatabaseConnection | None = None
        self._turn = trio.Lock()

    async def connect(self) -> None:
        """Make sure that there is a connection. Raises one of `OUTAGE`."""
        async with self._turn:
            await self._connected()

    async def fetch(self, query: str, *args: object, timeout: float = QUERY_TIMEOUT) -> list[Row]:
        """All rows of one statement. Raises one of `OUTAGE`. Cancelling it costs the connection."""
        async with self._turn:
            connection = await self._connected()
            self.statements += 1
            return await connection.fetch(query, *args, timeout=timeout)

    async def _connected(self) -> DatabaseConnection:
        if self._connection is None or self._connection.closed:
            self._connection = None
            self._connection = await self._connect()
        return self._connection
