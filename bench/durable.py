"""Durable publishing: two replicas on one PostgreSQL, publishers over WebSocket, every publish acknowledged.

    python bench/durable.py --publishers 8 --window 500 --repeat 3

Acknowledged means committed, so a figure here means nothing without what an fsync takes: it is measured beside it, in
the directory of the database. Without --database the embedded PostgreSQL serves, with fsync on. Workloads: 50 publishes
in a WebSocket frame, and one in a frame. Each publisher has as many unanswered publishes as --window allows. At the end
of each round what was acknowledged is counted in the log; the transactions that brought it are the commits.
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
BURST = 100
"""Frames of one publish that are handed to the kernel at once."""
WIDTH = 14
PATIENCE = 30.0
"""Seconds in which the last answers must have come."""

PUBLISHED = pattern(rb'"type":"published"[^}]*?"id":(\d+)')


class Result(NamedTuple):
    """`speed` and `commits` a second, latencies in milliseconds, `batch` messages a commit, `cpu` in us a message."""

    speed: float
    p50: float
    p99: float
    commits: float
    batch: float
    cpu: float


class Load:
    """One publisher that keeps its window full."""

    def __init__(self, server: Server, number: int, window: int) -> None:
        peer = harness.connect(server.port)
        peer.sendall(frame(auth_line()))
        harness.wait_for(peer, b'"auth_ok"')
        self.link = Publisher(peer)
        self.latencies: list[float] = []
        self._channel = b"bench.durable.%d" % number
        self._window = window
        self._unanswered: dict[int, float] = {}
        self._next = 1

    @property
    def unanswered(self) -> int:
        return len(self._unanswered)

    def publish(self, in_frame: int) -> None:
        """Publish whole frames, as far as window and kernel have room."""
        frames = max(1, min(BURST, self._window) // in_frame)
        while not self.link.blocked and len(self._unanswered) + in_frame * frames <= self._window:
            self.link.write(b"".join([frame(self._lines(in_frame)) for _ in range(frames)]))

    def _lines(self, count: int) -> bytes:
        first, self._next = self._next, self._next + count
        now = time.monotonic()
        self._unanswered.update((number, now) for number in range(first, first + count))
        channel = self._channel
        return b"".join(
            [
                b'{"type":"publish","channel":"%b","payload":%b,"id":%d}\n' % (channel, PAYLOAD, number)
                for number in range(first, first + count)
            ]
        )

    def read(self) -> None:
        """Count the answers that have come. Each publish has one."""
        lines = self.link.read()
        if b"error" in lines:
            sys.exit(f"refused: {lines!r}")
        now = time.monotonic()
        unanswered = self._unanswered
        self.latencies += [now - unanswered.pop(int(number)) for number in PUBLISHED.findall(lines)]


class Bench:
    """Two replicas, their publishers and their database."""

    def __init__(self, servers: Sequence[Server], url: str, publishers: int, window: int) -> None:
        self._servers = servers
        self._url = url
        self._loads = [Load(servers[number % len(servers)], number, window) for number in range(publishers)]

    def run(self, in_frame: int, seconds: float) -> Result:
        """One round."""
        before = asyncio.run(self._look())
        for load in self._loads:
            load.latencies.clear()
        cpu, began = self._cpu(), time.monotonic()
        self._publish(in_frame, began + seconds)
        elapsed, cpu = time.monotonic() - began, self._cpu() - cpu
        latencies = [latency for load in self._loads for latency in load.latencies]
        after = asyncio.run(self._look(before.head))
        if after.head - before.head != len(latencies) or after.messages != len(latencies):
            sys.exit(f"{len(latencies)} publishes were acknowledged, and in the log are {after} after {before.head}")
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
        while (now := time.monotonic()) < until or any(load.unanswered for load in self._loads):
            if now > until + PATIENCE:
                sys.exit(f"{sum(load.unanswered for load in self._loads)} publishes were never answered")
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

    async def _look(self, after: int | None = None) -> Look:
        """Where the log ends, and what stands behind `after`."""
        connection = await asyncpg.connect(self._url)
        try:
            head = await connection.fetchval("SELECT coalesce(max(seq), 0) FROM catbus.entries")
            messages, commits = await connection.fetchrow(
                "SELECT count(*), count(DISTINCT xmin::text) FROM catbus.entries WHERE seq > $1",
                head if after is None else after,
            )
            return Look(head, messages, commits)
        finally:
            await connection.close()


class Look(NamedTuple):
    head: int
    messages: int
    commits: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publishers", type=int, default=8, metavar="P", help="connections, half on each replica (8)")
    parser.add_argument("--window", type=int, default=500, metavar="W", help="unanswered publishes of each (500)")
    parser.add_argument(
        "--in-frame", type=int, nargs="*", default=[50, 1], metavar="F", help="publishes a frame (50 1)"
    )
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="of each round (5)")
    parser.add_argument("--repeat", type=int, default=3, metavar="K", help="rounds, interleaved; medians are shown (3)")
    parser.add_argument("--database", metavar="URL", help="instead of the embedded PostgreSQL; its log is written to")
    parser.add_argument("--directory", metavar="DIR", help="where the embedded PostgreSQL is kept meanwhile")
    options = parser.parse_args()
    if options.window < max(options.in_frame):
        parser.error("--window: a frame has to fit into it")
    harness.prepare()

    print(f"2 replicas, {options.publishers} publishers, each with {options.window} unanswered publishes")
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
    print("\nCPU is that of both replicas, without PostgreSQL.")


if __name__ == "__main__":
    main()
