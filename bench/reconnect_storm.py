"""A reconnect storm: the replica of all clients is killed, and all of them reconnect at once to another one.

    python bench/reconnect_storm.py --clients 1000
    python bench/reconnect_storm.py --clients 200 --transport webtransport --end SIGTERM

Two `catbus run` on one PostgreSQL. --clients of the Python library, in one process, are connected to the first and
subscribe to everything, while one client publishes --rate messages per second through the second. Then the first is
killed (SIGKILL) or drained (SIGTERM). A load balancer polls /ready every 0.1 s, and until it has noticed it sends
clients to the dead replica.

A client is back when it has a session again. An attempt without a session counts as refused. Ends with status 1 if a
client is not back, misses a message, or receives one twice.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from contextlib import suppress

import harness
import trio
from harness import SECRET, percentile
from restart_load import Load
from rolling_restart import Balancer, Replica

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.client import Transport

RECONNECT_TIMEOUT = 60.0


class StormBalancer:
    """A load balancer that sends all clients to the first replica until it has noticed that it is gone."""

    def __init__(self, first: Replica, other: Replica) -> None:
        self.first, self.other = first, other
        self.attempts = 0
        """Attempts to connect since the end of the first replica."""
        self._over = False
        self._balancers = {replica: Balancer([replica]) for replica in (first, other)}

    async def watch(self) -> None:
        async with trio.open_nursery() as nursery:
            for balancer in self._balancers.values():
                nursery.start_soon(balancer.watch)

    async def dial(self, transport: str) -> Transport:
        self.attempts += self._over
        return await self._balancers[self.first if self.first.ready else self.other].dial(transport)

    async def dial_other(self, transport: str) -> Transport:
        return await self._balancers[self.other].dial(transport)

    def end(self, number: int) -> None:
        assert self.first.server is not None
        self._over = True
        os.kill(self.first.server.pid, number)


async def play(storm: StormBalancer, options: argparse.Namespace) -> Load:
    token = sign(SECRET, client_id="storm", grants=Grants(("*",), ("*",)))
    load = Load(storm.dial, token, (options.transport,), 1, storm.dial_other)

    async def end() -> None:
        load.began = trio.current_time()
        storm.end(getattr(signal, options.end))
        with trio.move_on_after(RECONNECT_TIMEOUT):
            while len(load.moves) < options.clients:
                await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(storm.watch)
        while not (storm.first.ready and storm.other.ready):
            await trio.sleep(0.05)
        await load.play(options.clients, options.rate, end)
        nursery.cancel_scope.cancel()
    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=2.0, help="messages a second")
    parser.add_argument("--transport", choices=["websocket", "webtransport"], default="websocket")
    parser.add_argument("--end", choices=["SIGKILL", "SIGTERM"], default="SIGKILL", help="how the replica ends")
    parser.add_argument("--database", help="the URL of a PostgreSQL; without it, one is started")
    options = parser.parse_args()
    harness.prepare()
    print(harness.describe_machine())
    with harness.database(options.database) as url:
        storm = StormBalancer(Replica(url, harness.DRAIN), Replica(url, harness.DRAIN))
        try:
            storm.first.start()
            storm.other.start()
            load = trio.run(play, storm, options)
        finally:
            with suppress(SystemExit):  # It was killed.
                storm.first.stop()
            storm.other.stop()
    back = sorted(load.moves)
    refused = storm.attempts - len(back)
    p50, p99, last = percentile(back, 0.5), percentile(back, 0.99), max(back, default=0)
    print(
        f"{options.clients} clients over {options.transport}, {options.end}: {len(back)} back, "
        f"p50 {p50:.2f} s, p99 {p99:.2f} s, the last after {last:.2f} s"
    )
    print(f"attempts {storm.attempts}, refused {refused} ({refused / max(storm.attempts, 1):.1%})")
    print(f"published {load.published}, delivered {load.delivered}, lost {load.lost}, repeated {load.repeated}")
    sys.exit(bool(load.lost or load.repeated or len(back) < options.clients))


if __name__ == "__main__":
    main()
