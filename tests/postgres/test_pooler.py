"""A real PgBouncer in transaction mode: nothing is lost, and polling replaces notifications where necessary."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import trio

from catbus.config import DatabaseSettings
from catbus.log import Entry
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, open_bridge
from catbus.postgres.listen import polling_interval
from catbus.postgres.roles.role_store import open_roles
from tests.log.harness import TEST_TIMEOUT, Publisher, RecordingFollower, running
from tests.postgres.bouncer import Bouncer, open_bouncer
from tests.postgres.clusters import open_served_cluster
from tests.postgres.sql import open_sql
from tests.postgres.test_role_lookup import make_role


def make(url: str, **settings: object) -> PostgresLog:
    return PostgresLog(DatabaseSettings(url=url, **settings))  # type: ignore[arg-type]


@asynccontextmanager
async def busy(url: str, number: int = 4) -> AsyncIterator[None]:
    """Use the same pool all the time, so that each statement gets another server connection."""

    async def use() -> None:
        while True:
            with suppress(*DATABASE_ERRORS):
                async with open_sql(url) as sql:
                    while True:
                        await sql.fetch("SELECT pg_sleep(0.002)")
            await trio.sleep(0.01)

    async with trio.open_nursery() as nursery:
        for _ in range(number):
            nursery.start_soon(use)
        yield
        nursery.cancel_scope.cancel()


@pytest.fixture(params=[False, True], ids=["idle", "busy"])
async def bouncer(request: pytest.FixtureRequest, database_url: str) -> AsyncIterator[Bouncer]:
    async with open_bouncer(database_url) as bouncer:
        if request.param:
            async with busy(bouncer.url):
                yield bouncer
        else:
            yield bouncer


async def test_pooler_is_recognised_and_a_server_is_not_mistaken_for_one(bouncer: Bouncer, database_url: str) -> None:
    async with open_bridge() as bridge:
        for _ in range(2):
            for url, pooled in ((bouncer.url, True), (database_url, False)):
                with await bridge.connect(url) as connection:
                    assert connection.pooled is pooled
                    for n in range(20):
                        assert await connection.fetch("SELECT $1::int", n) == [(n,)]
                    # Preparing statements is useful only where they get the same server connection.
                    ((prepared,),) = await connection.fetch("SELECT count(*) FROM pg_prepared_statements")
                    assert (prepared > 0) is not pooled


async def publish(publisher: Publisher, number: int) -> None:
    for n in range(number):
        await publisher.publish_seq("a", b"%d" % n)


def is_whole(follower: RecordingFollower, number: int) -> bool:
    return [entry.seq for entry in follower.entries] == list(range(1, number + 1))


async def test_two_replicas_behind_a_pooler_lose_nothing_and_report_polling(
    bouncer: Bouncer, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = make(bouncer.url), make(bouncer.url)
    with caplog.at_level(logging.WARNING):
        async with running(one) as (first, publisher), running(other) as (second, others):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(publish, publisher, 100)
                nursery.start_soon(publish, others, 100)
            for follower in (first, second):
                await follower.wait_for(200)
                assert is_whole(follower, 200)
            for log in (one, other):
                assert log.statistics().polling
                assert log.statistics().notifications == 0
                assert log.statistics().restarts == 0
                assert log.report()["news"] == "polling"
    said = [record for record in caplog.records if "pooler" in record.getMessage()]
    assert len(said) == 2
    assert "listen_url" in said[0].getMessage()


async def test_notifications_arrive_through_a_listen_url_past_the_pooler(bouncer: Bouncer, database_url: str) -> None:
    one, other = (make(bouncer.url, listen_url=database_url) for _ in range(2))
    async with running(one) as (first, publisher), running(other) as (second, _):
        await publish(publisher, 100)
        for follower in (first, second):
            await follower.wait_for(100)
            assert is_whole(follower, 100)
        other.broadcast(Entry(0, 1, "a", b'"ephemeral"'))
        await first.wait_until(lambda self: bool(self.messages))
        for log in (one, other):
            assert not log.statistics().polling
            assert log.statistics().notifications >= 100
            assert log.report()["news"] == "notifications"


async def test_messages_published_from_sql_pass_the_pooler(bouncer: Bouncer, database_url: str) -> None:
    async with running(make(bouncer.url)) as (follower, _), open_sql(database_url) as sql:
        for n in range(10):
            await sql.fetch("SELECT catbus.publish('a', $1)", f"{n}")
        await follower.wait_for(10)
        assert follower.texts == [str(n) for n in range(10)]


async def test_role_and_its_changes_are_found_behind_a_pooler(bouncer: Bouncer, database_url: str) -> None:
    key = await make_role(database_url)
    log = make(bouncer.url)
    async with running(log), open_roles(DatabaseSettings(url=bouncer.url)) as roles:
        await log.roles.wait_changes()
        assert key in await log.roles.find([key])
        began = trio.current_time()
        await roles.delete(key.hex())
        assert await log.roles.wait_changes() is None
        assert trio.current_time() - began < TEST_TIMEOUT
        assert await log.roles.find([key]) == {}


async def test_killed_pooler_loses_nothing(bouncer: Bouncer, database_url: str) -> None:
    log = make(bouncer.url)
    async with running(log) as (follower, publisher):
        await publish(publisher, 10)
        bouncer.kill()
        appends = [publisher.submit("a", b"%d" % n) for n in range(10)]
        with trio.fail_after(TEST_TIMEOUT):
            while log.available:
                await trio.sleep(0.01)
        await bouncer.restart()
        await publisher.wait(*appends)
        await publish(publisher, 10)
        await follower.wait_for(30)
        assert is_whole(follower, 30)
        assert follower.restarts == [0]


async def test_unverified_server_behind_the_pooler_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clients stay connected while the server is set back, and nothing checks it before the next statement."""
    for name in ("NOTIFIED_INTERVAL", "IDLE_INTERVAL", "BUSY_INTERVAL"):
        monkeypatch.setattr(polling_interval, name, 3600.0)
    with open_served_cluster() as cluster:
        async with open_bouncer(cluster.url) as bouncer, running(make(bouncer.url)) as (follower, publisher):
            await publish(publisher, 2)
            await trio.to_thread.run_sync(cluster.save)
            await publish(publisher, 2)
            await follower.wait_for(4)
            await trio.to_thread.run_sync(cluster.set_back)
            await trio.to_thread.run_sync(cluster.start)
            # More than were lost, so that the new entries would continue after the applied position.
            appends = [publisher.submit("a", b'"after"') for _ in range(5)]
            assert [outcome.seq for outcome in await publisher.wait(*appends)] == [3, 4, 5, 6, 7]  # type: ignore[union-attr]
            await follower.wait_for(7)
            assert follower.restarts == [0, 2]
            assert follower.texts[-5:] == ['"after"'] * 5
            async with open_sql(cluster.url) as sql:
                assert await sql.fetch("SELECT after_seq FROM catbus.epochs ORDER BY ordinal") == [(0,), (2,)]


async def test_replicas_that_start_together_apply_the_schema_through_a_pooler(empty_database_url: str) -> None:
    async with open_bouncer(empty_database_url) as bouncer:
        one, other = make(bouncer.url), make(bouncer.url)
        async with running(one) as (_, publisher), running(other) as (follower, _):
            await publish(publisher, 3)
            await follower.wait_for(3)
