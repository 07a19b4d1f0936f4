"""Presence: what joins and leaves cost, and how long a killed replica's members stay.

    python bench/presence.py                       # 1,000 joins and 1,000 leaves a second, then 5,000 members
    python bench/presence.py --rate 200 --members 0

Two replicas without sockets, each in a process of its own, on one PostgreSQL; both watch all channels. First, sessions
join and leave --channels channels at --rate, and stay for 2 s: the CPU time of the replicas and of PostgreSQL's
processes for them, in percent of a core, statements, and the time from a join to its event. Then --members join, half
of them on each replica, the first replica is killed, and a watcher counts how many are announced as gone.

Ends with status 1 if an event is missing or comes twice.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import harness
import trio
from harness import cpu_time, percentile

from catbus.config import DatabaseSettings
from catbus.log import Entry
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import open_bridge
from catbus.presence import Member, PresenceAction

GIVE_UP = 90.0
"""Seconds after which events count as missing."""
STAY = 2.0
"""Seconds for which sessions stay."""
STEP = 0.02
"""Seconds between two groups of joins."""


class NoFollower:
    """Takes no messages: there are none."""

    def apply(self, entries: object) -> None: ...
    def restart(self, applied: int, lost: str = "epoch") -> None: ...
    def broadcast(self, entry: Entry) -> None: ...
    def begin_erasure(self) -> None: ...
    def erase(self, seqs: object) -> Iterator[None]:
        yield


class Counter:
    """Counts events of clients whose names begin with `prefix`, and measures how old an announced join is."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.joined = self.left = 0
        self.delays: list[float] = []
        self.begun = trio.Event()

    def begin_members(self, pattern: str) -> None:
        self.begun.set()

    def note_member(self, pattern: str, action: PresenceAction, member: Member) -> None:
        if member.client_id is None or not member.client_id.startswith(self.prefix):
            return
        self.joined += action == "join"
        self.left += action == "leave"
        if action == "join" and member.info is not None:
            # The clock of all processes of this machine.
            self.delays.append(time.monotonic() - float(member.info))


async def work(arguments: argparse.Namespace) -> None:
    """A replica: join and leave at a rate, or join once and stay."""
    log = PostgresLog(DatabaseSettings(url=arguments.work))
    counter = Counter()
    presence = log.presence
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run, NoFollower())
        presence.watch("*", counter)
        for session in range(arguments.members):
            presence.join(session, f"room.{session % arguments.channels}", f"{arguments.name}.{session}", None)
        await presence.flush()
        await counter.begun.wait()
        print("ready", flush=True)
        # The other replica watches, too.
        await trio.to_thread.run_sync(sys.stdin.readline)
        began, cpu, sent = time.monotonic(), time.process_time(), 0
        while arguments.rate and time.monotonic() < began + arguments.seconds:
            await trio.sleep(STEP)
            while sent < (time.monotonic() - began) * arguments.rate:
                channel = f"room.{sent % arguments.channels}"
                presence.join(sent, channel, f"{arguments.name}.{sent}", b"%.6f" % time.monotonic())
                old = sent - int(arguments.rate * STAY)
                if old >= 0:
                    presence.leave(old, f"room.{old % arguments.channels}", explicit=True)
                sent += 1
        elapsed, cpu = time.monotonic() - began, time.process_time() - cpu
        await presence.flush()
        await trio.sleep(2)
        figures = presence.statistics()
        print(
            cpu / elapsed, sent, figures.writes, figures.reads, counter.joined,
            percentile(counter.delays, 0.5) if counter.delays else 0.0,
            percentile(counter.delays, 0.99) if counter.delays else 0.0,
            flush=True,
        )  # fmt: skip
        await trio.sleep_forever()


