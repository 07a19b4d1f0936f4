"""The log on a real PostgreSQL: the conformance tests of all logs, outages, several replicas, and unknown outcomes."""

from __future__ import annotations

from functools import partial
from typing import Any
from urllib.parse import urlsplit

import asyncpg  # type: ignore[import-untyped]
import pytest
import trio
import trio.testing
from structlog.testing import CapturingLogger

from catbus.config import DatabaseSettings
from catbus.error_codes import ErrorCode
from catbus.errors import ConfigError, Unavailable
from catbus.log import Committed, Entry, Outcome, Rejected
from catbus.log.recent_messages import ENTRY_OVERHEAD
from catbus.postgres import PostgresLog
from catbus.postgres.access import asyncpg_bridge, migrations, reconnecting_tasks
from catbus.postgres.append import log_writer
from catbus.postgres.follow import log_reader
from catbus.postgres.listen import notification_listener, polling_interval
from catbus.postgres.maintenance import log_retention
from tests.log.conformance import ALICE, LogConformance, MakeLog, ReadConformance
from tests.log.harness import TEST_TIMEOUT, Publisher, RecordingFollower, read_all, running
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import head_locked, open_sql, pids, wait_until, waiting


def make(url: str, *, recent: int = 1 << 20, pending: int = 100_000, timeout: float = 20.0) -> PostgresLog:
    return PostgresLog(DatabaseSettings(url=url, publish_timeout=timeout), recent=recent, pending=pending)


class TestConformance(LogConformance):
    @pytest.fixture
    def make_log(self, database_url: str) -> MakeLog:
        return partial(make, database_url)


class TestConformanceFromTheTable(ReadConformance):
    """A log without recent entries in memory, so that every read goes to the table."""

    @pytest.fixture
    def make_log(self, database_url: str) -> MakeLog:
        return partial(make, database_url, recent=0)


def code(outcome: Outcome) -> ErrorCode | None:
    return outcome.code if isinstance(outcome, Rejected) else None


async def table(url: str) -> list[Entry]:
    """The entries in the table."""
    async with open_sql(url) as connection:
        rows = await connection.fetch(
            "SELECT seq, at, channel, payload, sender, origin FROM catbus.entries ORDER BY seq"
        )
    return [
        Entry(seq, at, channel, payload.encode(), sender, origin) for seq, at, channel, payload, sender, origin in rows
    ]


# Replicas


async def test_replicas_see_the_same_order(database_url: str) -> None:
    one, other = make(database_url), make(database_url)
    async with running(one) as (here, alice), running(other) as (there, bob):

        async def publish(publisher: Publisher, name: str) -> None:
            for n in range(100):
                for i in range(n % 7 + 1):
                    publisher.submit(name, b'{"n": %d, "text": "%s"}' % (n * 10 + i, b"x" * (n % 3 * 500)))
                await publisher.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish, alice, "alice")
            nursery.start_soon(publish, bob, "bob")
        total = len(alice.submitted) + len(bob.submitted)
        await here.wait_for(total)
        await there.wait_for(total)
        assert here.entries == there.entries == await table(database_url)
        for name in ("alice", "bob"):
            own = [entry.payload for entry in here.entries if entry.channel == name]
            assert own == [append.payload for append in {"alice": alice, "bob": bob}[name].submitted]


async def test_later_replica_follows_from_the_head_and_reads_the_history(database_url: str) -> None:
    async with running(make(database_url)) as (_, publisher):
        for n in range(10):
            await publisher.publish_seq("a", b"%d" % n, sender="s", origin=ALICE)
        late = make(database_url)
        async with running(late) as (follower, _):
            assert follower.restarts == [10]
            await publisher.publish_seq("a", b"10")
            await follower.wait_for(11)
            assert follower.texts == ["10"]
            assert await read_all(late) == await table(database_url)


