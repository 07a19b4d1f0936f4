"""Databases that were set back, replaced or failed over: replicas begin a new epoch, and subscriptions get a gap."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from catbus.config import DatabaseSettings
from catbus.errors import Unavailable
from catbus.log import Committed, Entry, Resumption
from catbus.log.interface import UNDECIDED
from catbus.postgres import PostgresLog
from catbus.postgres.access import reconnecting_tasks
from catbus.postgres.access.asyncpg_bridge import open_bridge
from catbus.postgres.follow.fingerprints import fingerprint
from catbus.postgres.follow.log_reader import LogReader, OtherEpochError
from catbus.postgres.listen import polling_interval
from tests.log.harness import TEST_TIMEOUT, Publisher, RecordingFollower, read_all, running
from tests.postgres.clusters import Cluster, open_cluster, open_served_cluster
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql, wait_until


def make(url: str, *, recent: int = 1 << 20, failover: str = "lossy") -> PostgresLog:
    return PostgresLog(DatabaseSettings(url=url, publish_timeout=30.0, failover=failover), recent=recent)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnecting_tasks, "LONGEST_DELAY", 0.1)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with open_served_cluster() as cluster:
        yield cluster


async def in_thread(work: object) -> None:
    await trio.to_thread.run_sync(work)  # type: ignore[arg-type]


async def publish(publisher: Publisher, *texts: str) -> list[int]:
    return [await publisher.publish_seq("a", text.encode()) for text in texts]


async def epochs(url: str) -> list[tuple[str, int]]:
    async with open_sql(url) as sql:
        return [(epoch, after) for epoch, after in await sql.fetch(
            "SELECT epoch, after_seq FROM catbus.epochs ORDER BY ordinal"
        )]  # fmt: skip


async def become(recorder: RecordingFollower, *restarts: int) -> None:
    await recorder.wait_until(lambda self: self.restarts == list(restarts))


# Set back: an earlier state of the same cluster


@pytest.mark.parametrize("recent", [1 << 20, 0])
async def test_log_that_was_set_back_gets_another_epoch(cluster: Cluster, recent: int) -> None:
    log = make(cluster.url, recent=recent)
    async with running(log) as (follower, publisher):
        await publish(publisher, "1", "2")
        await in_thread(cluster.save)
        await publish(publisher, "3", "4", "5")
        first = log.epoch
        await in_thread(cluster.set_back)
        await in_thread(cluster.start)
        await become(follower, 0, 2)
        assert await epochs(cluster.url) == [(first, 0), (log.epoch, 2)]
        assert await publish(publisher, "other 3") == [3]
        assert [entry.payload for entry in await read_all(log)] == [b"1", b"2", b"other 3"]
        assert log.resume(2, first) == Resumption(2)
        assert log.resume(5, first) == Resumption(2, "epoch")
        assert log.statistics().failures == 0


@pytest.mark.parametrize("more", [1, 3, 5])
async def test_log_that_was_set_back_and_overtaken_gets_another_epoch(cluster: Cluster, more: int) -> None:
    """Another replica, which does not know the lost messages, appends to the log before this one reconnects."""
    async with open_proxy(cluster.url) as proxy:
        log = make(proxy.url)
        async with running(log) as (follower, publisher):
            await publish(publisher, "1", "2")
            await in_thread(cluster.save)
            await publish(publisher, "3", "4", "5")
            first = log.epoch
            proxy.close()
            await in_thread(cluster.set_back)
            await in_thread(cluster.start)
            other = make(cluster.url)
            async with running(other) as (elsewhere, newcomer):
                assert elsewhere.restarts == [2]
                await publish(newcomer, *[f"other {n}" for n in range(3, 3 + more)])
                assert other.epoch == first
                proxy.open()
                await become(follower, 0, 2)
                await become(elsewhere, 2, 2)
                await follower.wait_for(2 + more)
                await elsewhere.wait_for(2 + more)
                assert log.epoch == other.epoch
                assert await epochs(cluster.url) == [(first, 0), (log.epoch, 2)]
                for one in (log, other):
                    texts = [entry.payload.decode() for entry in await read_all(one)]
                    assert texts == ["1", "2", *[f"other {n}" for n in range(3, 3 + more)]]


async def test_two_replicas_that_detect_it_at_once_begin_one_epoch(cluster: Cluster) -> None:
    one, other = make(cluster.url), make(cluster.url)
    async with running(one) as (here, publisher), running(other) as (there, _):
        await publish(publisher, "1", "2")
        await in_thread(cluster.save)
        await publish(publisher, "3", "4", "5")
        await there.wait_for(5)
        await in_thread(cluster.set_back)
        await in_thread(cluster.start)
        await become(here, 0, 2)
        await become(there, 0, 2)
        assert [after for _, after in await epochs(cluster.url)] == [0, 2]
        assert one.epoch == other.epoch
        await publish(publisher, "other 3")
        await there.wait_for(3)
        assert there.entries[-1].payload == b"other 3"


async def test_replica_that_knows_of_an_earlier_divergence_begins_another_epoch(cluster: Cluster) -> None:
    """One replica saw a log that diverged at 2, and the other one that diverged at 3; the second is faster."""
    async with open_proxy(cluster.url) as proxy:
        away, there = make(proxy.url), make(cluster.url)
        async with running(away) as (follower, publisher):
            await publish(publisher, "1", "2")
            await in_thread(cluster.save)
            await publish(publisher, "3", "4", "5")
            first = away.epoch
            proxy.close()
            await in_thread(cluster.set_back)
            await in_thread(cluster.start)
            async with running(there) as (elsewhere, newcomer):
                await publish(newcomer, "other 3")
                await in_thread(cluster.save)
                await publish(newcomer, "other 4")
                await in_thread(cluster.set_back)
                await in_thread(cluster.start)
                await become(elsewhere, 2, 3)
                assert there.resume(5, first) == Resumption(3, "epoch")
                assert there.resume(3, first) == Resumption(3), "it cannot know better"
                proxy.open()
                await become(follower, 0, 2)
                await become(elsewhere, 2, 3, 2)
                assert [after for _, after in await epochs(cluster.url)] == [0, 3, 2]
                assert there.resume(3, first) == Resumption(2, "epoch")
                await follower.wait_for(3)
                assert [entry.payload for entry in await read_all(away)] == [b"1", b"2", b"other 3"]


async def test_lagging_replica_misses_nothing(cluster: Cluster) -> None:
    async with open_proxy(cluster.url) as proxy:
        behind, ahead = make(proxy.url), make(cluster.url)
        async with running(ahead) as (_, publisher):
            await publish(publisher, "1", "2")
            async with running(behind) as (follower, _):
                assert follower.restarts == [2]
                proxy.close()
                await publish(publisher, "3", "4")
                await in_thread(cluster.save)
                await publish(publisher, "5")
                first = ahead.epoch
                await in_thread(cluster.set_back)
                await in_thread(cluster.start)
                with trio.fail_after(TEST_TIMEOUT):
                    await ahead._tail.wait_epoch(first)
                await publish(publisher, "other 5")
                proxy.open()
                await become(follower, 2, 2)
                await follower.wait_for(5)
                assert follower.texts == ["3", "4", "other 5"]
                assert [after for _, after in await epochs(cluster.url)] == [0, 4]


async def test_replica_catches_up_over_several_epochs(cluster: Cluster) -> None:
    async with open_proxy(cluster.url) as proxy:
        away, there = make(proxy.url), make(cluster.url)
        async with running(there) as (_, publisher), running(away) as (follower, _):
            await publish(publisher, "1", "2", "3")
            await follower.wait_for(3)
            proxy.close()
            for after in (1, 2):
                previous = there.epoch
                async with open_sql(cluster.url) as sql:
                    await sql.fetch("SELECT catbus.new_epoch($1, $2)", previous, after)
                with trio.fail_after(TEST_TIMEOUT):
                    await there._tail.wait_epoch(previous)
                await there._reader.connect()
            proxy.open()
            await become(follower, 0, 1)
            await follower.wait_for(3)
            assert follower.texts == ["1", "2", "3", "2", "3"]
            assert [after for _, after in await epochs(cluster.url)] == [0, 1, 2]


async def test_log_that_was_set_back_to_before_its_epoch_gets_another_epoch(cluster: Cluster) -> None:
    log = make(cluster.url)
    async with running(log) as (follower, publisher):
        await publish(publisher, "1", "2", "3")
        await in_thread(cluster.save)
        first = log.epoch
        async with open_sql(cluster.url) as sql:
            await sql.fetch("SELECT catbus.new_epoch($1)", first)
        await become(follower, 0, 3)
        await publish(publisher, "4")
        second = log.epoch
        await in_thread(cluster.set_back)
        await in_thread(cluster.start)
        await become(follower, 0, 3, 3)
        assert log.epoch not in (first, second)
        assert await epochs(cluster.url) == [(first, 0), (log.epoch, 3)]
        assert log.resume(4, second) == Resumption(0, "epoch")


async def test_pending_publishes_go_into_the_new_epoch_and_retries_do_not(cluster: Cluster) -> None:
    """The first is committed without a reply on a log that is lost; the others are sent during the outage."""
    async with open_proxy(cluster.url) as proxy:
        log = make(proxy.url)
        async with running(log) as (follower, publisher):
            await publish(publisher, "1")
            await in_thread(cluster.save)
            await publish(publisher, "2")
            proxy.block_answers()
            lost = publisher.submit("a", b'"lost"', producer=b"p" * 16, number=1)
            async with open_sql(cluster.url) as sql:
                await wait_until(partial(_head_is, sql, 3))
            retry = publisher.submit("a", b'"retry"', producer=b"p" * 16, number=2, after=1)
            later = publisher.submit("a", b'"later"', producer=b"p" * 16, number=3)
            proxy.close()
            proxy.unblock()
            await in_thread(cluster.set_back)
            await in_thread(cluster.start)
            # Another replica uses the same seq, so that the divergence can be detected.
            async with running(make(cluster.url)) as (_, newcomer):
                await publish(newcomer, "other 2")
            proxy.open()
            outcomes = await publisher.wait(lost, later)
            assert outcomes == [Committed(3), Committed(4)]
            assert await publisher.wait(retry) == [UNDECIDED]
            await follower.wait_for(4)


async def _head_is(sql: object, seq: int) -> bool:
    (head,) = await sql.fetchrow("SELECT head FROM catbus.position()")  # type: ignore[attr-defined]
    return bool(head == seq)


# Failover


async def wait_replayed(primary: Cluster, standby: Cluster) -> None:
    async with open_sql(primary.url) as there, open_sql(standby.url) as here:
        (position,) = await there.fetchrow("SELECT pg_current_wal_lsn()::text")

        async def replayed() -> bool:
            (done,) = await here.fetchrow("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", position)
            return bool(done)

        await wait_until(replayed)


async def test_failover_that_loses_commits_is_announced_and_replicas_wait_for_the_primary(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    with open_cluster() as standby:
        async with open_proxy(cluster.url) as proxy:
            log = make(proxy.url)
            async with running(log) as (follower, publisher):
                await publish(publisher, "1", "2")
                await in_thread(partial(cluster.make_standby, standby))
                await wait_replayed(cluster, standby)
                await in_thread(standby.stop)
                await publish(publisher, "3", "4", "5")
                first = log.epoch
                proxy.close()
                await in_thread(cluster.stop)
                await in_thread(standby.start)
                accepted = proxy.accepted
                proxy.open(standby.url)
                with trio.fail_after(TEST_TIMEOUT):
                    while proxy.accepted < accepted + 5:
                        await trio.sleep(0.01)
                assert not log.available
                assert log.epoch == first
                assert [r.getMessage() for r in caplog.records].count(
                    "the database is a standby, waiting until it is a primary"
                ) == 1  # fmt: skip
                waits = publisher.submit("a", b"other 3")
                await in_thread(standby.promote)
                await become(follower, 0, 2)
                assert await publisher.wait(waits) == [Committed(3)]
                assert await epochs(standby.url) == [(first, 0), (log.epoch, 2)]
                await follower.wait_for(3)
                assert follower.texts[-1] == "other 3"
                # A second check finds nothing new.
                log._listener.poll_now()
                await publish(publisher, "4")
                assert len(await epochs(standby.url)) == 2


@pytest.mark.parametrize("failover", ["lossy", "lossless"])
async def test_failover_that_loses_nothing_keeps_the_epoch(cluster: Cluster, failover: str) -> None:
    with open_cluster() as standby:
        async with open_proxy(cluster.url) as proxy:
            log = make(proxy.url, failover=failover)
            async with running(log) as (follower, publisher):
                await publish(publisher, "1", "2")
                await in_thread(partial(cluster.make_standby, standby))
                await publish(publisher, "3")
                await wait_replayed(cluster, standby)
                first = log.epoch
                proxy.close()
                await in_thread(cluster.stop)
                await in_thread(standby.promote)
                proxy.open(standby.url)
                assert await publish(publisher, "4") == [4]
                await follower.wait_for(4)
                if failover == "lossless":
                    assert follower.restarts == [0]
                    assert await epochs(standby.url) == [(first, 0)]
                else:
                    assert follower.restarts == [0, 3]
                    assert await epochs(standby.url) == [(first, 0), (log.epoch, 3)]
                assert follower.texts == ["1", "2", "3", "4"]
                # A replica that starts now finds no divergence.
                async with running(make(standby.url)) as (newcomer, _):
                    assert newcomer.restarts == [4]
                assert len(await epochs(standby.url)) == (1 if failover == "lossless" else 2)


async def test_failover_that_loses_commits_despite_lossless_is_announced(cluster: Cluster) -> None:
    with open_cluster() as standby:
        async with open_proxy(cluster.url) as proxy:
            log = make(proxy.url, failover="lossless")
            async with running(log) as (follower, publisher):
                await publish(publisher, "1", "2")
                await in_thread(partial(cluster.make_standby, standby))
                await wait_replayed(cluster, standby)
                await in_thread(standby.stop)
                await publish(publisher, "3")
                first = log.epoch
                proxy.close()
                await in_thread(cluster.stop)
                await in_thread(standby.start)
                await in_thread(standby.promote)
                proxy.open(standby.url)
                await become(follower, 0, 2)
                assert await epochs(standby.url) == [(first, 0), (log.epoch, 2)]


async def test_new_replica_accepts_the_log_after_a_failover(cluster: Cluster) -> None:
    with open_cluster() as standby:
        async with running(make(cluster.url)) as (_, publisher):
            await publish(publisher, "1", "2")
            await in_thread(partial(cluster.make_standby, standby))
            await wait_replayed(cluster, standby)
        await in_thread(standby.promote)
        log = make(standby.url)
        async with running(log) as (follower, publisher):
            (first, _), second = await epochs(standby.url)
            assert second == (log.epoch, 2)
            assert follower.restarts == [2]
            assert log.resume(2, first) == Resumption(2)
            assert log.resume(3, first) == Resumption(2, "epoch")


async def test_replica_that_knows_only_lost_commits_accepts_the_log_after_a_failover(cluster: Cluster) -> None:
    with open_cluster() as standby:
        async with running(make(cluster.url)) as (_, publisher):
            await publish(publisher, "1", "2")
            await in_thread(partial(cluster.make_standby, standby))
            await wait_replayed(cluster, standby)
            await in_thread(standby.stop)
            await publish(publisher, "3", "4")
        async with open_proxy(cluster.url) as proxy:
            log = make(proxy.url)
            async with running(log) as (follower, publisher):
                await publish(publisher, "5")
                await follower.wait_for(5)
                first = log.epoch
                proxy.close()
                await in_thread(cluster.stop)
                await in_thread(standby.start)
                await in_thread(standby.promote)
                proxy.open(standby.url)
                await become(follower, 4, 2)
                assert await epochs(standby.url) == [(first, 0), (log.epoch, 2)]


# Restore into another cluster


async def copy_log(source: Cluster, target: Cluster, last: int) -> None:
    """Copy the log up to an entry, as a dump and a restore do."""
    async with open_sql(source.url) as old, open_sql(target.url) as new:
        await new.execute("TRUNCATE catbus.head, catbus.epochs, catbus.entries")
        for row in await old.fetch("SELECT * FROM catbus.epochs"):
            await new.fetch(
                "INSERT INTO catbus.epochs (epoch, ordinal, after_seq, system_identifier, timeline, began) "
                "OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3, $4, $5, $6)",
                *row,
            )
        for row in await old.fetch("SELECT * FROM catbus.head"):
            await new.fetch("INSERT INTO catbus.head VALUES ($1, $2, $3, $4)", *row)
        for row in await old.fetch("SELECT * FROM catbus.entries WHERE seq <= $1 ORDER BY seq", last):
            await new.fetch("INSERT INTO catbus.entries VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)", *row)


@asynccontextmanager
async def restored(cluster: Cluster, last: int) -> AsyncIterator[Cluster]:
    """Another cluster with a log up to an entry, and the same password."""
    with open_cluster(identity=True) as target:
        await in_thread(target.start)
        async with running(make(target.url)):
            pass
        await copy_log(cluster, target, last)
        password = (cluster.data.parent / "password").read_text()
        async with open_sql(target.url) as sql:
            await sql.execute(f"ALTER ROLE catbus PASSWORD '{password}'")
        (target.data.parent / "password").write_text(password)
        await in_thread(target.stop)
        await in_thread(target.start)
        yield target


async def test_log_restored_into_another_cluster_gets_another_epoch(cluster: Cluster) -> None:
    async with open_proxy(cluster.url) as proxy:
        log = make(proxy.url)
        async with running(log) as (follower, publisher):
            await publish(publisher, "1", "2", "3")
            first = log.epoch
            async with restored(cluster, 2) as target:
                proxy.close()
                proxy.open(target.url)
                await become(follower, 0, 2)
                assert await epochs(target.url) == [(first, 0), (log.epoch, 2)]
                assert await publish(publisher, "other 3") == [3]


async def test_completely_restored_log_gets_another_epoch(cluster: Cluster) -> None:
    async with open_proxy(cluster.url) as proxy:
        log = make(proxy.url, failover="lossless")
        async with running(log) as (follower, publisher):
            await publish(publisher, "1", "2", "3")
            first = log.epoch
            async with restored(cluster, 3) as target:
                proxy.close()
                proxy.open(target.url)
                await become(follower, 0, 3)
                assert await epochs(target.url) == [(first, 0), (log.epoch, 3)]
                assert await publish(publisher, "4") == [4]
                await follower.wait_for(4)
                assert follower.texts == ["1", "2", "3", "4"]


# Independent of the cause


TEXTS = [b"1", b' {"a": 1}\t', '"é☃"'.encode(), b'"a  b"', b'""']


async def test_entry_has_the_same_fingerprint_in_python_and_sql(database_url: str) -> None:
    log, other = make(database_url), make(database_url)
    async with running(log) as (follower, publisher), running(other) as (there, _), open_sql(database_url) as sql:
        for text in TEXTS:
            await publisher.publish_seq("a.b-c_d", text)
        await there.wait_for(len(TEXTS))
        for mine, theirs in zip(follower.entries, there.entries, strict=True):
            (found,) = await sql.fetchrow("SELECT catbus.fingerprint($1)", mine.seq)
            assert found == fingerprint(mine) == fingerprint(theirs)
        assert await sql.fetchrow("SELECT catbus.fingerprint(99)") == (None,)
        assert other.statistics().reads == 0
    assert fingerprint(Entry(1, 2, "a", b"1")) != fingerprint(Entry(1, 3, "a", b"1"))


async def test_entries_removed_by_retention_cause_no_new_epoch(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polling_interval, "NOTIFIED_INTERVAL", 0.05)
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        await publish(publisher, "1", "2", "3")
        await sql.execute("BEGIN; UPDATE catbus.head SET floor = 4; DELETE FROM catbus.entries; COMMIT")
        polls = log.statistics().polls
        with trio.fail_after(TEST_TIMEOUT):
            while log.statistics().polls < polls + 3:
                await trio.sleep(0.01)
        assert await publish(publisher, "4") == [4]
        await follower.wait_for(4)
        assert follower.restarts == [0]
        assert len(await epochs(database_url)) == 1


async def test_one_of_several_concurrent_calls_begins_an_epoch(database_url: str) -> None:
    async with running(make(database_url)) as (_, publisher):
        await publish(publisher, "1", "2", "3")
        ((first, _),) = await epochs(database_url)
        found: list[tuple[str, int, bool]] = []

        async def begin(agreed: int | None) -> None:
            async with open_sql(database_url) as sql:
                found.append(tuple(await sql.fetchrow("SELECT * FROM catbus.new_epoch($1, $2)", first, agreed)))  # type: ignore[arg-type]

        async with trio.open_nursery() as nursery:
            for agreed in (None, 2, 99, 0):
                nursery.start_soon(begin, agreed)
    assert sorted(made for _, _, made in found) == [False, False, False, True]
    assert len({(epoch, after) for epoch, after, _ in found}) == 1
    assert found[0][1] in (0, 2, 3)
    assert [epoch for epoch, _ in await epochs(database_url)] == [first, found[0][0]]


# Reading while the server behind a connection changes


@pytest.mark.parametrize("pattern", ["a", "a.*", "*"])
async def test_entries_of_another_epoch_are_not_read_as_those_of_the_old_one(database_url: str, pattern: str) -> None:
    # As behind a pooler: the connection stays, and what it leads to is another epoch.
    async with open_bridge() as bridge, open_sql(database_url) as sql:
        log = make(database_url)
        async with running(log) as (_, publisher):
            await publish(publisher, "1", "2", "3")
            old = log.epoch
        reader = LogReader(partial(bridge.connect, database_url))
        assert (await reader.page(old, 0, 3, 10, 1000)).last == 3
        assert [entry.seq for entry in (await reader.history(old, "a", 4, 10))[0]] == [1, 2, 3]
        await sql.fetch("SELECT catbus.new_epoch($1, 1)", old)
        for _ in range(2):
            with pytest.raises(OtherEpochError):
                await reader.page(old, 0, 3, 10, 1000)
            with pytest.raises(Unavailable):
                await reader.history(old, pattern, 4, 10)
