"""Workers of a consumer: processes that move messages into a table, and are killed in the middle of transactions."""

from __future__ import annotations

import random
import subprocess
import sys
from contextlib import suppress
from math import inf
from pathlib import Path

import trio

from catbus.postgres.access.asyncpg_bridge import DATABASE_ERRORS
from tests.consumers.exactly_once import EFFECTS_TABLE
from tests.consumers.worker import CONSUMER
from tests.postgres.processes import ROOT
from tests.postgres.proxy import Proxy
from tests.postgres.server import execute

from .database_pair import DatabasePair

PATTERN = "orders.*"
PARTITIONS = 4
WORKERS = 2
LAG = f"SELECT sum(lag) FROM catbus.consumer_positions() WHERE consumer = '{CONSUMER}'"


def prepare_consumer(url: str) -> None:
    """Create the consumer. Retention waits for it, because faults can stop it for longer than messages are kept."""
    execute(
        url,
        EFFECTS_TABLE,
        f"SELECT catbus.create_consumer('{CONSUMER}', '{PATTERN}', partitions => {PARTITIONS}, hold => true)",
    )


class ConsumerWorkers:
    """Workers that reach the database through a proxy. They are killed at random until the load has ended.

    With `early`, their cursor moves in a transaction before that of the effects, which is a mistake. `errors` is a file
    for what they write to stderr.
    """

    def __init__(self, proxy: Proxy, seed: int, errors: Path, *, early: bool = False) -> None:
        self.unexpected_exits: list[int] = []
        """Exit statuses of workers that ended by themselves."""
        self._proxy = proxy
        self._seed = seed
        self._errors = errors
        self._arguments = ["--early"] * early

    async def run(self, load_ended: trio.Event) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(WORKERS):
                nursery.start_soon(self._run_worker, random.Random(f"{self._seed}-worker-{number}"), load_ended)

    async def _run_worker(self, rng: random.Random, load_ended: trio.Event) -> None:
        while True:
            process = await self._start(rng.randrange(1 << 32))
            try:
                with trio.move_on_after(inf if load_ended.is_set() else rng.uniform(1.5, 6)):
                    self.unexpected_exits.append(await process.wait())
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()

    async def _start(self, seed: int) -> trio.Process:
        command = [sys.executable, "-m", "tests.consumers.worker", self._proxy.url, "--seed", str(seed)]
        with self._errors.open("ab") as errors:
            return await trio.lowlevel.open_process(
                [*command, *self._arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors
            )


async def wait_processed(database: DatabasePair) -> bool:
    """Wait until the consumer has processed the whole log. Returns False if that takes too long."""
    with trio.move_on_after(60):
        while True:
            with suppress(*DATABASE_ERRORS):
                if not (await database.fetch(LAG))[0][0]:
                    return True
            await trio.sleep(0.1)
    return False
