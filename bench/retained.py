"""Snapshots of many retained messages: their time, the broker's memory, and the latency of the others meanwhile.

    python bench/retained.py --channels 100000

One `catbus run`, on PostgreSQL or with `--database memory`. First one retained message is published to each channel.
Then rounds alternate between two rows:

    none       a publisher sends --rate messages per second, and --others subscribers receive each of them
    snapshots  the same, while a client in a process of its own takes one snapshot of all channels after another

Latency is from just before a message is published until a subscriber has decoded it. Publisher and subscribers share a
process and a core with nobody but the broker, the database and the snapshot's client, which all run on this machine: on
few cores the latency includes their work. The ratio of the two p99 is that of the medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

import harness
import httpx
import trio
from harness import Server, auth_line, bench_token, frame, percentile
from latency_probe import read_memory

import catbus

BATCH = 500
"""Messages of one request, while the channels are filled."""
CLOCK = "bench.clock"
CHUNK = 1 << 20
BAR = 1.5


class Snapshot(NamedTuple):
    """What one client received. Times are in seconds since it subscribed, `size` is in bytes."""

    first: float
    complete: float
    pages: int
    size: int


class Round(NamedTuple):
    """The latencies of the others in milliseconds, and the snapshots that were taken meanwhile."""

    p50: float
    p99: float
    snapshots: Sequence[Snapshot]
    peak: float
    """The largest resident memory of the broker, in bytes."""


def fill(server: Server, channels: int, size: int) -> None:
    """Publish one retained message to each channel."""
    payload = "x" * size
    headers = {"Authorization": f"Bearer {bench_token()}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", headers=headers, timeout=60) as web:
        for start in range(0, channels, BATCH):
            names = range(start, min(start + BATCH, channels))
            items = [{"channel": f"bench.state.n{number:07}", "payload": payload, "retain": True} for number in names]
            web.post("/publish", json=items).raise_for_status()


def take_snapshot(port: int, channels: int) -> Snapshot:
    """Subscribe to all retained messages, and read until the snapshot is complete."""
    peer = harness.connect(port)
    peer.sendall(frame(auth_line()))
    harness.wait_for(peer, b'"auth_ok"')
    peer.sendall(frame(b'{"type":"subscribe","pattern":"bench.state.*","retained":true}\n'))
    began, first = time.perf_counter(), 0.0
    pages = messages = size = 0
    rest = b""
    while True:
        data = peer.recv(CHUNK)
        if not data:
            sys.exit("the broker closed the connection of a snapshot")
        size += len(data)
        # The names are counted, not decoded, so that this client is faster than the broker.
        text = rest + data
        end = max(text.rfind(b'"channel"'), text.rfind(b'"complete"'))
        rest, text = (text[end:], text[:end]) if end > 0 else (text, b"")
        messages += text.count(b'"channel"')
        pages += text.count(b'"complete"')
        if messages and not first:
            first = time.perf_counter() - began
        if b'"complete":true' in rest:
            complete = time.perf_counter() - began
            peer.close()
            if messages != channels:
                sys.exit(f"a snapshot has {messages} of {channels} messages")
            return Snapshot(first, complete, pages + 1, size)


def take_snapshots(port: int, channels: int, pipe: Connection) -> None:
    """Take snapshots for as many seconds as the other side says, again and again, until it says None."""
    while (seconds := pipe.recv()) is not None:
        until = time.perf_counter() + seconds
        found = [take_snapshot(port, channels)]
        while time.perf_counter() < until:
            found.append(take_snapshot(port, channels))
        pipe.send(found)


class Others:
    """A publisher, and subscribers that want no snapshot."""

    def __init__(self, url: str, number: int, rate: float) -> None:
        self.latencies: list[float] = []
        self._url = url
        self._number = number
        self._rate = rate

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery, catbus.connect(self._url, token=bench_token()) as publisher:
            for _ in range(self._number):
                await nursery.start(self._receive)
            task_status.started()
            due = trio.current_time()
            while True:
                await publisher.publish(CLOCK, time.perf_counter())
                due = max(due + 1 / self._rate, trio.current_time())
                await trio.sleep_until(due)

    async def _receive(self, task_status: trio.TaskStatus[None]) -> None:
        async with catbus.connect(self._url, token=bench_token()) as bus, bus.subscribe(CLOCK) as messages:
            task_status.started()
            async for message in messages:
                self.latencies.append(1000 * (time.perf_counter() - message.payload))


async def run_round(server: Server, others: Others, seconds: float, pipe: Connection | None) -> Round:
    """Measure one round, with snapshots if there is a process that takes them."""
    others.latencies.clear()
    if pipe is not None:
        pipe.send(seconds)
    until, peak = trio.current_time() + seconds, 0.0
    while trio.current_time() < until or (pipe is not None and not pipe.poll()):
        peak = max(peak, read_memory(server.pid)["VmRSS"])
        await trio.sleep(0.05)
    snapshots = [] if pipe is None else pipe.recv()
    return Round(percentile(others.latencies, 0.5), percentile(others.latencies, 0.99), snapshots, peak)


async def measure(server: Server, options: argparse.Namespace, pipe: Connection) -> bool:
    rounds: dict[str, list[Round]] = {"none": [], "snapshots": []}
    others = Others(f"ws://127.0.0.1:{server.port}/ws", options.others, options.rate)
    before = read_memory(server.pid)["VmRSS"]
    async with trio.open_nursery() as nursery:
        await nursery.start(others.run)
        await run_round(server, others, min(1.0, options.seconds), None)  # Nothing is warm yet.
        for _ in range(options.repeat):
            rounds["none"].append(await run_round(server, others, options.seconds, None))
            rounds["snapshots"].append(await run_round(server, others, options.seconds, pipe))
        nursery.cancel_scope.cancel()
    taken = [snapshot for each in rounds["snapshots"] for snapshot in each.snapshots]
    complete = sorted(snapshot.complete for snapshot in taken)
    print(
        f"{len(taken)} snapshots of {options.channels} channels, "
        f"{taken[0].size / 1e6:.1f} MB in {taken[0].pages} pages: "
        f"complete after {statistics.median(complete):.3f} s (at most {complete[-1]:.3f} s), the first page after "
        f"{1000 * statistics.median(snapshot.first for snapshot in taken):.1f} ms"
    )
    peak = max(each.peak for each in rounds["snapshots"])
    print(f"broker: {before / 2**20:.0f} MiB before, {peak / 2**20:.0f} MiB at most")
    print(f"\n{'':>10} {'p50 ms':>8} {'p99 ms':>8}")
    for name, found in rounds.items():
        p50, p99 = (statistics.median(each[column] for each in found) for column in (0, 1))
        print(f"{name:>10} {p50:8.2f} {p99:8.2f}")
    quiet, busy = (statistics.median(each.p99 for each in found) for found in rounds.values())
    print(f"\np99 of the others with snapshots, relative to without: {busy / quiet:.2f} (at most {BAR})")
    return busy <= BAR * quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=100_000)
    parser.add_argument("--size", type=int, default=100, help="bytes of a payload")
    parser.add_argument("--others", type=int, default=20)
    parser.add_argument("--rate", type=float, default=50)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--database", help="URL, or `memory`; by default an embedded PostgreSQL")
    options = parser.parse_args()
    harness.prepare()
    print(harness.describe_machine())
    with ExitStack() as stack:
        url = stack.enter_context(harness.database(options.database))
        server = stack.enter_context(harness.catbus_run(url))
        began = time.perf_counter()
        fill(server, options.channels, options.size)
        print(json.dumps({"channels": options.channels, "filled_in_seconds": round(time.perf_counter() - began, 1)}))
        context = get_context("spawn")
        pipe, other = context.Pipe()
        process = context.Process(target=take_snapshots, args=(server.port, options.channels, other), daemon=True)
        process.start()
        within = trio.run(measure, server, options, pipe)
        pipe.send(None)
        process.join()
    sys.exit(0 if within or options.channels < 10_000 else 1)


if __name__ == "__main__":
    main()
