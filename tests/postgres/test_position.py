"""`catbus.position()` for roles that read tables of their own and then follow their changes."""

from __future__ import annotations

import pytest

from tests.postgres.consumers import open_role, outcome, publish, retain
from tests.postgres.sql import open_sql

POSITION = "SELECT epoch, head, floor FROM catbus.position()"
GRANT = "GRANT USAGE ON SCHEMA catbus TO reader"


async def test_role_needs_execute_and_nothing_else(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_role(database_url, "reader", [GRANT]) as reader:
        head = await publish(sql, "a", "b")
        assert await outcome(reader, POSITION) == ("42501", "permission denied for function position")
        await sql.execute("GRANT EXECUTE ON FUNCTION catbus.position TO reader")
        (epoch,) = await sql.fetchrow("SELECT epoch FROM catbus.head")
        assert await reader.fetchrow(POSITION) == (epoch, head, 1)
        assert (await outcome(reader, "SELECT FROM catbus.entries"))[0] == "42501"


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE, READ ONLY"])
async def test_open_transaction_with_the_position_keeps_nothing_from_retention(database_url: str, level: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as reader:
        head = await publish(sql, "a", "b")
        await reader.execute(f"BEGIN ISOLATION LEVEL {level}")
        (_, seen, _) = await reader.fetchrow(POSITION)
        assert seen == head
        locks = await reader.fetch(
            "SELECT relation::regclass::text FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation' "
            "AND relation <> 'pg_locks'::regclass"
        )
        assert locks == []
        # Retention needs the tables for itself. At the first step no part of the log is too old yet.
        floors = [(await retain(sql))[0] for _ in range(10)]
        assert floors[-1] == head + 1
        # An old snapshot shows the log without the rows that are gone, never a head above what it has.
        (_, seen, _) = await reader.fetchrow(POSITION)
        assert seen <= head
        await reader.execute("ROLLBACK")
