"""Messages deleted by hand: every replica reports them, and subscriptions continue after `catbus repair`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg  # type: ignore[import-untyped]
import pytest
import trio
from structlog.testing import CapturingLogger

from catbus.config import DatabaseSettings
from catbus.errors import Unavailable
from catbus.log import Committed, LogPage
from catbus.log.interface import UNDECIDED
from catbus.postgres import PostgresLog
from catbus.postgres.follow import deleted_ranges
from catbus.postgres.maintenance import repair as repair_module
from catbus.postgres.maintenance.repair import repair
from tests.log.harness import TEST_TIMEOUT, Publisher, RecordingFollower, running
from tests.postgres.sql import open_sql

ALICE = b"alice-is-a-producer"[:16]


def make(url: str, *, recent: int = 0) -> PostgresLog:
    return PostgresLog(DatabaseSettings(url=url), recent=recent)


@asynccontextmanager
async def filled(
    url: str, messages: int = 10, *, recent: int = 0
) -> AsyncIterator[tuple[PostgresLog, RecordingFollower, Publisher]]:
    log = make(url, recent=recent)
    async with running(log) as (follower, publisher):
        for n in range(1, messages + 1):
            await publisher.publish_seq("a", b"%d" % n, producer=ALICE, number=n)
        yield log, follower, publisher


async def delete(url: str, condition: str, table: str = "entries") -> None:
    async with open_sql(url) as sql:
        await sql.execute(f"DELETE FROM catbus.{table} WHERE {condition}")


async def until_problem(problem: str, *logs: PostgresLog) -> None:
    with trio.fail_after(TEST_TIMEOUT):
        while any(log.problem != problem for log in logs):
            await trio.sleep(0.01)


async def run_repair(url: str, *, apply: bool = True) -> Sequence[tuple[int, int]]:
    told: list[tuple[int, int]] = []
    _, found = await repair(DatabaseSettings(url=url), lambda seq, last: told.append((seq, last)), apply=apply)
    assert not told or told[-1][0] == told[-1][1]
    return found


async def read_on(log: PostgresLog, after: int) -> LogPage:
    """The first page that a reader gets."""
    with trio.fail_after(TEST_TIMEOUT):
        while True:
            try:
                return await log.read(after)
            except Unavailable:
                await trio.sleep(0.01)


# Reports


@pytest.mark.parametrize("recent", [0, 1 << 20])
async def test_every_replica_reports_a_deleted_range_even_with_the_messages_in_memory(
    database_url: str, recent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = CapturingLogger()
    monkeypatch.setattr(deleted_ranges, "logger", lines)
    async with filled(database_url, recent=recent) as (one, _, _):
        other = make(database_url)
        async with running(other):
            await delete(database_url, "seq IN (3, 4, 7)")
            await until_problem("messages are missing", one, other)
            for log in (one, other):
                assert (log.report()["missing"], log.report()["holes"]) == (3, [[3, 4], [7, 7]])
                assert log.statistics().missing == 3
                assert log.available
    errors = [call.kwargs for call in lines.calls if call.method_name == "error"]
    assert len(errors) == 2
    assert errors[0] == {"missing": 3, "holes": 2, "ranges": ["3-4", "7-7"]}


async def test_deleted_range_is_logged_again_once_per_interval(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = CapturingLogger()
    monkeypatch.setattr(deleted_ranges, "logger", lines)
    monkeypatch.setattr(deleted_ranges, "REPEAT_INTERVAL", 0.5)
    async with filled(database_url) as (log, _, _):
        await delete(database_url, "seq = 3")
        with trio.fail_after(TEST_TIMEOUT):
            while len(lines.calls) < 2:
                log._listener.poll_now()
                await trio.sleep(0.01)
        assert log.statistics().polls > 4
    assert {call.method_name for call in lines.calls} == {"error"}


async def test_reader_finds_a_deleted_range_that_no_trigger_has_seen(database_url: str) -> None:
    async with filled(database_url) as (one, _, _):
        async with open_sql(database_url) as sql:
            await sql.execute(
                "ALTER TABLE catbus.entries DISABLE TRIGGER note_deleted; DELETE FROM catbus.entries WHERE seq = 5; "
                "ALTER TABLE catbus.entries ENABLE ALWAYS TRIGGER note_deleted"
            )
        assert (await one.read(0)).last == 4
        assert one.problem == ""
        with pytest.raises(Unavailable):
            await one.read(4)
        await until_problem("messages are missing", one)
        assert one.report()["holes"] == [[5, 5]]


async def test_deletion_from_a_partition_is_detected(database_url: str) -> None:
    async with filled(database_url) as (log, _, _):
        await delete(database_url, "seq = 5", "entries_0")
        await until_problem("messages are missing", log)


async def test_deletion_at_the_head_begins_an_epoch_and_makes_no_deleted_range(database_url: str) -> None:
    async with filled(database_url) as (log, follower, publisher):
        await delete(database_url, "seq > 8")
        await follower.wait_until(lambda self: self.restarts[-1] == 8)
        assert await publisher.publish_seq("a", b"9") == 9
        assert log.problem == ""
    async with open_sql(database_url) as sql:
        assert await sql.fetchrow("SELECT count(*) FROM catbus.deleted_ranges") == (0,)


async def test_retention_makes_no_deleted_range(database_url: str) -> None:
    async with filled(database_url) as (log, _, _), open_sql(database_url) as sql:
        await sql.execute("UPDATE catbus.head SET floor = 5; DELETE FROM catbus.entries WHERE seq < 5")
        await delete(database_url, "seq = 7")
        await until_problem("messages are missing", log)
        assert log.report()["holes"] == [[7, 7]]
        # Once the floor has passed the range, nothing is reported any more.
        await sql.execute("UPDATE catbus.head SET floor = 8; DELETE FROM catbus.entries WHERE seq < 8")
        await until_problem("", log)
        assert await run_repair(database_url) == []


@pytest.mark.parametrize(
    "change",
    [
        "payload = '{'",
        "payload = E'[1,\\n2]'",
        "channel = 'a b'",
        "seq = 100",
        "number = 100",
        "producer = ''",
        "payload = repeat('1', 70000)",
    ],
)
async def test_entry_changed_by_hand_can_still_be_delivered(database_url: str, change: str) -> None:
    async with filled(database_url) as (log, _, _), open_sql(database_url) as sql:
        with pytest.raises(asyncpg.PostgresError):
            await sql.execute(f"UPDATE catbus.entries SET {change} WHERE seq = 3")
        await sql.execute("""UPDATE catbus.entries SET payload = '"changed"', sender = NULL WHERE seq = 3""")
        assert [entry.payload for entry in (await log.read(0)).entries][2] == b'"changed"'


# Repair


async def test_deleted_range_is_found_wherever_it_is(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_module, "SCANNED_SEQS", 3)
    async with filled(database_url, 20):
        await delete(database_url, "seq IN (1, 2, 5, 6, 7, 8, 9, 12, 19)")
        wanted = [(1, 2), (5, 9), (12, 12), (19, 19)]
        assert await run_repair(database_url, apply=False) == wanted
        assert await run_repair(database_url) == wanted
        assert await run_repair(database_url) == []
        await delete(database_url, "seq = 13")
        assert await run_repair(database_url) == [(13, 13)]


async def test_many_deleted_ranges_are_repaired_in_batches(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_module, "REPAIRED_RANGES", 7)
    async with filled(database_url, 1) as (log, _, publisher):
        for n in range(60):
            publisher.submit("a", b"%d" % n)
        await publisher.wait()
        await delete(database_url, "seq % 2 = 0 AND seq < 60")
        assert len(await run_repair(database_url)) == 29
        await until_problem("", log)
        after, gaps = 0, 0
        while after < log.applied:
            page = await log.read(after)
            gaps += page.after > after
            after = page.last
        assert gaps == 29


async def test_database_with_another_isolation_level_is_repaired(database_url: str) -> None:
    async with filled(database_url):
        await delete(database_url, "seq = 3")
        async with open_sql(database_url) as sql:
            (name,) = await sql.fetchrow("SELECT current_database()")
            await sql.execute(f'ALTER DATABASE "{name}" SET default_transaction_isolation = serializable')
            assert await run_repair(database_url) == [(3, 3)]
            await sql.execute(f'ALTER DATABASE "{name}" RESET ALL')


async def test_readers_stop_before_a_deleted_range_until_the_repair_and_lose_nothing_else(database_url: str) -> None:
    async with filled(database_url) as (one, _, publisher):
        other = make(database_url)
        async with running(other):
            await delete(database_url, "seq BETWEEN 3 AND 5")
            for log in (one, other):
                assert [entry.seq for entry in (await log.read(0)).entries] == [1, 2]
                with pytest.raises(Unavailable):
                    await log.read(2)
            assert await publisher.publish_seq("a", b"11") == 11
            assert await run_repair(database_url) == [(3, 5)]
            await until_problem("", one, other)
            for log in (one, other):
                page = await read_on(log, 2)
                assert (page.after, page.lost) == (5, "repair")
                assert [entry.seq for entry in page.entries][:5] == [6, 7, 8, 9, 10]
                assert (await log.read(5)).after == 5


async def test_repaired_range_leaves_the_memory_of_every_replica(database_url: str) -> None:
    async with filled(database_url, recent=1 << 20) as (log, _, _):
        await delete(database_url, "seq = 5")
        await until_problem("messages are missing", log)
        assert len((await log.read(0)).entries) == 10
        await run_repair(database_url)
        await until_problem("", log)
        assert [entry.seq for entry in (await log.read(0)).entries] == [1, 2, 3, 4]
        page = await log.read(4)
        assert (page.after, page.lost, page.entries[0].seq) == (5, "repair", 6)
        entries, _ = await log.history("*", before=None, limit=100)
        assert [entry.seq for entry in entries] == [1, 2, 3, 4, 6, 7, 8, 9, 10]


async def test_replica_that_stopped_before_a_deleted_range_continues(database_url: str) -> None:
    """The deleted messages are not applied yet: without a notification the replica has to read them."""
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        await publisher.publish_seq("a", b"1")
        epoch = log.epoch
        await sql.execute("SET synchronous_commit = off; BEGIN; SELECT FROM catbus.head FOR UPDATE")
        await sql.fetch(
            """
            INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number)
            SELECT 0, n, 1, 'a', n::text, '\\x00', n FROM generate_series(2, 9) AS n WHERE n NOT BETWEEN 4 AND 6
            """
        )
        await sql.execute("COMMIT")
        await follower.wait_for(3)
        await until_problem("database", log)
        assert follower.texts == ["1", "2", "3"]
        assert await run_repair(database_url) == [(4, 6)]
        await follower.wait_for(9)
        assert follower.texts == ["1", "2", "3", "7", "8", "9"]
        assert follower.restarts == [0, 6]
        await until_problem("", log)
        assert log.epoch == epoch
        # Entries before the deleted range are read as before.
        assert [entry.seq for entry in (await log.read(0)).entries] == [1, 2, 3]


async def test_refilled_range_is_read_again(database_url: str) -> None:
    async with filled(database_url) as (log, _, _), open_sql(database_url) as sql:
        await sql.execute("CREATE TABLE public.saved AS SELECT * FROM catbus.entries WHERE seq BETWEEN 3 AND 5")
        await delete(database_url, "seq BETWEEN 3 AND 5")
        await until_problem("messages are missing", log)
        await run_repair(database_url)
        await sql.execute("INSERT INTO catbus.entries SELECT * FROM public.saved WHERE seq = 4")
        page = await log.read(2)
        assert (page.after, page.lost, page.entries[0].seq) == (3, "repair", 4)
        page = await log.read(4)
        assert (page.after, page.lost, page.entries[0].seq) == (5, "repair", 6)


async def test_role_without_rights_cannot_repair(database_url: str) -> None:
    async with filled(database_url), open_sql(database_url) as sql:
        await sql.execute("CREATE ROLE bystander")
        try:
            for call in ("find_hole(1)", "list_holes(1, 2)", "repair('{1}', '{1}')", "hole_report()", "newest_known()"):
                await sql.execute("SET ROLE bystander")
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await sql.fetch(f"SELECT catbus.{call}")
                await sql.execute("RESET ROLE")
        finally:
            await sql.execute("DROP ROLE bystander")


# Retries


async def test_retry_of_a_deleted_message_is_unknown_after_the_repair(database_url: str) -> None:
    async with filled(database_url) as (_, _, publisher):
        await delete(database_url, "seq BETWEEN 3 AND 5")
        await run_repair(database_url)
        again = {"producer": ALICE, "channel": "a"}
        assert await publisher.publish(**again, payload=b"4", number=4, after=3) == UNDECIDED
        assert await publisher.publish(**again, payload=b"7", number=7, after=3) == Committed(7, duplicate=True)
        assert await publisher.publish(**again, payload=b"99", number=99, after=5) == Committed(11)
        assert await publisher.publish(**again, payload=b"100", number=100) == Committed(12)


# Empty logs


async def test_log_restored_without_its_rows_gives_no_seq_twice(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (_, publisher):
        for n in range(10):
            await publisher.publish_seq("a", b"%d" % n)
        with trio.fail_after(TEST_TIMEOUT):
            async with open_sql(database_url) as sql:
                while (await sql.fetchrow("SELECT last_value FROM catbus.reached_seq"))[0] < 10:
                    await trio.sleep(0.05)
    async with open_sql(database_url) as sql:
        await sql.execute("TRUNCATE catbus.entries")
        (epoch,) = await sql.fetchrow("SELECT epoch FROM catbus.head")
        name, after, made = await sql.fetchrow("SELECT epoch, after_seq, made FROM catbus.new_epoch($1)", epoch)
        assert (after, made, name != epoch) == (0, True, True)
    log = make(database_url)
    async with running(log) as (_, publisher):
        first = await publisher.publish_seq("a", b"new")
        assert first == 1_000_011
        # A cursor of the earlier log gets a gap for the seqs that may be missing.
        resumption = log.resume(7, epoch)
        assert (resumption.cursor, resumption.lost) == (0, "epoch")
        page = await log.read(0)
        assert (page.after, page.lost, page.last) == (1_000_010, "retention", first)


async def test_empty_log_without_a_known_head_begins_at_1(database_url: str) -> None:
    async with running(make(database_url)), open_sql(database_url) as sql:
        (epoch,) = await sql.fetchrow("SELECT epoch FROM catbus.head")
        await sql.fetchrow("SELECT epoch FROM catbus.new_epoch($1)", epoch)
    async with running(make(database_url)) as (_, publisher):
        assert await publisher.publish_seq("a", b"1") == 1


async def test_log_emptied_by_retention_continues_at_its_head(database_url: str) -> None:
    async with filled(database_url), open_sql(database_url) as sql:
        await sql.execute("UPDATE catbus.head SET floor = 11; DELETE FROM catbus.entries")
        (epoch,) = await sql.fetchrow("SELECT epoch FROM catbus.head")
        await sql.fetchrow("SELECT setval('catbus.reached_seq', 10)")
        await sql.fetchrow("SELECT epoch FROM catbus.new_epoch($1)", epoch)
    async with running(make(database_url)) as (_, publisher):
        assert await publisher.publish_seq("a", b"1") == 11


async def test_log_emptied_by_hand_under_its_replicas_gives_no_seq_twice(database_url: str) -> None:
    one, other = make(database_url), make(database_url)
    async with running(one) as (here, publisher), running(other) as (there, _):
        for n in range(10):
            await publisher.publish_seq("a", b"%d" % n)
        await there.wait_for(10)
        with trio.fail_after(TEST_TIMEOUT):
            async with open_sql(database_url) as sql:
                while (await sql.fetchrow("SELECT last_value FROM catbus.reached_seq"))[0] < 10:
                    await trio.sleep(0.05)
                await sql.execute("TRUNCATE catbus.entries")
        await here.wait_until(lambda self: self.restarts[-1] == 1_000_010)
        await there.wait_until(lambda self: self.restarts[-1] == 1_000_010)
        assert await publisher.publish_seq("a", b"new") == 1_000_011
        await there.wait_for(1_000_011)
        assert here.texts[-1] == there.texts[-1] == "new"
