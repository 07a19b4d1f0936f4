"""Dead letters of consumers, their erasure, and who may use a consumer."""

from __future__ import annotations

import pytest
import trio

from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from tests.postgres.consumers import (
    create,
    dead_letters,
    open_role,
    outcome,
    positions,
    publish,
    receive,
    receive_all,
    retain,
)
from tests.postgres.sql import open_sql, wait_until

REJECT = "SELECT catbus.reject('c', $1, 'broken')"


async def test_rejected_message_becomes_a_dead_letter_with_its_transaction(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x", "a.y", "a.x")
        for end, left in (("ROLLBACK", []), ("COMMIT", [("c", 2, "a.y", "2", "broken")])):
            await sql.execute("BEGIN")
            assert await receive(sql) == [1, 2, 3]
            await sql.fetch(REJECT, 2)
            await sql.fetch(REJECT, 2)
            await sql.execute(end)
            assert await dead_letters(sql) == left
        assert await receive(sql) == []
        assert (await positions(sql))[0].dead_letters == 1


async def test_message_that_was_not_received_yet_is_passed_over_when_it_is_rejected(database_url: str) -> None:
    """A worker whose transaction failed rejects the message in the next one."""
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 4)
        await sql.fetch(REJECT, 1)
        await sql.fetch(REJECT, 3)
        assert await receive(sql, 1) == [2]
        assert await receive(sql) == [4]
        await sql.fetch("SELECT catbus.reset_consumer('c', 'floor')")
        assert await receive(sql) == [2, 4]
        await sql.fetch("DELETE FROM catbus.dead_letters WHERE seq = 3")
        await sql.fetch("SELECT catbus.reset_consumer('c', 'floor')")
        assert await receive(sql) == [2, 3, 4]


