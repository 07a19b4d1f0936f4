"""What tests of consumers share: publishing, receiving, retention and roles, by SQL."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, DatabaseConnection, sqlstate
from tests.postgres.sql import open_sql

PUBLISH = """
SELECT catbus.publish(m.channel, to_json(m.nth)) FROM (
    SELECT channel, nth FROM unnest($1::text[]) WITH ORDINALITY AS m (channel, nth) ORDER BY nth
) AS m
"""
MOVE = "SELECT m.last FROM catbus.head AS h CROSS JOIN LATERAL catbus.move_outbox('local', h.epoch, NULL) AS m"
YEAR = 365 * 86_400_000


class Position(NamedTuple):
    partition: int
    cursor: int
    lag: int
    gap: bool
    dead_letters: int


async def publish(sql: DatabaseConnection, *channels: str) -> int:
    """Publish to each of the channels in turn, and return the head."""
    await sql.fetch(PUBLISH, channels)
    while True:
        (last,) = await sql.fetchrow(MOVE)
        if last is None:
            (head,) = await sql.fetchrow("SELECT head FROM catbus.position()")
            return int(head)


async def fill(sql: DatabaseConnection, number: int, prefix: str = "a") -> None:
    """Fill an empty log with messages of 1,000 channels."""
    await sql.fetch(
        "INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number) "
        "SELECT 0, n, 0, $2 || '.' || n % 1000, '1', 'x', n FROM generate_series(1, $1::integer) AS n",
        number,
        prefix,
    )


async def create(
    sql: DatabaseConnection,
    name: str = "c",
    pattern: str = "a.*",
    *,
    partitions: int = 1,
    start: str = "floor",
    hold: bool = False,
    owner: str | None = None,
) -> None:
    await sql.fetch(
        "SELECT catbus.create_consumer($1, $2, partitions => $3, start => $4, hold => $5, owner => $6::text::regrole)",
        name, pattern, partitions, start, hold, owner,
    )  # fmt: skip


async def receive(sql: DatabaseConnection, number: int = 100, name: str = "c") -> list[int]:
    """Receive messages, and return their seqs."""
    return [seq for (seq,) in await sql.fetch("SELECT seq FROM catbus.receive($1, $2)", name, number)]


async def receive_all(sql: DatabaseConnection, name: str = "c") -> list[int]:
    """Receive in autocommit until nothing comes, and return all seqs."""
    found: list[int] = []
    while batch := await receive(sql, 1000, name):
        found += batch
    return found


async def positions(sql: DatabaseConnection, name: str = "c") -> list[Position]:
    return [
        Position(*row)
        for row in await sql.fetch(
            "SELECT partition, cursor, lag, gap, dead_letters FROM catbus.consumer_positions() "
            "WHERE consumer = $1 ORDER BY partition",
            name,
        )
    ]


async def dead_letters(sql: DatabaseConnection) -> list[tuple[str, int, str, str, str | None]]:
    rows = await sql.fetch("SELECT consumer, seq, channel, payload, reason FROM catbus.dead_letters ORDER BY 1, 2")
    return [tuple(row) for row in rows]


async def retain(sql: DatabaseConnection, *, size: int = 1 << 50) -> tuple[int, bool]:
    """Take one step of retention a year from now. Returns the floor, and whether the step was because of the size."""
    (now,) = await sql.fetchrow("SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint")
    floor, by_size = await sql.fetchrow("SELECT floor, by_size FROM catbus.retain(1000, $1, $2)", size, now + YEAR)
    return floor, by_size


async def outcome(sql: DatabaseConnection, query: str, *args: object) -> tuple[str, str]:
    """The SQLSTATE and the message of the error of a query; empty if there is none."""
    try:
        await sql.fetch(query, *args)
    except DATABASE_ERRORS as error:
        return sqlstate(error), str(error)
    return "", ""


@asynccontextmanager
async def open_role(
    url: str, name: str, statements: Sequence[str] = (), options: str = "LOGIN"
) -> AsyncIterator[DatabaseConnection]:
    """A connection of a new role, after the statements. The role is dropped afterwards."""
    async with open_sql(url) as owner:
        await owner.execute(f"CREATE ROLE {name} {options} PASSWORD 'sesame'")
        try:
            for statement in statements:
                await owner.execute(statement)
            place = urlsplit(url).netloc.rpartition("@")[2]
            async with open_sql(urlsplit(url)._replace(netloc=f"{name}:sesame@{place}").geturl()) as sql:
                yield sql
        finally:
            await owner.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")
