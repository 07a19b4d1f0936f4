"""Consumers in SQL on a real server: receiving, partitions, isolation, what they cost, retention and epochs."""

from __future__ import annotations

import json

import pytest

from tests.postgres.bouncer import open_bouncer
from tests.postgres.consumers import (
    Position,
    create,
    fill,
    outcome,
    positions,
    publish,
    receive,
    receive_all,
    retain,
)
from tests.postgres.sql import open_sql

PATTERNS = {
    "a.b": ["a.b"],
    "a.*": ["a.b", "a.b.c"],
    "a.b.*": ["a.b.c"],
    "*": ["a", "a-b", "a.b", "a.b.c", "a_b", "b"],
    "_x.*": ["_x.y"],
}
CHANNELS = ["_x", "_x.y", "a", "a-b", "a.b", "a.b.c", "a_b", "b"]
LEVELS = ["REPEATABLE READ", "SERIALIZABLE", "READ UNCOMMITTED"]


async def test_commit_acknowledges_and_rollback_gives_the_messages_back(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x", "b.x", "a.y", "a.x")
        await sql.execute("BEGIN")
        assert await receive(sql) == [1, 3, 4]
        assert await receive(sql) == []
        await sql.execute("ROLLBACK")
        assert await receive(sql, 2) == [1, 3]
        assert await receive(sql, 2) == [4]
        assert await receive(sql, 2) == []
        assert await positions(sql) == [Position(0, 4, 0, gap=False, dead_letters=0)]


async def test_message_comes_with_all_that_was_published(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await sql.fetch("""SELECT catbus.publish('a.x', '{"n": 1}')""")
        await publish(sql)
        await sql.execute("UPDATE catbus.entries SET sender = 'alice', at = 1500")
        ((seq, channel, payload, seconds, sender),) = await sql.fetch(
            "SELECT seq, channel, payload, extract(epoch FROM at)::float8, sender FROM catbus.receive('c')"
        )
        assert (seq, channel, payload, seconds, sender) == (1, "a.x", '{"n": 1}', 1.5, "alice")


@pytest.mark.parametrize("pattern", PATTERNS)
async def test_consumer_gets_what_its_pattern_matches(database_url: str, pattern: str) -> None:
    """`*` matches no reserved channel."""
    async with open_sql(database_url) as sql:
        await create(sql, pattern=pattern, partitions=3)
        await sql.fetch(
            "INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number) "
            "SELECT 0, n, 0, channel, '1', 'x', n FROM unnest($1::text[]) WITH ORDINALITY AS m (channel, n)",
            CHANNELS,
        )
        got = sorted(await receive_all(sql))
        assert [CHANNELS[seq - 1] for seq in got] == PATTERNS[pattern]


async def test_workers_share_partitions_and_channels_keep_their_order(database_url: str) -> None:
    channels = [f"a.{n % 20}" for n in range(200)]
    async with open_sql(database_url) as one, open_sql(database_url) as other:
        await create(one, partitions=4)
        await publish(one, *channels)
        await one.execute("BEGIN")
        await other.execute("BEGIN")
        firsts = await receive(one), await receive(other)
        own, others = ({channels[seq - 1] for seq in seqs} for seqs in firsts)
        assert own
        assert others
        assert own.isdisjoint(others)
        # A second call continues in the partition that the transaction has.
        await publish(one, *channels)
        assert {channels[(seq - 1) % 200] for seq in await receive(one)} == own
        await one.execute("COMMIT")
        await other.execute("ROLLBACK")
        rest = await receive_all(one)
        per_channel: dict[str, list[int]] = {}
        for seq in [*firsts[0], *rest]:
            per_channel.setdefault(channels[(seq - 1) % 200], []).append(seq)
        assert all(seqs == sorted(seqs) for seqs in per_channel.values())


async def test_every_partition_is_served_in_its_turn(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql, partitions=4)
        channels = [f"a.{n % 40}" for n in range(400)]
        await publish(sql, *channels)
        served = [{channels[seq - 1] for seq in await receive(sql, 5)} for _ in range(8)]
        for first, second in zip(served[:4], served[4:], strict=True):
            assert all(served[i].isdisjoint(served[j]) for i in range(4) for j in range(i))
            assert first
            assert second


async def test_rollback_to_a_savepoint_takes_back_what_came_after_it(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as other:
        await create(sql)
        await publish(sql, *["a.x"] * 6)
        await sql.execute("BEGIN")
        assert await receive(sql, 2) == [1, 2]
        await sql.execute("SAVEPOINT s")
        assert await receive(sql, 2) == [3, 4]
        await sql.execute("ROLLBACK TO s")
        assert await receive(other) == []
        assert await receive(sql, 2) == [3, 4]
        await sql.execute("COMMIT; BEGIN; SAVEPOINT s")
        assert await receive(sql, 1) == [5]
        await sql.execute("ROLLBACK TO s")
        assert await receive(other, 1) == [5]
        await sql.execute("COMMIT")
        assert await receive(sql) == [6]


@pytest.mark.parametrize("level", LEVELS)
async def test_other_isolation_levels_are_rejected_with_advice(database_url: str, level: str) -> None:
    calls = [
        "receive('c')", "reject('c', 1)", "skip_gap('c')", "reset_consumer('c', 'head')", "drop_consumer('c')",
        "create_consumer('d', '*')",
    ]  # fmt: skip
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, "a.x")
        for call in calls:
            await sql.execute(f"BEGIN ISOLATION LEVEL {level}")
            state, text = await outcome(sql, f"SELECT FROM catbus.{call}")
            await sql.execute("ROLLBACK")
            assert state == "25001"
            assert "READ COMMITTED" in text.upper()
        assert await receive(sql) == [1]


async def test_old_snapshot_would_pass_over_removed_messages(database_url: str) -> None:
    """This is why the levels are rejected: neither the entries nor the floor show that messages are missing."""
    async with open_sql(database_url) as sql, open_sql(database_url) as old:
        await publish(sql, *["a.x"] * 5)
        await retain(sql)
        await publish(sql, *["a.x"] * 5)
        await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await old.fetch("SELECT 1 FROM catbus.consumers")
        assert (await retain(sql))[0] == 6
        rows = await old.fetch("SELECT e.seq, h.floor FROM catbus.entries AS e, catbus.head AS h ORDER BY e.seq")
        assert [tuple(row) for row in rows] == [(seq, 1) for seq in range(6, 11)]
        await old.execute("ROLLBACK")


@pytest.mark.parametrize("number", ["0", "-1", "10001", "NULL"])
async def test_number_of_messages_is_checked(database_url: str, number: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        assert (await outcome(sql, f"SELECT FROM catbus.receive('c', {number})"))[0] == "22023"


# What a call costs others


async def test_call_that_finds_nothing_writes_nothing(database_url: str) -> None:
    """Nothing new at all; new messages of others; new messages that another transaction processes."""
    state = "SELECT pg_current_wal_insert_lsn()::text, pg_snapshot_xmax(pg_current_snapshot())::text"
    async with open_sql(database_url) as sql, open_sql(database_url) as other:
        await create(sql, partitions=4)
        for channels in ([], ["b.x"] * 50, ["a.x"]):
            await publish(sql, *channels)
            await other.execute("BEGIN")
            await receive(other)
            await sql.fetch("CHECKPOINT")
            before = tuple(await sql.fetchrow(state))
            for _ in range(5):
                assert await receive(sql) == []
            assert tuple(await sql.fetchrow(state)) == before
            await other.execute("COMMIT")


async def test_cursor_moves_at_least_every_ten_seconds_in_a_quiet_log(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql, partitions=2)
        head = await publish(sql, "b.x", "b.y")
        assert await receive(sql) == []
        assert {position.cursor for position in await positions(sql)} == {0}
        await sql.execute("UPDATE catbus.consumer_cursors SET moved = moved - interval '10 s'")
        assert await receive(sql) == []
        assert {position.cursor for position in await positions(sql)} == {head}


async def test_cursor_passes_over_many_messages_of_others_at_once(database_url: str) -> None:
    """10,000 in each call: a narrow pattern looks at no message twice."""
    async with open_sql(database_url) as sql:
        await create(sql, pattern="a.x")
        await fill(sql, 10_500, "b")
        head = await publish(sql, "a.x", *["b.x"] * 1_200)
        assert await receive(sql) == []
        assert (await positions(sql))[0].cursor == 10_000
        assert await receive(sql) == [10_501]
        assert (await positions(sql))[0].cursor == head


async def test_transaction_keeps_no_lock_on_the_log(database_url: str) -> None:
    """Retention removes messages that an open transaction has received."""
    locks = (
        "SELECT c.relname FROM pg_locks AS l JOIN pg_class AS c ON c.oid = l.relation "
        "WHERE l.pid = pg_backend_pid() AND c.relname LIKE 'entries%'"
    )
    async with open_sql(database_url) as sql, open_sql(database_url) as other:
        await create(sql)
        await publish(sql, *["a.x"] * 5)
        await retain(other)
        await publish(sql, *["a.x"] * 5)
        await sql.execute("BEGIN")
        assert await receive(sql, 3) == [1, 2, 3]
        await sql.fetch("SELECT catbus.reject('c', 3)")
        await sql.fetch("SELECT * FROM catbus.consumer_positions()")
        await sql.fetch("SELECT * FROM catbus.skip_gap('c')")
        assert await sql.fetch(locks) == []
        assert (await retain(other))[0] == 6
        await sql.execute("COMMIT")


async def test_open_snapshot_elsewhere_does_not_make_receiving_slower(database_url: str) -> None:
    """A search that does not begin at the newest version of a cursor would walk over all that the snapshot keeps."""

    async def walked() -> int:
        """Entries of the index of cursors that a call reads.

        The counter of the transaction begins with what PostgreSQL has not added to the statistics yet.
        """
        counter = "SELECT pg_stat_get_xact_tuples_returned('catbus.consumer_cursors_pkey'::regclass)"
        await sql.execute("BEGIN")
        ((before,),) = await sql.fetch(counter)
        assert len(await receive(sql, 1)) == 1
        ((after,),) = await sql.fetch(counter)
        await sql.execute("COMMIT")
        return int(after - before)

    async with open_sql(database_url) as sql, open_sql(database_url) as old:
        await create(sql)
        await fill(sql, 1_500)
        await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        await old.fetch("SELECT 1 FROM catbus.head")
        few = await walked()
        script = "DO $$ BEGIN FOR i IN 1..300 LOOP PERFORM catbus.receive('c', 1); COMMIT; END LOOP; END $$"
        await sql.execute(script, timeout=60)
        assert await walked() <= few + 2
        await old.execute("COMMIT")


async def test_broad_pattern_is_read_in_the_order_of_the_log(database_url: str) -> None:
    """By the index of channels, PostgreSQL would read and sort all of it for a few messages."""
    async with open_sql(database_url) as sql:
        await create(sql, pattern="a.*")
        await fill(sql, 30_000)
        ((plan,),) = await sql.fetch("EXPLAIN (ANALYZE, BUFFERS, FORMAT json) SELECT FROM catbus.receive('c', 10)")
        block = json.loads(plan)[0]["Plan"]
        assert block["Shared Hit Blocks"] + block["Shared Read Blocks"] < 3_000


# Messages that are gone


async def test_consumer_that_retention_overtook_gets_an_error_with_the_range(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql, partitions=2)
        await publish(sql, *["a.x"] * 5)
        await retain(sql)
        await publish(sql, *["a.x"] * 2)
        assert (await retain(sql))[0] == 6
        for _ in range(2):
            state, text = await outcome(sql, "SELECT * FROM catbus.receive('c')")
            assert state == "CB002"
            assert "the messages 1 to 5" in text
            assert "catbus.skip_gap('c')" in text
        assert all(position.gap for position in await positions(sql))
        rows = await sql.fetch("SELECT * FROM catbus.skip_gap('c')")
        assert sorted(tuple(row) for row in rows) == [(0, 1, 5), (1, 1, 5)]
        assert await sql.fetch("SELECT * FROM catbus.skip_gap('c')") == []
        assert await receive_all(sql) == [6, 7]


async def test_consumer_of_an_emptied_log_gets_the_error(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 5)
        await retain(sql)
        assert (await retain(sql))[0] == 6
        assert "the messages 1 to 5" in (await outcome(sql, "SELECT * FROM catbus.receive('c')"))[1]
        await sql.fetch("SELECT * FROM catbus.skip_gap('c')")
        assert await receive(sql) == []
        await publish(sql, "a.x")
        assert await receive(sql) == [6]


async def test_consumer_that_had_everything_misses_nothing(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 5)
        assert len(await receive(sql)) == 5
        await retain(sql)
        assert (await retain(sql))[0] == 6
        assert await receive(sql) == []
        await publish(sql, "a.x")
        assert await receive(sql) == [6]


async def test_retention_waits_for_a_consumer_that_holds_up_to_the_size(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql, hold=True, partitions=2)
        await create(sql, "other", "b.*")
        await publish(sql, *["a.x"] * 5)
        await retain(sql)
        await publish(sql, "a.x")
        assert await retain(sql) == (1, False)
        await sql.execute("BEGIN")
        await receive(sql)
        await sql.execute("COMMIT")
        # The other partition has no message there, and has to move, too.
        assert await retain(sql) == (1, False)
        await sql.execute("UPDATE catbus.consumer_cursors SET moved = moved - interval '10 s'")
        assert await receive(sql) == []
        assert await retain(sql) == (6, False)

        await publish(sql, "a.x")
        for _ in range(4):
            step = await retain(sql)
        assert step == (7, False)
        assert await retain(sql, size=1) == (8, True)
        state, text = await outcome(sql, "SELECT * FROM catbus.receive('c')")
        assert (state, "the messages 7 to 7" in text) == ("CB002", True)


async def test_retention_does_not_pass_a_consumer_that_is_being_created(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as other:
        await publish(sql, *["a.x"] * 5)
        await retain(sql)
        await sql.execute("BEGIN")
        await create(sql, hold=True)
        await other.execute("SET lock_timeout = '10ms'")
        assert (await outcome(other, "SELECT * FROM catbus.retain(1000, 1, 1 << 50)"))[0] == "55P03"
        await sql.execute("COMMIT")
        assert await retain(sql) == (1, False)
        assert await receive(sql) == [1, 2, 3, 4, 5]


async def test_messages_before_a_deleted_range_are_received_and_the_range_is_an_error(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 9)
        await sql.execute("DELETE FROM catbus.entries WHERE seq IN (4, 5, 8)")
        assert await receive(sql) == [1, 2, 3]
        assert "the messages 4 to 5" in (await outcome(sql, "SELECT * FROM catbus.receive('c')"))[1]
        assert [tuple(row) for row in await sql.fetch("SELECT * FROM catbus.skip_gap('c')")] == [(0, 4, 5)]
        assert await receive(sql) == [6, 7]
        await sql.fetch("SELECT * FROM catbus.skip_gap('c')")
        assert await receive(sql) == [9]


async def test_restore_without_the_log_uses_no_seq_again_that_a_consumer_has_passed(database_url: str) -> None:
    """Neither that of a cursor nor that of a dead letter, although the log forgot both."""
    async with open_sql(database_url) as sql:
        for name, received in (("c", True), ("d", False)):
            await create(sql, name)
            head = await publish(sql, *["a.x"] * 10)
            if received:
                await receive(sql)
            else:
                await sql.fetch("SELECT catbus.reject('d', $1)", head)
            await sql.execute("TRUNCATE catbus.entries; SELECT setval('catbus.reached_seq', 0)")
            await sql.execute("UPDATE catbus.head SET floor = 1")
            await sql.fetch("SELECT catbus.new_epoch((SELECT epoch FROM catbus.head))")
            assert await publish(sql, "a.y") > head
            state, text = await outcome(sql, "SELECT * FROM catbus.receive('c')")
            assert (state, "the messages 11 to " in text) == ("CB002", True)
            await sql.execute("UPDATE catbus.consumer_cursors SET cursor = 10 WHERE consumer = 'c'")


async def test_cursor_above_the_head_is_an_error(database_url: str) -> None:
    """A database that was restored by hand, before its log begins a new epoch."""
    async with open_sql(database_url) as sql:
        await create(sql)
        await publish(sql, *["a.x"] * 10)
        await receive(sql)
        await sql.execute("DELETE FROM catbus.entries WHERE seq > 6")
        state, text = await outcome(sql, "SELECT * FROM catbus.receive('c')")
        assert (state, "the messages 7 to 10" in text) == ("CB002", True)
        assert [tuple(row) for row in await sql.fetch("SELECT * FROM catbus.skip_gap('c')")] == [(0, 7, 10)]
        await publish(sql, "a.x")
        assert await receive(sql) == [7]


# Creating, moving and dropping


async def test_consumer_starts_where_it_is_told(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await publish(sql, *["a.x"] * 5)
        for start, expected in (("head", []), ("floor", [1, 2, 3, 4, 5]), ("3", [4, 5]), ("0", [1, 2, 3, 4, 5])):
            await create(sql, start=start)
            assert await receive(sql) == expected
            await sql.fetch("SELECT catbus.reset_consumer('c', 'head')")
            await sql.fetch("SELECT catbus.reset_consumer('c', $1)", start)
            assert await receive(sql) == expected
            await sql.fetch("SELECT catbus.drop_consumer('c')")
            assert await positions(sql) == []
        await retain(sql)
        await publish(sql, "a.x")
        await retain(sql)
        for wrong in ("4", "7", "now", "-1", "1" * 40):
            state, text = await outcome(sql, "SELECT catbus.create_consumer('c', '*', start => $1)", wrong)
            assert (state, "a seq from 5 to 6" in text) == ("22023", True)


@pytest.mark.parametrize(
    ("arguments", "state", "text"),
    [
        ("'', '*'", "22023", "not a name"),
        ("'a b', '*'", "22023", "not a name"),
        (f"'{'x' * 65}', '*'", "22023", "not a name"),
        ("NULL, '*'", "22023", "not a name"),
        ("'d', 'a.*.b'", "22023", "not a pattern"),
        ("'d', NULL", "22023", "not a pattern"),
        ("'d', '*', partitions => 0", "22023", "1 to 64"),
        ("'d', '*', partitions => 65", "22023", "1 to 64"),
        ("'d', '*', start => NULL", "22023", "starts at"),
        ("'c', '*'", "42710", "exists"),
    ],
)
async def test_wrong_definition_is_rejected(database_url: str, arguments: str, state: str, text: str) -> None:
    async with open_sql(database_url) as sql:
        await create(sql)
        found = await outcome(sql, f"SELECT catbus.create_consumer({arguments})")
        assert (found[0], text in found[1]) == (state, True)
        assert len(await sql.fetch("SELECT FROM catbus.consumers")) == 1


async def test_consumer_in_use_is_neither_moved_nor_dropped(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as other:
        await create(sql)
        await publish(sql, "a.x")
        await sql.execute("BEGIN")
        await receive(sql)
        for call in ("reset_consumer('c', 'floor')", "skip_gap('c')", "drop_consumer('c')"):
            assert (await outcome(other, f"SELECT catbus.{call}"))[0] == "55P03"
        await sql.execute("COMMIT")
        assert (await positions(sql))[0].cursor == 1


# Poolers


async def test_consumer_works_through_a_pooler(database_url: str) -> None:
    """In transaction mode a client gets another connection to the database for each transaction."""
    async with open_sql(database_url) as sql, open_bouncer(database_url, size=2) as bouncer:
        await create(sql, partitions=2)
        await publish(sql, *[f"a.{n % 7}" for n in range(60)])
        await sql.execute("CREATE TABLE public.effects (seq bigint PRIMARY KEY)")
        async with open_sql(bouncer.url) as one, open_sql(bouncer.url) as other:
            for number in range(100):
                for worker in (one, other):
                    await worker.execute("BEGIN")
                    await worker.fetch("INSERT INTO public.effects SELECT seq FROM catbus.receive('c', 3)")
                    await worker.execute("ROLLBACK" if number % 3 == 0 else "COMMIT")
        ((count,),) = await sql.fetch("SELECT count(*) FROM public.effects")
        assert count == 60
