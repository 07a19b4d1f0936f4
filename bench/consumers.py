"""Consumers in SQL: messages per second, beside pgmq and a queue table, and their effect on publishers.

    python bench/consumers.py --messages 1000000 --seconds 10
    python bench/consumers.py --pgmq pgmq.sql

Each worker is a process. In each transaction it takes a batch, adds its size to a row of its own, and commits. A
consumer has as many partitions as workers, and its messages have 1,000 channels. The queue table has `DELETE ... WHERE
id IN (SELECT ... FOR UPDATE SKIP LOCKED)`; pgmq has `pgmq.read` and `pgmq.delete`: pgmq-extension/sql/pgmq.sql of its
repository. All use one PostgreSQL. Rounds are interleaved, and medians are shown. At the end of a round the number of
effects is compared with what is gone from the queue.

Then comes the time in which a consumer passes over the whole log for one of its channels. Last, clients publish through
a replica at a constant rate, beside workers:

| Load | What the workers do |
|---|---|
| no workers | there are none |
| effects alone | a transaction for each message, with the effect and without any queue |
| following | process what is published |
| catching up | process the log as fast as they can |
| skip locked | empty the queue table as fast as they can |

The commits of all transactions wait for the same disk. So the effect of a consumer is that of `following` relative to
`effects alone`, and that of working at all is `effects alone` relative to `no workers`.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import asyncpg  # type: ignore[import-untyped]
import harness
from harness import Server, percentile
from publish_sql import PUBLISHED, Peer, paced

from catbus.postgres.access.migrations import schema_files, version_update

CHANNELS = 1000
PUBLISHERS = 4
BAR = 1.2
POLL_INTERVAL = 1.0
"""Seconds after which a worker that found nothing looks again, without a notification."""
LOADS = {
    "no workers": ("", ""),
    "effects alone": ("effects alone", ""),
    "following": ("catbus", "head"),
    "catching up": ("catbus", "floor"),
    "skip locked": ("skip locked", ""),
}
"""What workers do while clients publish: from which queue they take, and where the consumer starts."""
PREPARE = """
CREATE SCHEMA bench;
CREATE TABLE bench.effects (worker integer PRIMARY KEY, messages bigint NOT NULL) WITH (fillfactor = 10);
CREATE TABLE bench.queue (id bigint PRIMARY KEY, payload text NOT NULL);
"""
FILL_LOG = """
INSERT INTO catbus.entries (slot, seq, at, channel, payload, producer, number)
SELECT 0, n, extract(epoch FROM now()) * 1000, 'bench.' || n % $2, $3, '\\x62', n
FROM generate_series(1, $1::bigint) AS n
"""
EFFECT = "UPDATE bench.effects SET messages = messages + $2 WHERE worker = $1"
TAKE = {
    "catbus": "SELECT seq, channel, payload FROM catbus.receive('bench', $1)",
    "skip locked": """
        DELETE FROM bench.queue AS q
        WHERE q.id IN (SELECT w.id FROM bench.queue AS w ORDER BY w.id LIMIT $1 FOR UPDATE SKIP LOCKED)
        RETURNING q.id, q.payload
    """,
    "pgmq": "SELECT msg_id, message FROM pgmq.read('bench', 30, $1)",
    "effects alone": "SELECT n FROM generate_series(1, least($1, 1)) AS n",
}
DELETE = "SELECT pgmq.delete('bench', $1::bigint[])"
LEFT = {
    "catbus": "SELECT sum(count) FROM (SELECT (SELECT count(*) FROM catbus.entries AS e WHERE e.seq > p.cursor AND "
    "(hashtext(e.channel) & 2147483647) % (SELECT count(*) FROM catbus.consumer_positions()) = p.partition) AS count "
    "FROM catbus.consumer_positions() AS p) AS partitions",
    "skip locked": "SELECT count(*) FROM bench.queue",
    "pgmq": "SELECT count(*) FROM pgmq.q_bench",
}


async def fill(sql: Any, kind: str, workers: int, options: argparse.Namespace, start: str = "floor") -> None:
    """Fill the queue again."""
    await sql.execute("TRUNCATE bench.effects; TRUNCATE bench.queue")
    await sql.execute("INSERT INTO bench.effects SELECT n, 0 FROM generate_series(0, 63) AS n")
    match kind:
        case "catbus":
            await sql.execute("DELETE FROM catbus.consumers")
            await sql.execute(
                "SELECT catbus.create_consumer('bench', 'bench.*', partitions => $1, start => $2)", workers, start
            )
        case "skip locked":
            query = "INSERT INTO bench.queue SELECT n, $2 FROM generate_series(1, $1::bigint) AS n"
            await sql.execute(query, options.messages, options.payload)
        case "pgmq":
            await sql.execute("SELECT pgmq.purge_queue('bench')")
            query = "SELECT pgmq.send_batch('bench', array_fill($2::jsonb, ARRAY[$1::integer]))"
            await sql.execute(query, options.messages, options.payload)
    await sql.execute("VACUUM (ANALYZE) bench.queue, bench.effects")
    await sql.execute("CHECKPOINT")


def work(url: str, kind: str, number: int, workers: int, batch: int, ready: Any) -> None:
    """A worker: take batches until SIGTERM. For effects alone, each notification is a message for one worker."""

    async def go() -> None:
        stopping, woken = asyncio.Event(), asyncio.Event()
        alone = kind == "effects alone"
        notifications = count()

        def stop() -> None:
            stopping.set()
            woken.set()

        def wake(*_: object) -> None:
            if not alone or next(notifications) % workers == number:
                woken.set()

        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
        sql = await asyncpg.connect(url)
        take, effect = await sql.prepare(TAKE[kind]), await sql.prepare(EFFECT)
        delete = await sql.prepare(DELETE) if kind == "pgmq" else None
        await sql.add_listener("catbus", wake)
        ready.wait()
        while not stopping.is_set():
            woken.clear()
            async with sql.transaction():
                rows = await take.fetch(batch)
                if rows:
                    await effect.fetch(number, len(rows))
                if delete is not None:
                    await delete.fetch([row[0] for row in rows])
            if alone or not rows:
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_INTERVAL):
                        await woken.wait()
        await sql.close()

    asyncio.run(go())


@contextmanager
def running(url: str, kind: str, workers: int, batch: int) -> Iterator[None]:
    """Run workers, which are connected when the block begins and finish their transactions when it ends."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers + 1)
    processes = [
        context.Process(target=work, args=(url, kind, number, workers, batch, ready)) for number in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        ready.wait(harness.STARTING_TIME)
        yield
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"workers ended with {[process.exitcode for process in processes]}")


