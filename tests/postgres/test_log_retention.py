"""Retention by replicas, and the view of readers during it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from re import sub
from typing import Any

import pytest
import trio
from msgspec import structs
from structlog.testing import CapturingLogger

from catbus.config import DatabaseSettings
from catbus.config import RetentionSettings as Settings
from catbus.delivery.fan_out import Delivery
from catbus.log import Committed, Rejected
from catbus.postgres import PostgresLog
from catbus.postgres.access.migrations import begin_epoch
from catbus.postgres.listen import polling_interval
from catbus.postgres.maintenance import log_retention, schedule
from catbus.protocol import wire_messages as wire
from tests.log.harness import TEST_TIMEOUT, Publisher, read_all, running
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql, wait_until
from tests.test_delivery import Reader, exhaust

HOUR = 3600.0
AGE = 7 * HOUR
SLOT = 3_600_000
"""Milliseconds during which a slot receives entries."""


def make(url: str, *, recent: int = 0) -> PostgresLog:
    return PostgresLog(DatabaseSettings(url=url, publish_timeout=20), Settings(age=AGE), recent=recent)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> CapturingLogger:
    """The log lines of retention, which checks all the time here."""
    lines = CapturingLogger()
    monkeypatch.setattr(log_retention, "logger", lines)
    monkeypatch.setattr(log_retention, "CHECK_INTERVAL", 0.02)
    monkeypatch.setattr(log_retention, "BLOCKED_INTERVAL", 0.02)
    return lines


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas check retention only when they start, so the test takes the steps."""
    monkeypatch.setattr(log_retention, "CHECK_INTERVAL", HOUR)
    monkeypatch.setattr(polling_interval, "NOTIFIED_INTERVAL", 0.05)


class Clock:
    """The clock by which replicas measure the age of entries."""

    statements = ("_DUE", "_STEP")
    passed = 0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._originals = [getattr(log_retention, name) for name in self.statements]

    def advance(self, milliseconds: int) -> None:
        self.passed += milliseconds
        now = f"floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint + {self.passed}"
        for name, original in zip(self.statements, self._originals, strict=True):
            self._monkeypatch.setattr(log_retention, name, sub(r"\(\$1, \$2(, NULL)?", f"($1, $2, {now}", original))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def close_slot(sql: Any) -> None:
    """Let later entries go into another slot."""
    await sql.execute("UPDATE catbus.head SET slot = slot + 1")


async def drop(sql: Any, slots: int = 1) -> int:
    """Remove the oldest slots, and return the floor."""
    for _ in range(slots):
        ((floor, dropped),) = await sql.fetch("SELECT floor, dropped FROM catbus.retain(1, $1)", 1 << 50)
        assert dropped
    return int(floor)


@asynccontextmanager
async def following(log: PostgresLog) -> AsyncIterator[tuple[Delivery, Publisher]]:
    """A log that a `Delivery` follows."""
    delivery, publisher = Delivery(log), Publisher(log)
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run, delivery)
        with trio.fail_after(TEST_TIMEOUT):
            await log.wait_open()
            yield delivery, publisher
        nursery.cancel_scope.cancel()


async def sweep(log: PostgresLog, delivery: Delivery, rows: int = 1000) -> bool:
    """Serve one page to lagging subscriptions, and return whether there were any."""
    position = delivery.next_position()
    if position is None:
        return False
    exhaust(delivery.serve(position, await log.read(position, rows=rows)))
    return True


async def publish(publisher: Publisher, number: int) -> None:
    for _ in range(number):
        await publisher.publish_seq("a", b"1")


def said(reader: Reader) -> list[object]:
    """Seqs of messages, ("gap", from, to, reason), and ("live", seq)."""
    return [
        ("gap", mark.first, mark.last, mark.reason)
        if isinstance(mark, wire.Gap)
        else ("live", mark.seq)
        if isinstance(mark, wire.Live)
        else mark
        for mark in reader.received()
    ]


# Steps of replicas


