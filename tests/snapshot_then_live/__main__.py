"""Snapshot, then live, many times: the state of each reader must be that of the tables.

    python -m tests.snapshot_then_live --times 1000 --seed 7
    python -m tests.snapshot_then_live --mistake "tables first"

Three writers change rows of two tables. Readers take a snapshot and follow the changes through two replicas, 20 at a
time. In every fifth round, the PostgreSQL primary is lost with its last commits, and its asynchronous standby promoted.
With a mistake, all readers make it, and some state must be wrong: "tables first" reads the tables before the position,
and "any epoch" goes on in another epoch, in which changes of its snapshot may be lost.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import Counter

import trio

from catbus.config import DatabaseSettings
from catbus.postgres.access.migrations import init
from tests.chaos.database_pair import DatabasePair
from tests.postgres.processes import open_replicas, token
from tests.postgres.proxy import Proxy
from tests.postgres.server import execute, make_directory

from .follow import PREPARE, Report, play

READERS = 20
MISTAKES = "tables first", "any epoch"


async def run(times: int, seed: int, mistake: str, failovers: Counter[str]) -> Report:
    rng = random.Random(seed)
    report = Report()
    directory = make_directory()
    directory.chmod(0o755)
    pair = DatabasePair(directory)

    async def fail_over() -> None:
        await pair.fail_over(rng.choice([0.0, 0.1, 0.3]))
        failovers["failovers"] += 1

    try:
        async with trio.open_nursery() as nursery:
            await pair.start(nursery)
            await init(DatabaseSettings(url=pair.url))
            await trio.to_thread.run_sync(execute, pair.url, PREPARE)
            await pair.follow()
            pair.proxies = [Proxy(pair.url)]
            await nursery.start(pair.proxies[0].run)
            async with open_replicas(pair.proxies[0].url, 2) as replicas:
                addresses = [replica.url for replica in replicas]
                for number in range(1, times // READERS + 1):
                    lossy = number % 5 == 0 or mistake == "any epoch"
                    await play(
                        lambda: pair.url, addresses, token("reader"), report, rng,
                        number=number, readers=READERS, mistake=mistake, fault=fail_over if lossy else None,
                    )  # fmt: skip
                    print(f"\r{report.times} times, {len(report.wrong)} wrong ", end="", file=sys.stderr, flush=True)
                    if report.wrong and mistake:
                        break
            await pair.close()
            nursery.cancel_scope.cancel()
    finally:
        await pair.close()
        shutil.rmtree(directory, ignore_errors=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="a multiple of 20")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--mistake", choices=MISTAKES, default="", help="a mistake that must be found")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    began = time.monotonic()
    failovers: Counter[str] = Counter()
    report = trio.run(run, arguments.times, arguments.seed, arguments.mistake, failovers)
    print(
        f"\n{report.times:,} times in {time.monotonic() - began:.0f} s: {report.commits:,} commits, "
        f"{report.messages:,} messages, {report.paused:,} pauses with changes, {failovers['failovers']} failovers, "
        f"{report.again} snapshots read again"
    )
    for difference in report.wrong[:10]:
        print("wrong:", difference)
    if arguments.mistake:
        print("the mistake was found" if report.wrong else "the mistake was NOT found")
    elif not report.wrong:
        print("every state is that of the tables")
    sys.exit(bool(report.wrong) != bool(arguments.mistake))


if __name__ == "__main__":
    main()
