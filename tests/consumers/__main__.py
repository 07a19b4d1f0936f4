"""Exactly once, under force: workers move all messages of a consumer into a table while processes are killed.

    python -m tests.consumers --minutes 10 --seed 7
    python -m tests.consumers --mistake

4 workers in processes of their own, on 8 partitions, insert without ON CONFLICT. 8 publishers publish by SQL, and two
replicas move the messages into the log. Workers, replicas, connections and server processes are killed at random; a
killed server process makes PostgreSQL restart. Afterwards every message has one effect, in the order of its channel.
With `--mistake`, workers move the cursor in a transaction before that of the effects, and the checker must find it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from catbus.postgres.access.migrations import schema_files, version_update
from tests.postgres.server import execute, serve, to_database

from .exactly_once import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--mistake", action="store_true", help="run with broken workers, which must be found")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    for server in serve():
        execute(to_database(server, "postgres"), "CREATE DATABASE consumers ENCODING 'UTF8' TEMPLATE template0")
        url = to_database(server, "consumers")
        files = schema_files()
        execute(url, *(script for _, _, script in files), version_update(files[-1][0]))
        began = time.monotonic()
        report = run(
            url, 60 * arguments.minutes, arguments.seed, early=arguments.mistake, crash=True, replicas=2
        )  # fmt: skip
        print(f"{report.published:,} messages in {time.monotonic() - began:.0f} s; {dict(report.faults)}")
        for error in report.errors:
            print(error)
        if arguments.mistake:
            print("the mistake was found" if report.errors else "the mistake was NOT found")
        elif not report.errors:
            print("every message has one effect, in the order of its channel")
        sys.exit(bool(report.errors) != arguments.mistake)


if __name__ == "__main__":
    main()
