"""Retained messages in SQL: `catbus.append` compared with a model, the outbox, erasure, and the functions for all."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import pytest

from catbus.postgres.access.asyncpg_bridge import DatabaseConnection, sqlstate
from catbus.postgres.maintenance.vacuum import vacuum_tables
from catbus.protocol.channels import matches
from tests.postgres.sql import open_sql
from tests.postgres.test_sql_erase import CHANNELS, PATTERNS

APPEND = "SELECT seqs, present FROM catbus.append('on', $1, $2, $3, $4, $5, $6, $7, $8, NULL, $9, $10)"
RETAINED = "SELECT channel, seq, payload FROM catbus.retained ORDER BY channel, seq"


class Sent(NamedTuple):
    """An entry as a replica sends it."""

    number: int
    channel: str = "a"
    payload: str = "1"
    after: int | None = None
    retain: bool | None = True
    expect: int | None = None


class Held(NamedTuple):
    seq: int
    number: int
    payload: str


async def append(sql: DatabaseConnection, batch: Sequence[Sent]) -> tuple[list[int], list[int | None] | None]:
    (epoch,) = await sql.fetchrow("SELECT epoch FROM catbus.head")
    numbers, channels, payloads, afters, retains, expects = (list(column) for column in zip(*batch, strict=True))
    producers, nothing = [b"p"] * len(batch), [None] * len(batch)
    seqs, present = await sql.fetchrow(
        APPEND, epoch, channels, payloads, producers, numbers, nothing, nothing, afters, retains, expects
    )
    return list(seqs), None if present is None else list(present)


async def move(sql: DatabaseConnection) -> int:
    """Move everything from the outbox into the log. Returns the number of messages."""
    moved, more = 0, True
    while more:
        (epoch,) = await sql.fetchrow("SELECT epoch FROM catbus.head")
        some, more = await sql.fetchrow("SELECT moved, more FROM catbus.move_outbox('on', $1, NULL)", epoch)
        moved += some
    return moved


async def fold(sql: DatabaseConnection) -> list[tuple[str, int, str]]:
    """The retained messages that the entries of the log make."""
    held: dict[str, tuple[str, int, str]] = {}
    for channel, seq, payload in await sql.fetch(
        "SELECT channel, seq, payload FROM catbus.entries WHERE retain ORDER BY seq"
    ):
        held.pop(channel, None)
        if payload != "null":
            held[channel] = (channel, seq, payload)
    return sorted(held.values())


class Model:
    """What `catbus.append` must return, and the retained messages."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.next = 1
        self.floor = 1
        self.over_budget = False
        self.sent: list[Sent] = []
        self.log: dict[int, tuple[int, Sent]] = {}
        self.held: dict[str, Held] = {}

    def make(self) -> list[Sent]:
        """A batch of new entries and of repeated ones, with conditions that hold, and others that do not."""
        random, batch = self.random, list[Sent]()
        for _ in range(random.randint(1, 12)):
            old = [self.sent[held.number - 1] for held in self.held.values()] if random.random() < 0.3 else self.sent
            repeated = random.choice(old) if old and random.random() < 0.2 else None
            if repeated is not None and repeated.number not in {entry.number for entry in batch}:
                changed = {"payload": random.choice(["1", "2"])} if random.random() < 0.2 else {}
                batch.append(repeated._replace(after=random.choice([None, 0, self.next - 1]), **changed))
                continue
            channel = random.choice("abcd")
            retain = True if random.random() < 0.8 else None
            held = self.held.get(channel)
            # In the middle of a batch, the present one is often one of the next seqs.
            guess = self.next + random.randrange(len(batch) + 1)
            expect = random.choice([None, 0, held.seq if held else 0, guess])
            number = len(self.sent) + 1
            new = Sent(number, channel, random.choice(["null", "1", "2"]), None, retain, expect if retain else None)
            self.sent.append(new)
            batch.append(new)
        return batch

    def append(self, batch: Sequence[Sent]) -> tuple[list[int], list[int | None]]:
        seqs, present = list[int](), list[int | None]()
        known, before = dict(self.log), dict(self.held)
        for entry in batch:
            held = self.held.get(entry.channel)
            present.append(None)
            if entry.number in known and known[entry.number][0] >= self.floor:
                seq, original = known[entry.number]
                same = (original.channel, original.payload) == (entry.channel, entry.payload)
                seqs.append(seq if same else 0)
            elif entry.after is not None and entry.after < self.floor - 1:
                kept = before.get(entry.channel)
                if entry.retain and kept is not None and kept.number == entry.number:
                    seqs.append(kept.seq if kept.payload == entry.payload else 0)
                else:
                    seqs.append(-1)
            elif entry.retain and entry.expect not in (None, held.seq if held else 0):
                seqs.append(-2)
                present[-1] = held.seq if held else 0
            elif entry.retain and entry.payload != "null" and self.over_budget:
                seqs.append(-3)
            else:
                seqs.append(self.next)
                self.log[entry.number] = self.next, entry
                if entry.retain:
                    self.held.pop(entry.channel, None)
                    if entry.payload != "null":
                        self.held[entry.channel] = Held(self.next, entry.number, entry.payload)
                self.next += 1
        return seqs, present


