"""Runs cases on a real PostgreSQL in real time: fewer of them, and disturbances happen only about where they should.

A replica reaches the database through a proxy of its own. A failover is imitated by the same database without its
newest entries, and with the epoch on another timeline.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio

from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from tests.postgres.proxy import Proxy, open_proxy
from tests.postgres.sql import open_sql

from .case_runner import CHANNELS, ERASED_PATTERNS, PAUSES, POISON, REPLICAS, Case, CaseRunner, Position, PromiseBroken
from .log_model import LogModel, Row

_BEGIN = "BEGIN; SELECT FROM catbus.head FOR UPDATE"
_NEW = f"""
DELETE FROM catbus.entries;
DELETE FROM catbus.outbox_0;
DELETE FROM catbus.outbox_1;
DELETE FROM catbus.deleted_ranges;
UPDATE catbus.head SET floor = 1;
UPDATE catbus.epochs SET after_seq = 0;
SELECT setval('catbus.reached_seq', 0);
ALTER TABLE catbus.entries DROP CONSTRAINT IF EXISTS sound;
ALTER TABLE catbus.entries ADD CONSTRAINT sound CHECK (payload NOT LIKE '%{POISON}%');
"""
_END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> ALL ($1)"
_OUTBOX = "SELECT payload FROM catbus.outbox_0 UNION ALL SELECT payload FROM catbus.outbox_1"
_KEPT = "SELECT greatest(h.floor - 1, (SELECT max(e.after_seq) FROM catbus.epochs AS e)) FROM catbus.head AS h"


class PostgresRunner(CaseRunner):
    scale = 0.1
    recovery_poll_interval = 0.02
    recovery_timeout = 20.0

    def __init__(
        self,
        case: Case,
        nursery: trio.Nursery,
        sql: DatabaseConnection,
        locking: DatabaseConnection,
        proxies: list[Proxy],
    ) -> None:
        self.sql = sql
        """The test's own connection; `locking` is the one that holds the head row."""
        self.locking = locking
        self.proxies = proxies
        self.under_way = 0
        super().__init__(case, nursery, LogModel(follows=False))

    def url(self, slot: int, number: int) -> str:
        return self.proxies[slot].url

    async def position(self) -> Position:
        # The outbox is read first, so what has left it is in the log by the time that the model looks.
        waiting = len(await self.sql.fetch(_OUTBOX))
        (epoch,) = await self.sql.fetchrow("SELECT epoch FROM catbus.position()")
        await self.observe()
        return Position(epoch, len(self.model.log), waiting)

    async def observe(self) -> None:
        """Commit to the model what was committed since it looked last."""
        rows = await self.sql.fetch(
            "SELECT seq, channel, payload FROM catbus.entries WHERE seq > $1 ORDER BY seq", len(self.model.log)
        )
        self.model.commit([Row(*row) for row in rows])

    @property
    def busy(self) -> bool:
        return self.under_way > 0

    async def heal(self) -> None:
        self.start_database(0, 0)
        for proxy in self.proxies:
            proxy.unblock()

    # What goes wrong

    async def publish_from_sql(self, a: int, b: int) -> None:
        text = f'"{next(self.texts)}"'
        await self.sql.fetch("SELECT catbus.publish($1, $2::text)", CHANNELS[a % 4], text)
        self.model.published_by_sql.add(text)

    def cut_connections(self, a: int, b: int) -> None:
        self.proxies[a % REPLICAS].cut()

    def freeze_connections(self, a: int, b: int) -> None:
        self.proxies[a % REPLICAS].block()
        self.later(b, self.proxies[a % REPLICAS].unblock)

    def disturb_statement(self, a: int, b: int) -> None:
        """Lose or delay statements or their replies; all of them, as nobody knows which statement is under way."""
        proxy = self.proxies[a % REPLICAS]
        if b & 1:
            proxy.block_answers()
        else:
            proxy.block()
        if b & 2:
            self.later(a % 6, proxy.unblock)
        else:
            self.later(a % 4, lambda: (proxy.cut(), proxy.unblock()))

    def stop_database(self, a: int, b: int) -> None:
        for proxy in self.proxies:
            proxy.close()

    enter_standby = stop_database

    def start_database(self, a: int, b: int) -> None:
        for proxy in self.proxies:
            proxy.open()

    async def fail_over(self, a: int, b: int) -> None:
        self.stop_database(a, b)
        await self.sql.fetch(_END, [self.sql.pid, self.locking.pid])
        await self.sql.execute(_BEGIN)
        await self.observe()
        ((kept,),) = await self.sql.fetch(_KEPT)
        head = max(len(self.model.log) - (a % 4 if b & 6 else 0), kept)
        await self.sql.execute(
            f"DELETE FROM catbus.entries WHERE seq > {head}; UPDATE catbus.epochs SET timeline = -1; "
            f"SELECT setval('catbus.reached_seq', least(last_value, {head})) FROM catbus.reached_seq; COMMIT"
        )
        self.model.set_back(head, [text for (text,) in await self.sql.fetch(_OUTBOX)])
        self.start_database(a, b)

    async def apply_retention(self, a: int, b: int) -> None:
        await self.sql.execute(_BEGIN)
        await self.observe()
        head = len(self.model.log)
        self.retention_end = max(self.retention_end, min(self.retention_end + a % 5 + 1, head))
        await self.sql.execute(f"UPDATE catbus.head SET floor = {self.retention_end + 1}")
        await self.sql.execute(f"DELETE FROM catbus.entries WHERE seq <= {self.retention_end}; COMMIT")

    request_retention = apply_retention

    async def erase(self, a: int, b: int) -> None:
        await self.sql.execute(_BEGIN)
        await self.observe()
        before = await self._erased_seqs()
        waiting = {text for (text,) in await self.sql.fetch(_OUTBOX)}
        await self.sql.fetch("SELECT catbus.erase($1)", ERASED_PATTERNS[a % 4])
        # The lock on the head keeps the replicas from moving any of them into the log meanwhile.
        self.model.published_by_sql -= waiting - {text for (text,) in await self.sql.fetch(_OUTBOX)}
        (number,) = await self.sql.fetchrow("SELECT max(erasure) FROM catbus.erasures")
        self.model.erase(await self._erased_seqs() - before, number)
        await self.sql.execute("COMMIT")

    async def _erased_seqs(self) -> set[int]:
        (seqs,) = await self.sql.fetchrow("SELECT catbus.erased_seqs(0, $1)", len(self.model.log))
        return set(seqs)

    async def begin_epoch(self, a: int, b: int) -> None:
        await self.sql.fetch("SELECT catbus.new_epoch((SELECT h.epoch FROM catbus.head AS h))")

    def lock_head(self, a: int, b: int) -> None:
        if not self.busy:
            self.start_soon(self._lock(PAUSES[b] * self.scale))

    async def _lock(self, seconds: float) -> None:
        await self.locking.execute(_BEGIN)
        await trio.sleep(seconds)
        await self.locking.execute("ROLLBACK")

    def drop_notifications(self, a: int, b: int) -> None:
        """Do nothing: a real notification cannot be lost without its connection."""

    delay_notifications = drop_notifications

    def later(self, b: int, do: Callable[[], object]) -> None:
        async def wait() -> None:
            await trio.sleep(PAUSES[b] * self.scale)
            do()

        self.start_soon(wait())

    def start_soon(self, what: Awaitable[None]) -> None:
        async def run() -> None:
            await what
            self.under_way -= 1

        self.under_way += 1
        self.nursery.start_soon(run)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[DatabaseConnection, DatabaseConnection, list[Proxy]]]:
    async with (
        open_sql(url) as sql,
        open_sql(url) as locking,
        open_proxy(url) as one,
        open_proxy(url) as other,
    ):
        yield sql, locking, [one, other]


async def play(case: Case, sql: DatabaseConnection, locking: DatabaseConnection, proxies: list[Proxy]) -> int:
    """Run a case within `connected()`, and return its number of episodes. Raises `PromiseBroken`."""
    random.seed(case.seed)
    await sql.execute(_NEW)
    runner: PostgresRunner | None = None
    try:
        async with trio.open_nursery() as nursery:
            runner = PostgresRunner(case._replace(silent=False), nursery, sql, locking, proxies)
            await runner.play()
            nursery.cancel_scope.cancel()
    except Exception as error:
        raise PromiseBroken("\n".join([*(runner.trace if runner else ()), repr(error)])) from error
    if runner.model.broken:
        raise PromiseBroken("\n".join([*runner.trace, *runner.model.broken[:3]]))
    return runner.episodes
