"""`catbus.erase` on a real server: what is erased, what stays, and what VACUUM removes from the files."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import product
from typing import Any

import pytest

from catbus.postgres.access.asyncpg_bridge import DatabaseConnection, sqlstate
from catbus.postgres.maintenance.vacuum import vacuum_tables
from catbus.protocol.channels import matches
from tests.postgres.sql import open_sql

CHANNELS = ("a", "a-b", "a.b", "a.b.c", "ab", "a_b", "b.a", "_catbus.sessions.a", "a0")
PATTERNS = ("*", "a", "a.*", "a.b", "a.b.*", "b", "b.*", "_catbus.*", "_catbus.sessions.a")

APPEND = """
INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number, sender, origin)
SELECT n % 8, n, 1000 * n, ($1::text[])[1 + n % cardinality($1::text[])], format('"text %s"', n), '\\x01', n,
       ($2::text[])[1 + n % cardinality($2::text[])], '\\x02'
FROM generate_series(1, $3::integer) AS n
"""


@asynccontextmanager
async def filled(url: str, messages: int, channels: tuple[str, ...] = CHANNELS) -> AsyncIterator[DatabaseConnection]:
    """A log with entries in all of its tables, one second apart."""
    async with open_sql(url) as sql:
        await sql.fetch(APPEND, [*channels], ["alice", "bob", None], messages)
        yield sql


async def rows(sql: DatabaseConnection) -> list[dict[str, Any]]:
    return [
        dict(row)  # type: ignore[call-overload]
        for row in await sql.fetch(
            "SELECT seq, at, channel, payload, sender, origin, slot, producer, number FROM catbus.entries ORDER BY seq"
        )
    ]


@pytest.mark.parametrize("pattern", PATTERNS)
async def test_exactly_the_selected_messages_lose_their_contents(database_url: str, pattern: str) -> None:
    async with filled(database_url, 60) as sql:
        before = await rows(sql)
        for sender, time in product(["alice", "carol", None], [30_000, None]):
            selected = {
                row["seq"]
                for row in before
                if matches(pattern, row["channel"])
                and (sender is None or row["sender"] == sender)
                and (time is None or row["at"] < time)
            }
            await sql.execute("BEGIN")
            (count,) = await sql.fetchrow(
                "SELECT catbus.erase($1, sender => $2, before => to_timestamp($3::double precision / 1000))",
                pattern,
                sender,
                time,
            )
            assert count == len(selected)
            for old, new in zip(before, await rows(sql), strict=True):
                gone = {"channel": "_erased", "payload": "null", "sender": None, "origin": None}
                assert new == (old | gone if old["seq"] in selected else old)
            (seqs,) = await sql.fetchrow("SELECT catbus.erased_seqs(0, 60)")
            assert set(seqs) == selected
            await sql.execute("ROLLBACK")


async def test_batches_cover_the_log_without_a_gap(database_url: str) -> None:
    """More entries than a batch has, by either order, with matches at its edges."""
    channels = ("a.x", "a.x", "a.y", "b")
    async with filled(database_url, 42_000, channels) as sql:
        assert await sql.fetchrow("SELECT catbus.erase('a.*', before => to_timestamp(41000))") == (
            len([n for n in range(1, 41_000) if channels[n % 4] != "b"]),
        )
        assert await sql.fetchrow("SELECT catbus.erase('*', sender => 'bob')") == (
            len([n for n in range(1, 42_001) if n % 3 == 1 and (channels[n % 4] == "b" or n >= 41_000)]),
        )
        left = await sql.fetch("SELECT channel, count(*) FROM catbus.entries GROUP BY channel ORDER BY channel")
        assert sum(count for _, count in left) == 42_000
        assert await sql.fetchrow("SELECT catbus.erase('*')") == (
            sum(n for channel, n in left if channel != "_erased"),
        )


async def test_pattern_is_checked(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        for wrong in ("", "a.", "a.*.b", "a b", "%", "a" * 256, ".".join("a" * 33), None):
            with pytest.raises(Exception, match="not a pattern") as caught:
                await sql.fetch("SELECT catbus.erase($1)", wrong)
            assert sqlstate(caught.value) == "22023"


async def test_old_snapshot_is_rejected(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        with pytest.raises(Exception, match="read committed"):
            await sql.fetch("SELECT catbus.erase('a')")


async def test_messages_that_wait_in_the_outbox_are_deleted(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(
            "SELECT catbus.publish('a.b', '1'), catbus.publish('b', '2');"
            "SELECT setval('catbus.outbox_active', 1); SELECT catbus.publish('a.c', '3'), catbus.publish('b.c', '4')"
        )
        # They have no sender, and no time until they are in the log.
        assert await sql.fetchrow("SELECT catbus.erase('*', sender => 'alice')") == (0,)
        assert await sql.fetchrow("SELECT catbus.erase('*', before => now())") == (0,)
        assert await sql.fetchrow("SELECT catbus.erase_outbox('a.*', false)") == (2,)
        assert await sql.fetchrow("SELECT catbus.erase('a.*')") == (2,)
        left = await sql.fetch("TABLE catbus.outbox_0 UNION ALL TABLE catbus.outbox_1")
        assert [channel for _, channel, *_ in left] == ["b", "b.c"]
        assert await vacuum_tables(sql) == []


async def test_erasures_are_numbered_in_the_order_of_their_commits(database_url: str) -> None:
    """A replica that knows the newest number has applied all erasures with lower ones."""
    async with filled(database_url, 20) as sql, open_sql(database_url) as other:
        assert await sql.fetchrow("SELECT erasure FROM catbus.poll(0)") == (0,)
        await sql.execute("BEGIN; SELECT catbus.erase('a')")
        with pytest.raises(Exception, match="lock timeout"):
            await other.fetch("SELECT catbus.erase('ab')")
        assert await other.fetchrow("SELECT erasure FROM catbus.poll(0)") == (0,)
        await sql.execute("COMMIT")
        assert await other.fetchrow("SELECT erasure FROM catbus.poll(0)") == (1,)
        await other.fetch("SELECT catbus.erase('ab')")
        assert await sql.fetchrow("SELECT erasure FROM catbus.poll(0)") == (2,)
        # An erasure that finds nothing is none.
        await other.fetch("SELECT catbus.erase('ab')")
        assert await sql.fetchrow("SELECT erasure FROM catbus.poll(0)") == (2,)


async def row_pointers(sql: DatabaseConnection, table: str) -> tuple[int, int]:
    """The number of pointers in the pages of a table that lead to a row, and of those that only an index leads to."""
    await sql.execute("CHECKPOINT")
    ((content,),) = await sql.fetch("SELECT pg_read_binary_file(pg_relation_filepath($1::text))", table)
    used = dead = 0
    for start in range(0, len(content), 8192):
        (end,) = struct.unpack_from("<H", content, start + 12)  # pd_lower
        flags = [pointer >> 15 & 3 for (pointer,) in struct.iter_unpack("<I", content[start + 24 : start + end])]
        used, dead = used + flags.count(1), dead + flags.count(3)
    return used, dead


async def test_vacuum_removes_the_old_rows_of_erased_messages(database_url: str) -> None:
    """From the tables, the indexes and the TOAST table. Bytes may stay in free space of pages, as documented."""
    insert = """
        INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number, sender)
        SELECT 0, n, 1, $1, '"' || repeat($2, $3) || '"', '\\x01', n, 'mallory'
        FROM generate_series($4::bigint, $5) AS n
    """
    async with open_sql(database_url) as sql:
        ((toast,),) = await sql.fetch(
            "SELECT reltoastrelid::regclass::text FROM pg_class WHERE oid = 'catbus.entries_0'::regclass"
        )
        # So few rows in so many that VACUUM would leave their entries in the indexes by default.
        await sql.fetch(insert, "secret", "personal", 2, 1, 20)
        await sql.fetch(insert, "secret", "y", 20_000, 21, 40)
        await sql.fetch(insert, "other", "x", 100, 41, 20_000)
        assert (await row_pointers(sql, toast))[0] > 0
        assert await sql.fetchrow("SELECT catbus.erase('secret')") == (40,)
        assert (await row_pointers(sql, "catbus.entries_0"))[0] > 20_000
        assert await sql.fetch("SELECT name FROM catbus.vacuum_due()") == [("entries_0",)]
        assert await vacuum_tables(sql) == []
        assert await sql.fetch("SELECT name FROM catbus.vacuum_due()") == []
        assert await row_pointers(sql, "catbus.entries_0") == (20_000, 0)
        assert await row_pointers(sql, toast) == (0, 0)


async def test_vacuum_waits_for_transactions_that_might_see_the_messages(database_url: str) -> None:
    async with filled(database_url, 20) as sql, open_sql(database_url) as reader, open_sql(database_url) as writer:
        await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        old = await reader.fetch("SELECT payload FROM catbus.entries WHERE channel = 'a'")
        await writer.execute("BEGIN")
        await writer.fetch("SELECT pg_current_xact_id()")
        await sql.fetch("SELECT catbus.erase('a')")
        due = [name for (name,) in await sql.fetch("SELECT name FROM catbus.vacuum_due()")]
        assert await vacuum_tables(sql) == due != []
        assert await reader.fetch("SELECT payload FROM catbus.entries WHERE channel = 'a'") == old
        await reader.execute("COMMIT")
        assert await vacuum_tables(sql) == due
        await writer.execute("COMMIT")
        assert await vacuum_tables(sql) == []


async def test_retention_waits_for_a_vacuum(database_url: str) -> None:
    """VACUUM and TRUNCATE exclude each other: a step of retention that meets one does nothing."""
    async with filled(database_url, 20) as sql, open_sql(database_url) as vacuum:
        # The lock of VACUUM.
        await vacuum.execute("BEGIN; LOCK TABLE catbus.entries_1 IN SHARE UPDATE EXCLUSIVE MODE")
        (blocked,) = await sql.fetchrow("SELECT blocked FROM catbus.retain(1, 1000000000)")
        assert blocked == 1
        assert await sql.fetchrow("SELECT floor FROM catbus.position()") == (1,)
        await vacuum.execute("COMMIT")
        await sql.fetch("SELECT catbus.retain(1, 1000000000)")
        ((floor,),) = await sql.fetch("SELECT floor FROM catbus.position()")
        assert floor > 1
