"""Check a running broker against its OpenAPI document with schemathesis, which sends valid and invalid requests.

python -m tests.openapi                                     a thousand examples for each operation
python -m tests.openapi --examples 50 --include-path /publish     fewer, and options of schemathesis
"""

from __future__ import annotations

import argparse
import os
import sys
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

import trio

import catbus
from catbus.close_codes import CloseCode
from tests.brokers import TOKEN, running
from tests.programs import find_schemathesis

CONFIG = Path(__file__).with_name("schemathesis.toml")
HOOKS = Path(__file__).with_name("hooks.py")


async def check(examples: int, *options: str) -> tuple[int, str]:
    """Run schemathesis with so many random examples for each operation. Return its exit status and its output.

    The broker has two clients with subscriptions, so that the answers to administrators are not empty. Event streams
    end after a moment, because schemathesis reads a response to its end.
    """
    async with running(seconds=inf) as (broker, address), trio.open_nursery() as nursery:
        nursery.start_soon(end_streams, broker)
        for name in ("alice", "bob"):
            await nursery.start(stay, f"ws://{address}/ws", name)
        command = [str(find_schemathesis()), "--config-file", str(CONFIG), "run", f"http://{address}/openapi.json"]
        command += ["--header", f"Authorization: Bearer {TOKEN}", "--max-examples", str(examples), "--no-color"]
        with TemporaryDirectory() as directory:
            # It keeps the failures that it has found in its working directory, and tries them again the next time.
            environment = {**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS)}
            done = await trio.run_process(
                [*command, *options], cwd=directory, env=environment, capture_stdout=True, check=False
            )
        nursery.cancel_scope.cancel()
        return done.returncode, done.stdout.decode()


async def stay(url: str, name: str, *, task_status: trio.TaskStatus[None]) -> None:
    """Be a client with a subscription. Started once subscribed."""
    async with catbus.connect(url, token=TOKEN) as bus, bus.subscribe(f"{name}.*"):
        task_status.started()
        await trio.sleep_forever()


async def end_streams(broker: catbus.Broker) -> None:
    while True:
        await trio.sleep(0.05)
        for session in broker.replica.sessions_after(0):
            if session.driver.transport == "sse" and session.driver.authenticated:
                session.driver.close(CloseCode.DISCONNECTED, "the test goes on")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="random examples for each operation")
    chosen, options = parser.parse_known_args()
    status, output = trio.run(check, chosen.examples, *options)
    print(output)
    sys.exit(status)


if __name__ == "__main__":
    main()
