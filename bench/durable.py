"""Durable publishing: two replicas on one PostgreSQL, publishers over WebSocket, every publish acknowledged.

    python bench/durable.py --publishers 8 --window 500 --repeat 3

An acknowledged publish is committed, so the speed depends on the disk. The program prints the time of an fdatasync in
the directory of the database. Without --database it uses the embedded PostgreSQL, with fsync on. Workloads: 50
publishes in a WebSocket frame, and one in a frame. Each publisher has as many pending publishes as --window allows. At
the end of each round the program counts the new entries of the log, which must be the acknowledged publishes, and their
transactions, which are the commits.
"""

from __future__ import annotations

import argparse
import asyncio
import select
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from re import compile as pattern
from typing import NamedTuple

import asyncpg  # type: ignore[import-untyped]
import harness
from harness import Publisher, Server, auth_line, cpu_time, frame, percentile

PAYLOAD = b'{"status":"paid","text":"%b"}' % (b"x" * 100)
BATCH_SIZE = 100
"""Publishes that are written in one system call."""
WIDTH = 14
REPLY_TIMEOUT = 30.0
"""Seconds after a round within which the last replies must arrive."""

PUBLISHED = pattern(rb'"type":"published"[^}]*?"id":(\d+)')


class Result(NamedTuple):
    """The result of a round.

    `speed` and `commits` are per second, latencies in milliseconds, `batch` in messages per commit, and `cpu` in
    microseconds per message.
    """

    speed: float
    p50: float
    p99: float
    commits: float
    batch: float
    cpu: float


