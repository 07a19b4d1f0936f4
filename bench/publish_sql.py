"""Publishing from SQL: the latency from a commit to a subscriber, and the effect of an open transaction.

    python bench/publish_sql.py --rates 0.2 5 100 --seconds 30

Each call of catbus.publish is a transaction of its own. Meanwhile a client publishes over WebSocket, 20 times per
second. Each rate is measured alone and beside an open transaction: it calls catbus.publish before the first measured
call and ends after the last one. One such transaction commits, and its message must arrive; another one rolls back, and
its message must not arrive.
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
DELIVERY_TIMEOUT = 10.0
WIDTH = 11
SQL = pattern(rb'"payload":\{"n":(\d+)\}')
PUBLISHED = pattern(rb'"type":"published"[^}]*?"id":(\d+)')

PUBLISH = """SELECT catbus.publish('bench.sql', format('{"n":%s}', $1::bigint))"""


class Peer:
    """A client that records the time at which each number that matches `wanted` arrives."""

    def __init__(self, server: Server, wanted: pattern, *lines: bytes) -> None:
        self.peer: socket.socket = harness.connect(server.port)
        self.peer.sendall(frame(b"".join((auth_line(), *lines))))
        harness.wait_for(self.peer, b'"subscribed"' if lines else b'"auth_ok"')
        self.peer.setblocking(False)
        self.times: dict[int, float] = {}
        self._wanted = wanted
        self._changed = asyncio.Event()

    async def run(self) -> None:
        loop, data = asyncio.get_running_loop(), b""
        while more := await loop.sock_recv(self.peer, 1 << 16):
            now = time.monotonic()
            lines, end, data = (data + more).rpartition(b"\n")
            for number in self._wanted.findall(lines + end):
                if int(number) in self.times:
                    sys.exit(f"message {number!r} arrived twice")
                self.times[int(number)] = now
            self._changed.set()
        sys.exit("the server closed a connection")

    async def send(self, line: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.peer, frame(line))

    async def wait_for(self, number: int) -> None:
        async with asyncio.timeout(DELIVERY_TIMEOUT):
            while number not in self.times:
                self._changed.clear()
                await self._changed.wait()


class Result(NamedTuple):
    """Latencies in milliseconds: from a commit in SQL to a subscriber, and from a client's publish to its reply."""

    sql: list[float]
    client: list[float]


class Bench:
    """A subscriber and a publisher of a replica, and the URL of its database."""

    def __init__(self, url: str, subscriber: Peer, publisher: Peer) -> None:
        self._url = url
        self._subscriber = subscriber
        self._publisher = publisher
        self._next = 0

    async def run(self, rate: float, seconds: float) -> Result:
        """Run one round."""
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

        # The broker closes a connection from which nothing arrives for a long time.
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
    async def open_transaction(self, end: str) -> AsyncIterator[None]:
        """Keep a transaction that has published open during the block. It ends with `end`, COMMIT or ROLLBACK."""
        number = self._number()
        sql = await asyncpg.connect(self._url)
        await sql.execute("BEGIN")
        await sql.execute(PUBLISH, number)
        yield
        if number in self._subscriber.times:
            sys.exit("a message arrived before its transaction was committed")
        await sql.execute(end)
        await sql.execute(PUBLISH, after := self._number())
        await self._subscriber.wait_for(after)
        if (number in self._subscriber.times) != (end == "COMMIT"):
            sys.exit(f"after {end} the message {'has arrived' if end != 'COMMIT' else 'has not arrived'}")
        await sql.close()

    def _number(self) -> int:
        self._next += 1
        return self._next


async def paced(call: Callable[[], Awaitable[None]], rate: float, seconds: float) -> None:
    """Call at a constant rate. A slow call delays the following ones."""
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
            async with bench.open_transaction(end):
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
        "--rates", type=float, nargs="*", default=[0.15, 5, 100], metavar="R", help="calls per second (0.15 5 100)"
    )
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="seconds of each round (60)")
    parser.add_argument(
        "--database",
        metavar="URL",
        help="a PostgreSQL to use instead of the embedded one; the messages stay in its log",
    )
    parser.add_argument("--directory", metavar="DIR", help="a directory for the data of the embedded PostgreSQL")
    options = parser.parse_args()
    harness.prepare()

    print(f"1 replica; latency of a SQL commit to a subscriber, and of {CLIENT_RATE} client publishes/s to the reply")
    print(harness.describe_machine())
    with ExitStack() as stack:
        url = stack.enter_context(harness.database(options.database, options.directory))
        server = stack.enter_context(harness.catbus_run(url))
        asyncio.run(measure(url, server, options))


if __name__ == "__main__":
    main()