async def test_old_entries_are_removed_and_the_log_continues(
    database_url: str, lines: CapturingLogger, clock: Clock
) -> None:
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        await publish(publisher, 10)
        await wait_until(lambda: looked(log))
        assert log.statistics().retention_steps == 0
        assert log.statistics().retention_stepped is None
        assert log.statistics().table_size > 0
        clock.advance(9 * SLOT)
        await wait_until(lambda: dropped(log, 10))
        statistics = log.statistics()
        assert statistics.retention_steps == 2
        assert statistics.retention_stepped is not None
        assert await publisher.publish_seq("a", b"11") == 11
        assert await sql.fetchrow("SELECT head, floor FROM catbus.position()") == (11, 11)
        assert follower.restarts == [0]
        assert [entry.seq for entry in follower.entries] == list(range(1, 12))
    assert [(call.args, call.kwargs) for call in lines.calls] == [
        (("the oldest part of the log was dropped",), {"entries": 10, "floor": 11, "reason": "age"})
    ]


async def looked(log: PostgresLog) -> bool:
    return log.statistics().table_size > 0


async def dropped(log: PostgresLog, number: int) -> bool:
    return log.statistics().retention_dropped >= number


async def test_one_of_several_replicas_takes_each_step(database_url: str, lines: CapturingLogger, clock: Clock) -> None:
    logs = [make(database_url) for _ in range(3)]
    async with running(logs[0]) as (_, publisher), running(logs[1]), running(logs[2]), open_sql(database_url) as sql:
        for _ in range(5):
            await publish(publisher, 4)
            clock.advance(9 * SLOT)
            await wait_until(lambda: is_empty(sql))
            clock.advance(-9 * SLOT)
        # A replica counts a step a moment after the step is visible.
        await wait_until(lambda: have_dropped(logs, 20))
        all_statistics = [log.statistics() for log in logs]
        # A check that still uses the earlier clock closes a slot early: one step more, and no entry twice.
        assert 10 <= sum(statistics.retention_steps for statistics in all_statistics) <= 15
        assert sum(statistics.retention_held for statistics in all_statistics) == 0
        assert sum(statistics.failures + statistics.restarts for statistics in all_statistics) == 0


async def have_dropped(logs: Sequence[PostgresLog], number: int) -> bool:
    return sum(log.statistics().retention_dropped for log in logs) == number


async def is_empty(sql: Any) -> bool:
    ((head, floor),) = await sql.fetch("SELECT head, floor FROM catbus.position()")
    return bool(floor == head + 1)


async def test_transaction_that_blocks_retention_is_logged_once_and_delays_no_publish(
    database_url: str, lines: CapturingLogger, clock: Clock
) -> None:
    log = make(database_url)
    async with running(log) as (_, publisher), open_sql(database_url) as dump, open_sql(database_url) as sql:
        await publish(publisher, 3)
        await close_slot(sql)
        await dump.execute("SET application_name = 'nightly'; BEGIN; SELECT 'sesame' FROM catbus.entries")
        # A transaction that has just begun does not count as blocking yet.
        await wait_until(lambda: is_old(sql, dump.pid))
        clock.advance(9 * SLOT)
        await wait_until(lambda: held(log, 5))
        tries = "SELECT pg_current_xact_id_if_assigned()::text, pg_snapshot_xmax(pg_current_snapshot())::text"
        assert (await sql.fetchrow(tries))[0] is None
        seen = []
        for times in range(10, 35, 5):
            seen.append((await sql.fetchrow(tries))[1])
            await wait_until(partial(held, log, times))
        # The count includes all transactions of the server, and autovacuum occasionally starts one.
        assert len(set(seen)) < len(seen), "nobody has even tried to get the head row"
        assert await publisher.publish_seq("a", b"1") == 4
        assert log.statistics().retention_dropped == 0
        [warning] = lines.calls
        [holder] = log.report()["retention"]["holders"]  # type: ignore[index]
        await dump.execute("ROLLBACK")
        await wait_until(lambda: dropped(log, 3))
        await wait_until(lambda: is_named(log, ()))
    assert warning.method_name == "warning"
    [named] = warning.kwargs["holders"]
    assert named == {
        "pid": dump.pid,
        "application": "nightly",
        "state": "idle in transaction",
        "since": holder.since,
    }
    assert "sesame" not in repr(lines.calls)
    assert {call.method_name for call in lines.calls[1:]} == {"info"}, "the warning came once"


