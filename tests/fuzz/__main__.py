"""Have `catbus fuzz` at two replicas that share a PostgreSQL, over both transports.

    python -m tests.fuzz --minutes 60

Takes what `catbus fuzz` takes besides: `--seed`, `--keep`, `--script`. Its exit status is that of `catbus fuzz`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import trio

from tests.postgres.processes import SECRET, open_replicas
from tests.postgres.server import serve

REPLICAS = 2


async def fuzz(database_url: str, arguments: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory() as state:
        async with open_replicas(database_url, REPLICAS, Path(state)) as replicas:
            urls = [argument for replica in replicas for argument in ("--url", replica.url)]
            command = [sys.executable, "-m", "catbus", "fuzz", *urls, *arguments]
            environment = {**os.environ, "CATBUS_SECRET": SECRET}
            done = await trio.run_process(command, env=environment, stdin=subprocess.DEVNULL, check=False)
            complaints = [each for replica in replicas for each in replica.complaints]
    for each in complaints:
        print(each, file=sys.stderr)
    return done.returncode or bool(complaints)


def main() -> None:
    with contextmanager(serve)() as database_url:
        status = trio.run(fuzz, database_url, sys.argv[1:])
    sys.exit(status)


if __name__ == "__main__":
    main()
