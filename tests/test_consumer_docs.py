"""`docs/consumers.md`: the workers run, as the role that the page sets up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from tests.postgres.consumers import MOVE, Position, dead_letters, positions
from tests.postgres.sql import open_sql, wait_until
from tests.test_readme import examples

PAGE = Path(__file__).parent.parent / "docs" / "consumers.md"
NAMES = ["consume", "consume blocking", "consume on Trio", "psycopg", "asyncpg", "sqlalchemy"]
WORKERS = dict(zip(NAMES, examples(PAGE, "python"), strict=True))
_, SET_UP, _ = examples(PAGE, "sql")
BROKEN = {"id": 3}
ORDERS = [{"id": 1, "cents": 250}, {"id": 2, "cents": 100}]


@asynccontextmanager
async def prepared(url: str) -> AsyncIterator[tuple[DatabaseConnection, str]]:
    """A connection of the owner, and the URL of the worker's role."""
    place = urlsplit(url).netloc.rpartition("@")[2]
    async with open_sql(url) as sql:
        await sql.execute("CREATE ROLE billing_worker LOGIN PASSWORD 'sesame'; SET search_path = public")
        try:
            await sql.execute(SET_UP)
            yield sql, urlsplit(url)._replace(netloc=f"billing_worker:sesame@{place}").geturl()
        finally:
            await sql.execute("DROP OWNED BY billing_worker CASCADE; DROP ROLE billing_worker")


async def publish(sql: DatabaseConnection, *orders: dict[str, int]) -> None:
    for order in orders:
        await sql.fetch("SELECT catbus.publish($1, $2::text)", f"orders.{order['id']}", json.dumps(order))
    await sql.fetch(MOVE)


@pytest.mark.parametrize("driver", WORKERS)
async def test_worker_processes_each_message_once(database_url: str, driver: str, tmp_path: Path) -> None:
    async def charged() -> list[dict[str, int]]:
        rows = await sql.fetch("SELECT order_id, cents FROM public.charges ORDER BY order_id")
        return [{"id": number, "cents": cents} for number, cents in rows]

    async def is_done() -> bool:
        assert process.poll() is None, process.communicate()
        return len(await charged()) == expected

    file = tmp_path / "worker.py"
    file.write_text(WORKERS[driver])
    async with prepared(database_url) as (sql, worker_url):
        await publish(sql, *ORDERS)
        command = [sys.executable, str(file)]
        environment = os.environ | {"DATABASE_URL": worker_url}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:  # noqa: ASYNC220
            try:
                expected = 2
                await wait_until(is_done)
                # One that fails in the worker that rejects, and the next one for a worker that waits.
                await publish(sql, *[BROKEN] * (driver == "sqlalchemy"), {"id": 4, "cents": 5})
                expected = 3
                await wait_until(is_done)
            finally:
                process.kill()
        assert await charged() == [*ORDERS, {"id": 4, "cents": 5}]
        if driver == "sqlalchemy":
            await wait_until(lambda: dead_letters(sql))
            ((_, seq, channel, payload, reason),) = await dead_letters(sql)
            assert (seq, channel, json.loads(payload), reason) == (3, "orders.3", BROKEN, "KeyError('cents')")


async def test_transaction_of_the_page_is_an_acknowledgement(database_url: str) -> None:
    async with prepared(database_url) as (sql, _):
        await publish(sql, ORDERS[0])
        script, _, deletion = examples(PAGE, "sql")
        await sql.execute(script)
        assert [partition.lag for partition in await positions(sql, "billing")].count(0) == 1
        await sql.execute(deletion)


def test_page_names_the_columns_of_positions() -> None:
    text = PAGE.read_text()
    assert all(f"`{name}`" in text for name in Position._fields if name != "partition")
