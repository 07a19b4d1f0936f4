"""The outbox relay: messages published by SQL, from the transaction to the followers of the log."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

import catbus
from catbus.config import DatabaseSettings
from catbus.log import Committed
from catbus.postgres import PostgresLog, outbox_relay
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.postgres.outbox_relay import OutboxRelay
from tests.brokers import CONFIG, TOKEN
from tests.brokers import running as running_broker
from tests.log.harness import Publisher, running
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import head_locked, open_sql, pids, wait_until, waiting
from tests.postgres.test_log import new_epoch, table

README = Path(__file__).parents[2] / "README.md"


def make(url: str) -> PostgresLog:
    return PostgresLog(DatabaseSettings(url=url, publish_timeout=20))


async def publish(sql: DatabaseConnection, channel: str, payload: str) -> None:
    await sql.fetch("SELECT catbus.publish($1, $2)", channel, payload)


async def is_seen(log: PostgresLog) -> bool:
    """Whether the replica knows of waiting messages."""
    return log._writer._moving


# From the transaction to every replica


async def test_messages_of_a_transaction_reach_every_replica_once_and_in_order(database_url: str) -> None:
    one, other = make(database_url), make(database_url)
    async with running(one) as (here, _), running(other) as (there, _), open_sql(database_url) as sql:
        await sql.execute("BEGIN")
        for n in range(3):
            await publish(sql, "orders.42", f'{{"n":  {n}}}')
        await sql.execute("COMMIT")
        await publish(sql, "orders.43", "3")
        await here.wait_for(4)
        await there.wait_for(4)
        assert here.texts == ['{"n":  0}', '{"n":  1}', '{"n":  2}', "3"]
        assert here.entries == there.entries == await table(database_url)
        assert {(entry.sender, entry.origin) for entry in here.entries} == {(None, None)}
        assert one.statistics().moved + other.statistics().moved == 4


async def test_rolled_back_message_is_never_delivered(database_url: str) -> None:
    async with running(make(database_url)) as (follower, _), open_sql(database_url) as sql:
        await sql.execute("BEGIN; SELECT catbus.publish('a', '1'); ROLLBACK")
        await sql.execute("BEGIN; SAVEPOINT s; SELECT catbus.publish('a', '2'); ROLLBACK TO s; COMMIT")
        await publish(sql, "a", "3")
        await follower.wait_for(1)
        assert follower.texts == ["3"]
        assert [entry.payload for entry in await table(database_url)] == [b"3"]


async def test_subscriber_gets_an_sql_message_without_a_sender(database_url: str) -> None:
    config = msgspec.structs.replace(CONFIG, database=DatabaseSettings(url=database_url))
    async with running_broker(config) as (broker, address), open_sql(database_url) as sql:
        await broker.replica.log.wait_open()
        async with catbus.connect(f"ws://{address}/ws", token=TOKEN) as bus:
            async with bus.subscribe("orders.*") as messages:
                await publish(sql, "orders.42", '{"status":"paid"}')
                message = await anext(messages)
            assert (message.seq, message.channel, message.payload) == (1, "orders.42", {"status": "paid"})
            assert message.sender is None


def examples() -> Iterator[str]:
    """The SQL in the README."""
    yield from re.findall(r"^```sql\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


async def test_readme_examples_do_what_they_say(database_url: str) -> None:
    async with running(make(database_url)) as (follower, _), open_sql(database_url) as sql:
        await sql.execute(
            "SET search_path = public; CREATE ROLE shop; CREATE TABLE orders (id integer PRIMARY KEY, status text); "
            "CREATE TABLE charges (order_id integer, cents integer)"
        )
        await sql.fetch("SELECT catbus.create_consumer('billing', 'orders.*')")
        try:
            for example in examples():
                await sql.execute(example)
            await sql.execute("GRANT SELECT, INSERT, UPDATE ON orders TO shop; SET ROLE shop")
            await sql.execute("INSERT INTO orders VALUES (43, 'new')")
            await sql.execute("UPDATE orders SET status = 'paid'")
            await follower.wait_until(lambda self: len(self.entries) >= 3)
            assert [(entry.channel, entry.payload) for entry in follower.entries] == [
                ("orders.42", b'{"status":"paid"}'),
                ("orders.43", b'{"id":43,"status":"new"}'),
                ("orders.43", b'{"id":43,"status":"paid"}'),
            ]
        finally:
            await sql.execute("RESET ROLE; DROP OWNED BY shop; DROP ROLE shop")


# With messages of clients


async def test_outbox_messages_follow_the_next_batch_in_its_commit(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        await publisher.publish_seq("a", b'"first"')
        async with head_locked(database_url):
            publisher.submit("a", b'"under way"')
            await wait_until(partial(waiting, sql))
            await publish(sql, "a", '"from SQL 1"')
            await publish(sql, "a", '"from SQL 2"')
            await wait_until(partial(is_seen, log))
            for n in range(3):
                publisher.submit("a", b"%d" % n)
        assert [outcome.seq for outcome in await publisher.wait() if isinstance(outcome, Committed)] == [1, 2, 3, 4, 5]
        await follower.wait_for(7)
        assert follower.texts == ['"first"', '"under way"', "0", "1", "2", '"from SQL 1"', '"from SQL 2"']
        commits = await sql.fetch("SELECT count(*) FROM catbus.entries GROUP BY xmin::text ORDER BY min(seq)")
        assert commits == [(1,), (1,), (5,)]
        assert (log.statistics().commits, log.statistics().appended, log.statistics().moved) == (3, 5, 2)


async def test_clients_and_transactions_publish_at_once_on_two_replicas(database_url: str) -> None:
    one, other = make(database_url), make(database_url)
    rounds = 60
    async with running(one) as (here, alice), running(other) as (there, bob):

        async def submit(publisher: Publisher, name: str) -> None:
            for n in range(rounds):
                for i in range(5):
                    publisher.submit(name, b"%d" % (5 * n + i))
                await publisher.wait()

        async def transact(name: str) -> None:
            async with open_sql(database_url) as sql:
                for n in range(rounds):
                    await sql.execute(f"BEGIN; SELECT catbus.publish('{name}', '\"no\"'); ROLLBACK")
                    numbers = f"generate_series({5 * n}, {5 * n + 4})"
                    await sql.execute(f"SELECT catbus.publish('{name}', to_json(n)) FROM {numbers} AS n")

        async with trio.open_nursery() as nursery:
            for publisher, name in ((alice, "alice"), (bob, "bob")):
                nursery.start_soon(submit, publisher, name)
            for name in ("carol", "dave"):
                nursery.start_soon(transact, name)
        await here.wait_for(20 * rounds)
        await there.wait_for(20 * rounds)
        assert here.entries == there.entries == await table(database_url)
        for name in ("alice", "bob", "carol", "dave"):
            own = [int(entry.payload) for entry in here.entries if entry.channel == name]
            assert own == list(range(5 * rounds))
        assert one.statistics().moved + other.statistics().moved == 10 * rounds


async def test_large_transaction_does_not_keep_clients_waiting(database_url: str) -> None:
    """They are moved 1,000 at a time, and messages of clients are appended between the moves."""
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        await sql.execute("SELECT catbus.publish('sql', to_json(n)) FROM generate_series(1, 20000) AS n")
        await wait_until(partial(is_seen, log))
        await publisher.publish_seq("client", b"0")
        await follower.wait_for(20_001)
        assert [int(entry.payload) for entry in follower.entries if entry.channel == "sql"] == list(range(1, 20_001))
        (place,) = [entry.seq for entry in follower.entries if entry.channel == "client"]
        assert place <= 19_001


async def test_open_transaction_delays_no_other_message(database_url: str) -> None:
    one, other = make(database_url), make(database_url)
    async with running(one) as (here, publisher), running(other) as (there, _), open_sql(database_url) as forgetful:
        await forgetful.execute("BEGIN")
        await publish(forgetful, "a", '"late"')
        async with open_sql(database_url) as sql:
            for n in range(5):
                assert await publisher.publish_seq("a", b'"client"') == 2 * n + 1
                await publish(sql, "a", '"quick"')
                await here.wait_for(2 * n + 2)
            await forgetful.execute("COMMIT")
            await there.wait_for(11)
            assert there.texts == ['"client"', '"quick"'] * 5 + ['"late"']


# Faults


async def test_locked_outbox_delays_only_its_own_messages(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as locking, open_sql(database_url) as sql:
        await publish(sql, "a", "1")
        await follower.wait_for(1)
        await locking.execute("BEGIN; LOCK TABLE catbus.outbox_0, catbus.outbox_1 IN ACCESS EXCLUSIVE MODE")
        await publish(locking, "a", "3")
        restarts = log.statistics().restarts

        async def given_up() -> bool:
            return log.statistics().restarts > restarts

        await wait_until(given_up)
        assert log.available
        assert await publisher.publish_seq("a", b"2") == 2
        await locking.execute("COMMIT")
        await follower.wait_for(3)
        assert follower.texts == ["1", "2", "3"]


async def test_message_that_cannot_be_moved_does_no_harm(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        ((source,),) = await sql.fetch("SELECT pg_get_functiondef('catbus.move_outbox'::regproc)")
        await sql.execute(source.replace("    moved := 0;", "    moved := 1 / 0;"))
        await publish(sql, "a", '"stuck"')
        seen = log.statistics().restarts

        async def refused() -> bool:
            return log.statistics().restarts > seen + 1

        await wait_until(refused)
        for n in range(0, 20, 2):
            async with head_locked(database_url):
                before = publisher.submit("a", b"%d" % n)
                await wait_until(partial(is_seen, log))
                beside = publisher.submit("a", b"%d" % (n + 1))
            assert await publisher.wait(before, beside) == [Committed(n + 1), Committed(n + 2)]
        bad = publisher.submit("a", b'"a NUL \x00"')
        good = publisher.submit("a", b'"good"')
        outcomes = await publisher.wait(bad, good)
        assert [isinstance(outcome, Committed) for outcome in outcomes] == [False, True]
        assert log.available
        assert log.statistics().failures == 0
        await sql.execute(source)
        await follower.wait_for(22)
        assert follower.texts[-1] == '"stuck"'


async def test_waiting_messages_are_moved_into_another_epoch(database_url: str) -> None:
    log = make(database_url)
    async with running(log) as (follower, publisher), open_sql(database_url) as sql:
        await publisher.publish_seq("a", b"1")
        await new_epoch(database_url, "second", 1)
        await publish(sql, "a", "2")
        await follower.wait_until(lambda self: self.restarts == [0, 1] and self.applied == 2)
        assert follower.texts == ["1", "2"]
        await new_epoch(database_url, "third", 2)
        await sql.execute("SELECT catbus.publish('a', to_json(n)) FROM generate_series(3, 1500) AS n")
        publisher.submit("b", b'"client"')
        await follower.wait_until(lambda self: self.restarts == [0, 1, 2] and self.applied == 1501)
        assert [entry.channel for entry in await table(database_url)].count("a") == 1500


async def test_lost_result_moves_nothing_twice(database_url: str) -> None:
    async with open_proxy(database_url) as proxy:
        log = make(proxy.url)
        async with running(log) as (follower, publisher), open_sql(database_url) as sql:
            await publisher.publish_seq("a", b'"first"')
            async with head_locked(database_url):
                await publish(sql, "a", "1")
                await wait_until(partial(moving, sql))
                proxy.block()
            await wait_until(partial(is_empty, sql))
            proxy.cut()
            proxy.unblock()
            await publish(sql, "a", "2")
            await follower.wait_for(3)
            assert follower.texts == ['"first"', "1", "2"]


async def moving(sql: DatabaseConnection) -> bool:
    ((count,),) = await sql.fetch(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND wait_event_type = 'Lock' AND query LIKE '%catbus.move_outbox%'"
    )
    return bool(count)


async def is_empty(sql: DatabaseConnection) -> bool:
    (waits,) = await sql.fetchrow("SELECT catbus.outbox_pending()")
    return not waits


@pytest.mark.parametrize("victim", ["%catbus.outbox_pending%", "%catbus.move_outbox%", "%"])
async def test_killed_connections_lose_nothing(database_url: str, victim: str) -> None:
    one, other = make(database_url), make(database_url)
    total = 3000
    async with running(one) as (here, _), running(other) as (there, _), open_sql(database_url) as sql:

        async def transact(*, task_status: trio.TaskStatus[None]) -> None:
            async with open_sql(database_url) as app:
                await app.execute("SET application_name = 'app'")
                task_status.started()
                for n in range(0, total, 10):
                    await app.execute(f"SELECT catbus.publish('a', to_json(n)) FROM generate_series({n}, {n + 9}) AS n")

        async with trio.open_nursery() as nursery:
            await nursery.start(transact)
            for n in range(8):
                await here.wait_for(total * n // 10)
                for pid in await pids(sql, victim):
                    await sql.fetch(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE pid = $1 AND application_name = 'catbus'",
                        pid,
                    )
        await here.wait_for(total)
        await there.wait_for(total)
        assert [int(text) for text in here.texts] == list(range(total))
        assert here.entries == there.entries == await table(database_url)
        assert one.statistics().failures == other.statistics().failures == 0


# Polling


class Scripted:
    """A connection that replies to `OutboxRelay` on the test's clock."""

    def __init__(self) -> None:
        self.looks: list[float] = []
        self.fetches: list[float] = []
        self.waits = False
        self.cost = 0.0

    async def connect(self) -> Any:
        return self

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    async def fetchrow(self, query: str, *, timeout: float) -> tuple[bool]:
        await trio.sleep(self.cost)
        self.looks.append(trio.current_time())
        return (self.waits,)

    async def fetch(self, query: str, *, timeout: float) -> list[object]:
        await trio.sleep(self.cost)
        self.fetches.append(trio.current_time())
        return []