async def is_named(log: PostgresLog, holders: Sequence[object]) -> bool:
    return bool(log.report()["retention"]["holders"] == holders)  # type: ignore[index]


async def is_old(sql: Any, pid: int) -> bool:
    query = "SELECT xact_start < clock_timestamp() - interval '50 ms' FROM pg_stat_activity WHERE pid = $1"
    return bool((await sql.fetchrow(query, pid))[0])


async def held(log: PostgresLog, number: int) -> bool:
    return log.statistics().retention_held >= number


async def test_transaction_that_blocks_a_running_step_is_logged(
    database_url: str, lines: CapturingLogger, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search finds no blocker, and then a transaction blocks the step for longer than it waits."""
    monkeypatch.setattr(log_retention, "BLOCKED_INTERVAL", HOUR)
    ask = log_retention.LogRetention._find_blockers
    asked = []

    async def blind_at_first(self: Any, connection: Any, slot: int) -> Any:
        asked.append(slot)
        return await ask(self, connection, slot) if len(asked) > 1 else ()

    monkeypatch.setattr(log_retention.LogRetention, "_find_blockers", blind_at_first)
    log = make(database_url)
    async with running(log) as (_, publisher), open_sql(database_url) as dump, open_sql(database_url) as sql:
        await publish(publisher, 3)
        await close_slot(sql)
        await dump.execute("SET application_name = 'nightly'; BEGIN; SELECT FROM catbus.entries")
        await wait_until(lambda: is_old(sql, dump.pid))
        clock.advance(9 * SLOT)
        await wait_until(lambda: held(log, 1))
        [warning] = lines.calls
        assert [named["pid"] for named in warning.kwargs["holders"]] == [dump.pid]


async def test_step_taken_by_another_replica_is_not_blocked(
    database_url: str, lines: CapturingLogger, clock: Clock
) -> None:
    log = make(database_url)
    async with running(log) as (_, publisher), open_sql(database_url) as dump, open_sql(database_url) as sql:
        for times in (1, 2):
            await publish(publisher, 3)
            await close_slot(sql)
            await dump.execute("BEGIN; SELECT FROM catbus.entries")
            await wait_until(lambda: is_old(sql, dump.pid))
            clock.advance(9 * SLOT)
            await wait_until(lambda: is_held(log, True))
            assert len(lines.calls) == times
            # In one transaction, so that the tested log cannot take the step first.
            await sql.execute("BEGIN; SELECT FROM catbus.head FOR UPDATE")
            await dump.execute("ROLLBACK")
            await drop(sql)
            await sql.execute("COMMIT")
            await wait_until(lambda: is_held(log, False))
            # The next messages are young again.
            clock.advance(-9 * SLOT)
        assert log.statistics().retention_dropped == 0


async def is_held(log: PostgresLog, expected: bool) -> bool:
    return bool(log.report()["retention"]["holders"]) is expected  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "state", "begun", "expected"),
    [
        ("a dump", "'idle in transaction'", "now() - interval '1 hour'", 1),
        ("a reader that has just come", "'active'", "clock_timestamp()", 0),
        ("a reader that has left since", "'idle'", "NULL", 0),
        ("a session whose state may not be seen", "NULL", "NULL", 1),
        ("a session that has ended since", None, None, 0),
        ("a prepared transaction", None, None, 1),
    ],
)
async def test_transaction_that_has_just_begun_or_ended_does_not_block_retention(
    database_url: str, name: str, state: str | None, begun: str | None, expected: int
) -> None:
    """The server reads locks and processes at two moments; temporary tables replace both views here."""
    pid = "NULL" if name == "a prepared transaction" else "1234"
    async with open_sql(database_url) as sql:
        await sql.execute(f"""
            SET search_path = pg_temp, pg_catalog;
            CREATE TEMPORARY TABLE pg_locks AS SELECT * FROM pg_locks LIMIT 0;
            INSERT INTO pg_temp.pg_locks (locktype, database, relation, virtualtransaction, pid, mode, granted)
            SELECT 'relation', oid, 'catbus.entries_3'::regclass, '-1/1234', {pid}, 'AccessShareLock', true
            FROM pg_database WHERE datname = current_database();
            CREATE TEMPORARY TABLE pg_stat_activity AS SELECT * FROM pg_stat_activity LIMIT 0""")
        if state is not None:
            await sql.execute(f"""
                INSERT INTO pg_temp.pg_stat_activity (pid, application_name, state, xact_start)
                VALUES (1234, 'x', {state}, {begun})""")
        assert len(await sql.fetch(log_retention._BLOCKERS, 3)) == expected
        assert await sql.fetch(log_retention._BLOCKERS, 4) == []


async def test_unreachable_database_does_not_end_retention(
    database_url: str, lines: CapturingLogger, clock: Clock
) -> None:
    async with open_proxy(database_url) as proxy:
        log = make(proxy.url)
        async with running(log) as (_, publisher):
            await publish(publisher, 3)
            proxy.close()
            clock.advance(9 * SLOT)
            await proxy.wait_refused()
            proxy.open()
            await wait_until(lambda: dropped(log, 3))
            assert log.statistics().failures == 0


async def test_log_is_available_without_retention(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(self: object, working: object) -> None:
        raise OSError("no more connections")

    monkeypatch.setattr(schedule.MaintenanceSchedule, "run", never)
    log = make(database_url)
    async with running(log) as (_, publisher):
        assert await publisher.publish_seq("a", b"1") == 1
        with trio.fail_after(TEST_TIMEOUT):
            while not log.available:
                await trio.sleep(0.01)


# Readers


@pytest.mark.usefixtures("by_hand")
async def test_gap_between_two_pages_is_announced_and_the_rest_is_exact(database_url: str) -> None:
    log = make(database_url)
    async with following(log) as (delivery, publisher), open_sql(database_url) as sql:
        for _ in range(3):
            await publish(publisher, 4)
            await close_slot(sql)
        behind, ahead = Reader(delivery, "a", 0), Reader(delivery, "a", 7)
        assert await sweep(log, delivery, rows=2)
        assert said(behind) == [1, 2]
        assert await drop(sql, 2) == 9
        while await sweep(log, delivery, rows=3):
            pass
        assert said(behind) == [("gap", 3, 8, "retention"), 9, 10, 11, 12, ("live", 12)]
        assert said(ahead) == [("gap", 8, 8, "retention"), 9, 10, 11, 12, ("live", 12)]
        await publish(publisher, 1)
        assert said(behind) == said(ahead) == [13]


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("recent", [0, 1 << 20], ids=["from the table", "from memory"])
async def test_cursor_one_below_the_floor_resumes_exactly(database_url: str, recent: int) -> None:
    log = make(database_url, recent=recent)
    async with following(log) as (delivery, publisher), open_sql(database_url) as sql:
        await publish(publisher, 4)
        await close_slot(sql)
        await publish(publisher, 4)
        assert await drop(sql) == 5
        await wait_until(lambda: knows_floor(log, 5))
        readers = {since: Reader(delivery, "a", since) for since in (3, 4, 6, 8)}
        while await sweep(log, delivery):
            pass
        assert {since: said(reader) for since, reader in readers.items()} == {
            3: [("gap", 4, 4, "retention"), 5, 6, 7, 8, ("live", 8)],
            4: [5, 6, 7, 8, ("live", 8)],
            6: [7, 8, ("live", 8)],
            8: [("live", 8)],
        }


async def knows_floor(log: PostgresLog, floor: int) -> bool:
    return log.floor == floor


@pytest.mark.usefixtures("by_hand")
async def test_quiet_subscription_that_got_head_gets_no_gap(database_url: str) -> None:
    log = make(database_url)
    async with following(log) as (delivery, publisher), open_sql(database_url) as sql:
        quiet = Reader(delivery, "quiet")
        await publish(publisher, 4)
        head = delivery.position
        await close_slot(sql)
        assert await drop(sql) == 5
        await wait_until(lambda: knows_floor(log, 5))
        assert said(quiet) == []
        back = Reader(delivery, "quiet", head)
        without_head = Reader(delivery, "quiet", 0)
        while await sweep(log, delivery):
            pass
        assert said(back) == [("live", 4)]
        assert said(without_head) == [("gap", 1, 4, "retention"), ("live", 4)]
        await publisher.publish_seq("quiet", b"1")
        assert said(quiet) == said(back) == said(without_head) == [5]


@pytest.mark.usefixtures("by_hand")
async def test_entries_in_memory_are_served_until_the_replica_learns_the_floor(database_url: str) -> None:
    log = make(database_url, recent=1 << 20)
    async with running(log) as (_, publisher), open_sql(database_url) as sql:
        await publish(publisher, 4)
        await close_slot(sql)
        await publish(publisher, 2)
        # There is no await between the step and the read, so there is no poll.
        log._tail.floor = 1
        assert [entry.seq for entry in await read_all(log)] == [1, 2, 3, 4, 5, 6]
        await drop(sql)
        await wait_until(lambda: knows_floor(log, 5))
        page = await log.read(0)
        assert (page.after, page.last, [entry.seq for entry in page.entries]) == (4, 6, [5, 6])
        assert log.statistics().reads == 0


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("recent", [0, 1 << 20])
async def test_history_page_is_complete_above_the_floor(database_url: str, recent: int) -> None:
    """The same holds for entries in memory, once the replica knows the floor."""
    log = make(database_url, recent=recent)
    async with running(log) as (_, publisher), open_sql(database_url) as sql:
        for _ in range(3):
            await publisher.publish_seq("a", b"1")
            await publisher.publish_seq("b", b"1")
            await close_slot(sql)

        async def history(before: int | None, limit: int) -> tuple[list[int], bool]:
            entries, more = await log.history("a", before=before, limit=limit)
            return [entry.seq for entry in entries], more

        assert await history(None, 2) == ([3, 5], True)
        floor = await drop(sql)
        await wait_until(lambda: knows_floor(log, floor))
        assert await history(3, 2) == ([], False)
        assert await history(None, 2) == ([3, 5], False)
        end = await drop(sql, 2)
        await wait_until(lambda: knows_floor(log, end))
        assert await history(None, 2) == ([], False)


# Disconnected replicas


@pytest.mark.usefixtures("by_hand")
async def test_replica_overtaken_by_retention_announces_a_gap(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, open_sql(database_url) as sql:
        one, other = make(database_url), make(proxy.url, recent=1 << 20)
        async with running(one) as (_, publisher), following(other) as (delivery, elsewhere):
            live = Reader(delivery, "a")
            await publish(publisher, 3)
            await wait_until(lambda: has_come_to(delivery, 3))
            assert said(live) == [1, 2, 3]
            late = Reader(delivery, "a", 0)
            # These cursors come from the other replica, and are above this replica's head.
            beyond, at_floor = Reader(delivery, "a", 9), Reader(delivery, "a", 7)
            proxy.close()
            await publish(publisher, 4)
            await close_slot(sql)
            await publish(publisher, 3)
            assert await drop(sql) == 8
            proxy.open()
            await wait_until(lambda: has_come_to(delivery, 10))
            while await sweep(other, delivery):
                pass
            assert said(live) == [("gap", 4, 7, "retention"), 8, 9, 10]
            assert said(late) == [("gap", 1, 7, "retention"), ("live", 7), 8, 9, 10]
            assert said(at_floor) == [("live", 7), 8, 9, 10]
            told = said(beyond)
            assert [item for item in told if isinstance(item, int)] == [10]
            assert not [item for item in told if isinstance(item, tuple) and item[0] == "gap"]
            assert await elsewhere.publish_seq("a", b"1") == 11
            assert said(live) == [11]


async def has_come_to(delivery: Delivery, position: int) -> bool:
    return delivery.position == position


@pytest.mark.usefixtures("by_hand")
async def test_replica_that_starts_after_retention_removed_everything_continues(database_url: str) -> None:
    async with running(make(database_url)) as (_, publisher), open_sql(database_url) as sql:
        await publish(publisher, 5)
        epoch = publisher.log.epoch
        await close_slot(sql)
        assert await drop(sql) == 6
    log = make(database_url)
    async with running(log) as (follower, publisher):
        assert (log.epoch, log.applied, log.floor) == (epoch, 5, 6)
        assert follower.restarts == [5]
        page = await log.read(2)
        assert (page.after, page.last, list(page.entries)) == (5, 5, [])
        assert await publisher.publish_seq("a", b"1") == 6
        assert [entry.seq for entry in await read_all(log, 5)] == [6]


@pytest.mark.usefixtures("by_hand")
async def test_retry_below_the_floor_is_unknown_and_one_above_it_a_duplicate(database_url: str) -> None:
    async with running(make(database_url)) as (_, publisher), open_sql(database_url) as sql:
        await publisher.publish_seq("a", b"1", producer=b"p" * 16, number=1)
        await close_slot(sql)
        await publisher.publish_seq("a", b"2", producer=b"p" * 16, number=2)
        await drop(sql)
        lost = await publisher.publish("a", b"1", producer=b"p" * 16, number=1, after=0)
        assert isinstance(lost, Rejected)
        assert lost.code == "unknown"
        again = await publisher.publish("a", b"2", producer=b"p" * 16, number=2, after=0)
        assert again == Committed(2, duplicate=True)
        assert await publisher.publish("a", b"3", producer=b"p" * 16, number=3, after=1) == Committed(3)


async def test_replicas_lose_nothing_above_the_floor_while_retention_runs(
    database_url: str, lines: CapturingLogger
) -> None:
    """Small slots are removed all the time. The followers check the order, and gaps announce the rest."""
    settings = Settings(age=AGE)
    structs.force_setattr(settings, "size", 1_000_000)  # Below the minimum of the configuration.
    logs = [
        PostgresLog(DatabaseSettings(url=database_url, publish_timeout=20), settings, recent=20_000) for _ in range(2)
    ]
    async with running(logs[0]) as (here, alice), running(logs[1]) as (there, bob):
        busy = True

        async def publish_all(publisher: Publisher) -> None:
            for n in range(150):
                for _ in range(1 + n % 20):
                    publisher.submit("a", b'"%s"' % (b"x" * 300))
                await publisher.wait()

        async def read() -> None:
            log, after = logs[1], 0
            while busy:
                page = await log.read(after, rows=50)
                assert page.after >= after
                assert [entry.seq for entry in page.entries] == list(range(page.after + 1, page.last + 1))
                after = page.last if page.last < log.applied else 0
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as readers:
            readers.start_soon(read)
            async with trio.open_nursery() as publishers:
                publishers.start_soon(publish_all, alice)
                publishers.start_soon(publish_all, bob)
            busy = False
        total = len(alice.submitted) + len(bob.submitted)
        await here.wait_for(total)
        await there.wait_for(total)
        given = [answer.seq for p in (alice, bob) for answer in p.outcomes.values() if isinstance(answer, Committed)]
        assert sorted(given) == list(range(1, total + 1))
        assert sum(log.statistics().retention_dropped for log in logs) > total / 3
        assert sum(log.statistics().failures for log in logs) == 0


async def test_log_restored_without_its_messages_gets_another_epoch(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (_, publisher):
        await publish(publisher, 3)
        old = log.epoch
    async with open_sql(database_url) as sql:
        await sql.execute("DELETE FROM catbus.entries")
    assert (await begin_epoch(DatabaseSettings(url=database_url)))[1] == 0
    log = make(database_url)
    async with running(log) as (follower, publisher):
        assert log.epoch not in ("", old)
        assert follower.restarts == [0]
        assert log.resume(3, old).lost == "epoch"
        assert await publisher.publish_seq("a", b"1") == 1