async def test_random_batches_agree_with_a_model(database_url: str) -> None:
    random = Random(23)
    model = Model(random)
    results = set[int]()
    async with open_sql(database_url) as sql:
        for _ in range(300):
            batch = model.make()
            expected = model.append(batch)
            seqs, present = await append(sql, batch)
            if all(entry.retain is None for entry in batch):
                present = present or [None] * len(batch)
            assert (seqs, present) == expected, batch
            results.update(seq for seq in seqs if seq <= 0)
            held = [(channel, kept.seq, kept.payload) for channel, kept in sorted(model.held.items())]
            assert [tuple(row) for row in await sql.fetch(RETAINED)] == held
            if random.random() < 0.1:
                model.over_budget = not model.over_budget
                await sql.fetch("SELECT setval('catbus.retained_over_budget', $1)", int(model.over_budget))
            if random.random() < 0.2:
                model.floor = random.randint(model.floor, model.next)
                await sql.execute(f"DELETE FROM catbus.entries WHERE seq < {model.floor}")
                await sql.execute(f"UPDATE catbus.head SET floor = {model.floor}")
            if random.random() < 0.1:
                await sql.execute("UPDATE catbus.head SET slot = (slot + 1) % 8")
        rows = await sql.fetch("SELECT seq, number, retain FROM catbus.entries ORDER BY seq")
        assert [tuple(row) for row in rows] == sorted(
            (seq, number, entry.retain) for number, (seq, entry) in model.log.items() if seq >= model.floor
        )
        assert results == {0, -1, -2, -3}


