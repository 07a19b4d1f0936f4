"""`catbus.retain` on a real server, compared with a list, and during appends, reads and locks.

The tests let time pass by making all entries older.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

import asyncpg  # type: ignore[import-untyped]
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.postgres.test_sql_append import Connection, Sent, append, play, position, seqs, wait_blocked

T = TypeVar("T")

SLOT = 1_000_000
"""Milliseconds during which a slot receives entries, much longer than a test takes."""
AGE = 7 * SLOT
SIZE = 1 << 50


class Step(NamedTuple):
    floor: int
    dropped: int
    by_size: bool
    closed: bool
    blocked: int | None


NOTHING = (0, False, False, None)
"""The result of a step that had nothing to do, without its floor."""


async def retain(connection: Connection, age: int = AGE, size: int = SIZE, now: int | None = None) -> Step:
    return Step(*await connection.fetchrow("SELECT * FROM catbus.retain($1, $2, $3)", age, size, now))


async def pass_time(connection: Connection, milliseconds: int) -> None:
    await connection.execute(f"UPDATE catbus.entries SET at = at - {milliseconds}")


async def publish(connection: Connection, epoch: str, number: int, size: int = 1) -> None:
    """Append more entries after those of earlier calls."""
    _, head, _ = await position(connection)
    await append(connection, epoch, [Sent(b"p", head + n, payload="1" * size) for n in range(1, number + 1)])


async def slot(connection: Connection) -> int:
    current: int = await connection.fetchval("SELECT slot FROM catbus.head")
    return current


async def fill_slots(connection: Connection, epoch: str, number: int, each: int = SLOT * 9 // 10) -> None:
    """Fill slots with one entry each; the last is current. Of 8 slots, the oldest is due after one slot's time."""
    for index in range(number):
        if index:
            await pass_time(connection, each)
            await connection.execute("UPDATE catbus.head SET slot = slot + 1")
        await publish(connection, epoch, 1)


# Age


