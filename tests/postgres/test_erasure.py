"""Erasure as replicas see it: what is in memory or being read is erased, too, and the log stays the same log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
import trio

from catbus.config import DatabaseSettings
from catbus.log import Entry
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.postgres.follow.fingerprints import fingerprint, same_entry
from catbus.postgres.listen import polling_interval
from catbus.postgres.maintenance.erasure import ErasureReport, Selection, erase
from tests.log.harness import TEST_TIMEOUT, Publisher, read_all, running, wait_read
from tests.postgres.bouncer import open_bouncer
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql, wait_until

EPOCHS = "SELECT after_seq FROM catbus.epochs ORDER BY ordinal"


async def publish(publisher: Publisher, *channels: str) -> None:
    for channel in channels:
        await publisher.publish_seq(channel, b'"secret"', sender="alice")


async def wait_erasures(log: PostgresLog, number: int) -> None:
    with trio.fail_after(TEST_TIMEOUT):
        while log.statistics().erasures < number:
            await trio.sleep(0.01)


def channels(entries: Sequence[Entry]) -> list[str]:
    return [entry.channel for entry in entries]


READS: dict[str, Callable[[PostgresLog], Awaitable[Sequence[Entry]]]] = {}


def read(name: str) -> Callable[[Any], Any]:
    def add(function: Callable[[PostgresLog], Awaitable[Sequence[Entry]]]) -> Any:
        READS[name] = function
        return function

    return add


@read("page")
async def read_page(log: PostgresLog) -> Sequence[Entry]:
    return (await log.read(0)).entries


@read("history")
async def read_history(log: PostgresLog) -> Sequence[Entry]:
    return (await log.history("*", before=None, limit=10))[0]


@pytest.mark.parametrize("name", READS)
async def test_what_was_read_before_the_erasure_is_not_used_after_it(database_url: str, name: str) -> None:
    """The answer of the database is on its way when the replica hears of the erasure."""
    found: list[Entry] = []
    async with open_proxy(database_url) as proxy, open_sql(database_url) as sql:
        log = PostgresLog(DatabaseSettings(url=proxy.url, listen_url=database_url), recent=0)
        async with running(log) as (_, publisher), trio.open_nursery() as nursery:
            await publish(publisher, "a", "b", "a")
            await READS[name](log)  # The connection is there.
            proxy.block_answers()
            reads = log.statistics().reads

            async def go() -> None:
                found.extend(await READS[name](log))

            nursery.start_soon(go)
            while log.statistics().reads == reads:
                await trio.sleep(0.01)
            await wait_until(lambda: _is_idle(sql))
            await sql.fetch("SELECT catbus.erase('a')")
            await wait_erasures(log, 1)
            proxy.unblock()
    assert [e.channel for e in found if e.payload != b"null"] == ["b"]


async def _is_idle(sql: DatabaseConnection) -> bool:
    """Whether the statement that reads entries has been executed."""
    ((count,),) = await sql.fetch(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle' "
        "AND query LIKE '%FROM catbus.entries%' AND pid <> pg_backend_pid()"
    )
    return bool(count)


@pytest.mark.parametrize("hint", [True, False], ids=["notified", "polled"])
async def test_all_replicas_forget_what_was_erased(
    database_url: str, hint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notification causes a poll, which need not wait for the next one. Without a notification, a poll finds it."""
    if hint:
        monkeypatch.setattr(polling_interval, "NOTIFIED_INTERVAL", 1000)
    one, other = (PostgresLog(DatabaseSettings(url=database_url)) for _ in range(2))
    async with running(one) as (_, publisher), running(other) as (follower, _), open_sql(database_url) as sql:
        await publish(publisher, "a", "b", "a")
        await follower.wait_for(3)
        if not hint:
            await sql.execute(
                "CREATE OR REPLACE FUNCTION catbus.notify(channel text, shown text, enclosed text DEFAULT NULL) "
                "RETURNS void LANGUAGE sql AS ''"
            )
        await sql.fetch("SELECT catbus.erase('a')")
        for log in (one, other):
            with trio.fail_after(TEST_TIMEOUT):
                while channels([log._tail.recent[seq] for seq in (1, 2, 3)]) != ["_erased", "b", "_erased"]:
                    await trio.sleep(0.01)
        assert follower.erased == {1, 3}


async def test_replica_that_applies_an_erased_message_goes_on(database_url: str) -> None:
    """A message that is erased before a replica has read it is applied without its contents."""
    one = PostgresLog(DatabaseSettings(url=database_url))
    async with open_proxy(database_url) as proxy, running(one) as (_, publisher), open_sql(database_url) as sql:
        other = PostgresLog(DatabaseSettings(url=proxy.url))
        async with running(other) as (follower, _):
            await publish(publisher, "a")
            await follower.wait_for(1)
            proxy.close()
            await publish(publisher, "a", "b", "a")
            await sql.fetch("SELECT catbus.erase('a')")
            proxy.open()
            await follower.wait_for(4)
            assert channels(follower.entries) == ["a", "_erased", "b", "_erased"]
            assert follower.restarts == [0]
            await wait_read(other, await read_all(one))