async def test_notification_contains_small_entries(database_url: str) -> None:
    one, other = make(database_url), make(database_url)
    async with running(one) as (here, publisher), running(other) as (there, _):
        for n in range(20):
            await publisher.publish_seq("a", f'["é☃", {n}]'.encode(), sender='q"ö', origin=ALICE)
        await publisher.publish_seq("a", b'"bare"')
        await there.wait_for(21)
        assert there.entries == here.entries
        assert other.statistics().reads == 0


async def test_big_batch_is_read_from_the_table(database_url: str) -> None:
    one, other = make(database_url), make(database_url)
    async with running(one) as (here, publisher), running(other) as (there, _):
        for n in range(90):
            publisher.submit("a", b'"%s"' % (b"x" * 60_000 + b"%d" % n))
        assert all(isinstance(outcome, Committed) for outcome in await publisher.wait())
        await there.wait_for(90)
        assert there.entries == here.entries
        assert other.statistics().reads > 0
        assert one.statistics().reads == 0
        assert one.statistics().commits == 2  # at most 4 MiB each


# Acknowledgements


async def acknowledged_means_committed(log: PostgresLog, url: str) -> None:
    """Before the database can commit it, a message is neither acknowledged nor delivered."""
    async with running(log) as (follower, publisher), open_sql(url) as sql:
        await publisher.publish_seq("a", b"1")
        async with head_locked(url):
            append = publisher.submit("a", b"2")
            await wait_until(partial(waiting, sql))
            assert append not in publisher.outcomes
            assert log.applied == 1
            assert follower.texts == ["1"]
        assert await publisher.wait(append) == [Committed(2)]


async def test_acknowledged_publish_is_committed(database_url: str) -> None:
    await acknowledged_means_committed(make(database_url), database_url)


