"""`docs/table-feeds.md`: the programs show the rows of the table, also when the log gets another epoch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
import trio
from psycopg.rows import dict_row

from catbus.config import DatabaseSettings
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.postgres.access.migrations import begin_epoch
from tests.brokers import CONFIG, TOKEN, request, running
from tests.log.harness import TEST_TIMEOUT
from tests.postgres.consumers import open_role
from tests.postgres.sql import open_sql, wait_until
from tests.programs import CLIENT, find_module, find_program
from tests.test_readme import examples

PAGE = Path(__file__).parent.parent / "docs" / "table-feeds.md"
MAP, PYTHON = examples(PAGE, "python")
WATCH, WATCH_RETAINED, GRANTS, _ = examples(PAGE, "sql")
[JAVASCRIPT] = examples(PAGE, "js")
LOCKED = "SELECT FROM pg_locks WHERE relation = 'public.orders'::regclass AND NOT granted"

PYTHON_END = """
import asyncio, json, os

async def main():
    database = await asyncpg.connect(os.environ["DATABASE_URL"])
    async with catbus.connect(os.environ["URL"], token=os.environ["TOKEN"]) as bus:
        await follow(database, bus, lambda orders: print(json.dumps([*orders.items()]), flush=True))

asyncio.run(main())
"""
JAVASCRIPT_START = """
import WebSocket from 'ws';
globalThis.WebSocket = WebSocket;
const token = process.env.TOKEN;
const show = (orders) => console.log(JSON.stringify([...orders].map(([id, { status }]) => [id, status])));
"""


class Program:
    """A program of the page that is running, and the states that it has shown."""

    def __init__(self) -> None:
        self.states: list[dict[int, str]] = []
        self._shown = trio.Event()

    async def read(self, stream: trio.abc.ReceiveStream) -> None:
        rest = b""
        async for data in stream:
            *lines, rest = (rest + data).split(b"\n")
            self.states += [dict(json.loads(line)) for line in lines]
            self._shown.set()
            self._shown = trio.Event()

    async def wait_for(self, state: dict[int, str]) -> None:
        """Wait until it has shown `state`, and nothing after that."""
        with trio.fail_after(TEST_TIMEOUT):
            while not self.states or self.states[-1] != state:
                await self._shown.wait()


@contextmanager
def serving_orders(database_url: str) -> Iterator[str]:
    """The address of a server that has the rows at `/orders.json`, read after the position."""

    class Orders(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with psycopg.connect(database_url, row_factory=dict_row) as sql:
                sql.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
                place = sql.execute("SELECT epoch, head FROM catbus.position()").fetchone()
                assert place is not None
                rows = sql.execute("SELECT id, status FROM public.orders").fetchall()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(place | {"rows": rows}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Orders) as server:
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@asynccontextmanager
async def program(language: str, database_url: str, address: str, folder: Path) -> AsyncIterator[Program]:
    """Run a program of the page until the end of the block."""
    shown = Program()
    url = f"ws://{address}/ws"
    with serving_orders(database_url) as server:
        if language == "python":
            file = folder / "follow.py"
            file.write_text(PYTHON + PYTHON_END)
            command = [sys.executable, str(file)]
        else:
            file = find_module("ws").parent / f".example-{folder.name}.mjs"
            text = JAVASCRIPT.replace("@catbus/client", f"{CLIENT}/src/catbus.js")
            text = text.replace("wss://bus.example.com/ws", url).replace("/orders.json", f"{server}/orders.json")
            file.write_text(JAVASCRIPT_START + text)
            command = [find_program("nodejs", "node"), str(file)]
        environment = os.environ | {"DATABASE_URL": database_url, "URL": url, "TOKEN": TOKEN}
        try:
            async with trio.open_nursery() as nursery:
                process = await trio.lowlevel.open_process(command, env=environment, stdout=subprocess.PIPE)
                assert process.stdout is not None
                nursery.start_soon(shown.read, process.stdout)
                try:
                    yield shown
                finally:
                    process.kill()
                    with trio.CancelScope(shield=True):
                        await process.wait()
        finally:
            file.unlink()


@asynccontextmanager
async def shop(url: str) -> AsyncIterator[tuple[DatabaseConnection, str]]:
    """The table of the page, and the address of a broker with that database."""
    async with open_sql(url) as sql:
        await sql.execute(f"SET search_path = public; {WATCH}; TRUNCATE orders; INSERT INTO orders VALUES (1, 'new')")
        async with running(msgspec.structs.replace(CONFIG, database=DatabaseSettings(url=url))) as (_, address):

            async def is_ready() -> bool:
                return (await request(address, "/ready")).status == 200

            await wait_until(is_ready)
            yield sql, address


@pytest.mark.parametrize("language", ["python", "javascript"])
async def test_program_shows_each_change(database_url: str, language: str, tmp_path: Path) -> None:
    async with (
        shop(database_url) as (sql, address),
        program(language, database_url, address, tmp_path) as shown,
    ):
        await shown.wait_for({1: "new"})
        await sql.execute("INSERT INTO orders VALUES (2, 'new')")
        await shown.wait_for({1: "new", 2: "new"})
        await sql.execute("UPDATE orders SET status = 'paid' WHERE id = 2")
        await shown.wait_for({1: "new", 2: "paid"})
        await sql.execute("DELETE FROM orders WHERE id = 1")
        await shown.wait_for({2: "paid"})
        # The database loses a change together with its message, and the log begins another epoch.
        await sql.execute("SELECT catbus.unwatch('orders'); UPDATE orders SET status = 'lost' WHERE id = 2")
        await begin_epoch(DatabaseSettings(url=database_url))
        await shown.wait_for({2: "lost"})


@pytest.mark.parametrize("language", ["python", "javascript"])
async def test_program_reads_again_if_another_epoch_begins_behind_its_snapshot(
    database_url: str, language: str, tmp_path: Path
) -> None:
    """Nothing is missing behind the position, so there is no gap, and only the epoch is another one."""

    async def is_waiting() -> object:
        return await sql.fetch(LOCKED)

    async def has_begun() -> bool:
        page = json.loads((await request(address, "/messages?pattern=orders.*")).body)
        return bool(page["cursor"].endswith(epoch))

    async with shop(database_url) as (sql, address), open_sql(database_url) as locker:
        await locker.execute("BEGIN; LOCK TABLE public.orders IN ACCESS EXCLUSIVE MODE")
        async with program(language, database_url, address, tmp_path) as shown:
            await wait_until(is_waiting)
            epoch, _ = await begin_epoch(DatabaseSettings(url=database_url))
            await wait_until(has_begun)
            await locker.execute(
                "SELECT catbus.unwatch('public.orders'); UPDATE public.orders SET status = 'lost'; COMMIT"
            )
            await shown.wait_for({1: "lost"})
        assert shown.states == [{1: "new"}, {1: "lost"}]


async def test_retained_feed_is_a_live_map(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(MAP, str(PAGE), "exec"), names)
    async with shop(database_url) as (sql, address), trio.open_nursery() as nursery:
        await sql.execute(WATCH_RETAINED)
        nursery.start_soon(names["show"], f"ws://{address}/ws", TOKEN)
        printed = ""
        number = 1
        while "'status': 'changed'" not in printed:
            number += 1
            await sql.execute(f"INSERT INTO orders VALUES ({number}, 'changed')")
            await trio.sleep(0.05)
            printed += capsys.readouterr().out
        nursery.cancel_scope.cancel()
    assert "'orders.1': {'id': 1, 'status': 'new'}" in printed


async def test_rights_of_the_page_are_enough(database_url: str) -> None:
    async with open_sql(database_url) as sql, open_role(database_url, "shop", [GRANTS]) as owner:
        await sql.execute("GRANT CREATE, USAGE ON SCHEMA public TO shop")
        await owner.execute(f"SET search_path = public; {WATCH}; SELECT catbus.unwatch('orders')")
        ((channel, payload),) = await sql.fetch("SELECT channel, payload FROM catbus.outbox_0")
        assert channel == "orders.42"
        assert payload == '{"operation":"insert","row":{"id":42,"status":"new"}}'
        assert payload in PAGE.read_text()
