"""Workers of each driver on a real server: each message has its effect once, or becomes a dead letter."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from io import StringIO
from typing import Any

import anyio
import asyncpg  # type: ignore[import-untyped]
import psycopg
import pytest
import trio
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from catbus import ConsumerError, ConsumerMessage, consume, consume_blocking
from tests.postgres.bouncer import open_bouncer
from tests.postgres.consumers import YEAR

from .workers import (
    DRIVERS,
    INSERT,
    QUICK,
    Database,
    Worker,
    ignore,
    open_database,
    run_asyncio,
    running,
    wait_for,
    work,
)

CRASHING = """
import os, sys
from functools import partial
import psycopg
import catbus

def handle(connection, messages):
    for message in messages:
        connection.execute("INSERT INTO public.effects (seq) VALUES (%s)", (message.seq,))
        if message.seq == 2:
            os._exit(9)
        if message.seq == 3:
            stop.set()

import threading
stop = threading.Event()
catbus.consume_blocking(partial(psycopg.connect, sys.argv[1]), "c", handle, batch=10, attempts=2, stop=stop)
"""


class Broken(Exception):
    """What a handler raises."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost connection is replaced at once."""
    monkeypatch.setattr("catbus.worker.work_cycle.RECONNECT_BACKOFF", QUICK)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with open_database(database_url) as database:
        yield database


@pytest.mark.parametrize("driver", DRIVERS)
def test_each_message_has_its_effect_once_or_becomes_a_dead_letter(database: Database, driver: str) -> None:
    """One message fails always, another one twice, in a batch with others: neighbours are neither lost nor rejected."""
    failures: Counter[int] = Counter()

    def behave(message: ConsumerMessage) -> None:
        assert message.payload == {"id": 1}
        if message.seq == 3 or (message.seq == 5 and failures[5] < 2):
            failures[message.seq] += 1
            raise Broken(f"no {message.seq}")

    database.publish(*["a.x"] * 6)
    with running(driver, database.url, behave, batch=4, attempts=3) as worker:
        wait_for(lambda: len(database.effects()) == 5)
        database.publish("a.x", "a.y")
        wait_for(lambda: len(database.effects()) == 7)
    assert database.effects() == [1, 2, 4, 5, 6, 7, 8]
    assert database.dead_letters() == [(3, "Broken: no 3")]
    # Once in a batch, and three times alone. The next ones are received alone, too.
    assert failures == {3: 4, 5: 2}
    assert [attempt for seq, attempt in worker.seen if seq == 3] == [1, 1, 2, 3]
    assert [attempt for seq, attempt in worker.seen if seq == 5] == [1, 2, 3]
    statistics = worker.statistics
    assert (statistics.processed, statistics.dead_letters, statistics.reconnects) == (7, 1, 0)
    assert statistics.failures == failures.total()