async def test_log_that_acknowledges_before_the_commit_is_detected(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = log_writer.LogWriter._send
    guessed = iter(range(1, 100))

    async def hasty(self: log_writer.LogWriter, connection: Any, batch: Any) -> None:
        batch.settle([Committed(next(guessed)) for _ in batch.appends])
        await send(self, connection, batch)

    monkeypatch.setattr(log_writer.LogWriter, "_send", hasty)
    with pytest.raises(BaseExceptionGroup) as caught:
        await acknowledged_means_committed(make(database_url), database_url)
    assert caught.group_contains(AssertionError)


# Outages


async def test_log_waits_for_a_database_that_is_unreachable_at_the_start(database_url: str) -> None:
    async with open_proxy(database_url) as proxy:
        proxy.close()
        log = make(proxy.url, timeout=0.3)
        recorder, publisher = RecordingFollower(), Publisher(log)
        async with trio.open_nursery() as nursery:
            await nursery.start(log.run, recorder)
            await proxy.wait_refused()
            assert not log.available
            assert log.epoch == ""
            begin = trio.current_time()
            early = publisher.submit("a", b'"never"')
            (outcome,) = await publisher.wait(early)
            assert code(outcome) == ErrorCode.UNAVAILABLE
            assert 0.3 <= trio.current_time() - begin < 3
            with pytest.raises(Unavailable):
                await log.history("*", before=None, limit=1)

            proxy.open()
            with trio.fail_after(TEST_TIMEOUT):
                await log.wait_open()
            log._writer._timeout = 20
            await publisher.publish_seq("a", b'"now"')
            await recorder.wait_for(1)
            assert log.available
            assert recorder.texts == ['"now"']
            nursery.cancel_scope.cancel()
    assert [entry.payload for entry in await table(database_url)] == [b'"now"']


async def test_outage_pauses_the_log(database_url: str) -> None:
    async with open_proxy(database_url) as proxy:
        log, other = make(proxy.url), make(database_url)
        async with running(log) as (follower, publisher), running(other) as (_, elsewhere):
            await publisher.publish_seq("a", b"1")
            proxy.close()
            waiting_for_it = publisher.submit("a", b"2")
            await proxy.wait_refused()
            assert not log.available
            missed = await elsewhere.publish_seq("a", b"3")
            assert [entry.seq for entry in (await log.history("*", before=None, limit=1))[0]] == [1]
            assert (await log.read(0)).last == 1
            proxy.open()
            (outcome,) = await publisher.wait(waiting_for_it)
            assert outcome in (Committed(3), Committed(2))
            await follower.wait_for(3)
            assert sorted(follower.texts) == ["1", "2", "3"]
            assert follower.restarts == [0]
            assert missed in (2, 3)


@pytest.mark.parametrize("held", [100, 4, 0])
async def test_history_is_the_same_from_memory_and_from_the_table(database_url: str, held: int) -> None:
    """Messages in memory are not queried, unless the search may be long or older messages are requested, too."""
    log = make(database_url, recent=held * (ENTRY_OVERHEAD + 2))
    async with running(log) as (follower, publisher):
        for number in range(10):
            await publisher.publish_seq("ab"[number % 2], b"%d" % number)
        await follower.wait_for(10)
        reads = log.statistics().reads
        for pattern, before, limit, expected in [
            ("*", None, 3, ([8, 9, 10], True)),
            ("*", 9, 1, ([8], True)),
            ("a", None, 5, ([1, 3, 5, 7, 9], False)),
            ("b", None, 4, ([4, 6, 8, 10], True)),
            ("a", 1, 4, ([], False)),
            ("c", None, 4, ([], False)),
        ]:
            entries, more = await log.history(pattern, before=before, limit=limit)
            assert ([entry.seq for entry in entries], more) == expected
        # An empty answer is followed by a look at the epoch.
        assert log.statistics().reads - reads == {100: 0, 4: 4, 0: 6}[held]


async def test_history_of_all_channels_passes_over_reserved_messages_in_one_query(database_url: str) -> None:
    """A log full of reserved messages is not read to its end."""
    log = make(database_url, recent=0)
    async with running(log) as (_, publisher):
        await publisher.publish_seq("a", b"1")
        for _ in range(500):
            publisher.submit("_a", b"2")
        await publisher.wait()
        reads = log.statistics().reads
        entries, more = await log.history("*", before=None, limit=10)
        assert ([entry.seq for entry in entries], more) == ([1], False)
        assert log.statistics().reads - reads == 1


@pytest.mark.parametrize("step", [1, 3, 4, 100])
async def test_history_is_the_same_with_any_page_size(
    database_url: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_reader, "HISTORY_ROWS", step)
    log = make(database_url, recent=0)
    async with running(log) as (follower, publisher):
        for number in range(9):
            publisher.submit("ab"[number % 2], b"%d" % number)
        await follower.wait_for(9)
        for limit in range(1, 11):
            entries, more = await log.history("*", before=None, limit=limit)
            assert ([entry.seq for entry in entries], more) == ([*range(1, 10)][-limit:], limit < 9)
            entries, more = await log.history("a", before=8, limit=limit)
            assert ([entry.seq for entry in entries], more) == ([1, 3, 5, 7][-limit:], limit < 4)


async def test_history_of_large_messages_ends_at_the_limit(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "HISTORY_ROWS", 2)
    monkeypatch.setattr(log_reader, "HISTORY_BYTES", 25_000)
    log = make(database_url, recent=0)
    async with running(log) as (follower, publisher):
        for _ in range(9):
            publisher.submit("a", b'"%b"' % (b"x" * 10_000))
        await follower.wait_for(9)
        entries, more = await log.history("*", before=None, limit=100)
        assert ([entry.seq for entry in entries], more) == ([6, 7, 8, 9], True)


async def test_short_history_does_not_wait_for_long_ones(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_reader, "HISTORY_ROWS", 5)
    log = make(database_url, recent=0)
    ended: list[int] = []

    async def ask(limit: int) -> None:
        entries, _ = await log.history("*", before=None, limit=limit)
        ended.append(len(entries))

    async with running(log) as (follower, publisher):
        for _ in range(100):
            publisher.submit("a", b"1")
        await follower.wait_for(100)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(ask, 90)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(ask, 1)
    assert ended == [1] + [90] * 5


async def test_withdrawn_publish_is_no_longer_counted() -> None:
    log = make("postgres://nobody@localhost:1/nowhere")
    publisher = Publisher(log)
    publisher.submit("a", b"1")
    kept = publisher.submit("b", b"1")
    log.withdraw(None, lambda append: append.channel == "a", Rejected(ErrorCode.UNAUTHORIZED, "not any more"))
    assert (log.statistics().pending, log.statistics().pending_bytes) == (1, kept.size)


async def test_log_gives_up_on_a_database_that_stops_replying(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "APPEND_TIMEOUT", 0.3)
    monkeypatch.setattr(notification_listener, "POLL_TIMEOUT", 0.3)
    monkeypatch.setattr(polling_interval, "NOTIFIED_INTERVAL", 0.1)
    async with open_proxy(database_url) as proxy:
        log = make(proxy.url)
        async with running(log) as (follower, publisher):
            await publisher.publish_seq("a", b"1")
            accepted = proxy.accepted
            proxy.block()
            append = publisher.submit("a", b"2")
            with trio.fail_after(TEST_TIMEOUT):
                while log.available:
                    await trio.sleep(0.01)
            proxy.cut()
            proxy.unblock()
            (outcome,) = await publisher.wait(append)
            assert isinstance(outcome, Committed)
            assert outcome.seq == 2
            await follower.wait_for(2)
            assert proxy.accepted > accepted
    assert [entry.payload for entry in await table(database_url)] == [b"1", b"2"]


@pytest.mark.parametrize("victim", ["%catbus.append%", "SELECT epoch%", "%"])
async def test_connections_killed_under_load_lose_nothing(database_url: str, victim: str) -> None:
    one, other = make(database_url), make(database_url)
    stop = False
    async with running(one) as (here, alice), running(other) as (there, bob), open_sql(database_url) as sql:

        async def publish(publisher: Publisher, name: bytes) -> None:
            number = 0
            while not stop:
                for _ in range(20):
                    number += 1
                    publisher.submit("a", b'"%s %d"' % (name, number), producer=name.ljust(16), number=number)
                await publisher.wait()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(publish, alice, b"alice")
            nursery.start_soon(publish, bob, b"bob")
            for _ in range(6):
                begun = one.statistics().commits, other.statistics().commits
                await wait_until(partial(_moved_on, one, other, begun))
                for pid in await pids(sql, victim):
                    await sql.fetch("SELECT pg_terminate_backend($1)", pid)
            stop = True
        rows = await table(database_url)
        await here.wait_for(len(rows))
        await there.wait_for(len(rows))
        assert here.entries == there.entries == rows
        assert one.statistics().restarts + other.statistics().restarts >= 2
    answers = {**alice.outcomes, **bob.outcomes}
    committed = {outcome.seq: append for append, outcome in answers.items() if isinstance(outcome, Committed)}
    assert len(committed) == len(answers) == len(rows)
    for row in rows:
        assert committed[row.seq].payload == row.payload


async def _moved_on(one: PostgresLog, other: PostgresLog, begun: tuple[int, int]) -> bool:
    return one.statistics().commits > begun[0] + 3 and other.statistics().commits > begun[1] + 3


async def test_batch_with_a_lost_result_is_sent_again(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks between the commit and its reply; the batch is sent again unchanged, and recognised."""
    async with open_proxy(database_url) as proxy:
        log = make(proxy.url)
        calls: list[object] = []
        call = log._writer._fetch_row

        async def note(connection: Any, epoch: str, *statement: object) -> Any:
            calls.append(statement)
            return await call(connection, epoch, *statement)  # type: ignore[arg-type]

        monkeypatch.setattr(log._writer, "_fetch_row", note)
        async with running(log) as (follower, publisher), open_sql(database_url) as sql:
            await publisher.publish_seq("a", b"0")
            async with head_locked(database_url):
                for n in range(1, 4):
                    publisher.submit("a", b"%d" % n)
                await wait_until(partial(waiting, sql))
                proxy.block()
            await wait_until(partial(_head_is, sql, 4))
            publisher.submit("a", b"4")
            proxy.cut()
            proxy.unblock()
            outcomes = await publisher.wait()
            assert [outcome.seq for outcome in outcomes if isinstance(outcome, Committed)] == [1, 2, 3, 4, 5]
            await follower.wait_for(5)
            assert follower.texts == ["0", "1", "2", "3", "4"]
            assert log.statistics().duplicates == 3
        _, lost, again, newer = calls
        assert again == lost != newer


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.LockNotAvailableError,
        asyncpg.DeadlockDetectedError,
        asyncpg.DiskFullError,
        asyncpg.QueryCanceledError,
        asyncpg.ConnectionFailureError,
    ],
)
async def test_batch_is_sent_again_after_a_temporary_database_error(
    database_url: str, monkeypatch: pytest.MonkeyPatch, error: type[asyncpg.PostgresError]
) -> None:
    """An error that no message causes rejects none."""
    log = make(database_url)
    sizes: list[object] = []
    call = log._writer._fetch_row

    async def fail_at_first(connection: Any, epoch: str, *statement: Any) -> Any:
        sizes.append(statement[-1])
        if len(sizes) == 1:
            raise error("not just now")
        return await call(connection, epoch, *statement)

    monkeypatch.setattr(log._writer, "_fetch_row", fail_at_first)
    async with running(log) as (follower, publisher):
        for n in range(3):
            publisher.submit("a", b"%d" % n)
        assert await publisher.wait() == [Committed(1), Committed(2), Committed(3)]
        await follower.wait_for(3)
        assert follower.texts == ["0", "1", "2"]
    assert sizes == [3, 3]


async def test_paused_replica_appends_nothing_that_a_retry_has_appended(database_url: str) -> None:
    """Its batch arrives after the client has sent the message again, to another replica."""
    async with open_proxy(database_url) as proxy:
        still, other = make(proxy.url), make(database_url)
        async with running(still) as (follower, client), running(other) as (_, elsewhere):
            await client.publish_seq("a", b"0")
            proxy.block()
            original = client.submit("a", b"1", producer=ALICE, number=1)
            with trio.fail_after(TEST_TIMEOUT):
                while still.statistics().pending:
                    await trio.lowlevel.checkpoint()
            assert await elsewhere.publish("a", b"1", producer=ALICE, number=1, after=1) == Committed(2)
            await elsewhere.publish_seq("a", b"2")
            proxy.unblock()
            assert await client.wait(original) == [Committed(2, duplicate=True)]
            await follower.wait_for(3)
            assert follower.texts == ["0", "1", "2"]
    assert [entry.payload for entry in await table(database_url)] == [b"0", b"1", b"2"]


async def _head_is(sql: Any, seq: int) -> bool:
    (head,) = await sql.fetchrow("SELECT head FROM catbus.position()")
    return bool(head == seq)


async def test_publish_in_doubt_is_unknown_in_time_and_is_still_appended(database_url: str) -> None:
    log = make(database_url, timeout=0.3)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        async with head_locked(database_url):
            in_flight = publisher.submit("a", b'"in flight"')
            await wait_until(partial(waiting, sql))
            queued = publisher.submit("a", b'"queued"')
            outcomes = await publisher.wait(in_flight, queued)
            assert [code(outcome) for outcome in outcomes] == [ErrorCode.UNKNOWN, ErrorCode.UNAVAILABLE]
        await follower.wait_for(1)
        assert follower.texts == ['"in flight"']
        log._writer._timeout = 20
        assert await publisher.publish_seq("a", b'"next"') == 2


async def test_stop_waits_for_the_append_in_progress(database_url: str) -> None:
    log = make(database_url)
    recorder, publisher = RecordingFollower(), Publisher(log)
    async with open_sql(database_url) as sql, trio.open_nursery() as nursery:
        await nursery.start(log.run, recorder)
        with trio.fail_after(TEST_TIMEOUT):
            await log.wait_open()
        async with head_locked(database_url):
            in_flight = publisher.submit("a", b"1")
            await wait_until(partial(waiting, sql))
            queued = publisher.submit("a", b"2")
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                outcome = (await publisher.wait(queued))[0]
                assert code(outcome) == ErrorCode.SHUTTING_DOWN
                assert in_flight not in publisher.outcomes
                late = publisher.submit("a", b"3")
                assert code(publisher.outcomes[late]) == ErrorCode.SHUTTING_DOWN
    assert publisher.outcomes[in_flight] == Committed(1)
    assert recorder.texts == ["1"]


async def test_stop_during_an_outage_replies_unknown_to_publishes_in_doubt(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_writer, "APPEND_TIMEOUT", 0.2)
    async with open_proxy(database_url) as proxy:
        log = make(proxy.url)
        recorder, publisher = RecordingFollower(), Publisher(log)
        async with trio.open_nursery() as nursery:
            await nursery.start(log.run, recorder)
            await log.wait_open()
            await publisher.publish_seq("a", b"1")
            proxy.block()
            in_flight = publisher.submit("a", b"2")
            with trio.fail_after(TEST_TIMEOUT):
                while log.statistics().pending:
                    await trio.sleep(0.01)
            queued = publisher.submit("a", b"3")
            nursery.cancel_scope.cancel()
        assert code(publisher.outcomes[queued]) == ErrorCode.SHUTTING_DOWN
        assert code(publisher.outcomes[in_flight]) == ErrorCode.UNKNOWN


# Notifications are hints


async def test_poll_finds_a_commit_without_a_notification(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling_interval, "NOTIFIED_INTERVAL", 0.1)
    deaf, other = make(database_url), make(database_url)
    monkeypatch.setattr(deaf._listener, "_receive", lambda *_: None)
    async with running(deaf) as (follower, _), running(other) as (_, publisher):
        await publisher.publish_seq("a", b"1")
        await publisher.publish_seq("a", b"2")
        await follower.wait_for(2)
        assert follower.texts == ["1", "2"]
        assert deaf.statistics().unannounced > 0
        assert deaf.statistics().notifications == 0


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "nonsense",
        "a:b:c",
        "{epoch}:1",
        "{epoch}:5:99",
        "other:1:2",
        "{epoch}:1:1 [1]",
        "{epoch}:2:2 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
        "{epoch}:2:2 AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA= 1000 AAAA",
        "{epoch}:2:2 " + "é" * 44 + ' [[2,1000,"a",null,null,"forged"]]',
    ],
)
async def test_forged_notification_changes_nothing(database_url: str, payload: str) -> None:
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        await publisher.publish_seq("a", b"1")
        await sql.fetch("SELECT pg_notify('catbus', $1)", payload.replace("{epoch}", log.epoch))
        with trio.fail_after(TEST_TIMEOUT):
            while log.statistics().rejected == 0:
                await trio.sleep(0.01)
        await publisher.publish_seq("a", b"2")
        await follower.wait_for(2)
        assert follower.texts == ["1", "2"]
        assert log.available
        assert log.statistics().failures == 0
        assert log.statistics().restarts == 0
        assert log.statistics().rejected == 1


# Bad entries


async def test_bad_entry_does_not_fail_the_rest_of_its_batch(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (follower, publisher):
        await publisher.publish_seq("a", b'"first"')
        payloads = [b'"%d"' % n for n in range(50)]
        payloads[13] = b'"a NUL \x00"'
        payloads[14] = b'"not UTF-8 \xff"'
        payloads[31] = b'"another NUL \x00"'
        for payload in payloads:
            publisher.submit("a", payload)
        outcomes = (await publisher.wait())[1:]
        assert [i for i, outcome in enumerate(outcomes) if code(outcome) == ErrorCode.INTERNAL] == [13, 14, 31]
        good = [payload.decode() for i, payload in enumerate(payloads) if i not in (13, 14, 31)]
        await follower.wait_for(48)
        assert follower.texts == ['"first"', *good]


async def test_unusual_senders_and_payloads_are_stored_unchanged(database_url: str) -> None:
    senders = [None, "", "\x01", "a\nb", "x", "\\N", "null", "é☃", ","]
    async with running(make(database_url)) as (follower, publisher):
        for sender in senders:
            await publisher.publish_seq("a", b"1", sender=sender)
        for odd in senders:
            publisher.submit("a", b"2", sender=odd)
        for sender in (None, "x", None):
            publisher.submit("a", b"3", sender=sender, origin=ALICE if sender else None, producer=ALICE, number=7)
        await publisher.wait(*publisher.submitted[:-2])
        expected = [*senders, *senders, None]
        await follower.wait_for(len(expected))
        assert [entry.sender for entry in await table(database_url)] == expected


# Epochs and retention


async def new_epoch(url: str, name: str, after: int) -> None:
    """Change the epoch, as a failover or `catbus init --new-epoch` does."""
    async with open_sql(url) as sql:
        await sql.execute(f"""
            BEGIN;
            SELECT FROM catbus.head FOR UPDATE;
            DELETE FROM catbus.entries WHERE seq > {after};
            INSERT INTO catbus.epochs (epoch, after_seq, system_identifier, timeline)
                SELECT '{name}', {after}, system_identifier, timeline
                FROM catbus.epochs ORDER BY ordinal DESC LIMIT 1;
            UPDATE catbus.head SET epoch = '{name}';
            COMMIT""")


async def test_writer_detects_another_epoch(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (follower, publisher):
        for n in range(1, 6):
            await publisher.publish_seq("a", b"%d" % n)
        old = log.epoch
        await new_epoch(database_url, "second", 3)
        retry = publisher.submit("a", b'"retried"', producer=ALICE, number=1, after=5)
        plain = publisher.submit("a", b'"plain"')
        outcomes = await publisher.wait(retry, plain)
        assert code(outcomes[0]) == ErrorCode.UNKNOWN
        assert outcomes[1] == Committed(4)
        await follower.wait_until(lambda self: self.restarts == [0, 3] and self.applied == 4)
        assert log.epoch == "second"
        assert [entry.payload for entry in await read_all(log)] == [b"1", b"2", b"3", b'"plain"']
        below, above, unknown = log.resume(3, old), log.resume(5, old), log.resume(2, "never")
        assert (below.cursor, below.lost) == (3, None)
        assert (above.cursor, above.lost) == (3, "epoch")
        assert (unknown.cursor, unknown.lost) == (0, "epoch")


async def test_listener_detects_another_epoch(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling_interval, "NOTIFIED_INTERVAL", 0.1)
    log = make(database_url)
    async with running(log) as (follower, publisher):
        await publisher.publish_seq("a", b"1")
        await new_epoch(database_url, "second", 1)
        await follower.wait_until(lambda self: self.restarts == [0, 1])
        assert log.epoch == "second"


async def test_rolled_back_log_gets_another_epoch(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polling_interval, "NOTIFIED_INTERVAL", 0.1)
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        for n in range(1, 6):
            await publisher.publish_seq("a", b"%d" % n)
        await sql.execute("DELETE FROM catbus.entries WHERE seq > 2")
        await follower.wait_until(lambda self: self.restarts == [0, 2])
        assert await publisher.publish_seq("a", b'"again"') == 3
        await follower.wait_for(3)
        assert [entry.payload for entry in await read_all(log)] == [b"1", b"2", b'"again"']


async def forget(url: str, floor: int) -> None:
    """Remove entries, as retention does."""
    async with open_sql(url) as sql:
        await sql.execute(f"DELETE FROM catbus.entries WHERE seq < {floor}; UPDATE catbus.head SET floor = {floor}")


async def test_page_reports_that_retention_has_passed(database_url: str) -> None:
    log = make(database_url, recent=0)
    async with running(log) as (_, publisher):
        for n in range(1, 11):
            publisher.submit("a", b"%d" % n)
        await publisher.wait()
        await forget(database_url, 6)
        page = await log.read(2)
        assert (page.after, page.last, [e.seq for e in page.entries]) == (5, 10, [6, 7, 8, 9, 10])
        page = await log.read(7)
        assert (page.after, [e.seq for e in page.entries]) == (7, [8, 9, 10])
        await forget(database_url, 11)
        page = await log.read(2)
        assert (page.after, page.last, list(page.entries)) == (10, 10, [])


async def test_unrecognisable_retry_is_not_appended(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (_, publisher):
        for n in range(1, 6):
            await publisher.publish_seq("a", b"%d" % n, producer=ALICE, number=n)
        await forget(database_url, 4)
        assert code(await publisher.publish("a", b"1", producer=ALICE, number=1, after=0)) == ErrorCode.UNKNOWN
        assert await publisher.publish("a", b"5", producer=ALICE, number=5, after=0) == Committed(5, duplicate=True)
        assert await publisher.publish("a", b"6", producer=ALICE, number=6, after=3) == Committed(6)


async def test_deleted_range_is_not_skipped(database_url: str) -> None:
    log = make(database_url, recent=0)
    async with running(log) as (_, publisher), open_sql(database_url) as sql:
        for n in range(1, 6):
            await publisher.publish_seq("a", b"%d" % n)
        await sql.execute("DELETE FROM catbus.entries WHERE seq = 3")
        page = await log.read(0)
        assert (page.last, len(page.entries)) == (2, 2)
        with pytest.raises(Unavailable):
            await log.read(2)


# Connections


async def test_log_opens_no_extra_connections(database_url: str) -> None:
    """A cancelled query opens none, either."""
    async with open_proxy(database_url) as proxy:
        log = make(proxy.url, recent=0)
        async with running(log) as (_, publisher):
            await publisher.publish_seq("a", b"1")
            await log.history("*", before=None, limit=1)
            with trio.fail_after(TEST_TIMEOUT):
                while not (log.available and log.statistics().table_size):
                    await trio.sleep(0.01)
            accepted = proxy.accepted - 1  # the connection that applied the schema is closed
            assert accepted == 8
            proxy.block()
            with trio.move_on_after(0.05) as scope:
                await log.history("*", before=None, limit=1)
            assert scope.cancelled_caught
            proxy.unblock()
            assert len((await log.history("*", before=None, limit=1))[0]) == 1
            assert proxy.accepted - 1 == accepted + 1


async def test_unusable_database_ends_the_log(database_url: str) -> None:
    async with running(make(database_url)):
        pass
    async with open_sql(database_url) as sql:
        await sql.execute("UPDATE catbus.schema_version SET version = 999")
    with pytest.raises(ConfigError, match="newer release"):
        await make(database_url).run(RecordingFollower())


async def test_repeated_bug_ends_the_log(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def mistaken(self: object, working: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(log_writer.LogWriter, "run", mistaken)
    log = make(database_url)
    publisher = Publisher(log)
    append = publisher.submit("a", b"1")
    with pytest.raises(ZeroDivisionError), trio.fail_after(TEST_TIMEOUT):
        await log.run(RecordingFollower())
    assert code(publisher.outcomes[append]) == ErrorCode.SHUTTING_DOWN
    assert log.statistics().failures == 5


MODULES = reconnecting_tasks, notification_listener, log_writer, asyncpg_bridge, migrations, log_retention


async def test_log_lines_do_not_contain_the_password(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = CapturingLogger()
    for module in MODULES:
        monkeypatch.setattr(module, "logger", lines)
    parts = urlsplit(database_url)
    url = parts._replace(netloc=f"nobody:sesame@{parts.netloc.rpartition('@')[2]}").geturl()
    with trio.move_on_after(0.5):
        await make(url).run(RecordingFollower())
    async with open_proxy(url) as proxy:
        proxy.close()
        with trio.move_on_after(0.3):
            await make(proxy.url).run(RecordingFollower())
    assert [call.args for call in lines.calls] == [("database unavailable, trying again",)] * 2
    assert "sesame" not in repr(lines.calls)