def test_slot_is_closed_when_its_first_entry_is_older_than_a_seventh_of_the_age(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        assert await retain(sql) == (1, *NOTHING)
        await publish(sql, epoch, 2)
        assert await retain(sql) == (1, *NOTHING)
        await pass_time(sql, SLOT - 10_000)
        await publish(sql, epoch, 1)
        assert await retain(sql) == (1, *NOTHING)
        await pass_time(sql, 10_000)
        assert await retain(sql) == (1, 0, False, True, None)
        assert await slot(sql) == 1
        assert await retain(sql) == (1, *NOTHING)

    play(database_url, scene)


def test_oldest_slot_is_emptied_when_its_newest_entry_is_older_than_the_age(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        await publish(sql, epoch, 3)
        await pass_time(sql, SLOT)
        await publish(sql, epoch, 2)
        assert (await retain(sql)).closed
        await publish(sql, epoch, 1)
        await pass_time(sql, AGE - 10_000)
        assert (await retain(sql)).dropped == 0
        await pass_time(sql, 10_000)
        assert await retain(sql) == (6, 5, False, False, None)
        assert await seqs(sql) == [6]
        assert await position(sql) == (epoch, 6, 6)

    play(database_url, scene)


def test_current_slot_grows_while_the_oldest_is_young(database_url: str) -> None:
    """The maximum size was smaller before, so slots were closed sooner."""

    async def scene(epoch: str, sql: Connection) -> None:
        await fill_slots(sql, epoch, 8, SLOT // 10)
        await pass_time(sql, SLOT)
        assert await retain(sql) == (1, *NOTHING)
        await publish(sql, epoch, 1)
        assert await slot(sql) == 7
        await pass_time(sql, AGE - SLOT)
        assert (await retain(sql)) == (2, 1, False, True, None)

    play(database_url, scene)


def test_database_clock_is_used_by_default(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        answer = await append(sql, epoch, [Sent(b"p", 1)])
        assert not (await retain(sql, now=answer.at + SLOT - 1)).closed
        assert (await retain(sql, now=answer.at + SLOT)).closed
        assert (await retain(sql, now=answer.at + AGE - 1)).dropped == 0
        assert (await retain(sql, now=answer.at + AGE)).dropped == 1

    play(database_url, scene)


def test_entry_from_a_clock_that_was_set_back_is_not_old(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        await publish(sql, epoch, 1)
        await pass_time(sql, -2 * AGE)
        await publish(sql, epoch, 1)
        assert await retain(sql) == (1, *NOTHING)

    play(database_url, scene)


def test_emptied_log_keeps_its_epoch_and_its_seqs(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        await publish(sql, epoch, 5)
        await pass_time(sql, 2 * AGE)
        assert await retain(sql) == (1, 0, False, True, None)
        assert await retain(sql) == (6, 5, False, False, None)
        assert await seqs(sql) == []
        assert await position(sql) == (epoch, 5, 6)
        answer = await append(sql, epoch, [Sent(b"q", 1), Sent(b"q", 2)])
        assert (answer.first, answer.seqs) == (6, [6, 7])
        assert await position(sql) == (epoch, 7, 6)

    play(database_url, scene)


# Size


def test_oldest_slot_is_emptied_by_size_whatever_its_age(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        size = 2 << 20
        dropped = []
        for _ in range(60):
            await publish(sql, epoch, 100, size=1000)
            while (step := await retain(sql, size=size)) and (step.closed or step.dropped):
                if step.dropped:
                    assert step.by_size
                    dropped.append(step.dropped)
            (takes,) = await sql.fetchrow("SELECT bytes FROM catbus.retention_due($1, $2)", AGE, size)
            assert takes <= size
        assert len(dropped) > 10
        assert max(dropped) < 600, "a slot has about an eighth of it"
        _, head, floor = await position(sql)
        assert await seqs(sql) == list(range(floor, head + 1))
        assert (head, floor) == (6000, sum(dropped) + 1)
        # Then the log has its maximum size, apart from one slot and the current one.
        assert head - floor > 600

    play(database_url, scene)


def test_size_includes_indexes_and_long_payloads(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        await publish(sql, epoch, 10, size=100_000)
        (takes,) = await sql.fetchrow("SELECT bytes FROM catbus.retention_due($1, $2)", AGE, SIZE)
        assert takes > 1_000_000

    play(database_url, scene)


def test_empty_log_needs_no_step_however_small_the_size(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        assert await retain(sql, size=1) == (1, *NOTHING)

    play(database_url, scene)


# Retries


def test_retry_whose_original_may_be_removed_stays_in_doubt(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        await append(sql, epoch, [Sent(b"p", n) for n in (1, 2, 3)])
        await pass_time(sql, SLOT)
        assert (await retain(sql)).closed
        await append(sql, epoch, [Sent(b"p", 4)])
        await pass_time(sql, AGE - 10_000)
        await pass_time(sql, 10_000)
        assert (await retain(sql)).floor == 4
        retries = [Sent(b"p", 1, after=0), Sent(b"p", 3, after=2), Sent(b"p", 4, after=0), Sent(b"p", 5, after=3)]
        assert (await append(sql, epoch, retries)).seqs == [-1, -1, 4, 5]
        assert await seqs(sql) == [4, 5]

    play(database_url, scene)


# Comparison with a list


class RetainMachine(RuleBasedStateMachine):
    """A comparison with `log`, the time of every entry by seq. Each step gets the time as an argument.

    All examples use one database. Each begins above the head of the previous one.
    """

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.sql = self.run(asyncpg.connect(self.url))
        self.reader = self.run(asyncpg.connect(self.url))
        self.held = False
        self.run(self.sql.execute("TRUNCATE catbus.entries"))
        self.epoch, self.base, _ = self.run(position(self.sql))
        self.floor = self.base + 1
        self.now = 10**15
        self.log: dict[int, int] = {}
        self.punctual = True
        """Whether steps were taken in time for all entries in the log."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.sql.terminate()
        self.reader.terminate()
        self.runner.close()

    @property
    def head(self) -> int:
        return self.base + len(self.log)

    @rule(number=st.integers(1, 5))
    def publish(self, number: int) -> None:
        first = self.head + 1
        batch = [Sent(b"machine", seq) for seq in range(first, first + number)]
        assert self.run(append(self.sql, self.epoch, batch)).seqs == list(range(first, first + number))
        self.run(self.sql.execute(f"UPDATE catbus.entries SET at = {self.now} WHERE seq >= {first}"))
        self.log.update(dict.fromkeys(range(first, first + number), self.now))

    @rule(quarters=st.integers(1, 12))
    def pass_time(self, quarters: int) -> None:
        for _ in range(quarters):
            self.now += SLOT // 4
            self.step()

    @rule()
    def sleep(self) -> None:
        """No replica takes a step for a long time."""
        self.now += 3 * AGE
        self.punctual = False

    @rule()
    def hold(self) -> None:
        """A reader leaves its transaction open."""
        if not self.held:
            self.run(self.reader.execute("BEGIN; SELECT FROM catbus.entries LIMIT 1"))
            self.held = True
            self.punctual = False

    @rule()
    def let_go(self) -> None:
        if self.held:
            self.run(self.reader.execute("COMMIT"))
            self.held = False

    def step(self) -> None:
        """Take steps until there is nothing to do."""
        while True:
            step = self.run(retain(self.sql, now=self.now))
            assert step.floor == self.floor + step.dropped
            self.floor = step.floor
            if not (step.dropped or step.closed):
                break
            assert not (step.dropped and self.held)
        assert step.blocked is None or self.held

    @invariant()
    def the_log_is_what_is_above_the_floor(self) -> None:
        assert self.run(seqs(self.sql)) == list(range(self.floor, self.head + 1))
        assert self.run(position(self.sql)) == (self.epoch, self.head, self.floor)

    @invariant()
    def nothing_young_is_gone(self) -> None:
        assert all(at <= self.now - AGE for seq, at in self.log.items() if seq < self.floor)

    @invariant()
    def nothing_is_kept_much_longer(self) -> None:
        """A step is late by at most a quarter of a slot's time, unless a reader blocks it."""
        if self.floor > self.head:
            self.punctual = not self.held
        elif self.punctual:
            assert self.log[self.floor] >= self.now - AGE - SLOT - SLOT // 4


def test_retain_agrees_with_a_list(database_url: str) -> None:
    class Machine(RetainMachine):
        url = database_url

    run_state_machine_as_test(Machine, settings=settings(max_examples=15, stateful_step_count=30))


# Interleavings


def test_one_of_two_concurrent_steps_is_taken(database_url: str) -> None:
    async def scene(epoch: str, one: Connection, other: Connection, holder: Connection) -> None:
        await fill_slots(holder, epoch, 8)
        await pass_time(holder, SLOT)
        await holder.execute("BEGIN")
        await holder.execute("SELECT FROM catbus.head FOR UPDATE")
        steps = [asyncio.create_task(retain(connection)) for connection in (one, other)]
        for connection in (one, other):
            await wait_blocked(holder, connection)
        await holder.execute("COMMIT")
        assert sorted(await asyncio.gather(*steps)) == [(2, *NOTHING), (2, 1, False, True, None)]
        assert await seqs(holder) == list(range(2, 9))
        assert await slot(holder) == 0

    play(database_url, scene, connections=3)


def test_step_that_waits_for_the_head_row_holds_no_lock_on_the_log(database_url: str) -> None:
    """Otherwise it would block the step that has the head row."""

    async def scene(epoch: str, stepping: Connection, holder: Connection) -> None:
        await fill_slots(holder, epoch, 8)
        await holder.execute("BEGIN")
        await holder.execute("SELECT FROM catbus.head FOR UPDATE")
        step = asyncio.create_task(retain(stepping))
        await wait_blocked(holder, stepping)
        locked = await holder.fetch(
            "SELECT relation::regclass::text FROM pg_locks WHERE pid = $1 AND relation IS NOT NULL",
            stepping.get_server_pid(),
        )
        await holder.execute("COMMIT")
        await step
        assert any(name.endswith("head") for (name,) in locked)
        assert not [name for (name,) in locked if "entries" in name]

    play(database_url, scene, connections=2)


@pytest.mark.parametrize(
    "use",
    [
        "LOCK TABLE catbus.entries_0 IN ACCESS SHARE MODE",  # as pg_dump does
        "SELECT FROM catbus.entries LIMIT 1",
        "DECLARE slow CURSOR FOR SELECT * FROM catbus.entries",
    ],
    ids=["dump", "reader", "cursor"],
)
def test_current_slot_grows_while_a_transaction_uses_the_oldest(database_url: str, use: str) -> None:
    async def scene(epoch: str, holder: Connection, sql: Connection, writer: Connection) -> None:
        await fill_slots(sql, epoch, 8)
        await pass_time(sql, SLOT)
        await holder.execute(f"BEGIN ISOLATION LEVEL REPEATABLE READ; {use}")
        step = asyncio.create_task(retain(sql))
        await wait_blocked(holder, sql, step)
        # It has, or had, the head row. An append that waited for the holder's end would be rejected.
        assert (await append(writer, epoch, [Sent(b"q", 1)])).seqs == [9]
        assert await step == (1, 0, False, False, 0)
        assert await slot(sql) == 7
        await holder.execute("COMMIT")
        assert await retain(sql) == (2, 1, False, True, None)
        assert await seqs(sql) == list(range(2, 10))

    play(database_url, scene, connections=3)


def test_slot_is_closed_while_the_oldest_is_used_if_another_is_free(database_url: str) -> None:
    async def scene(epoch: str, holder: Connection, sql: Connection) -> None:
        await fill_slots(sql, epoch, 3)
        await pass_time(sql, AGE)
        await holder.execute("BEGIN; SELECT FROM catbus.entries LIMIT 1")
        assert await retain(sql) == (1, 0, False, True, 0)
        assert await slot(sql) == 3
        await holder.execute("COMMIT")
        assert [(await retain(sql)).dropped for _ in range(4)] == [1, 1, 1, 0]
        assert await position(sql) == (epoch, 3, 4)

    play(database_url, scene, connections=2)


def test_old_snapshot_sees_entries_vanish_and_a_new_statement_sees_the_floor(database_url: str) -> None:
    async def scene(epoch: str, old: Connection, sql: Connection) -> None:
        await fill_slots(sql, epoch, 8)
        await pass_time(sql, SLOT)
        await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        assert await old.fetchval("SELECT floor FROM catbus.head") == 1
        # A snapshot alone blocks nothing.
        assert await retain(sql) == (2, 1, False, True, None)
        await publish(sql, epoch, 2)
        assert await seqs(old) == list(range(2, 9))
        assert await old.fetchval("SELECT floor FROM catbus.head") == 1
        await old.execute("COMMIT")
        assert await position(old) == (epoch, 10, 2)

    play(database_url, scene, connections=2)


def test_appends_during_retention_lose_nothing_above_the_floor(database_url: str) -> None:
    async def scene(epoch: str, stepping: Connection, reading: Connection, *writers: Connection) -> None:
        busy = True
        dropped = 0

        async def step() -> None:
            nonlocal dropped
            while busy:
                taken = await retain(stepping, size=400_000)
                dropped += taken.dropped
                assert taken.blocked is None or taken.dropped == 0

        async def read() -> None:
            while busy:
                _, _, floor = await position(reading)
                found = await seqs(reading)
                assert found == list(range(found[0], found[-1] + 1)) if found else True
                _, head, floor_then = await position(reading)
                assert not found or floor <= found[0] <= max(floor_then, floor)
                assert floor_then <= head + 1

        async def write(writer: Connection, producer: bytes) -> list[int]:
            given = []
            for n in range(80):
                batch = [Sent(producer, 10 * n + i, payload="1" * 500) for i in range(1 + n % 9)]
                given += (await append(writer, epoch, batch)).seqs
            return given

        others = [asyncio.create_task(step()), asyncio.create_task(read())]
        each = await asyncio.gather(*(write(writer, b"%d" % index) for index, writer in enumerate(writers)))
        busy = False
        await asyncio.gather(*others)
        given = sorted(seq for seqs_of_one in each for seq in seqs_of_one)
        _, head, floor = await position(stepping)
        assert given == list(range(1, head + 1))
        assert floor == dropped + 1 > 1
        assert await seqs(stepping) == list(range(floor, head + 1))

    play(database_url, scene, connections=4)


def test_step_with_a_snapshot_older_than_the_lock_is_rejected(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        await sql.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        with pytest.raises(asyncpg.PostgresError, match="read committed"):
            await retain(sql)

    play(database_url, scene)


def test_queries_use_the_indexes_however_small_the_tables_are(database_url: str) -> None:
    async def scene(epoch: str, sql: Connection) -> None:
        await publish(sql, epoch, 5)
        await sql.execute("BEGIN")
        await sql.fetch("SELECT * FROM catbus.retention_due(1, 1)")
        scans = "SELECT sum(seq_scan) FROM pg_stat_xact_user_tables WHERE relname LIKE 'entries%'"
        assert await sql.fetchval(scans) == 0
        await sql.execute("COMMIT")

    play(database_url, scene)