@pytest.mark.parametrize("driver", DRIVERS)
def test_notification_wakes_a_worker_which_listens_outside_of_transactions(
    database: Database, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without notifications it would wait for an hour."""

    def is_processed(seq: int) -> bool:
        database.sql.execute("NOTIFY catbus")
        return database.effects()[-1:] == [seq]

    monkeypatch.setattr("catbus.worker.work_cycle.FIRST_PAUSE", 3600.0)
    with running(driver, database.url, poll=3600.0) as worker:
        for seq in (1, 2):
            wait_for(lambda seq=seq: worker.statistics.empty >= seq)
            database.publish("a.x", notify=False)
            wait_for(partial(is_processed, seq))
        worker.stop.set()
        worker.blocking_stop.set()
        wait_for(lambda: not is_processed(0) and not worker.running)
    assert database.rows("SELECT DISTINCT listening FROM public.effects") == [0]


@pytest.mark.parametrize("driver", DRIVERS)
def test_lost_connection_is_replaced_and_its_messages_come_again(database: Database, driver: str, quick: None) -> None:
    """It is lost in the handler, and while the worker waits."""
    cuts: list[int] = []

    def behave(message: ConsumerMessage) -> None:
        if len(cuts) < 2:
            cuts.append(message.seq)
            database.terminate_others()

    with running(driver, database.url, behave, batch=4) as worker:
        database.publish("a.x", "a.x", "a.x")
        wait_for(lambda: len(database.effects()) == 3)
        looks = worker.statistics.empty
        wait_for(lambda: worker.statistics.empty > looks)
        database.terminate_others()
        database.publish("a.x")
        wait_for(lambda: len(database.effects()) == 4)
    assert database.effects() == [1, 2, 3, 4]
    assert database.dead_letters() == []
    # The first one lost was a batch, the second one an attempt of message 1.
    assert cuts == [1, 1]
    assert [attempt for seq, attempt in worker.seen if seq == 1][-1] == 2
    assert worker.statistics.reconnects >= 3


def test_worker_far_behind_looks_on_without_a_pause(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at 10,000 messages at a time, and one in 36,000 is for it. With a pause it would wait for an hour."""
    database.sql.execute(
        "INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number) "
        "SELECT 0, n, 0, CASE n WHEN 25000 THEN 'a.x' ELSE 'b.x' END, '{\"id\": 1}', 'x', n "
        "FROM generate_series(1, 36000) AS n"
    )
    monkeypatch.setattr("catbus.worker.work_cycle.FIRST_PAUSE", 3600.0)
    worker = Worker(lambda worker: work("psycopg", database.url, ignore, worker, poll=3600.0))
    wait_for(database.effects)
    worker.stop.set()
    worker.blocking_stop.set()
    while worker.running:
        database.sql.execute("NOTIFY catbus")
    assert database.effects() == [25000]


def test_message_that_kills_its_worker_becomes_a_dead_letter(database: Database) -> None:
    database.publish(*["a.x"] * 3)
    codes = []
    while 0 not in codes:
        command = [sys.executable, "-c", CRASHING, database.url]
        codes.append(subprocess.run(command, check=False, timeout=60).returncode)
        assert len(codes) < 9
    # In the batch, and twice alone.
    assert codes == [9, 9, 9, 0]
    assert database.effects() == [1, 3]
    assert database.dead_letters() == [(2, "2 attempts have not ended with a commit")]


def test_message_whose_commit_fails_becomes_a_dead_letter(database: Database, quick: None) -> None:
    database.sql.execute("ALTER TABLE public.effects ADD UNIQUE (channel) DEFERRABLE INITIALLY DEFERRED")
    database.publish("a.x", "a.x", "a.y")
    for driver in ("psycopg", "asyncpg"):
        with running(driver, database.url, attempts=2):
            wait_for(lambda: len(database.effects()) == 2)
    assert database.effects() == [1, 3]
    assert database.dead_letters() == [(2, "2 attempts have not ended with a commit")]


@pytest.mark.parametrize("driver", DRIVERS)
def test_stop_finishes_the_transaction_first(database: Database, driver: str) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def behave(message: ConsumerMessage) -> None:
        entered.set()
        assert go_on.wait(20)

    database.publish(*["a.x"] * 4)
    with running(driver, database.url, behave, batch=3) as worker:
        assert entered.wait(20)
        worker.stop.set()
        worker.blocking_stop.set()
        go_on.set()
        wait_for(lambda: not worker.running)
    assert database.effects() == [1, 2, 3]


def test_workers_share_the_partitions_and_keep_the_order_of_channels(database_url: str) -> None:
    with open_database(database_url, partitions=4) as database, ExitStack() as stack:
        for driver in ("asyncpg", "asyncpg on Trio", "psycopg", "SQLAlchemy"):
            stack.enter_context(running(driver, database_url, batch=3))
        for _ in range(6):
            database.publish(*(f"a.{number}" for number in range(10)))
        wait_for(lambda: len(database.effects()) >= 60)
        for number in range(10):
            seqs = database.rows(f"SELECT seq FROM public.effects WHERE channel = 'a.{number}' ORDER BY id")
            assert seqs == [number + 1 + 10 * turn for turn in range(6)]


async def test_worker_polls_through_a_pooler(database_url: str) -> None:
    """Without prepared statements, of which asyncpg makes many otherwise."""
    with open_database(database_url) as database:
        async with open_bouncer(database_url, size=2) as bouncer:
            for driver in ("asyncpg", "asyncpg on Trio"):
                with running(driver, bouncer.url, poll=0.1) as worker:
                    database.publish("a.x", notify=False)
                    await trio.to_thread.run_sync(wait_for, lambda worker=worker: worker.statistics.processed == 1)
                    await trio.to_thread.run_sync(wait_for, lambda worker=worker: worker.statistics.empty > 3)
        assert database.effects() == [1, 2]
        assert database.rows("SELECT 1 FROM pg_stat_activity WHERE query LIKE '%LISTEN catbus'") == []


def test_package_needs_no_driver() -> None:
    code = "import sys, catbus; catbus.consume; print({'psycopg', 'sqlalchemy', 'asyncpg'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_connection_of_another_kind_is_a_type_error(database: Database) -> None:
    async def handle(connection: object, message: ConsumerMessage) -> None: ...

    connect = partial(psycopg.connect, database.url)
    with pytest.raises(TypeError, match="Connection"):
        trio.run(partial(consume, connect, "c", handle))
    with pytest.raises(TypeError, match="Connection"):
        run_asyncio(consume(connect, "c", handle))
    with pytest.raises(TypeError, match="StringIO"):
        consume_blocking(StringIO, "c", print)


def run_in_asyncio(function: Callable[..., Any], *args: object) -> None:
    run_asyncio(function(*args))


def retain_all(database: Database) -> None:
    now = f"floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint + {YEAR}"
    for _ in range(2):
        database.publish("a.x")
        database.sql.execute(f"SELECT catbus.retain(1000, 1::bigint << 50, {now})")


@pytest.mark.parametrize(
    ("name", "options", "prepare", "code", "text"),
    [
        ("missing", "", None, "42501", "has no consumer .* lists the consumers"),
        ("c", "-c default_transaction_isolation=serializable", None, "25001", "BEGIN ISOLATION LEVEL READ COMMITTED"),
        ("c", "", retain_all, "CB002", "has not received the messages 1 to 1, .* SELECT . FROM catbus.skip_gap"),
    ],
)
def test_worker_that_cannot_go_on_says_what_to_do(
    database: Database, name: str, options: str, prepare: Callable[[Database], None] | None, code: str, text: str
) -> None:
    async def handle(connection: object, message: ConsumerMessage) -> None: ...

    if prepare is not None:
        prepare(database)
    settings = {"default_transaction_isolation": "serializable"} if options else {}
    url = database.url.replace("postgres://", "postgresql+psycopg://", 1)
    engine = create_engine(url, connect_args={"options": options})
    async_connects = [
        partial(asyncpg.connect, database.url, server_settings=settings),
        partial(psycopg.AsyncConnection.connect, database.url, options=options),
    ]
    blocking_connects = [partial(psycopg.connect, database.url, options=options), engine.connect]
    works = [
        *(partial(run_in_asyncio, consume, connect, name, handle) for connect in async_connects),
        partial(trio.run, partial(consume, async_connects[0], name, handle)),
        *(partial(consume_blocking, connect, name, print) for connect in blocking_connects),
    ]
    for start in works:
        with pytest.raises(ConsumerError, match=text) as caught:
            start()
        assert caught.value.sqlstate == code
    engine.dispose()


def test_connection_that_commits_each_statement_is_rejected(database: Database) -> None:
    database.publish("a.x")
    engine = create_engine(
        database.url.replace("postgres://", "postgresql+psycopg://", 1), isolation_level="AUTOCOMMIT"
    )  # fmt: skip
    with pytest.raises(ConsumerError, match="AUTOCOMMIT"):
        consume_blocking(engine.connect, "c", print)
    engine.dispose()
    with running("psycopg", database.url):
        wait_for(lambda: database.effects() == [1])


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg", "SQLAlchemy"])
def test_cancellation_rolls_the_transaction_back(database: Database, driver: str) -> None:
    """The handler is cancelled between its statements, and within one."""
    url = database.url
    database.publish("a.x", "a.x")

    async def main(delay: float) -> None:
        async def handle(connection: Any, message: ConsumerMessage) -> None:
            insert = INSERT.format("1", "NULL")
            statements = [insert, "SELECT pg_sleep(60)"] if delay else [insert]
            for statement in statements:
                await connection.execute(text(statement) if driver == "SQLAlchemy" else statement)
                scope.deadline = anyio.current_time() + delay
            await anyio.sleep_forever()

        engine = create_async_engine(url.replace("postgres://", "postgresql+asyncpg://", 1))
        connects: dict[str, Any] = {
            "asyncpg": url,
            "psycopg": partial(psycopg.AsyncConnection.connect, url),
            "SQLAlchemy": engine.connect,
        }
        with anyio.CancelScope() as scope:
            await consume(connects[driver], "c", handle)
        assert scope.cancelled_caught
        await engine.dispose()

    # SQLAlchemy drops a connection of asyncpg, and the server ends the statement first.
    for delay in (0.0, 0.1) if driver != "SQLAlchemy" else (0.0,):
        run_asyncio(main(delay))
        if driver == "asyncpg":
            trio.run(main, delay)
    assert database.effects() == []
    with running("psycopg", url):
        wait_for(lambda: database.effects() == [1, 2])


def test_task_that_is_cancelled_by_asyncio_rolls_the_transaction_back(database: Database) -> None:
    async def main() -> None:
        async def handle(connection: Any, message: ConsumerMessage) -> None:
            await connection.execute(INSERT.format("1", "NULL"))
            entered.set()
            await asyncio.sleep(60)

        entered = asyncio.Event()
        task = asyncio.create_task(consume(database.url, "c", handle))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    database.publish("a.x")
    run_asyncio(main())
    with running("psycopg", database.url):
        wait_for(lambda: database.effects() == [1])
