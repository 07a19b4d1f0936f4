"""Retained messages of the log on a real PostgreSQL."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings

from catbus.config import DatabaseSettings, RetentionSettings
from catbus.error_codes import ErrorCode
from catbus.errors import Unavailable
from catbus.log import Append, Committed, RetainedPage, conflict
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection, open_bridge
from catbus.postgres.append.append_batch import AppendBatch, decode_enclosed
from catbus.postgres.follow.log_reader import LogReader
from catbus.postgres.maintenance import log_retention, retained_budget
from tests.log.conformance import ALICE, MakeLog
from tests.log.harness import TEST_TIMEOUT, read_all, running
from tests.log.retained_conformance import RetainedConformance, Script, check_script, code, read_retained, scripts
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import head_locked, open_sql, wait_until, waiting


def make(url: str, *, recent: int = 1 << 20, retained: int = 1 << 20) -> PostgresLog:
    settings = DatabaseSettings(url=url, publish_timeout=20.0)
    return PostgresLog(settings, RetentionSettings(retained=retained), recent=recent)


class TestConformance(RetainedConformance):
    @pytest.fixture
    def make_log(self, database_url: str) -> MakeLog:
        return partial(make, database_url)


class TestConformanceFromTheTable(RetainedConformance):
    """A log without recent entries in memory, so that every read goes to the table."""

    @pytest.fixture
    def make_log(self, database_url: str) -> MakeLog:
        return partial(make, database_url, recent=0)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts)
def test_retained_messages_and_outcomes_agree_with_a_dict(database_url: str, script: Script) -> None:
    trio.run(check_script, make(database_url), script)


# Replicas and notifications


async def test_notification_contains_retained_messages_with_their_flag(database_url: str) -> None:
    one, other = make(database_url), make(database_url)
    async with running(one) as (here, publisher), running(other) as (there, _):
        async with head_locked(database_url), open_sql(database_url) as sql:
            publisher.submit("a", b"0")
            await wait_until(partial(waiting, sql))
            for n in range(1, 6):
                publisher.submit("a", b"%d" % n, retain=n % 2 == 0, origin=ALICE)
        await publisher.wait()
        await there.wait_for(6)
        assert there.entries == here.entries == await read_all(other)
        assert [entry.retain for entry in there.entries] == [False, False, True, False, True, False]
        assert other.statistics().reads == 0


async def test_messages_from_sql_are_retained(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        await publisher.publish_seq("a", b"1", retain=True)
        await sql.execute("SELECT catbus.publish('a', '2', retain => true), catbus.publish('b', '3')")
        await follower.wait_for(3)
        assert [entry.retain for entry in follower.entries] == [True, True, False]
        assert await read_retained(log, "*") == [follower.entries[1]]
        assert await publisher.publish("a", b"4", retain=True, expect=1) == conflict(2)


async def test_conflicts_in_a_batch_do_not_divide_it(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        await publisher.publish_seq("a", b"0", retain=True)
        async with head_locked(database_url):
            publisher.submit("b", b"0")
            await wait_until(partial(waiting, sql))
            for n, expect in enumerate([0, 1, 2, 3, 3, 1]):
                publisher.submit("a", b"%d" % n, retain=True, expect=expect)
        outcomes = await publisher.wait()
        expected = [conflict(1), Committed(3), conflict(3), Committed(4), conflict(4), conflict(4)]
        assert outcomes == [Committed(1), Committed(2), *expected]
        statistics = log.statistics()
        assert (statistics.commits, statistics.appended, statistics.conflicts, statistics.duplicates) == (3, 4, 4, 0)
        await follower.wait_for(4)
        assert follower.texts == ["0", "0", "1", "3"]


async def test_conditional_batch_with_a_lost_result_succeeds_when_it_is_sent_again(database_url: str) -> None:
    """Its keys are found before its conditions, which do not hold any more, are looked at."""
    async with open_proxy(database_url) as proxy:
        log = make(proxy.url)
        async with running(log) as (follower, publisher), open_sql(database_url) as sql:
            await publisher.publish_seq("a", b"0", retain=True)
            async with head_locked(database_url):
                publisher.submit("a", b"1", retain=True, expect=1)
                publisher.submit("a", b"2", retain=True, expect=2)
                publisher.submit("b", b"3", retain=True, expect=1)
                await wait_until(partial(waiting, sql))
                proxy.block()
            await wait_until(partial(_head_is, sql, 3))
            proxy.cut()
            proxy.unblock()
            duplicates = [Committed(seq, duplicate=True) for seq in (2, 3)]
            assert await publisher.wait() == [Committed(1), *duplicates, conflict(0)]
            await follower.wait_for(3)
            assert follower.texts == ["0", "1", "2"]


async def _head_is(sql: DatabaseConnection, seq: int) -> bool:
    (head,) = await sql.fetchrow("SELECT head FROM catbus.position()")
    return bool(head == seq)


async def test_batch_that_arrives_after_a_retry_succeeds_like_the_retry(database_url: str) -> None:
    """The replica is paused, and the client sends its conditional publish to another one."""
    async with open_proxy(database_url) as proxy:
        still, other = make(proxy.url), make(database_url)
        async with running(still) as (_, client), running(other) as (_, elsewhere):
            await client.publish_seq("a", b"0", retain=True)
            proxy.block()
            original = client.submit("a", b"1", producer=ALICE, number=1, retain=True, expect=1)
            with trio.fail_after(TEST_TIMEOUT):
                while still.statistics().pending:
                    await trio.lowlevel.checkpoint()
            retry = await elsewhere.publish("a", b"1", producer=ALICE, number=1, after=1, retain=True, expect=1)
            assert retry == Committed(2)
            await elsewhere.publish_seq("a", b"2", retain=True)
            proxy.unblock()
            assert await client.wait(original) == [Committed(2, duplicate=True)]


def test_call_without_retained_messages_says_nothing_of_them() -> None:
    def columns(*appends: Append) -> tuple[object, ...]:
        _, args = AppendBatch(appends, range(len(appends)), b"own").build_call(lambda text: text.decode())
        return args[7:9]

    plain = Append("a", b"1", lambda *_: None)
    retained = Append("a", b"1", lambda *_: None, retain=True)
    conditional = Append("a", b"1", lambda *_: None, retain=True, expect=0)
    assert columns(plain, plain) == (None, None)
    assert columns(plain, retained) == ([None, True], None)
    assert columns(plain, conditional, retained) == ([None, True, True], [None, 0, None])
    with pytest.raises(msgspec.DecodeError):
        decode_enclosed(b'[["a",null,null]]', 1, 0)


# Pages


async def test_pages_end_with_their_epoch(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make(database_url)
    read = log._history_reader.retained

    async def begin_epoch_after_reading(*args: Any) -> RetainedPage:
        page = await read(*args)
        epoch = log.epoch
        await sql.fetch("SELECT catbus.new_epoch($1)", epoch)
        with trio.fail_after(TEST_TIMEOUT):
            while log.epoch == epoch:
                await trio.sleep(0.01)
        return page

    async with running(log) as (_, publisher), open_sql(database_url) as sql, open_bridge() as bridge:
        for channel in "ab":
            await publisher.publish_seq(channel, b"1", retain=True)
        old, reader = log.epoch, LogReader(partial(bridge.connect, database_url))
        assert not (await reader.retained(old, "*", None, 2, 1, 1000)).complete
        with monkeypatch.context() as patch:
            patch.setattr(log._history_reader, "retained", begin_epoch_after_reading)
            with pytest.raises(Unavailable):
                await log.retained("*", after=None, until=2)
        with pytest.raises(Unavailable):
            await reader.retained(old, "*", "a", 2, 1, 1000)
        assert [entry.channel for entry in await read_retained(log, "*")] == ["a", "b"]


async def test_page_of_a_database_without_the_newest_messages_is_refused(database_url: str) -> None:
    """A standby may lack them, or a database that was set back. The same page in an emptied log is complete."""
    log = make(database_url)
    async with running(log) as (_, publisher), open_sql(database_url) as sql, open_bridge() as bridge:
        await publisher.publish_seq("a", b"1", retain=True)
        await publisher.publish_seq("b", b"1")
        reader = LogReader(partial(bridge.connect, database_url))
        for until, found in ((0, 0), (1, 1), (2, 1)):
            assert len((await reader.retained(log.epoch, "*", None, until, 10, 1000)).entries) == found
        with pytest.raises(Unavailable):
            await reader.retained(log.epoch, "*", None, 3, 10, 1000)
        await sql.execute("BEGIN; TRUNCATE catbus.entries; UPDATE catbus.head SET floor = 3; COMMIT")
        assert len((await reader.retained(log.epoch, "*", None, 2, 10, 1000)).entries) == 1
        with pytest.raises(Unavailable):
            await reader.retained(log.epoch, "*", None, 3, 10, 1000)


async def test_page_that_was_read_before_an_erasure_is_read_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = make(database_url)
    read = log._history_reader.retained
    pages = list[RetainedPage]()

    async def erase_after_reading(*args: Any) -> RetainedPage:
        pages.append(await read(*args))
        if len(pages) == 1:
            before = log.statistics().erasures
            assert await log.erase("a") == 1
            with trio.fail_after(TEST_TIMEOUT):
                while log.statistics().erasures == before:
                    await trio.sleep(0.01)
        return pages[-1]

    monkeypatch.setattr(log._history_reader, "retained", erase_after_reading)
    async with running(log) as (_, publisher):
        for channel in "ab":
            await publisher.publish_seq(channel, b"1", retain=True)
        assert [entry.channel for entry in await read_retained(log, "*")] == ["b"]
        assert [entry.channel for entry in pages[0].entries] == ["a", "b"]


async def test_retained_messages_cannot_be_read_during_an_outage(database_url: str) -> None:
    async with open_proxy(database_url) as proxy:
        log = make(proxy.url)
        async with running(log) as (_, publisher):
            await publisher.publish_seq("a", b"1", retain=True)
            proxy.close()
            with pytest.raises(Unavailable):
                await log.retained("*", after=None, until=1)
            proxy.open()
            with trio.fail_after(TEST_TIMEOUT):
                while not log.available:
                    await trio.sleep(0.01)
            assert [entry.seq for entry in await read_retained(log, "*")] == [1]


# The budget and erasure


async def test_replicas_reject_retained_messages_over_the_budget(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (retained_budget, log_retention):
        monkeypatch.setattr(module, "CHECK_INTERVAL", 0.01)
    one, other = make(database_url, retained=10), make(database_url, retained=10)

    async def measured(log: PostgresLog, messages: int, size: int) -> None:
        with trio.fail_after(TEST_TIMEOUT):
            while (log.statistics().retained_messages, log.statistics().retained_bytes) != (messages, size):
                await trio.sleep(0.01)

    async with running(one) as (_, alice), running(other) as (_, bob):
        assert await alice.publish("a", b'"123456789"', retain=True) == Committed(1)
        await measured(one, 1, 12)
        for publisher in (alice, bob):
            assert code(await publisher.publish("b", b"1", retain=True)) is ErrorCode.LIMIT
        assert await bob.publish("b", b"1") == Committed(2)
        assert await bob.publish("b", b"null", retain=True) == Committed(3)
        assert await bob.publish("a", b"null", retain=True, expect=1) == Committed(4)
        for log in (one, other):
            await measured(log, 0, 0)
            assert log.report()["retained"] == {"messages": 0, "bytes": 0}
        assert await alice.publish("b", b"1", retain=True) == Committed(5)


async def test_retained_message_below_the_floor_is_erased(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (_, publisher), open_sql(database_url) as sql:
        for channel in "ab":
            await publisher.publish_seq(channel, b"1", retain=True)
        await sql.execute("BEGIN; TRUNCATE catbus.entries; UPDATE catbus.head SET floor = 3; COMMIT")
        retry = await publisher.publish("a", b"2", retain=True, expect=0, producer=ALICE, number=1, after=0)
        assert code(retry) is ErrorCode.UNKNOWN
        assert await log.erase("a") == 1
        assert [entry.channel for entry in await read_retained(log, "*")] == ["b"]
        assert await publisher.publish("a", b"3", retain=True, expect=0) == Committed(3)
