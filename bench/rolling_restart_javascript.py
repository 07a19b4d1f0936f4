"""Rolling restarts of two replicas under the JavaScript client: silent subscriptions, lost and repeated messages.

    python bench/rolling_restart_javascript.py --rounds 20

Two `catbus run` on one PostgreSQL, and one client in Node (rolling_restart_javascript.mjs) behind a proxy that delays
each way by half of --delay. In each round the client makes --subscriptions new subscriptions, one every 6 ms, and
publishes to them at the same time. Meanwhile each replica in turn gets SIGTERM and is started again, and new
connections go to the other one. Then each channel gets one more message: a subscription that does not receive it is
silent.

`CATBUS_CLIENT=file:///...` selects another client module. Ends with status 1 if a subscription is silent, or if a
message is lost or repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import harness
from rolling_restart import Replica

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign

PROGRAM = Path(__file__).with_suffix(".mjs")
DRAIN = "[drain]\ndelay = 0.3\nwindow = 1.0\n"


def play(replicas: list[Replica], node: subprocess.Popen[str], rounds: int) -> dict[str, int]:
    """Run the rounds, and return the totals that the client has counted."""
    assert node.stdin is not None
    assert node.stdout is not None

    def say(text: str) -> None:
        assert node.stdin is not None
        node.stdin.write(f"{text}\n")
        node.stdin.flush()

    counted: dict[str, int] = {}
    for _ in range(rounds):
        say("play")
        time.sleep(0.8)
        for number, replica in enumerate(replicas):
            other = replicas[1 - number].server
            assert other is not None
            say(f"target {other.port}")
            replica.stop()
            replica.start()
        say("finish")
        counted = json.loads(node.stdout.readline())
        print(*(f"{name} {count}" for name, count in counted.items()), sep=", ", flush=True)
    say("end")
    node.wait(10)
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--subscriptions", type=int, default=450)
    parser.add_argument("--delay", type=int, default=150, help="milliseconds to the broker and back")
    parser.add_argument("--database", help="the URL of a PostgreSQL; without it, one is started")
    options = parser.parse_args()
    harness.prepare()
    print(harness.describe_machine())
    token = sign(harness.SECRET, client_id="bench", grants=Grants(("*",), ("*",)))
    with harness.database(options.database) as url:
        replicas = [Replica(url, DRAIN) for _ in range(2)]
        try:
            for replica in replicas:
                replica.start()
            assert replicas[0].server is not None
            command = ["node", PROGRAM, *map(str, (replicas[0].server.port, options.delay, options.subscriptions))]
            environment = {**os.environ, "TOKEN": token}
            with subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as node:
                try:
                    counted = play(replicas, node, options.rounds)
                finally:
                    node.kill()
        finally:
            for replica in replicas:
                replica.stop()
    sys.exit(bool(counted["silent"] or counted["lost"] or counted["repeated"] or counted["failed"]))


if __name__ == "__main__":
    main()
