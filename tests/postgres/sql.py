"""SQL connections with which a test changes and observes the database of the tested log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from catbus.postgres.access.asyncpg_bridge import DatabaseConnection, open_bridge
from tests.log.harness import TEST_TIMEOUT


@asynccontextmanager
async def open_sql(url: str) -> AsyncIterator[DatabaseConnection]:
    """A separate connection for the test."""
    async with open_bridge() as bridge:
        with await bridge.connect(url) as connection:
            yield connection


async def wait_until(condition: Callable[[], Awaitable[object]]) -> None:
    """Poll until a condition of the database holds."""
    with trio.fail_after(TEST_TIMEOUT):
        while not await condition():
            await trio.sleep(0.01)


@asynccontextmanager
async def head_locked(url: str) -> AsyncIterator[None]:
    """Lock the head row, which blocks all appends."""
    async with open_sql(url) as connection:
        await connection.execute("BEGIN")
        await connection.fetch("SELECT FROM catbus.head FOR UPDATE")
        yield
        await connection.execute("ROLLBACK")


async def pids(connection: DatabaseConnection, query: str = "%") -> list[int]:
    """The other processes of this database whose current or last query matches."""
    rows = await connection.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND backend_type = 'client backend' AND query LIKE $1",
        query,
    )
    return [pid for (pid,) in rows]


async def waiting(connection: DatabaseConnection) -> int:
    """The number of appends that wait for the head row."""
    ((count,),) = await connection.fetch(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND wait_event_type = 'Lock' AND query LIKE '%catbus.append%'"
    )
    return int(count)


async def expire_replica(connection: DatabaseConnection, member: str, *, rejoined: int) -> None:
    """Let the last heartbeat of the replica with this client be so old that its members are lost.

    First wait until `rejoined` memberships are on other replicas: then nothing depends on the time that takes.
    """
    (replica,) = await connection.fetchrow("SELECT replica FROM catbus.presence WHERE client_id = $1", member)

    async def have_rejoined() -> bool:
        (count,) = await connection.fetchrow(
            "SELECT count(*) FROM catbus.presence WHERE state = 0 AND replica <> $1", replica
        )
        return bool(count == rejoined)

    await wait_until(have_rejoined)
    await connection.fetch(
        "UPDATE catbus.presence_replicas SET last_heartbeat = last_heartbeat - interval '1 h' WHERE replica = $1",
        replica,
    )
