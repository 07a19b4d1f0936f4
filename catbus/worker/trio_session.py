"""asyncpg on Trio: a connection whose methods may be awaited there, in an asyncio loop inside of Trio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import trio_asyncio  # type: ignore[import-untyped]

from ..observability.loggers import get_logger
from .async_sessions import AsyncpgSession, Closer, open_connection

logger = get_logger("catbus.worker")


class TrioConnection:
    """A connection of asyncpg on Trio. `raw` is the connection itself, for what is not here."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw

    async def execute(self, query: str, *args: object) -> str:
        return str(await self._call(self.raw.execute, query, *args))

    async def executemany(self, query: str, args: Any) -> None:
        await self._call(self.raw.executemany, query, args)

    async def fetch(self, query: str, *args: object) -> list[Any]:
        return list(await self._call(self.raw.fetch, query, *args))

    async def fetchrow(self, query: str, *args: object) -> Any:
        return await self._call(self.raw.fetchrow, query, *args)

    async def fetchval(self, query: str, *args: object) -> Any:
        return await self._call(self.raw.fetchval, query, *args)

    def transaction(self) -> AbstractAsyncContextManager[Any]:
        """A savepoint."""
        context: AbstractAsyncContextManager[Any] = trio_asyncio.aio_as_trio(self.raw.transaction())
        return context

    async def _call(self, method: Any, *args: object) -> Any:
        return await trio_asyncio.aio_as_trio(method)(*args)


@asynccontextmanager
async def open_asyncio_loop() -> AsyncIterator[None]:
    """Run an asyncio loop while the context lasts, unless there is one."""
    if trio_asyncio.current_loop.get() is not None:
        yield
        return
    async with trio_asyncio.open_loop() as loop:
        # By default an error in a callback would end the loop and the worker.
        loop.set_exception_handler(lambda _, context: logger.warning("error in a callback", reason=str(context)))
        yield


async def open_trio_session(connect: Any) -> tuple[AsyncpgSession, Closer]:
    """A session of a new connection of asyncpg, and how to close it."""
    connection, close = await trio_asyncio.aio_as_trio(open_connection)(connect)
    session = AsyncpgSession(connection, trio_asyncio.aio_as_trio)
    session.connection = TrioConnection(connection)
    return session, trio_asyncio.aio_as_trio(close)
