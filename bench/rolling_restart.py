"""A rolling restart of all replicas under load: reconnects, pauses, and lost or repeated messages.

    python bench/rolling_restart.py --sessions 300 --rate 20
    python bench/rolling_restart.py --svg docs/rolling.svg

--replicas `catbus run` on one PostgreSQL. --sessions clients of the Python library subscribe to everything, half of
them over WebSocket and half over WebTransport; four more publish --rate messages per second together. A load balancer
polls /ready of each replica every 0.1 s and sends new connections to the replicas that are ready. Then each replica in
turn gets SIGTERM, ends, and is started again. The next one follows when it is ready.

    python bench/rolling_restart.py --replicas 2 --subscriptions 450 --latency 150 --rounds 20 --delay 0.3 --window 1

With --subscriptions there is one client, behind a proxy that delays each way by half of --latency. In each of --rounds
it makes so many new subscriptions, one every 6 ms, and publishes to them at the same time. Meanwhile each replica in
turn is restarted, and new connections go to the other one. Then each channel gets one more message: a subscription that
does not receive it is silent. `rolling_restart_javascript.py` does the same with the JavaScript client.

A pause is the longest time without a message of a subscriber. Ends with status 1 if a subscriber misses a message or
receives one twice, or if a publish is not acknowledged.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

import distant_client
import harness
import trio
from harness import SECRET, Server, percentile
from restart_load import Load, plot

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.client import Disconnected, Transport
from catbus.client.broker_address import parse_address
from catbus.client.websocket_transport import open_websocket
from catbus.client.webtransport_transport import make_configuration, open_webtransport


class Replica:
    """A replica that is started and stopped. Its methods block."""

    def __init__(self, database: str, drain: str) -> None:
        self.server: Server | None = None
        self.ready = False
        self._make = partial(harness.catbus_run, database, webtransport=True, drain=drain)
        self._running: AbstractContextManager[Server] | None = None

    def start(self) -> None:
        self._running = self._make()
        self.server = self._running.__enter__()

    def stop(self) -> None:
        if self._running is not None:
            running, self._running = self._running, None
            running.__exit__(None, None, None)


class Balancer:
    """Connects clients to the next replica that is ready, like a load balancer."""

    def __init__(self, replicas: Sequence[Replica]) -> None:
        self._replicas = replicas
        self._dialled = 0

    async def watch(self) -> None:
        """Poll /ready of each replica, without end."""
        while True:
            for replica in self._replicas:
                ready = False
                if replica.server is not None:
                    with suppress(OSError, IndexError):
                        ready = await trio.to_thread.run_sync(harness.is_ready, replica.server.port)
                replica.ready = ready
            await trio.sleep(0.1)

    async def dial(self, transport: str) -> Transport:
        ready = [replica for replica in self._replicas if replica.ready]
        if not ready:
            raise Disconnected("no replica is ready")
        self._dialled += 1
        server = ready[self._dialled % len(ready)].server
        assert server is not None
        if transport == "websocket":
            return await open_websocket(parse_address(f"ws://127.0.0.1:{server.port}/ws"))
        address = parse_address(f"https://127.0.0.1:{server.quic_port}/")
        return await open_webtransport(address, make_configuration(address, server.ca))


async def play(replicas: Sequence[Replica], sessions: int, rate: float) -> tuple[Load, list[tuple[float, int]]]:
    """Return the load, and for each replica's restart its seconds and the sessions that moved."""
    balancer = Balancer(replicas)
    load = Load(balancer.dial, sign(SECRET, client_id="bench", grants=Grants(("*",), ("*",))))
    restarts = []

    async def restart() -> None:
        for replica in replicas:
            began, moved = trio.current_time(), len(load.moves)
            await trio.to_thread.run_sync(replica.stop)
            await trio.to_thread.run_sync(replica.start)
            while not replica.ready:
                await trio.sleep(0.02)
            restarts.append((trio.current_time() - began, len(load.moves) - moved))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(balancer.watch)
        while not all(replica.ready for replica in replicas):
            await trio.sleep(0.05)
        await load.play(sessions, rate, restart)
        nursery.cancel_scope.cancel()
    return load, restarts


