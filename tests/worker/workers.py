"""Workers of each driver, in threads of the test, and the database that they work on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
import asyncpg  # type: ignore[import-untyped]
import psycopg
import trio
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from catbus import Backoff, ConsumerMessage, WorkStatistics, consume, consume_blocking
from tests.log.harness import TEST_TIMEOUT

MOVE = "SELECT m.last FROM catbus.head AS h CROSS JOIN LATERAL catbus.move_outbox('local', h.epoch, NULL) AS m"
TABLE = """
CREATE FUNCTION public.listening() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM pg_listening_channels()';
CREATE TABLE public.effects (
    id bigint GENERATED ALWAYS AS IDENTITY, seq bigint, channel text, listening bigint DEFAULT public.listening()
);
"""
INSERT = "INSERT INTO public.effects (seq, channel) VALUES ({}, {})"
QUICK = Backoff(0.01, 0.05, 0.0)

Behaviour = Callable[[ConsumerMessage], object]


def run_asyncio(coroutine: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run` on a loop of asyncio: where trio-asyncio is imported, it would use one of its own."""
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(coroutine)


def wait_for(condition: Callable[[], object]) -> None:
    """Poll until a condition holds."""
    end = time.monotonic() + TEST_TIMEOUT
    while not condition():
        assert time.monotonic() < end, "the condition does not come true"
        time.sleep(0.01)


class Database:
    """The log, a consumer `c`, and a table of effects in which a message may be twice."""

    def __init__(self, url: str, partitions: int = 1) -> None:
        self.url = url
        self.sql = psycopg.connect(url, autocommit=True)
        self.sql.execute(TABLE)
        self.sql.execute("SELECT catbus.create_consumer('c', 'a.*', partitions => %s)", (partitions,))

    def publish(self, *channels: str, notify: bool = True) -> None:
        for channel in channels:
            self.sql.execute("SELECT catbus.publish(%s, '{\"id\": 1}')", (channel,))
        while self.sql.execute(MOVE).fetchone() != (None,):
            pass
        if notify:
            self.sql.execute("NOTIFY catbus")

    def rows(self, query: str) -> list[Any]:
        return [row if len(row) > 1 else row[0] for row in self.sql.execute(query).fetchall()]

    def terminate_others(self) -> None:
        self.sql.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )

    def effects(self) -> list[int]:
        return self.rows("SELECT seq FROM public.effects ORDER BY id")

    def dead_letters(self) -> list[tuple[int, str]]:
        return self.rows("SELECT seq, reason FROM catbus.dead_letters ORDER BY seq")


@contextmanager
def open_database(url: str, partitions: int = 1) -> Iterator[Database]:
    database = Database(url, partitions)
    with database.sql:
        yield database


class Stop(threading.Event):
    """An event that any thread may set, and that coroutines may wait for."""

    async def wait(self) -> None:  # type: ignore[override]
        while not self.is_set():
            await anyio.sleep(0.01)


class Worker:
    """A worker in a thread."""

    def __init__(self, work: Callable[[Worker], object]) -> None:
        self.stop = Stop()
        self.blocking_stop = threading.Event()
        self.statistics = WorkStatistics()
        self.seen: list[tuple[int, int]] = []
        """Seq and attempt of each message that the handler got."""
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[Worker], object]) -> None:
        try:
            work(self)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        self.stop.set()
        self.blocking_stop.set()
        self._thread.join(TEST_TIMEOUT)
        assert not self._thread.is_alive()


def each(messages: Any) -> Sequence[ConsumerMessage]:
    return [messages] if isinstance(messages, ConsumerMessage) else messages


def work(driver: str, url: str, behave: Behaviour, worker: Worker, **options: Any) -> None:
    """Run a worker of a driver that inserts its messages, after `behave`, until it is stopped."""
    options = {"backoff": QUICK, "statistics": worker.statistics, **options}
    sqlalchemy = url.replace("postgres://", "postgresql+psycopg://", 1)

    def note(message: ConsumerMessage) -> None:
        worker.seen.append((message.seq, message.attempt))
        behave(message)

    async def handle_asyncpg(connection: Any, messages: Any) -> None:
        for message in each(messages):
            await connection.execute(INSERT.format("$1", "$2"), message.seq, message.channel)
            note(message)

    async def handle_psycopg(connection: psycopg.AsyncConnection, messages: Any) -> None:
        for message in each(messages):
            await connection.execute(INSERT.format("%s", "%s"), (message.seq, message.channel))
            note(message)

    async def handle_sqlalchemy(connection: Any, messages: Any) -> None:
        for message in each(messages):
            await connection.execute(text(INSERT.format(":a", ":b")), {"a": message.seq, "b": message.channel})
            note(message)

    def handle_blocking(connection: psycopg.Connection, messages: Any) -> None:
        for message in each(messages):
            connection.execute(INSERT.format("%s", "%s"), (message.seq, message.channel))
            note(message)

    def handle_blocking_sqlalchemy(connection: Any, messages: Any) -> None:
        for message in each(messages):
            connection.execute(text(INSERT.format(":a", ":b")), {"a": message.seq, "b": message.channel})
            note(message)

    async def pooled() -> None:
        async with asyncpg.create_pool(url, min_size=1, max_size=2) as pool:
            await consume(pool.acquire, "c", handle_asyncpg, stop=worker.stop, **options)

    async def over_sqlalchemy(address: str) -> None:
        engine = create_async_engine(address)
        try:
            await consume(engine.connect, "c", handle_sqlalchemy, stop=worker.stop, **options)
        finally:
            await engine.dispose()

    def over_blocking_sqlalchemy() -> None:
        engine = create_engine(sqlalchemy)
        try:
            consume_blocking(engine.connect, "c", handle_blocking_sqlalchemy, stop=worker.blocking_stop, **options)
        finally:
            engine.dispose()

    consume_asyncpg = partial(consume, handler=handle_asyncpg, name="c", stop=worker.stop, **options)
    match driver:
        case "asyncpg":
            run_asyncio(consume_asyncpg(url))
        case "asyncpg pool":
            run_asyncio(pooled())
        case "asyncpg on Trio":
            trio.run(lambda: consume_asyncpg(url))
        case "psycopg":
            connect = partial(psycopg.connect, url)
            consume_blocking(connect, "c", handle_blocking, stop=worker.blocking_stop, **options)
        case "psycopg async":
            connect = partial(psycopg.AsyncConnection.connect, url)
            run_asyncio(consume(connect, "c", handle_psycopg, stop=worker.stop, **options))
        case "SQLAlchemy":
            over_blocking_sqlalchemy()
        case "SQLAlchemy async, asyncpg":
            run_asyncio(over_sqlalchemy(sqlalchemy.replace("+psycopg", "+asyncpg", 1)))
        case "SQLAlchemy async, psycopg":
            run_asyncio(over_sqlalchemy(sqlalchemy))


DRIVERS = [
    "asyncpg",
    "asyncpg pool",
    "asyncpg on Trio",
    "psycopg",
    "psycopg async",
    "SQLAlchemy",
    "SQLAlchemy async, asyncpg",
    "SQLAlchemy async, psycopg",
]


def ignore(message: ConsumerMessage) -> None:
    """Do nothing more."""


@contextmanager
def running(driver: str, url: str, behave: Behaviour = ignore, **options: Any) -> Iterator[Worker]:
    """A worker that is stopped at the end, and must not have failed."""
    worker = Worker(lambda worker: work(driver, url, behave, worker, **options))
    try:
        yield worker
    finally:
        worker.end()
    if worker.error is not None:
        raise worker.error
