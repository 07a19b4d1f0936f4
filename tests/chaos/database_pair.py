"""A PostgreSQL primary and standby that are killed, stopped, filled up and failed over, and an operator's repairs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import trio

from catbus.errors import ConfigError
from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS, Row
from tests.postgres.clusters import SETTINGS, Cluster
from tests.postgres.proxy import Proxy
from tests.postgres.sql import open_sql

LIMITS = {"max_wal_size": "64MB", "min_wal_size": "32MB", "wal_keep_size": "64MB", "max_connections": "60"}
"""Small WAL because of the small disk, and connections for everybody, including forgotten ones."""

RESPONSE_TIMEOUT = 15.0
"""Seconds without a reply after which a server is killed and started again, as an operator would."""

START_ERRORS = (ConfigError, TimeoutError, subprocess.CalledProcessError, trio.TooSlowError)
"""Errors of a cluster that does not start because of a fault. The start is tried again."""

# Keeps appended messages for the checker, in the same transaction, because retention deletes them from the log.
AUDIT = """
CREATE SCHEMA audit;
CREATE TABLE audit.entries (epoch text NOT NULL, seq bigint NOT NULL, channel text NOT NULL, payload text NOT NULL);
CREATE FUNCTION audit.keep() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit.entries
    SELECT h.epoch, e.seq, e.channel, e.payload FROM appended AS e CROSS JOIN catbus.head AS h;
    RETURN NULL;
END
$$;
CREATE TRIGGER audit AFTER INSERT ON catbus.entries REFERENCING NEW TABLE AS appended
    FOR EACH STATEMENT EXECUTE FUNCTION audit.keep();
"""


class DatabasePair:
    """A primary, and a standby that follows it through `replication`, in directories below `disk`.

    `proxies` lead to the current primary.
    """

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        self.primary = Cluster(disk / "0", SETTINGS | LIMITS)
        self.standby = Cluster(disk / "1", SETTINGS | LIMITS)
        self.proxies: list[Proxy] = []
        self.replication = Proxy("postgres://nobody/")
        self.restarts = 0
        """How often the operator restarted a server."""
        self._given_up = False
        self._should_run = True
        self._clusters = trio.Lock()

    @property
    def url(self) -> str:
        return self.primary.url

    async def start(self, nursery: trio.Nursery) -> None:
        await self._run_in_thread(self.primary.start)
        self.replication = Proxy(self.url)
        await nursery.start(self.replication.run)
        nursery.start_soon(self._supervise)

    async def fetch(self, statement: str, *args: object) -> list[Row]:
        """Query the primary directly, past all proxies. Raises one of `DATABASE_ERRORS`."""
        async with open_sql(self.url) as sql:
            return list(await sql.fetch(statement, *args))

    async def follow(self) -> None:
        """Make the standby from nothing. Raises `CalledProcessError`, and what a cluster raises that cannot start."""
        async with self._clusters:
            await self._follow()

    async def _follow(self) -> None:
        await self._run_in_thread(self.standby.kill)
        await self._run_in_thread(lambda: shutil.rmtree(self.standby.directory, ignore_errors=True))
        await self._run_in_thread(lambda: self.primary.make_standby(self.standby, self.replication.url))

    # Faults, and how they are undone

    async def kill(self) -> None:
        """Kill the server with all its processes, as when the machine fails."""
        self._should_run = False
        async with self._clusters:
            await self._run_in_thread(self.primary.kill)

    async def stop(self) -> None:
        """Stop the server as for an update: its connections are closed."""
        self._should_run = False
        async with self._clusters:
            await self._run_in_thread(self.primary.stop)

    async def serve(self) -> None:
        """Start the server again, and wait until it answers."""
        self._should_run = True
        while not await self._answers():
            await trio.sleep(0.1)

    async def fail_over(self, loss: float) -> None:
        """Lose the primary with the commits of its last `loss` seconds, and promote the standby."""
        async with self._clusters:
            while not await self._catch_up():
                with suppress(*START_ERRORS):
                    await self._follow()
            self.replication.block_answers()
            await trio.sleep(loss)
            self._should_run = False
            await self._run_in_thread(self.primary.kill)
            self.replication.close()
            self.replication.unblock()
            for path in self.proxies:
                path.close()
            await self._run_in_thread(self.standby.promote)
            self.primary, self.standby = self.standby, self.primary
            self.replication.open(self.url)
            for path in self.proxies:
                path.open(self.url)
            self._should_run = True
        await self.serve()

    async def _catch_up(self) -> bool:
        """Wait until the standby has everything committed by now. Returns False if it does not get there."""
        with trio.move_on_after(3), suppress(*DATABASE_ERRORS):
            ((here,),) = await self.fetch("SELECT pg_current_wal_lsn()::text")
            async with open_sql(self.standby.url) as sql:
                while True:
                    ((there,),) = await sql.fetch("SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn", here)
                    if there:
                        return True
                    await trio.sleep(0.02)
        return False

    @property
    def ballast(self) -> Path:
        return self.disk / "ballast"

    def fill(self) -> None:
        """Fill the disk."""
        with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))

    def clear(self) -> None:
        self.ballast.unlink(missing_ok=True)

    # The operator

    async def _supervise(self) -> None:
        """Keep the server running while it should run."""
        last = trio.current_time()
        while True:
            await trio.sleep(0.2)
            if not self._should_run or await self._answers():
                last = trio.current_time()
                if self._should_run and not self.standby.running and not self._clusters.locked():
                    with suppress(*START_ERRORS):
                        await self.follow()
            elif not self.primary.running or trio.current_time() > last + RESPONSE_TIMEOUT:
                async with self._clusters:
                    if self._should_run:
                        self.restarts += 1
                        await self._run_in_thread(self.primary.kill)
                        with suppress(*START_ERRORS):
                            await self._run_in_thread(self.primary.start)
                last = trio.current_time()

    async def _answers(self) -> bool:
        with trio.move_on_after(2), suppress(*DATABASE_ERRORS):
            await self.fetch("SELECT 1")
            return True
        return False

    async def _run_in_thread(self, work: Callable[[], None]) -> None:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(work)

    async def close(self) -> None:
        self._should_run = False
        await self._run_in_thread(self.primary.kill)
        await self._run_in_thread(self.standby.kill)


def is_root() -> bool:
    return os.geteuid() == 0
