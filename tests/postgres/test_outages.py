"""Outages of a silent or read-only database are detected in time, and only pause the log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from catbus.config import DatabaseSettings
from catbus.log import Committed
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, open_bridge
from catbus.postgres.append import log_writer
from catbus.postgres.follow import log_reader
from catbus.postgres.follow.log_reader import LogReader
from catbus.postgres.listen import notification_listener, polling_interval
from tests.log.harness import TEST_TIMEOUT, Publisher, RecordingFollower, running
from tests.postgres.clusters import Cluster, open_served_cluster
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql

NOTICED = 5.0
"""Seconds within which a silent database is detected."""

LEEWAY = 3.0
"""Additional seconds for a busy machine."""


def test_silent_connection_is_dropped_in_time() -> None:
    """Polls detect it within their interval and timeout, and other statements have no longer timeouts."""
    assert polling_interval.NOTIFIED_INTERVAL + notification_listener.POLL_TIMEOUT <= NOTICED
    assert max(log_writer.APPEND_TIMEOUT, log_reader.PAGE_TIMEOUT) <= NOTICED


async def wait_available(log: PostgresLog, available: bool, seconds: float) -> None:
    with trio.fail_after(seconds):
        while log.available is not available:
            await trio.sleep(0.01)


@asynccontextmanager
async def following(
    url: str, listen_url: str | None = None
) -> AsyncIterator[tuple[PostgresLog, RecordingFollower, Publisher]]:
    log = PostgresLog(DatabaseSettings(url=url, listen_url=listen_url, publish_timeout=30.0))
    async with running(log) as (follower, publisher):
        assert await publisher.publish("a", b"1") == Committed(1)
        await wait_available(log, True, TEST_TIMEOUT)
        yield log, follower, publisher


async def be_silent(
    log: PostgresLog,
    follower: RecordingFollower,
    publisher: Publisher,
    silence: Callable[[], Awaitable[None]],
    speak: Callable[[], Awaitable[None]],
) -> None:
    """Silence the database while one publish is pending, and check that the log only pauses.

    The database may execute afterwards what it was sent before the silence. The next attempt then finds the message
    as a duplicate.
    """
    await silence()
    waiting = publisher.submit("a", b"2")
    await wait_available(log, False, NOTICED + LEEWAY)
    assert len(publisher.outcomes) == 1
    await speak()
    (answer,) = await publisher.wait(waiting)
    assert answer in (Committed(2), Committed(2, duplicate=True))
    await follower.wait_for(2)
    await wait_available(log, True, TEST_TIMEOUT)
    assert follower.texts == ["1", "2"]
    assert follower.restarts == [0]


async def test_lost_packets_are_detected(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, following(proxy.url) as (log, follower, publisher):

        async def speak() -> None:
            proxy.cut()
            proxy.unblock()

        async def silence() -> None:
            proxy.block()

        await be_silent(log, follower, publisher, silence, speak)


async def test_dead_listening_connection_is_detected(database_url: str) -> None:
    """The database replies to all other connections meanwhile, so publishing continues."""
    async with open_proxy(database_url) as proxy, following(database_url, proxy.url) as (log, follower, publisher):
        accepted = proxy.accepted
        proxy.block_answers()
        await wait_available(log, False, NOTICED + LEEWAY)
        proxy.unblock()
        await wait_available(log, True, TEST_TIMEOUT)
        assert proxy.accepted > accepted
        assert await publisher.publish("a", b"2") == Committed(2)
        await follower.wait_for(2)


async def test_killed_listening_connection_is_replaced_at_once(database_url: str) -> None:
    async with open_proxy(database_url) as proxy, following(database_url, proxy.url) as (log, follower, publisher):
        accepted = proxy.accepted
        proxy.cut()
        await wait_available(log, False, 1.0)
        await wait_available(log, True, TEST_TIMEOUT)
        assert proxy.accepted > accepted
        assert await publisher.publish("a", b"2") == Committed(2)
        await follower.wait_for(2)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with open_served_cluster() as cluster:
        yield cluster


async def test_paused_database_is_detected(cluster: Cluster) -> None:
    async with following(cluster.url) as (log, follower, publisher):

        async def silence() -> None:
            cluster.pause()

        async def speak() -> None:
            cluster.resume()

        try:
            await be_silent(log, follower, publisher, silence, speak)
        finally:
            cluster.resume()


async def test_replica_waits_for_a_killed_database(cluster: Cluster) -> None:
    async with following(cluster.url) as (log, follower, publisher):

        async def silence() -> None:
            await trio.to_thread.run_sync(cluster.kill)

        async def speak() -> None:
            await trio.to_thread.run_sync(cluster.start)

        await be_silent(log, follower, publisher, silence, speak)


FULL = """
CREATE FUNCTION public.full() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'No space left on device' USING ERRCODE = 'disk_full';
END
$$;
CREATE TRIGGER full_disk BEFORE INSERT ON catbus.entries FOR EACH ROW EXECUTE FUNCTION public.full();
"""


async def test_full_disk_is_one_outage_until_there_is_room(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """A database that accepts connections but no writes is unavailable, for SQL publishing as well."""

    def said(text: str) -> int:
        return sum(text in record.getMessage() for record in caplog.records)

    caplog.set_level("INFO", "catbus.postgres")
    async with following(database_url) as (log, follower, publisher), open_sql(database_url) as sql:
        assert (said("database connected"), said("database unavailable")) == (1, 0)
        await sql.execute(FULL)
        await sql.fetch("SELECT catbus.publish('a', '2')")
        await wait_available(log, False, TEST_TIMEOUT)
        restarts = log.statistics().restarts
        with trio.fail_after(TEST_TIMEOUT):
            while log.statistics().restarts < restarts + 4:
                assert not log.available
                await trio.sleep(0.01)
        assert (said("database connected"), said("database unavailable")) == (1, 1)
        await sql.execute("DROP TRIGGER full_disk ON catbus.entries")
        await wait_available(log, True, TEST_TIMEOUT)
        await follower.wait_for(2)
        assert await publisher.publish("a", b"3") == Committed(3)
        assert (said("database connected"), said("database unavailable")) == (2, 1)


async def test_reading_a_log_page_stops_at_the_timeout(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "PAGE_TIMEOUT", 0.2)
    async with open_proxy(database_url) as proxy, open_bridge() as bridge:
        reader = LogReader(partial(bridge.connect, proxy.url))
        await reader.connect()
        proxy.block()
        with trio.fail_after(TEST_TIMEOUT / 2), pytest.raises(DATABASE_ERRORS):
            await reader.page("", 0, 1, 10, 1000)
