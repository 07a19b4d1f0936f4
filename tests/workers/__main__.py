"""Restart the workers of a broker again and again under load, and check what clients saw.

    python -m tests.workers                     # 100 restarts, each worker in turn
    python -m tests.workers --restarts 20 --kill

A worker gets SIGTERM, or with --kill SIGKILL. The next one follows when it serves again and 20 more messages have
arrived everywhere. Subscribers check the order of all messages; short connections are opened without a pause. Prints
one line, and ends with status 1 if a message was lost or repeated, or a connection refused.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import trio

from catbus.processes.restart_policy import MAX_DEATHS, PERIOD
from tests.postgres.server import make_directory

from .load import WorkerLoad
from .processes import open_workers


@contextmanager
def state_directory() -> Iterator[Path]:
    """A directory for the embedded database, which the user that runs PostgreSQL can reach."""
    directory = make_directory()
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


async def run(state: Path, workers: int, restarts: int, number: signal.Signals) -> bool:
    """Restart workers under load, and return whether clients saw what they have to see."""
    async with open_workers("embedded", workers, CATBUS_STATE=str(state), CATBUS_DRAIN_WINDOW="1") as broker:
        load = WorkerLoad(broker.url, broker.address)
        began = trio.current_time()
        async with load.running():
            for _, worker in zip(range(restarts), cycle(range(workers)), strict=False):
                starts, next_one = broker.starts, trio.current_time()
                if number == signal.SIGKILL:
                    # A worker that dies more often ends the broker.
                    next_one += (PERIOD / (MAX_DEATHS - 1) + 1) / workers
                broker.kill(worker, number)
                await broker.restarted(starts)
                await load.progress(20)
                await trio.sleep_until(next_one)
        seconds = trio.current_time() - began
        moved = sum(broker.opened(f"subscriber-{index}") - 1 for index in range(len(load.received)))
    faults = load.faults()
    print(
        f"{restarts} restarts by {number.name} in {seconds:.0f} s: {len(load.acknowledged):,} messages to "
        f"{len(load.received)} subscribers, which reconnected {moved} times, {faults.lost} lost, {faults.repeated} "
        f"repeated, {faults.reordered} out of order; {load.reached:,} short connections, {load.refused} refused, "
        f"{load.broken} without a response"
    )
    return not (any(faults) or load.refused or (load.broken and number == signal.SIGTERM))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("--kill", action="store_true", help="kill the workers instead of stopping them")
    arguments = parser.parse_args()
    number = signal.SIGKILL if arguments.kill else signal.SIGTERM
    with state_directory() as state:
        sys.exit(not trio.run(run, state, arguments.workers, arguments.restarts, number))


if __name__ == "__main__":
    main()