async def test_message_is_not_rejected_while_or_after_it_is_processed(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as other:
        await create(sql)
        await publish(sql, *["a.x"] * 3)
        await sql.execute("BEGIN")
        assert await receive(sql, 1) == [1]
        assert (await outcome(other, REJECT, 1))[0] == "55P03"
        await sql.fetch(REJECT, 1)
        await sql.execute("COMMIT; BEGIN")
        assert await receive(sql, 1) == [2]
        # What an earlier transaction received is processed, also for the worker itself.
        state, text = await outcome(sql, REJECT, 1)
        assert (state, "has processed message 1" in text) == ("CB003", True)
        await sql.execute("ROLLBACK")
        assert await receive(sql) == [2, 3]
        assert (await outcome(other, REJECT, 2))[0] == "CB003"
        assert [letter[1] for letter in await dead_letters(sql)] == [1]


async def test_savepoint_takes_back_what_may_be_rejected(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 4)
        await sql.execute("BEGIN")
        assert await receive(sql, 2) == [1, 2]
        await sql.execute("SAVEPOINT s")
        await sql.fetch(REJECT, 1)
        await sql.execute("ROLLBACK TO s")
        assert await receive(sql, 1) == [3]
        for seq in (2, 3):
            await sql.fetch(REJECT, seq)
        await sql.execute("COMMIT")
        assert [letter[1] for letter in await dead_letters(sql)] == [2, 3]


@pytest.mark.parametrize("seq", [2, 9])
async def test_message_of_others_cannot_be_rejected(database_url: str, seq: int) -> None:
    """One that the pattern does not match, and one that does not exist."""
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x", "b.x")
        assert (await outcome(sql, REJECT, seq))[0] == "CB003"


async def test_dead_letter_outlives_its_message_in_the_log_and_can_be_processed_later(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x")
        await sql.execute("BEGIN")
        await receive(sql)
        await sql.fetch(REJECT, 1)
        await sql.execute("COMMIT")
        await retain(sql)
        assert (await retain(sql))[0] == 2
        rows = await sql.fetch("DELETE FROM catbus.dead_letters WHERE seq = 1 RETURNING consumer, channel, payload")
        assert [tuple(row) for row in rows] == [("c", "a.x", "1")]
        assert await dead_letters(sql) == []


# Erasure


async def test_erasure_removes_dead_letters(database_url: str) -> None:
    """Also of messages that retention has removed, and of no others."""
    async with open_sql(database_url) as sql:
        await create(sql, pattern="*")
        await publish(sql, "a.x", "b.x")
        await sql.execute("BEGIN")
        for seq in await receive(sql):
            await sql.fetch(REJECT, seq)
        await sql.execute("COMMIT")
        await retain(sql)
        await publish(sql, "a.x", "a.y")
        await retain(sql)
        await sql.fetch(REJECT, 3)
        await sql.execute("UPDATE catbus.rejected_messages SET sender = 'alice' WHERE seq = 3")
        assert tuple(await sql.fetchrow("SELECT catbus.erase('a.x', sender => 'bob')")) == (0,)
        assert [letter[1] for letter in await dead_letters(sql)] == [1, 2, 3]
        # One is in the log, one is only a dead letter.
        assert tuple(await sql.fetchrow("SELECT catbus.erase('a.x')")) == (2,)
        assert [letter[1] for letter in await dead_letters(sql)] == [2]
        due = await sql.fetch("SELECT name FROM catbus.vacuum_due()")
        assert ("rejected_messages",) in [tuple(row) for row in due]
        assert await receive_all(sql) == [4]


async def test_erasure_waits_for_a_transaction_that_has_rejected(database_url: str) -> None:
    """Otherwise the copy that the transaction has made would survive it."""
    async with open_sql(database_url) as sql, open_sql(database_url) as eraser, open_sql(database_url) as observer:
        await create(sql)
        await publish(sql, "a.x")
        await sql.execute("BEGIN")
        await receive(sql)
        await sql.fetch(REJECT, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(eraser.fetch, "SELECT catbus.erase('a.x')")
            query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%catbus.erase%'"
            await wait_until(lambda: observer.fetch(query))
            await sql.execute("COMMIT")
        assert await dead_letters(sql) == []


async def test_message_that_was_erased_meanwhile_leaves_no_dead_letter(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as eraser:
        await create(sql)
        await publish(sql, "a.x")
        await sql.execute("BEGIN")
        assert await receive(sql) == [1]
        await eraser.fetch("SELECT catbus.erase('a.x')")
        await sql.fetch(REJECT, 1)
        await sql.execute("COMMIT")
        assert await dead_letters(sql) == []


# Rights

CALLS = [
    "receive('c')",
    "reject('c', 1)",
    "postpone('c', '1 s')",
    "far_behind('c')",
    "skip_gap('c')",
    "reset_consumer('c', 'head')",
    "drop_consumer('c')",
]


async def test_owner_may_use_its_consumer_and_nothing_else(database_url: str) -> None:
    forbidden = [
        *(f"SELECT * FROM catbus.{name}" for name in ("entries", "consumers", "consumer_cursors", "rejected_messages")),
        "SELECT catbus.create_consumer('d', '*')",
        "SELECT name FROM catbus.own_consumer('c', '')",
        "SELECT catbus.move_cursor('c', 0::smallint, 1)",
        "SELECT catbus.erase_dead_letters('*', NULL, NULL, true)",
        "INSERT INTO catbus.dead_letters (consumer, seq) VALUES ('c', 1)",
    ]
    async with open_sql(database_url) as admin, open_role(database_url, "catbus_test_owner") as sql:
        await create(admin, owner="catbus_test_owner")
        await create(admin, "other")
        await publish(admin, *["a.x"] * 3)
        for query in forbidden:
            assert (await outcome(sql, query))[0] == "42501", query
        for call in CALLS:
            assert (await outcome(sql, f"SELECT catbus.{call}".replace("'c'", "'other'")))[0] == "42501", call
        assert await receive(sql, 1) == [1]
        await sql.fetch(REJECT, 2)
        await admin.fetch("SELECT catbus.reject('other', 1)")
        assert [letter[:2] for letter in await dead_letters(sql)] == [("c", 2)]
        assert [letter[:2] for letter in await dead_letters(admin)] == [("c", 2), ("other", 1)]
        assert {tuple(row) for row in await sql.fetch("SELECT consumer FROM catbus.consumer_positions()")} == {("c",)}
        await sql.fetch("DELETE FROM catbus.dead_letters")
        assert [letter[:2] for letter in await dead_letters(admin)] == [("other", 1)]
        assert (await outcome(admin, "DROP ROLE catbus_test_owner"))[0] == "2BP01"
        await sql.fetch("SELECT catbus.drop_consumer('c')")


async def test_role_uses_a_consumer_by_what_it_inherits(database_url: str) -> None:
    """A member that does not inherit may only SET ROLE; and a consumer of others looks like none."""
    grant = "GRANT catbus_test_group TO catbus_test_member"
    async with open_sql(database_url) as admin, open_role(database_url, "catbus_test_group"):
        await create(admin, owner="catbus_test_group")
        await publish(admin, *["a.x"] * 3)
        async with open_role(database_url, "catbus_test_member", [grant]) as member:
            assert await receive(member, 1) == [1]
        everything = (
            grant,
            "GRANT USAGE ON SCHEMA catbus TO catbus_test_member",
            "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA catbus TO catbus_test_member",
        )
        async with open_role(database_url, "catbus_test_member", everything, "LOGIN NOINHERIT") as pooler:
            for call in CALLS:
                found = await outcome(pooler, f"SELECT catbus.{call}")
                assert (found[0], 'has no consumer "c"' in found[1]) == ("42501", True)
            await pooler.execute("SET ROLE catbus_test_group")
            assert await receive(pooler, 1) == [2]
            await pooler.execute("RESET ROLE")
            state, text = await outcome(pooler, "SELECT catbus.receive('missing')")
            assert (state, 'has no consumer "missing"' in text) == ("42501", True)


async def test_consumer_belongs_to_the_role_that_creates_it(database_url: str) -> None:
    """Also if the role has a name that has to be quoted, and is set by SET ROLE."""
    role = '"Catbus test"'
    async with open_sql(database_url) as sql:
        await sql.execute(
            f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA catbus TO {role}; "
            f"GRANT EXECUTE ON FUNCTION catbus.create_consumer TO {role}; SET ROLE {role}"
        )
        await create(sql)
        await publish_as_owner(sql)
        assert await receive(sql) == [1]
        ((owner,),) = await sql.fetch("SELECT owner FROM catbus.consumer_positions()")
        assert owner == role
        await sql.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")


async def publish_as_owner(sql: DatabaseConnection) -> None:
    await sql.execute("BEGIN; SET LOCAL ROLE NONE")
    await publish(sql, "a.x")
    await sql.execute("COMMIT")
