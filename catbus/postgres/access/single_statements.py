"""Statements that are rare, each on a connection of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from .asyncpg_bridge import DatabaseConnection, Row


class SingleStatements:
    """Runs one statement at a time, and closes its connection: a connection that waits for the next one costs more."""

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]]) -> None:
        self._connect = connect
        self._lock = trio.Lock()

    async def fetch(self, query: str, *args: object) -> list[Row]:
        """Fetch all rows of one statement. Raises one of `DATABASE_ERRORS`. Cancellation closes the connection."""
        async with self._lock:
            with await self._connect() as connection:
                return await connection.fetch(query, *args)