def measure(url: str, kind: str, workers: int, batch: int, options: argparse.Namespace) -> float:
    """Return messages per second."""
    on_database(url, lambda sql: fill(sql, kind, workers, options))
    with running(url, kind, workers, batch):
        began = time.monotonic()
        time.sleep(options.seconds)
    took = time.monotonic() - began
    done, left = on_database(url, lambda sql: count_messages(sql, kind, options.messages))
    if not left:
        print(f"{kind}: nothing was left before the end: use --messages", file=sys.stderr)
    return float(done) / took


def on_database(url: str, action: Callable[[Any], Any]) -> Any:
    """Call a function with a connection, and return what it returns."""

    async def run() -> Any:
        sql = await asyncpg.connect(url)
        try:
            return await action(sql)
        finally:
            await sql.close()

    return asyncio.run(run())


async def count_messages(sql: Any, kind: str, messages: int) -> tuple[int, int]:
    """Return how many messages have an effect, and how many are left."""
    done, left = await sql.fetchval("SELECT sum(messages) FROM bench.effects"), await sql.fetchval(LEFT[kind])
    if done + left != messages:
        sys.exit(f"{kind}: {done} effects and {left} messages left of {messages}")
    return done, left


async def prepare(sql: Any, options: argparse.Namespace) -> None:
    files = schema_files()
    for _, _, script in files:
        await sql.execute(script)
    await sql.execute(version_update(files[-1][0]))
    await sql.execute(PREPARE)
    await sql.execute(FILL_LOG, options.messages, CHANNELS, options.payload)
    if options.pgmq is not None:
        await sql.execute(options.pgmq.read_text())
        await sql.execute("SELECT pgmq.create('bench')")


async def pass_over(sql: Any, messages: int) -> None:
    """Print how long a consumer of one channel takes to catch up with the whole log."""
    await sql.execute("SELECT catbus.create_consumer('narrow', 'bench.7', start => 'floor')")
    began, calls, found = time.monotonic(), 0, 0
    while await sql.fetchval("SELECT lag > 0 FROM catbus.consumer_positions() WHERE consumer = 'narrow'"):
        found += len(await sql.fetch("SELECT seq FROM catbus.receive('narrow', 100)"))
        calls += 1
    took = time.monotonic() - began
    print(f"\n1 of {CHANNELS} channels: {found} of {messages:,} messages in {took:.2f} s, {calls} calls", flush=True)


# Publishers


async def publish(server: Server, rate: float, seconds: float) -> list[float]:
    """Publish at a constant rate, and return the milliseconds until each reply."""
    peers = [Peer(server, PUBLISHED) for _ in range(PUBLISHERS)]
    readers = [asyncio.create_task(peer.run()) for peer in peers]

    async def run(place: int, peer: Peer) -> list[float]:
        sent: dict[int, float] = {}
        numbers = count(place, PUBLISHERS)

        async def call() -> None:
            number = next(numbers)
            sent[number] = time.monotonic()
            line = b'{"type":"publish","channel":"bench.%d","payload":1,"id":%d}\n' % (number % CHANNELS, number)
            await peer.send(line)

        await asyncio.sleep(place / rate)
        await paced(call, rate / PUBLISHERS, seconds)
        for number in sent:
            await peer.wait_for(number)
        return [(peer.times[number] - began) * 1e3 for number, began in sent.items()]

    latencies = await asyncio.gather(*(run(*each) for each in enumerate(peers, 1)))
    for reader, peer in zip(readers, peers, strict=True):
        reader.cancel()
        peer.peer.close()
    return [latency for each in latencies for latency in each]


