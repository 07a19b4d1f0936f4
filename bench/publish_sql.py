"""Publishing from SQL: how long until a subscriber has it, and whom a transaction holds up that is left open.

    python bench/publish_sql.py --rates 0.2 5 100 --seconds 30

Beside the calls of catbus.publish, each a transaction of its own, a client publishes over WebSocket 20 times a second.
Each round is measured twice: alone, and with a transaction open from before the first call to after the last that has
called catbus.publish itself. In the end one such transaction commits, and its message has to come; another one rolls
back, and its message must not.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from re import compile as pattern
from typing import NamedTuple

import asyncpg  # type: ignore[import-untyped]
import harness
from harness import Server, auth_line, frame, percentile

CLIENT_RATE = 20
PING_RATE = 0.2
PATIENCE = 10.0
WIDTH = 11
SQL = pattern(rb'"payload":\{"n":(\d+)\}')
PUBLISHED = pattern(rb'"type":"published"[^}]*?"id":(\d+)')

PUBLISH = """SELECT catbus.publish('bench.sql', format('{"n":%s}', $1::bigint))"""


class Peer:
    """A client whose incoming lines are searched for numbers; each has the time at which it came."""

    def __init__(self, server: Server, wanted: pattern, *lines: bytes) -> None:
        self.peer: socket.socket = harness.connect(server.port)
        self.peer.sendall(frame(b"".join((auth_line(), *lines))))
        harness.wait_for(self.peer, b'"subscribed"' if lines else b'"auth_ok"')
        self.peer.setblocking(False)
        self.times: dict[int, float] = {}
        self._wanted = wanted
        self._news = asyncio.Event()

    async def run(self) -> None:
        loop, data = asyncio.get_running_loop(), b""
        while more := await loop.sock_recv(self.peer, 1 << 16):
            now = time.monotonic()
            lines, end, data = (data + more).rpartition(b"\n")
            for number in self._wanted.findall(lines + end):
                if int(number) in self.times:
                    sys.exit(f"{number!r} came twice")
                self.times[int(number)] = now
            self._news.set()
        sys.exit("the server has closed a connection")

    async def send(self, line: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.peer, frame(line))

    async def wait_for(self, number: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while number not in self.times:
                self._news.clear()
                await self._news.wait()


class Result(NamedTuple):
    """Latencies in milliseconds: from a commit in SQL to a subscriber, and from a client's publish to its answer."""

    sql: list[float]
    client: list[float]


class Bench:
    """A replica's subscriber and publisher, and a connection to its database."""

    def __init__(self, url: str, subscriber: Peer, publisher: Peer) -> None:
        self._url = url
        self._subscriber = subscriber
        self._publisher = publisher
        self._next = 0

    async def run(self, rate: float, seconds: float) -> Result:
        """One round."""
        committed: dict[int, float] = {}
        sent: dict[int, float] = {}
        sql = await asyncpg.connect(self._url)

        async def call() -> None:
            number = self._number()
            await sql.execute(PUBLISH, number)
            committed[number] = time.monotonic()

        async def publish() -> None:
            number = self._number()
            sent[number] = time.monotonic()
            await self._publisher.send(b'{"type":"publish","channel":"bench.client","payload":1,"id":%d}\n' % number)

        async def ping() -> None:
            await self._subscriber.send(b'{"type":"ping","seq":0}\n')

        # Who is silent for long is taken for lost.
        await asyncio.gather(
            paced(call, rate, seconds), paced(publish, CLIENT_RATE, seconds), paced(ping, PING_RATE, seconds)
        )
        for number in committed:
            await self._subscriber.wait_for(number)
        for number in sent:
            await self._publisher.wait_for(number)
        await sql.close()
        return Result(
            [(self._subscriber.times[number] - began) * 1e3 for number, began in committed.items()],
            [(self._publisher.times[number] - began) * 1e3 for number, began in sent.items()],
        )

    @asynccontextmanager
    async def left_open(self, end: str) -> AsyncIterator[None]:
        """A transaction that has published and does not end before the block does: with COMMIT or ROLLBACK."""
        number = self._number()
        sql = await asyncpg.connect(self._url)
        await sql.execute("BEGIN")
        await sql.execute(PUBLISH, number)
        yield
        if number in self._subscriber.times:
            sys.exit("a message has come before its transaction was committed")
        await sql.execute(end)
        await sql.execute(PUBLISH, after := self._number())
        await self._subscriber.wait_for(after)
        if (number in self._subscriber.times) != (end == "COMMIT"):
            sys.exit(f"after {end} the message has {'come' if end != 'COMMIT' else 'not come'}")
        await sql.close()

    def _number(self) -> int:
        self._next += 1
        return self._next


async def paced(call: Callable[[], Awaitable[None]], rate: float, seconds: float) -> None:
    """Call at a constant rate, as far as the calls let it."""
    began = time.monotonic()
    for number in range(max(1, round(rate * seconds))):
        await asyncio.sleep(began + number / rate - time.monotonic())
        await call()


async def measure(url: str, server: Server, options: argparse.Namespace) -> None:
    subscriber = Peer(server, SQL, b'{"type":"subscribe","pattern":"bench.sql"}\n')
    publisher = Peer(server, PUBLISHED)
    readers = [asyncio.create_task(peer.run()) for peer in (subscriber, publisher)]
    bench = Bench(url, subscriber, publisher)
    columns = ("SQL p50 ms", "p99 ms", "longest", "client p50", "p99 ms", "longest")
    print(f"\n{'calls/s':>8} {'transaction':>12}", *(f"{column:>{WIDTH}}" for column in columns))
    for rate in options.rates:
        show(rate, "-", await bench.run(rate, options.seconds))
        for end in ("COMMIT", "ROLLBACK"):
            async with bench.left_open(end):
                show(rate, f"open, {end[0]}", await bench.run(rate, options.seconds))
    for reader in readers:
        reader.cancel()


def show(rate: float, transaction: str, result: Result) -> None:
    figures = [
        figure
        for latencies in result
        for figure in (percentile(latencies, 0.5), percentile(latencies, 0.99), max(latencies))
    ]
    print(f"{rate:8g} {transaction:>12}", *(f"{figure:{WIDTH}.1f}" for figure in figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[0.15, 5, 100], metavar="R", help="calls a second (0.15 5 100)"
    )
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="of each round (60)")
    parser.add_argument("--database", metavar="URL", help="instead of the embedded PostgreSQL; its log is written to")
    parser.add_argument("--directory", metavar="DIR", help="where the embedded PostgreSQL is kept meanwhile")
    options = parser.parse_args()
    harness.prepare()

    print(f"1 replica; SQL from its commit to a subscriber, {CLIENT_RATE} client publishes/s to their answers")
    print(harness.describe_machine())
    with ExitStack() as stack:
        url = stack.enter_context(harness.database(options.database, options.directory))
        server = stack.enter_context(harness.catbus_run(url))
        asyncio.run(measure(url, server, options))


if __name__ == "__main__":
    main()
