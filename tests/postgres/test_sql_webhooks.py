"""Webhooks in SQL: leases, batches, secrets, rights, and messages that are gone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from tests.postgres.consumers import dead_letters, open_role, outcome, positions, publish, retain
from tests.postgres.sql import open_sql

URL = "https://example.com/hook"
LEASE = "SELECT * FROM catbus.lease_batch($1, $2::integer::smallint, 'r', $3, $4, 1000000)"
SETTLE = "SELECT catbus.settle_batch('c', 0::smallint, $1, $2, $3, $4, true, 'broken')"
MINUTE = 60.0


async def create(sql: DatabaseConnection, name: str = "c", *, partitions: int = 1, **arguments: Any) -> None:
    more = "".join(f", {key} => '{value}'" for key, value in arguments.items())
    await sql.fetch(
        f"SELECT catbus.create_consumer($1, 'a.*', partitions => $2, start => 'floor', push => $3{more})",
        name, partitions, URL,
    )  # fmt: skip


async def lease(sql: DatabaseConnection, most: int = 100, part: int = 0, name: str = "c") -> Any:
    """Lease for a minute. The row has no turn if there is nothing to deliver."""
    return await sql.fetchrow(LEASE, name, part, MINUTE, most)


async def settle(sql: DatabaseConnection, turn: int, verdict: str, take: int = 0, delay: float = 0.0) -> bool:
    ((valid,),) = await sql.fetch(SETTLE, turn, verdict, delay, take)
    return bool(valid)


async def end_leases(sql: DatabaseConnection) -> None:
    await sql.execute("UPDATE catbus.webhook_batches SET until = clock_timestamp() WHERE until IS NOT NULL")


async def work(sql: DatabaseConnection) -> dict[tuple[str, int], float]:
    _, consumers, parts, waits = await sql.fetchrow("SELECT * FROM catbus.webhook_work()")
    return dict(zip(zip(consumers, parts, strict=True), waits, strict=True))


async def cursor(sql: DatabaseConnection) -> int:
    (position,) = await positions(sql)
    return position.cursor


# Leases


async def test_partition_is_leased_once_until_the_lease_ends(database_url: str) -> None:
    async with open_sql(database_url) as one, open_sql(database_url) as other:
        await create(one)
        await publish(one, "a.x", "a.y")
        first = await lease(one)
        assert first["seqs"] == [1, 2]
        assert (await lease(other))["turn"] is None
        assert 50 < (await work(other))["c", 0] <= 60
        await end_leases(one)
        again = await lease(other)
        assert again["turn"] > first["turn"]
        assert [again[name] for name in ("id", "made", "seqs")] == [first[name] for name in ("id", "made", "seqs")]
        # Who has lost the lease changes nothing.
        for verdict in ("delivered", "retry", "reject", "pause", "release"):
            assert not await settle(one, first["turn"], verdict)
        assert await cursor(one) == 0
        assert await settle(other, again["turn"], "delivered")
        assert not await settle(other, again["turn"], "delivered")
        assert await cursor(one) == 2
        assert await work(one) == {}


async def test_lease_of_a_partition_that_is_being_settled_does_not_wait(database_url: str) -> None:
    async with open_sql(database_url) as one, open_sql(database_url) as other:
        await create(one)
        await publish(one, "a.x")
        await one.execute("BEGIN")
        assert (await lease(one))["turn"] is not None
        assert (await lease(other))["turn"] is None
        await one.execute("ROLLBACK")
        assert (await lease(other))["turn"] is not None


async def test_messages_that_come_later_are_not_in_the_batch_of_a_retry(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x")
        first = await lease(sql)
        await publish(sql, "a.x")
        assert await settle(sql, first["turn"], "retry", 1)
        again = await lease(sql)
        assert (again["id"], again["seqs"], again["failures"]) == (first["id"], [1], 1)
        assert await settle(sql, again["turn"], "delivered")
        assert (await lease(sql))["seqs"] == [2]


async def test_part_of_a_batch_has_another_id(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 4)
        first = await lease(sql)
        assert await settle(sql, first["turn"], "retry", 2)
        part = await lease(sql)
        assert part["seqs"] == [1, 2]
        assert part["id"] != first["id"]
        assert await settle(sql, part["turn"], "delivered")
        assert await cursor(sql) == 2
        rest = await lease(sql)
        assert (rest["seqs"], rest["failures"]) == ([3, 4], 0)


async def test_next_attempt_is_not_before_its_time(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x")
        assert await settle(sql, (await lease(sql))["turn"], "retry", 1, delay=MINUTE)
        assert (await lease(sql))["turn"] is None
        assert 50 < (await work(sql))["c", 0] <= 60
        await sql.fetch("SELECT catbus.resume_consumer('c')")
        assert (await work(sql))["c", 0] == 0
        assert (await lease(sql))["failures"] == 0


@pytest.mark.parametrize("move", ["reset_consumer('c', 'floor')", "reset_consumer('c', 'head')"])
async def test_reset_during_a_delivery_is_not_undone_by_its_end(database_url: str, move: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 3)
        first = await lease(sql, 2)
        await sql.fetch(f"SELECT catbus.{move}")
        moved = await cursor(sql)
        assert await settle(sql, first["turn"], "delivered")
        assert await cursor(sql) == moved
        again = await lease(sql, 2)
        if "floor" in move:
            assert again["seqs"] == [1, 2]
            assert again["id"] != first["id"]
        else:
            assert again["turn"] is None


async def test_consumer_may_be_dropped_and_made_again_during_a_delivery(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x")
        first = await lease(sql)
        await sql.fetch("SELECT catbus.drop_consumer('c')")
        assert not await settle(sql, first["turn"], "delivered")
        await create(sql)
        assert not await settle(sql, first["turn"], "delivered")
        assert await cursor(sql) == 0


async def test_pause_keeps_the_position(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x")
        held = await lease(sql)
        await sql.fetch("SELECT catbus.pause_consumer('c', 'moving')")
        assert await work(sql) == {}
        assert await settle(sql, held["turn"], "retry", 1)
        assert (await lease(sql))["turn"] is None
        await sql.fetch("SELECT catbus.resume_consumer('c')")
        assert (await lease(sql))["id"] == held["id"]


# What is not delivered


async def test_removed_messages_are_an_error_and_never_passed_over(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 5)
        held = await lease(sql)
        assert held["seqs"] == [1, 2, 3, 4, 5]
        await settle(sql, held["turn"], "retry", 5)
        await retain(sql)
        await publish(sql, *["a.x"] * 5)
        assert (await retain(sql))[0] == 6
        assert (await lease(sql))["turn"] is None
        assert await cursor(sql) == 0
        ((error,),) = await sql.fetch("SELECT error FROM catbus.webhook_states()")
        assert "the messages 1 to 5 were removed before they were delivered" in error
        assert (await positions(sql))[0].gap
        await sql.fetch("SELECT catbus.skip_gap('c')")
        await sql.fetch("SELECT catbus.resume_consumer('c')")
        assert (await lease(sql))["seqs"] == [6, 7, 8, 9, 10]


async def test_erased_and_rejected_messages_are_left_out_under_another_id(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x", "a.secret", "a.y", "a.z")
        first = await lease(sql)
        await settle(sql, first["turn"], "retry", 4)
        await sql.fetch("SELECT catbus.reject('c', 4)")
        second = await lease(sql)
        assert second["seqs"] == [1, 2, 3]
        await settle(sql, second["turn"], "retry", 3)
        await sql.fetch("SELECT catbus.erase('a.secret')")
        third = await lease(sql)
        assert (third["seqs"], third["channels"], third["failures"]) == ([1, 3], ["a.x", "a.y"], 2)
        assert len({first["id"], second["id"], third["id"]}) == 3
        assert await settle(sql, third["turn"], "delivered")
        assert await cursor(sql) == 4


async def test_rejected_message_is_a_dead_letter_with_the_error(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 3)
        assert await settle(sql, (await lease(sql, 1))["turn"], "reject")
        assert await dead_letters(sql) == [("c", 1, "a.x", "1", "broken")]
        assert (await lease(sql))["seqs"] == [2, 3]


async def test_cursor_follows_a_log_without_messages_for_the_consumer(database_url: str) -> None:
    """Otherwise retention would wait for it, or pass it."""
    async with open_sql(database_url) as sql:
        await create(sql, partitions=2)
        await publish(sql, "b.x")
        assert await work(sql) == {}
        await sql.execute("UPDATE catbus.consumer_cursors SET moved = moved - interval '10 s'")
        assert {*await work(sql)} == {("c", 0), ("c", 1)}
        for part in range(2):
            assert (await lease(sql, part=part))["turn"] is None
        assert {position.cursor for position in await positions(sql)} == {1}
        await publish(sql, *["b.x"] * 1500)
        for part in range(2):
            assert (await lease(sql, part=part))["turn"] is None
        assert {position.cursor for position in await positions(sql)} == {1501}


async def test_work_names_the_partitions_with_messages(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql, partitions=8)
        await create(sql, "d", partitions=8)
        await publish(sql, "a.x")
        found = await work(sql)
        assert {name for name, _ in found} == {"c", "d"}
        assert len(found) == 2
        ((_, part),) = (key for key in found if key[0] == "c")
        for other in range(8):
            assert ((await lease(sql, part=other))["turn"] is not None) == (other == part)


async def test_open_snapshot_elsewhere_does_not_make_deliveries_slower(database_url: str) -> None:
    """Buffers that are read, not times."""
    async with open_sql(database_url) as sql, open_sql(database_url) as old:
        await create(sql)
        await publish(sql, *["a.x"] * 250)
        await old.execute("SET idle_in_transaction_session_timeout = 0; BEGIN ISOLATION LEVEL REPEATABLE READ")
        await old.fetch("SELECT 1 FROM catbus.consumers")

        async def pages() -> int:
            lines = await sql.fetch(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {LEASE}", "c", 0, MINUTE, 1)
            plan = json.loads(lines[0][0])[0]["Plan"]
            return int(plan["Shared Hit Blocks"]) + int(plan["Shared Read Blocks"])

        counts = []
        for _ in range(100):
            turn = (await lease(sql, 1))["turn"]
            assert await settle(sql, turn, "delivered")
        counts.append(await pages())
        await end_leases(sql)
        for _ in range(100):
            turn = (await lease(sql, 1))["turn"]
            assert await settle(sql, turn, "delivered")
        counts.append(await pages())
        assert counts[1] <= counts[0] * 1.5 + 20
        await old.execute("ROLLBACK")


# Secrets and rights


@pytest.mark.parametrize(
    "secret", ["", "x", "whsec_", "whsec_AAAA", "whsec_" + "A" * 31, "whsec_" + "A" * 92, "whsec_" + "A" * 31 + "\n"]
)
async def test_wrong_secret_is_rejected(database_url: str, secret: str) -> None:
    query = "SELECT catbus.create_consumer('c', 'a', push => $1, secret => $2)"
    async with open_sql(database_url) as sql:
        assert await outcome(sql, query, URL, secret) == (
            "22023", 'a signing secret is "whsec_", followed by 24 to 64 bytes in base64'
        )  # fmt: skip


WRONG_URLS = [
    "", "x", "ftp://x", "https://", "https:///x", "https://user@x/", "https://user:secret@x", "https://x/#y",
    "https://x y", "https://x\\@y/", "https://x:port/", "https://exämple.com", "javascript:alert(1)", "https://x/\n",
    "https://" + "x" * 2048,
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG_URLS)))
async def test_wrong_url_is_rejected(database_url: str, number: int) -> None:
    async with open_sql(database_url) as sql:
        state, text = await outcome(sql, "SELECT catbus.create_consumer('c', 'a', push => $1)", WRONG_URLS[number])
        assert state == "22023"
        assert "secret" not in text


async def test_secret_is_random_or_given_and_can_be_rotated(database_url: str) -> None:
    given = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    async with open_sql(database_url) as sql:
        await create(sql)
        await create(sql, "d", secret=given)
        await publish(sql, "a.x")
        ((one,), (other,)) = await sql.fetch("SELECT catbus.webhook_secret(n) FROM unnest('{c,d}'::text[]) AS n")
        assert other == given
        assert one != given
        assert len(one) == len("whsec_") + 44
        ((fresh,),) = await sql.fetch("SELECT catbus.rotate_webhook_secret('c')")
        assert (await lease(sql))["secrets"] == [fresh, one]
        await sql.fetch("SELECT catbus.rotate_webhook_secret('d', $1)", one)
        assert (await lease(sql, name="d"))["secrets"] == [one, given]
        await sql.execute("UPDATE catbus.webhooks SET former_until = clock_timestamp()")
        await end_leases(sql)
        assert (await lease(sql))["secrets"] == [fresh]


CALLS = [
    "webhook_secret('c')", "rotate_webhook_secret('c')", "pause_consumer('c')", "resume_consumer('c')",
]  # fmt: skip


async def test_only_the_owner_sees_secrets_and_pauses(database_url: str) -> None:
    private = [
        "SELECT secret FROM catbus.webhooks",
        "SELECT * FROM catbus.webhook_batches",
        "SELECT * FROM catbus.webhook_work()",
        "SELECT * FROM catbus.lease_batch('c', 0::smallint, 'r', 1, 1, 1)",
        "SELECT catbus.settle_batch('c', 0::smallint, 1, 'delivered', 0, 0, true, '')",
        "SELECT catbus.create_webhook('c', NULL)",
        "SELECT catbus.signing_secret(NULL)",
    ]
    async with (
        open_sql(database_url) as admin,
        open_role(database_url, "catbus_test_owner") as owner,
        open_role(database_url, "catbus_test_stranger") as stranger,
    ):
        await create(admin, owner="catbus_test_owner")
        await create(admin, "d", owner="catbus_test_stranger")
        for call in CALLS:
            await owner.fetch(f"SELECT catbus.{call}")
            state, _ = await outcome(stranger, f"SELECT catbus.{call}")
            assert state == "42501", call
        for role in (owner, stranger):
            for query in private:
                assert (await outcome(role, query))[0] == "42501", query
        rows = await owner.fetch("SELECT consumer FROM catbus.webhook_states()")
        assert [name for (name,) in rows] == ["c"]
        assert len(await admin.fetch("SELECT consumer FROM catbus.webhook_states()")) == 2


@pytest.mark.parametrize("call", CALLS)
async def test_consumer_without_a_url_has_no_deliveries(database_url: str, call: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.fetch("SELECT catbus.create_consumer('c', 'a.*')")
        assert (await outcome(sql, f"SELECT catbus.{call}"))[0] == "55000"


async def test_consumer_with_a_url_is_not_received_from(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x")
        state, text = await outcome(sql, "SELECT catbus.receive('c')")
        assert state == "55000"
        assert "to a URL" in text
        assert await cursor(sql) == 0