async def test_duplicate_below_the_floor_is_known_by_the_retained_message(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        assert await append(sql, [Sent(1), Sent(2, "b")]) == ([1, 2], [None, None])
        await sql.execute("TRUNCATE catbus.entries; UPDATE catbus.head SET floor = 3")
        retries = [Sent(1, after=0, expect=0), Sent(2, "b", after=0, expect=7), Sent(3, after=0)]
        assert await append(sql, retries) == ([1, 2, -1], [None] * 3)
        assert await append(sql, [Sent(1, payload="2", after=0)]) == ([0], [None])
        assert await append(sql, [Sent(4, payload="null")]) == ([3], [None])
        assert await append(sql, [Sent(1, after=0)]) == ([-1], [None])


async def test_other_messages_do_not_touch_the_retained_ones(database_url: str) -> None:
    """They need no statement and no lock: an append of them succeeds while the table is locked."""
    async with open_sql(database_url) as locking, open_sql(database_url) as sql:
        await locking.execute("BEGIN; LOCK TABLE catbus.retained IN ACCESS EXCLUSIVE MODE")
        (epoch,) = await sql.fetchrow("SELECT epoch FROM catbus.head")
        row = await sql.fetchrow(APPEND, epoch, ["a"], ["1"], [b"p"], [1], [None], [None], [None], None, None)
        assert row == ([1], None)
        await sql.execute("SELECT catbus.publish('a', '2')")
        assert await move(sql) == 1
        with pytest.raises(Exception, match="lock timeout"):
            await append(sql, [Sent(2)])
        await locking.execute("ROLLBACK")
        assert await append(sql, [Sent(2)]) == ([3], [None])


# The outbox


async def test_messages_of_the_outbox_are_retained_in_the_order_of_their_ids(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute(
            """
            SELECT catbus.publish('a', '1', retain => true);
            SELECT catbus.publish('b', '2', true), catbus.publish('b', '3', false), catbus.publish('b', '4', NULL);
            SELECT setval('catbus.outbox_active', 1);
            SELECT catbus.publish('a', ' 5 '::json, retain => true);
            SELECT catbus.publish('c', '6', retain => true);
            SELECT catbus.publish('c', E'\\nnull ', retain => true);
            """
        )
        assert await sql.fetch(RETAINED) == []
        assert await move(sql) == 7
        rows = await sql.fetch("SELECT payload, retain FROM catbus.entries ORDER BY seq")
        assert [payload for payload, retain in rows if retain] == ["1", "2", "5", "6", "null"]
        assert [payload for payload, retain in rows if retain is None] == ["3", "4"]
        assert await sql.fetch(RETAINED) == [("a", 5, "5"), ("b", 2, "2")] == await fold(sql)
        await sql.execute(
            "SELECT catbus.publish(format('c%s', n % 7), to_json(n), n % 3 > 0) FROM generate_series(1, 2500) n"
        )
        await sql.execute("SELECT catbus.publish('a', 'null', retain => true)")
        assert await move(sql) == 2501
        assert [tuple(row) for row in await sql.fetch(RETAINED)] == await fold(sql)
        assert len(await fold(sql)) == 8


async def test_transaction_that_is_rolled_back_retains_nothing(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await sql.execute("BEGIN; SELECT catbus.publish('a', '1', retain => true); ROLLBACK")
        assert await move(sql) == 0
        assert await sql.fetch(RETAINED) == []


async def test_retained_messages_over_their_budget_are_rejected_until_some_are_removed(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await append(sql, [Sent(1, "a", '"1234567"'), Sent(2, "b", '"1234567"')])
        assert await sql.fetchrow("SELECT * FROM catbus.measure_retained(20)") == (2, 20)
        assert await append(sql, [Sent(3, "a", "1")]) == ([3], [None])
        await append(sql, [Sent(4, "a", '"12345678"')])
        assert await sql.fetchrow("SELECT * FROM catbus.measure_retained(20)") == (2, 21)
        assert await append(sql, [Sent(5, "a", "1"), Sent(6, "a", "1", retain=None), Sent(7, "c", "null")]) == (
            [-3, 5, 6],
            [None] * 3,
        )
        with pytest.raises(Exception, match="no space left") as caught:
            await sql.fetch("SELECT catbus.publish('a', '1', retain => true)")
        assert sqlstate(caught.value) == "53400"
        await sql.execute("SELECT catbus.publish('a', 'null', retain => true), catbus.publish('b', '1')")
        assert await move(sql) == 2
        assert await sql.fetchrow("SELECT * FROM catbus.measure_retained(20)") == (1, 10)
        assert (await append(sql, [Sent(8, "a", "1")]))[0] == [9]


# Reading


async def fill(sql: DatabaseConnection) -> None:
    await append(sql, [Sent(n, channel, f'"{channel}"') for n, channel in enumerate(CHANNELS, 1)])


@pytest.mark.parametrize("pattern", PATTERNS)
async def test_retained_messages_are_read_by_pattern(database_url: str, pattern: str) -> None:
    async with open_sql(database_url) as sql:
        await fill(sql)
        rows = await sql.fetch("SELECT * FROM catbus.retained($1)", pattern)
        assert [row[0] for row in rows] == sorted(c for c in CHANNELS if matches(pattern, c))
        assert [(seq, payload) for _, seq, _, payload, _ in rows] == [
            (CHANNELS.index(channel) + 1, f'"{channel}"') for channel, *_ in rows
        ]


async def test_wrong_pattern_is_rejected(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        with pytest.raises(Exception, match="not a pattern") as caught:
            await sql.fetch("SELECT catbus.retained('a.*.b')")
        assert sqlstate(caught.value) == "22023"


async def test_retained_messages_are_those_of_the_snapshot_of_the_caller(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as other:
        await append(sql, [Sent(1)])
        await sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        assert len(await sql.fetch("SELECT catbus.retained('*')")) == 1
        await append(other, [Sent(2, payload="2"), Sent(3, "b")])
        assert [row[3] for row in await sql.fetch("SELECT * FROM catbus.retained('*')")] == ["1"]
        await sql.execute("COMMIT")
        assert [row[3] for row in await sql.fetch("SELECT * FROM catbus.retained('*')")] == ["2", "1"]


# Erasure


@pytest.mark.parametrize("kept", [True, False], ids=["in-the-log", "below-the-floor"])
@pytest.mark.parametrize("pattern", PATTERNS)
async def test_exactly_the_selected_retained_messages_are_erased(database_url: str, pattern: str, kept: bool) -> None:
    async with open_sql(database_url) as sql:
        await fill(sql)
        await append(sql, [Sent(20, "b.a", '"of bob"')])
        await sql.execute("UPDATE catbus.retained SET sender = 'bob', at = 7 WHERE channel IN ('b.a', 'a.b')")
        await sql.execute("UPDATE catbus.entries SET sender = 'bob' WHERE seq = 10 OR channel = 'a.b'")
        if not kept:
            await sql.execute("TRUNCATE catbus.entries; UPDATE catbus.head SET floor = 11")
        before = await sql.fetch("SELECT channel, sender FROM catbus.retained")
        for sender in ("bob", None):
            selected = {c for c, s in before if matches(pattern, c) and sender in (None, s)}
            await sql.execute("BEGIN")
            (count,) = await sql.fetchrow("SELECT catbus.erase_retained($1, $2, NULL, 99, false)", pattern, sender)
            assert count == (0 if kept else len(selected))
            (count,) = await sql.fetchrow("SELECT catbus.erase($1, sender => $2)", pattern, sender)
            # In the log there is also the earlier message of b.a, which was replaced.
            replaced = kept and sender is None and matches(pattern, "b.a")
            assert count == len(selected) + replaced
            rows = await sql.fetch("SELECT channel FROM catbus.retained")
            assert {channel for (channel,) in rows} == {channel for channel, _ in before} - selected
            due = [name for name, _, _ in await sql.fetch("SELECT name, erasure, blocked FROM catbus.vacuum_due()")]
            assert ("retained" in due) is bool(selected)
            await sql.execute("ROLLBACK")
        (count,) = await sql.fetchrow("SELECT catbus.erase($1, before => to_timestamp(0.007))", pattern)
        assert count == 0


async def test_message_published_after_an_erasure_began_stays(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await append(sql, [Sent(1), Sent(2, "b")])
        assert await sql.fetchrow("SELECT catbus.erase_retained('*', NULL, NULL, 1, true)") == (0,)
        assert await sql.fetch(RETAINED) == [("b", 2, "1")]


async def test_vacuum_removes_the_old_rows_of_erased_retained_messages(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await append(sql, [Sent(1, "a", '"a secret text"')])
        await sql.execute("TRUNCATE catbus.entries; UPDATE catbus.head SET floor = 2")
        assert await sql.fetchrow("SELECT catbus.erase('a')") == (1,)
        assert await vacuum_tables(sql) == []
        # The whole table is empty, so VACUUM has given its pages back.
        assert await sql.fetchrow("SELECT pg_relation_size('catbus.retained')") == (0,)


async def test_append_waits_for_an_erasure_of_the_message_that_it_replaces(database_url: str) -> None:
    async with open_sql(database_url) as erasing, open_sql(database_url) as sql:
        await append(sql, [Sent(1), Sent(2, "b")])
        await erasing.execute("BEGIN; SELECT catbus.erase('a')")
        with pytest.raises(Exception, match="lock timeout"):
            await append(sql, [Sent(3)])
        assert (await append(sql, [Sent(4, "b")]))[0] == [3]
        await erasing.execute("COMMIT")
        assert await append(sql, [Sent(3, expect=1)]) == ([-2], [0])
        assert await append(sql, [Sent(5, expect=0)]) == ([4], [None])
        assert await sql.fetch(RETAINED) == [("a", 4, "1"), ("b", 3, "1")]


# Restores


async def test_retained_messages_that_the_log_has_lost_are_deleted_with_a_new_epoch(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await append(sql, [Sent(1), Sent(2, "b"), Sent(3, "c"), Sent(4, "d")])
        await sql.execute("DELETE FROM catbus.entries WHERE seq > 2")
        (epoch,) = await sql.fetchrow("SELECT epoch FROM catbus.head")
        await sql.fetch("SELECT catbus.new_epoch($1)", epoch)
        assert await sql.fetch(RETAINED) == [("a", 1, "1"), ("b", 2, "1")] == await fold(sql)
        assert await append(sql, [Sent(5, "c", expect=0), Sent(6, "d", expect=4)]) == ([3, -2], [None, 0])


async def test_log_that_was_restored_empty_begins_above_every_retained_message(database_url: str) -> None:
    async with open_sql(database_url) as sql:
        await append(sql, [Sent(n) for n in range(1, 41)])
        await sql.execute("TRUNCATE catbus.entries; UPDATE catbus.head SET floor = 1")
        assert await sql.fetchrow("SELECT catbus.highest_seq()") == (40,)
        (epoch,) = await sql.fetchrow("SELECT epoch FROM catbus.head")
        await sql.fetch("SELECT catbus.new_epoch($1)", epoch)
        ((seq,), _) = await append(sql, [Sent(50, expect=40)])
        assert seq > 40
        assert [row[1] for row in await sql.fetch(RETAINED)] == [seq]