async def play_rounds(
    replicas: Sequence[Replica], rounds: int, subscriptions: int, latency: float
) -> distant_client.Counts:
    """Run one client with many subscriptions through `rounds` rounds of restarts."""
    proxy = distant_client.DelayingProxy(latency)

    def route_to(replica: Replica) -> None:
        assert replica.server is not None
        proxy.port = replica.server.port

    async def restart() -> None:
        for number, replica in enumerate(replicas):
            route_to(replicas[number - 1])
            await trio.to_thread.run_sync(replica.stop)
            await trio.to_thread.run_sync(replica.start)

    route_to(replicas[0])
    token = sign(SECRET, client_id="bench", grants=Grants(("*",), ("*",)))
    return await distant_client.run(proxy, token, rounds, subscriptions, restart)


def draw(moves: Sequence[float]) -> str:
    """Draw the reconnects of each second as SVG."""
    counts = Counter(int(at) for at in moves)
    most, seconds = max(counts.values(), default=1), max(counts, default=0) + 1
    step, height = max(4, 640 // seconds), 200
    width = step * seconds
    bars = "".join(
        f'<rect x="{50 + step * second}" y="{20 + height - height * count / most:.1f}" width="{step - 1}" '
        f'height="{height * count / most:.1f}"/>'
        for second, count in sorted(counts.items())
    )
    labels = "".join(
        f'<text x="{50 + step * second}" y="{height + 38}" text-anchor="middle">{second}</text>'
        for second in range(0, seconds + 1, 5)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 70}" height="{height + 64}" '
        f'font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>'
        f'<g fill="#3b6ea5">{bars}</g>'
        f'<path d="M50 20V{height + 20}H{width + 50}" fill="none" stroke="black"/>'
        f'<text x="44" y="26" text-anchor="end">{most}</text><text x="44" y="{height + 20}" text-anchor="end">0</text>'
        f"{labels}"
        f'<text x="{50 + width / 2}" y="{height + 58}" text-anchor="middle">seconds; bars: reconnects in one</text>'
        f"</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=300)
    parser.add_argument("--rate", type=float, default=20.0, help="messages per second, of all publishers together")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--delay", type=float, default=1.0, help="drain.delay, in seconds")
    parser.add_argument("--window", type=float, default=5.0, help="drain.window: seconds over which clients reconnect")
    parser.add_argument("--subscriptions", type=int, help="subscriptions of one client, instead of --sessions")
    parser.add_argument("--latency", type=float, default=150.0, help="round trip to the broker, in milliseconds")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--database", help="the URL of a PostgreSQL; without it, one is started")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the reconnects into this file")
    options = parser.parse_args()
    harness.prepare()
    print(harness.describe_machine())
    drain = f"[drain]\ndelay = {options.delay}\nwindow = {options.window}\n"
    with harness.database(options.database) as url:
        replicas = [Replica(url, drain) for _ in range(options.replicas)]
        try:
            for replica in replicas:
                replica.start()
            if options.subscriptions is not None:
                counts = trio.run(play_rounds, replicas, options.rounds, options.subscriptions, options.latency / 1000)
                sys.exit(bool(counts.error_count))
            load, restarts = trio.run(play, replicas, options.sessions, options.rate)
        finally:
            for replica in replicas:
                replica.stop()
    print(f"{options.sessions} sessions; drain: notice of {options.delay:g} s, reconnects over {options.window:g} s")
    print("\nreconnects in each second:")
    print("\n".join(plot(load.moves)))
    print()
    for number, (seconds, moved) in enumerate(restarts, 1):
        print(f"replica {number}: {seconds:.1f} s from SIGTERM to ready again, {moved} sessions moved")
    print(
        f"in all {sum(seconds for seconds, _ in restarts):.1f} s, {len(load.moves)} sessions moved; "
        f"published {load.published}, acknowledged {load.acknowledged}, delivered {load.delivered}"
    )
    pauses = load.pauses
    print(f"pause p50 {percentile(pauses, 0.5) * 1e3:.0f} ms, p99 {percentile(pauses, 0.99) * 1e3:.0f} ms")
    print(f"lost {load.lost}, repeated {load.repeated}")
    if options.svg is not None:
        options.svg.write_text(draw(load.moves))
    sys.exit(bool(load.lost or load.repeated or load.published != load.acknowledged))


if __name__ == "__main__":
    main()