async def look_for(seconds: float, database: Scripted, move: Callable[[], Awaitable[None]]) -> list[float]:
    """Run the relay for some seconds, and return the pauses between its polls."""
    with trio.move_on_after(seconds):
        await OutboxRelay(database.connect, move).run(lambda: None)  # type: ignore[arg-type]
    return [later - earlier for earlier, later in zip(database.looks, database.looks[1:], strict=False)]


async def no_move() -> None:
    raise AssertionError("there was nothing to move")


async def test_outbox_is_polled_ten_times_a_second_with_jitter(autojump_clock: MockClock) -> None:
    database = Scripted()
    pauses = await look_for(60, database, no_move)
    assert all(0.075 <= pause <= 0.125 for pause in pauses)
    assert 550 < len(pauses) < 650
    assert len({round(pause, 3) for pause in pauses}) > 20
    assert 50 <= len(database.fetches) <= 60


async def test_outbox_is_polled_more_often_while_it_is_in_use(autojump_clock: MockClock) -> None:
    database = Scripted()

    async def move() -> None:
        database.waits = False

    database.waits = True
    pauses = await look_for(10, database, move)
    brisk = [pause for pause in pauses if pause < 0.05]
    assert all(0.015 <= pause <= 0.025 for pause in brisk)
    assert sum(brisk) == pytest.approx(outbox_relay.BUSY_TIME, abs=0.1)
    assert all(pause >= 0.075 for pause in pauses[len(brisk) :])


async def test_outbox_is_not_polled_during_a_move(autojump_clock: MockClock) -> None:
    database = Scripted()
    database.waits = True
    await look_for(10, database, partial(trio.sleep, 3))
    assert len(database.looks) == 4


async def test_polling_the_outbox_takes_at_most_a_tenth_of_the_time(autojump_clock: MockClock) -> None:
    database = Scripted()
    database.waits, database.cost = True, 0.05
    pauses = await look_for(10, database, trio.lowlevel.checkpoint)
    assert all(pause >= 0.5 - 1e-6 for pause in pauses)