def publish_beside(url: str, server: Server, load: str, options: argparse.Namespace) -> tuple[float, float, float]:
    """Return p50 and p99 of publishers in milliseconds, and the messages per second of the workers beside them."""
    kind, start = LOADS[load]
    workers = max(options.workers)
    on_database(url, lambda sql: fill(sql, kind, workers, options, start))
    before = on_database(url, lambda sql: sql.fetchval("SELECT head FROM catbus.position()"))
    with running(url, kind, workers if kind else 0, max(options.batches)):
        began = time.monotonic()
        latencies = asyncio.run(publish(server, options.rate, options.seconds))
    took, done = time.monotonic() - began, 0
    if kind == "effects alone":
        done = on_database(url, lambda sql: sql.fetchval("SELECT sum(messages) FROM bench.effects"))
    elif kind:
        waiting = {"head": 0, "floor": before, "": options.messages}[start]
        published = 0 if kind == "skip locked" else len(latencies)
        done, _ = on_database(url, lambda sql: count_messages(sql, kind, waiting + published))
    return percentile(latencies, 0.5), percentile(latencies, 0.99), float(done) / took


def measure_publishers(url: str, server: Server, options: argparse.Namespace) -> bool:
    """Print the latency of publishers beside each load. Returns whether a consumer keeps it within the bar."""
    asyncio.run(publish(server, options.rate, min(1.0, options.seconds)))  # Nothing is warm yet.
    rounds: dict[str, list[Sequence[float]]] = {load: [] for load in LOADS}
    for _ in range(options.repeat):
        for load, found in rounds.items():
            found.append(publish_beside(url, server, load, options))
    print(f"\n{options.rate:g} publishes/s, {max(options.workers)} workers in batches of {max(options.batches)}")
    print(f"{'':>14} {'p50 ms':>8} {'p99 ms':>8} {'x none':>8} {'worked/s':>10}")
    medians = {
        load: [statistics.median(column) for column in zip(*found, strict=True)] for load, found in rounds.items()
    }
    quiet = medians["no workers"][1]
    for load, (p50, p99, speed) in medians.items():
        print(f"{load:>14} {p50:8.2f} {p99:8.2f} {p99 / quiet:8.2f} {speed:10,.0f}")
    ratio = medians["following"][1] / medians["effects alone"][1]
    print(f"\np99 of publishers beside following workers, relative to their effects alone: {ratio:.2f} (at most {BAR})")
    return ratio <= BAR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--messages", type=int, default=1_000_000, metavar="N", help="in the log and each queue (1000000)"
    )
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4], metavar="N", help="processes (1 4)")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 10, 100], metavar="N", help="messages (1 10 100)")
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="seconds of each round at most (5)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds (3)")
    parser.add_argument(
        "--rate", type=float, default=100, metavar="R", help="publishes per second beside workers (100)"
    )
    parser.add_argument("--pgmq", type=Path, metavar="FILE", help="pgmq.sql; without it, pgmq is left out")
    parser.add_argument("--payload", default='{"id": 12345, "cents": 250}', metavar="JSON", help="of each message")
    parser.add_argument(
        "--database", metavar="URL", help="an empty PostgreSQL database to use instead of the embedded one"
    )
    parser.add_argument("--directory", metavar="DIR", help="a directory for the data of the embedded PostgreSQL")
    options = parser.parse_args()
    harness.prepare()
    kinds = [kind for kind in LEFT if kind != "pgmq" or options.pgmq is not None]

    print(f"messages per second; {options.messages:,} wait; median of {options.repeat}")
    print(harness.describe_machine())
    with ExitStack() as stack:
        url = stack.enter_context(harness.database(options.database, options.directory))
        on_database(url, lambda sql: prepare(sql, options))
        print(f"\n{'workers':>8} {'batch':>6}", *(f"{kind:>12}" for kind in kinds))
        for workers in options.workers:
            for batch in options.batches:
                rounds = [
                    [measure(url, kind, workers, batch, options) for kind in kinds] for _ in range(options.repeat)
                ]
                figures = [statistics.median(column) for column in zip(*rounds, strict=True)]
                print(f"{workers:8} {batch:6}", *(f"{figure:12,.0f}" for figure in figures), flush=True)
        on_database(url, lambda sql: pass_over(sql, options.messages))
        server = stack.enter_context(harness.catbus_run(url))
        within = measure_publishers(url, server, options)
    sys.exit(0 if within or options.messages < 100_000 else 1)


if __name__ == "__main__":
    main()