async def test_erasing_the_newest_message_begins_no_epoch(database_url: str) -> None:
    """Neither for replicas that run, nor for one that reconnects or starts afterwards."""
    settings = DatabaseSettings(url=database_url)
    one = PostgresLog(settings)
    async with open_proxy(database_url) as proxy, running(one) as (here, publisher), open_sql(database_url) as sql:
        other = PostgresLog(DatabaseSettings(url=proxy.url))
        async with running(other) as (there, _):
            await publish(publisher, "a", "b", "a")
            await there.wait_for(3)
            proxy.close()
            await sql.fetch("SELECT catbus.erase('*')")
            await wait_erasures(one, 1)
            proxy.open()
            await wait_erasures(other, 1)
            async with running(PostgresLog(settings)) as (late, _):
                await publish(publisher, "c")
                await there.wait_for(4)
                await late.wait_for(4)
            # One that began at an erased message.
            await sql.fetch("SELECT catbus.erase('*')")
            async with running(PostgresLog(settings)) as (late, _):
                await publish(publisher, "c")
                await late.wait_for(5)
                assert late.restarts == [4]
        assert here.restarts == there.restarts == [0]
        assert await sql.fetch(EPOCHS) == [(0,)]


@pytest.mark.parametrize("recent", [0, 1 << 20])
async def test_comparison_of_two_logs_passes_over_erased_messages(database_url: str, recent: int) -> None:
    """After a failover without a loss the new epoch begins after the newest message, and not before an erased one."""
    async with open_proxy(database_url) as proxy, open_sql(database_url) as sql:
        log = PostgresLog(DatabaseSettings(url=proxy.url), recent=recent)
        async with running(log) as (follower, publisher):
            await publish(publisher, *["a", "b", "c"] * 20)
            await sql.fetch("SELECT catbus.erase('a'), catbus.erase('c')")
            await wait_erasures(log, 1)
            await publish(publisher, "a", "c")
            proxy.close()
            # The replica knows the last two, and does not hear that one of them is erased and the other one lost.
            await sql.execute(
                "SELECT catbus.erase('a'); DELETE FROM catbus.entries WHERE seq = 62; "
                "UPDATE catbus.epochs SET timeline = -1"
            )
            proxy.open()
            await follower.wait_until(lambda self: len(self.restarts) == 2)
            assert follower.restarts[-1] == 61
            assert await sql.fetch(EPOCHS) == [(0,), (61,)]


def test_only_the_erased_message_has_the_end_of_its_fingerprint() -> None:
    known, other = fingerprint(Entry(1, 5, "a", b"1")), fingerprint(Entry(1, 5, "a", b"2"))
    gone, later = fingerprint(Entry(1, 5, "_erased", b"null")), fingerprint(Entry(1, 6, "_erased", b"null"))
    assert same_entry(known, known)
    assert same_entry(known, gone)
    assert same_entry(gone, gone)
    assert same_entry(None, None)
    assert not same_entry(known, other)
    assert not same_entry(known, later)
    assert not same_entry(gone, known)
    assert not same_entry(known, None)
    assert not same_entry(None, gone)


async def test_replicas_vacuum_after_an_erasure(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as reader:
        log = PostgresLog(DatabaseSettings(url=database_url))
        async with running(log) as (_, publisher):
            await publish(publisher, "a", "b")
            await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM catbus.entries")
            await sql.fetch("SELECT catbus.erase('a')")
            with trio.fail_after(TEST_TIMEOUT):
                while log.statistics().unvacuumed != 1:
                    await trio.sleep(0.02)
                await reader.execute("COMMIT")
                while log.statistics().unvacuumed or await sql.fetch("SELECT FROM catbus.vacuum_due()"):
                    await trio.sleep(0.02)


async def test_erasure_works_behind_a_pooler(database_url: str) -> None:
    async with open_bouncer(database_url) as bouncer, open_sql(database_url) as sql:
        settings = DatabaseSettings(url=bouncer.url)
        log = PostgresLog(settings)
        async with running(log) as (follower, publisher):
            await publish(publisher, "a", "b")
            report = await erase(settings, Selection("a"), lambda *_: None, apply=True)
            assert report == ErasureReport(1)
            await follower.wait_until(lambda self: self.erased == {1})
            assert await sql.fetch("SELECT FROM catbus.vacuum_due()") == []


async def test_command_waits_for_short_transactions_before_it_vacuums(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_sql(database_url) as writer, trio.open_nursery() as nursery:
        await sql.fetch(
            "INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number) "
            "VALUES (0, 1, 1, 'a', '1', '\\x00', 1)"
        )
        await writer.execute("BEGIN")
        await writer.fetch("SELECT pg_current_xact_id()")
        reports = []

        async def go() -> None:
            settings = DatabaseSettings(url=database_url)
            reports.append(await erase(settings, Selection("a"), lambda *_: None, apply=True))

        nursery.start_soon(go)
        await wait_until(lambda: sql.fetch("SELECT FROM catbus.vacuum_due() WHERE blocked"))
        await writer.execute("COMMIT")
        while not reports:
            await trio.sleep(0.01)
        assert reports == [ErasureReport(1)]
