"""A steady state: one replica takes publishes at a constant rate for a long time, and retention deletes them.

    python bench/soak.py --minutes 10 --rate 5000 --age 60 --held both

Each line shows three figures that must stay flat: the latency of an append to its publisher, the size of the log's
tables, and the memory of the replica. With `--held yes` another transaction in the database keeps its snapshot open
during the whole run, as a report or a forgotten session does; `both` makes a run without it and a run with it. At the
end the program compares the middle third of the run with the last third. In the first third the log fills up.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from re import compile as pattern
from typing import NamedTuple

import asyncpg  # type: ignore[import-untyped]
import harness
from harness import Publisher, Server, auth_line, frame, percentile

PAYLOAD = b'{"status":"paid","text":"%b"}' % (b"x" * 100)
TICK = 0.01
"""Seconds between batches of publishes."""
REPLY_TIMEOUT = 30.0
WIDTH = 12
PUBLISHED = pattern(rb'"type":"published"[^}]*?"id":(\d+)')

_TABLES = """
SELECT sum(pg_total_relation_size(format('catbus.entries_%s', n)::regclass))::bigint FROM generate_series(0, 7) AS n
"""


class Interval(NamedTuple):
    """One interval: latencies in milliseconds, sizes in MiB."""

    speed: float
    p50: float
    p99: float
    worst: float
    tables: float
    entries: int
    memory: float


class Load:
    """A publisher with a constant rate, which does not wait for replies."""

    def __init__(self, server: Server, rate: int) -> None:
        peer = harness.connect(server.port)
        peer.sendall(frame(auth_line()))
        harness.wait_for(peer, b'"auth_ok"')
        self._link = Publisher(peer)
        self._rate = rate
        self._sent: dict[int, float] = {}
        self._began = time.monotonic()
        self._count = 0
        self.latencies: list[float] = []

    def run(self, until: float) -> None:
        """Publish until the time `until`."""
        while (now := time.monotonic()) < until:
            due = int((now - self._began) * self._rate)
            self._link.write(b"".join([self._publish(now) for _ in range(due - self._count)]))
            self._read(min(until, now + TICK))

    def finish(self) -> None:
        """Wait for the outstanding replies."""
        until = time.monotonic() + REPLY_TIMEOUT
        while self._sent:
            if time.monotonic() > until:
                sys.exit(f"{len(self._sent)} publishes have no reply")
            self._read(until)

    def _publish(self, now: float) -> bytes:
        self._count += 1
        self._sent[self._count] = now
        return frame(b'{"type":"publish","channel":"bench.soak","payload":%b,"id":%d}\n' % (PAYLOAD, self._count))

    def _read(self, until: float) -> None:
        while True:
            lines = self._link.wait(until)
            if b"error" in lines:
                sys.exit(f"refused: {lines!r}")
            now = time.monotonic()
            self.latencies += [now - self._sent.pop(int(number)) for number in PUBLISHED.findall(lines)]
            if now >= until or not self._sent:
                return


async def look_at_log(url: str) -> tuple[float, int]:
    """Return the size of the log's tables in MiB, and the number of entries."""
    connection = await asyncpg.connect(url)
    try:
        size = await connection.fetchval(_TABLES)
        _, head, floor = await connection.fetchrow("SELECT epoch, head, floor FROM catbus.position()")
        return size / (1 << 20), head - floor + 1
    finally:
        await connection.close()


def memory(pid: int) -> float:
    """Return the memory of a process in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


async def hold(url: str) -> asyncpg.Connection:
    """Hold a transaction open whose snapshot keeps PostgreSQL from removing dead rows."""
    connection = await asyncpg.connect(url)
    await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await connection.fetchval("SELECT pg_current_xact_id()")
    return connection


def run(url: str, options: argparse.Namespace, *, held: bool) -> list[Interval]:
    """Run the load, and return a line for each interval."""
    print(f"\n{'with a snapshot held open' if held else 'nothing else in the database'}")
    columns = ("messages/s", "p50 ms", "p99 ms", "longest ms", "tables MiB", "entries", "memory MiB")
    print(f"{'seconds':>8}", *(f"{column:>{WIDTH}}" for column in columns))
    intervals: list[Interval] = []
    settings = f'\n[retention]\nage = "{options.age:g}s"\n'
    with asyncio.Runner() as runner, harness.catbus_run(url, settings=settings) as server:
        holder = runner.run(hold(url)) if held else None
        load, began = Load(server, options.rate), time.monotonic()
        count = max(3, round(options.minutes * 60 / options.every))
        for number in range(1, count + 1):
            load.latencies.clear()
            load.run(began + number * options.every)
            size, entries = runner.run(look_at_log(url))
            latencies = [latency * 1e3 for latency in load.latencies]
            interval = Interval(
                len(latencies) / options.every,
                percentile(latencies, 0.5),
                percentile(latencies, 0.99),
                max(latencies),
                size,
                entries,
                memory(server.pid),
            )
            intervals.append(interval)
            print(f"{number * options.every:8g}", *shown(interval), flush=True)
        load.finish()
        if holder is not None:
            runner.run(holder.close())
    return intervals


def shown(interval: Interval) -> list[str]:
    figures = (
        f"{interval.speed:,.0f}",
        f"{interval.p50:.2f}",
        f"{interval.p99:.1f}",
        f"{interval.worst:.0f}",
        f"{interval.tables:.1f}",
        f"{interval.entries:,}",
        f"{interval.memory:.1f}",
    )
    return [f"{figure:>{WIDTH}}" for figure in figures]


def summarize(intervals: Sequence[Interval]) -> None:
    """Compare the medians of the middle third with those of the last third."""
    third = len(intervals) // 3
    for name, part in (("middle", intervals[third : 2 * third]), ("last", intervals[2 * third :])):
        medians = Interval(*(statistics.median(values) for values in zip(*part, strict=True)))
        print(f"{name:>8}", *shown(medians._replace(entries=int(medians.entries))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, metavar="M", help="of each run (10)")
    parser.add_argument("--rate", type=int, default=5000, metavar="R", help="publishes a second (5000)")
    parser.add_argument("--age", type=float, default=60, metavar="S", help="seconds that retention keeps (60)")
    parser.add_argument("--every", type=float, default=30, metavar="S", help="seconds to a line (30)")
    parser.add_argument("--held", choices=["no", "yes", "both"], default="both", help="a snapshot, meanwhile (both)")
    parser.add_argument("--database", metavar="URL", help="instead of the embedded PostgreSQL; its log is written to")
    parser.add_argument("--directory", metavar="DIR", help="where the embedded PostgreSQL is kept meanwhile")
    options = parser.parse_args()
    harness.prepare()

    print(f"1 replica, 1 publisher, {options.rate:,} messages/s of {len(PAYLOAD)} bytes, kept for {options.age:g} s")
    print(harness.describe_machine())
    for held in {"no": [False], "yes": [True], "both": [False, True]}[options.held]:
        with ExitStack() as stack:
            url = stack.enter_context(harness.database(options.database, options.directory))
            summarize(run(url, options, held=held))


if __name__ == "__main__":
    main()
