"""Attempts of consumers in SQL: who has received a message without committing, and when it is received again."""

from __future__ import annotations

from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from tests.postgres.consumers import create, dead_letters, outcome, publish, receive
from tests.postgres.sql import open_sql, pids, wait_until

COUNTERS = "SELECT count(*) FROM pg_class WHERE relname LIKE 'attempts_%' AND relnamespace = 'catbus'::regnamespace"


async def attempt(sql: DatabaseConnection, number: int = 4) -> list[tuple[int, int]]:
    """Receive with attempts, and return the seq and the attempt of each message."""
    query = "SELECT seq, attempt FROM catbus.receive('c', $1, attempts => true)"
    return [(seq, tries) for seq, tries in await sql.fetch(query, number)]


async def abandon(sql: DatabaseConnection, number: int = 4) -> list[tuple[int, int]]:
    """Receive in a transaction that is rolled back."""
    await sql.execute("BEGIN")
    found = await attempt(sql, number)
    await sql.execute("ROLLBACK")
    return found


async def postpone(sql: DatabaseConnection, number: int, delay: str) -> list[tuple[int, int]]:
    await sql.execute("BEGIN")
    found = await attempt(sql, number)
    await sql.fetch("SELECT catbus.postpone('c', $1::text::interval, 'broken')", delay)
    await sql.execute("COMMIT")
    return found


async def test_messages_that_were_not_committed_come_one_at_a_time_and_are_counted(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 6)
        assert await abandon(sql) == [(1, 1), (2, 1), (3, 1), (4, 1)]
        assert [await abandon(sql) for _ in range(3)] == [[(1, 1)], [(1, 2)], [(1, 3)]]
        assert await attempt(sql) == [(1, 4)]
        assert await attempt(sql) == [(2, 1)]
        assert await abandon(sql) == [(3, 1)]
        assert await attempt(sql) == [(3, 2)]
        assert [await attempt(sql) for _ in range(3)] == [[(4, 1)], [(5, 1)], [(6, 1)]]
        await publish(sql, "a.x", "a.x")
        assert await attempt(sql) == [(7, 1), (8, 1)]


async def test_attempt_counts_when_the_connection_is_lost_in_it(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x", "a.x")
        for expected in ([(1, 1), (2, 1)], [(1, 1)], [(1, 2)]):
            async with open_sql(database_url) as worker:
                await worker.execute("BEGIN")
                assert await attempt(worker) == expected
                await sql.fetch("SELECT pg_terminate_backend($1)", worker.pid)
            await wait_until(lambda: _all_gone(sql))
        assert await attempt(sql) == [(1, 3)]


async def _all_gone(sql: DatabaseConnection) -> bool:
    return not await pids(sql)


async def test_rollback_without_attempts_changes_nothing(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x", "a.x")
        for _ in range(2):
            await sql.execute("BEGIN")
            rows = await sql.fetch("SELECT seq, attempt FROM catbus.receive('c')")
            assert [tuple(row) for row in rows] == [(1, None), (2, None)]
            await sql.execute("ROLLBACK")
        assert await attempt(sql) == [(1, 1), (2, 1)]


async def test_postponed_messages_wait_and_other_partitions_go_on(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as other:
        await create(sql, partitions=2)
        ((home,), *_) = await sql.fetch("SELECT c FROM generate_series(1, 9) AS c WHERE (hashtext('a.' || c) & 1) = 0")
        ((away,), *_) = await sql.fetch("SELECT c FROM generate_series(1, 9) AS c WHERE (hashtext('a.' || c) & 1) = 1")
        await publish(sql, f"a.{home}", f"a.{home}")
        assert await postpone(sql, 2, "1 day") == [(1, 1), (2, 1)]
        assert await attempt(other) == await receive(other) == []
        await publish(sql, f"a.{home}", f"a.{away}")
        assert await attempt(other) == [(4, 1)]
        query = "SELECT failure, postponed > now() + interval '23 h' FROM catbus.consumer_cursors WHERE cursor = 0"
        assert [tuple(row) for row in await sql.fetch(query)] == [("broken", True)]
        await sql.execute("UPDATE catbus.consumer_cursors SET postponed = now()")
        assert [await attempt(other) for _ in range(3)] == [[(1, 1)], [(2, 1)], [(3, 1)]]


async def test_postponing_counts_only_what_was_received_alone(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 3)
        found = [await postpone(sql, number, "0") for number in (3, 3, 1, 3)]
        assert found == [[(1, 1), (2, 1), (3, 1)], [(1, 1)], [(1, 2)], [(1, 3)]]
        assert await attempt(sql) == [(1, 4)]


async def test_message_takes_no_attempts_over_from_a_rejected_one(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 3)
        assert [await abandon(sql, 1) for _ in range(3)] == [[(1, 1)], [(1, 2)], [(1, 3)]]
        await sql.fetch("SELECT catbus.reject('c', 1)")
        assert await abandon(sql, 1) == [(2, 1)]
        await sql.fetch("SELECT catbus.reset_consumer('c', 'floor')")
        assert await attempt(sql) == [(2, 1), (3, 1)]
        assert [seq for _, seq, *_ in await dead_letters(sql)] == [1]


async def test_only_the_transaction_that_has_received_may_postpone(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as other:
        await create(sql)
        await publish(sql, "a.x")
        await sql.execute("BEGIN")
        assert await receive(sql) == [1]
        assert (await outcome(other, "SELECT catbus.postpone('c', '0')"))[0] == "55000"
        for delay in ("'-1 s'", "'25 h'", "NULL"):
            assert (await outcome(other, f"SELECT catbus.postpone('c', {delay})"))[0] == "22023"
        await sql.execute("COMMIT")
        assert (await outcome(sql, "SELECT catbus.postpone('c', '0')"))[0] == "55000"


async def test_counters_end_with_their_consumer(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql, partitions=3)
        assert await sql.fetch(COUNTERS) == [(3,)]
        await sql.fetch("SELECT catbus.drop_consumer('c')")
        assert await sql.fetch(COUNTERS) == [(0,)]