class PublisherLoad:
    """A publisher that keeps its window of pending publishes full."""

    def __init__(self, server: Server, number: int, window: int) -> None:
        peer = harness.connect(server.port)
        peer.sendall(frame(auth_line()))
        harness.wait_for(peer, b'"auth_ok"')
        self.link = Publisher(peer)
        self.latencies: list[float] = []
        self._channel = b"bench.durable.%d" % number
        self._window = window
        self._pending: dict[int, float] = {}
        self._next = 1

    @property
    def pending(self) -> int:
        return len(self._pending)

    def publish(self, in_frame: int) -> None:
        """Publish whole frames until the window or the kernel's buffer is full."""
        frames = max(1, min(BATCH_SIZE, self._window) // in_frame)
        while not self.link.blocked and len(self._pending) + in_frame * frames <= self._window:
            self.link.write(b"".join([frame(self._lines(in_frame)) for _ in range(frames)]))

    def _lines(self, count: int) -> bytes:
        first, self._next = self._next, self._next + count
        now = time.monotonic()
        self._pending.update((number, now) for number in range(first, first + count))
        channel = self._channel
        return b"".join(
            [
                b'{"type":"publish","channel":"%b","payload":%b,"id":%d}\n' % (channel, PAYLOAD, number)
                for number in range(first, first + count)
            ]
        )

    def read(self) -> None:
        """Read the replies that have arrived, one for each publish."""
        lines = self.link.read()
        if b"error" in lines:
            sys.exit(f"a publish was rejected: {lines!r}")
        now = time.monotonic()
        pending = self._pending
        self.latencies += [now - pending.pop(int(number)) for number in PUBLISHED.findall(lines)]


class Bench:
    """Two replicas, their publishers and their database."""

    def __init__(self, servers: Sequence[Server], url: str, publishers: int, window: int) -> None:
        self._servers = servers
        self._url = url
        self._loads = [PublisherLoad(servers[number % len(servers)], number, window) for number in range(publishers)]

    def run(self, in_frame: int, seconds: float) -> Result:
        """Run one round."""
        before = asyncio.run(self._count())
        for load in self._loads:
            load.latencies.clear()
        cpu, began = self._cpu(), time.monotonic()
        self._publish(in_frame, began + seconds)
        elapsed, cpu = time.monotonic() - began, self._cpu() - cpu
        latencies = [latency for load in self._loads for latency in load.latencies]
        after = asyncio.run(self._count(before.head))
        if after.head - before.head != len(latencies) or after.messages != len(latencies):
            sys.exit(f"{len(latencies)} publishes were acknowledged; the log has {after} after {before.head}")
        return Result(
            len(latencies) / elapsed,
            percentile(latencies, 0.5) * 1e3,
            percentile(latencies, 0.99) * 1e3,
            after.commits / elapsed,
            len(latencies) / after.commits,
            cpu / len(latencies) * 1e6,
        )

    def _publish(self, in_frame: int, until: float) -> None:
        poll = select.epoll()
        loads = {load.link.peer.fileno(): load for load in self._loads}
        for file, load in loads.items():
            load.publish(in_frame)
            poll.register(file, select.EPOLLIN | select.EPOLLOUT * load.link.blocked)
        while (now := time.monotonic()) < until or any(load.pending for load in self._loads):
            if now > until + REPLY_TIMEOUT:
                sys.exit(f"{sum(load.pending for load in self._loads)} publishes have no reply")
            for file, happened in poll.poll(0.1):
                load = loads[file]
                was_blocked = load.link.blocked
                if happened & select.EPOLLOUT:
                    load.link.write()
                if happened & ~select.EPOLLOUT:
                    load.read()
                if now < until:
                    load.publish(in_frame)
                if load.link.blocked != was_blocked:
                    poll.modify(file, select.EPOLLIN | select.EPOLLOUT * load.link.blocked)

    def _cpu(self) -> float:
        return sum(cpu_time(server.pid) for server in self._servers)

    async def _count(self, after: int | None = None) -> LogCounts:
        """Return the head of the log, and the numbers of entries and of transactions after the seq `after`."""
        connection = await asyncpg.connect(self._url)
        try:
            head = await connection.fetchval("SELECT coalesce(max(seq), 0) FROM catbus.entries")
            messages, commits = await connection.fetchrow(
                "SELECT count(*), count(DISTINCT xmin::text) FROM catbus.entries WHERE seq > $1",
                head if after is None else after,
            )
            return LogCounts(head, messages, commits)
        finally:
            await connection.close()


class LogCounts(NamedTuple):
    head: int
    messages: int
    commits: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publishers", type=int, default=8, metavar="P", help="connections, half on each replica (8)")
    parser.add_argument("--window", type=int, default=500, metavar="W", help="pending publishes of each (500)")
    parser.add_argument(
        "--in-frame", type=int, nargs="*", default=[50, 1], metavar="F", help="publishes in a frame (50 1)"
    )
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="of each round (5)")
    parser.add_argument("--repeat", type=int, default=3, metavar="K", help="rounds, interleaved; medians are shown (3)")
    parser.add_argument(
        "--database",
        metavar="URL",
        help="a PostgreSQL to use instead of the embedded one; the messages stay in its log",
    )
    parser.add_argument("--directory", metavar="DIR", help="a directory for the data of the embedded PostgreSQL")
    options = parser.parse_args()
    if options.window < max(options.in_frame):
        parser.error("--window must be at least --in-frame")
    harness.prepare()

    print(f"2 replicas, {options.publishers} publishers, each with {options.window} pending publishes")
    print(f"{len(PAYLOAD)} bytes, medians of {options.repeat}")
    print(harness.describe_machine())
    results: dict[int, list[Result]] = {in_frame: [] for in_frame in options.in_frame}
    with ExitStack() as stack:
        url = stack.enter_context(harness.database(options.database, options.directory))
        servers = [stack.enter_context(harness.catbus_run(url)) for _ in range(2)]
        bench = Bench(servers, url, options.publishers, options.window)
        for _ in range(options.repeat):
            for in_frame in results:
                results[in_frame].append(bench.run(in_frame, options.seconds))
    columns = ("messages/s", "p50 ms", "p99 ms", "commits/s", "a commit", "CPU us/message")
    print(f"\n{'in a frame':>10}", *(f"{column:>{WIDTH}}" for column in columns))
    for in_frame, rounds in results.items():
        speed, p50, p99, commits, batch, cpu = (statistics.median(values) for values in zip(*rounds, strict=True))
        figures = f"{speed:,.0f}", f"{p50:.1f}", f"{p99:.1f}", f"{commits:.0f}", f"{batch:.1f}", f"{cpu:.1f}"
        print(f"{in_frame:10}", *(f"{figure:>{WIDTH}}" for figure in figures))
    print("\nCPU is the CPU time of both replicas, without PostgreSQL.")


if __name__ == "__main__":
    main()