@contextmanager
def open_replicas(url: str, options: list[str], prefix: str = "") -> Iterator[list[subprocess.Popen[str]]]:
    """Two replicas that are ready. The names of their clients begin with `prefix`."""
    replicas = [
        subprocess.Popen(
            [sys.executable, __file__, "--work", url, "--name", name, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in (f"{prefix}one", f"{prefix}two")
    ]
    try:
        for replica in replicas:
            read(replica)
        for replica in replicas:
            assert replica.stdin is not None
            print(file=replica.stdin, flush=True)
        yield replicas
    finally:
        for replica in replicas:
            replica.kill()
            replica.wait()


def read(replica: subprocess.Popen[str]) -> list[float]:
    """The figures in a line of a replica."""
    assert replica.stdout is not None
    line = replica.stdout.readline()
    if not line:
        sys.exit("a replica has ended")
    return [] if line == "ready\n" else [float(text) for text in line.split()]


async def database_cpu(url: str) -> float:
    """CPU seconds of the server processes that serve the replicas, so far."""
    async with open_bridge() as bridge:
        with await bridge.connect(url) as connection:
            rows = await connection.fetch(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
                "AND backend_type = 'client backend'"
            )
    return sum((cpu_time(pid) for (pid,) in rows), 0.0)


def measure_joins(url: str, arguments: argparse.Namespace) -> bool:
    """Print what joins and leaves cost. Return whether all joins were announced on both replicas."""
    options = ["--rate", str(arguments.rate / 2), "--channels", str(arguments.channels)]
    with open_replicas(url, [*options, "--seconds", str(arguments.seconds), "--members", "0"]) as replicas:
        began, cpu = time.monotonic(), trio.run(database_cpu, url)
        figures = [read(replica) for replica in replicas]
        share = (trio.run(database_cpu, url) - cpu) / (time.monotonic() - began)
    sent = sum(each[1] for each in figures)
    print(f"{sent / arguments.seconds:,.0f} joins/s and as many leaves/s, {arguments.channels} channels, 2 replicas")
    for name, (used, _, writes, reads, joined, p50, p99) in zip(("one", "two"), figures, strict=True):
        print(
            f"  {name}: {used:.1%} of a core; {writes / arguments.seconds:.1f} writes/s, "
            f"{reads / arguments.seconds:.1f} reads/s; {joined:,.0f} joins announced, "
            f"p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms after the join"
        )
    print(f"  PostgreSQL, for both: {share:.1%} of a core")
    return all(each[4] == sent for each in figures)


async def measure_kill(url: str, arguments: argparse.Namespace) -> bool:
    """Print how long members of a killed replica stay. Return whether each of them was announced as gone, once."""
    half = arguments.members // 2
    options = ["--rate", "0", "--channels", str(arguments.channels), "--members", str(half)]
    log = PostgresLog(DatabaseSettings(url=url))
    # The members of replicas that have ended before leave at about the same time.
    counter = Counter("kill-")
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run, NoFollower())
        log.presence.watch("*", counter)
        await counter.begun.wait()
        with open_replicas(url, options, counter.prefix) as replicas:
            with trio.fail_after(GIVE_UP):
                while counter.joined < 2 * half:
                    await trio.sleep(0.1)
            replicas[0].kill()
            killed, first = time.monotonic(), 0.0
            with trio.move_on_after(GIVE_UP):
                while counter.left < half:
                    await trio.sleep(0.01)
                    first = first or (time.monotonic() - killed if counter.left else 0.0)
            last = time.monotonic() - killed
            await trio.sleep(5)
        nursery.cancel_scope.cancel()
    print(f"{2 * half:,} members, one of two replicas killed: {counter.left:,} announced as gone,")
    print(f"  the first after {first:.1f} s, the last after {last:.1f} s")
    return counter.left == half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", help="URL of a PostgreSQL; by default, an embedded one")
    parser.add_argument("--rate", type=float, default=1000, help="joins a second, on both replicas together")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--channels", type=int, default=200)
    parser.add_argument("--members", type=int, default=5000)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    harness.prepare()
    if arguments.work:
        trio.run(work, arguments)
        return
    print(harness.describe_machine())
    with harness.database(arguments.database) as url:
        complete = not arguments.rate or measure_joins(url, arguments)
        if arguments.members:
            complete = bool(trio.run(measure_kill, url, arguments)) and complete
    sys.exit(0 if complete else "events are missing, or came twice")


if __name__ == "__main__":
    main()
