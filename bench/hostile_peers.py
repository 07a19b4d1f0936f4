"""The cost of hostile WebTransport peers: the broker's memory, and the latency of honest subscribers.

    python bench/hostile_peers.py --bytes 1000000000 --peers 3

One `catbus run` with its log in memory. Besides the hostile peers, subscribers over WebTransport and WebSocket receive
50 messages per second, and their latencies are measured in every phase:

    calm       nothing else happens
    small      300,000 messages of 100 bytes are published and acknowledged, without subscribers
    load       --bytes are published the same way, in messages of 4 KiB
    unread     the same with subscribers: --peers that acknowledge every packet but never read, and as many that stop
               responding; those that the broker disconnects reconnect
    publishes  one peer publishes as fast as it can, for --seconds, and another does so without reading replies
    garbage    a peer sends malformed objects of the maximum size, and then larger ones; it reconnects
    streams    a peer opens streams and sends datagrams without end
    after      nothing else happens

Ends with status 1 if an honest subscriber misses a message or receives one out of order, or if a hostile phase takes
more than BOUND bytes of memory beyond `small` and `load`. By then the log's cache is full (`limits.recent`, 64 MiB, and
up to half of that for Python's overhead of small messages with an id), so the rest is what the peers make the broker
keep. By design that is, for each peer: 512 KiB of send queue, 256 KiB of unacknowledged stream data and 64 KiB more,
and 512 KiB that the peer may send unasked. So BOUND is 2 MiB for each, and 32 MiB for memory that the allocator cannot
return.

The hostile peers run at a lower priority, because real ones run on other machines.
"""

from __future__ import annotations

import argparse
import itertools
import os
import secrets
import select
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import harness
from harness import Publisher, Server, frame, percentile
from latency_probe import (
    AUTH_STEP,
    RATE,
    SUBSCRIBERS,
    LatencyProbe,
    Measurement,
    for_seconds,
    publish_line,
    subscribe_step,
)
from subscriber_process import FORK
from subscriber_transports import ConnectionClosed, WebSocketConnector, WebTransportClient

from catbus.webtransport import client_configuration

LOAD_CHANNEL, NOISE_CHANNEL = b"bench.load", b"bench.noise"
LOAD_SIZE = 4096
SMALL_SIZE, SMALL_COUNT = 100, 300_000
"""More than the cache holds."""
OBJECTS_IN_FRAME = 10
WINDOW = 200
REPLY_TIMEOUT = 60.0
LARGEST = 65_536
"""Maximum size of an object: `limits.message_size`."""
PEER_BOUND = 2 << 20
FRAGMENTATION_BOUND = 32 << 20

Hostile = Callable[[Server], None]


# Hostile peers, each in a process of its own


class HostileClient:
    """An authenticated WebTransport client, which its caller can make misbehave."""

    def __init__(self, server: Server, *steps: tuple[bytes, bytes]) -> None:
        self.peer = WebTransportClient(client_configuration("127.0.0.1", ca=server.ca), server.quic_port)
        self.connection = self.peer.connection
        self.peer.transmit()
        while self.peer.stream is None:
            self.turn(1)
        self.stream = self.peer.stream
        for said, expected in (AUTH_STEP, *steps):
            self.connection.send(self.stream, said)
            self.peer.transmit()
            reply = b""
            while expected not in reply:
                reply += self.turn(1)

    def turn(self, timeout: float) -> bytes:
        """Process what arrives until `timeout` or until a timer is due, and send what is due."""
        timer, now = self.connection.timer, time.monotonic()
        if timer is not None:
            timeout = min(timeout, max(0.0, timer - now))
        data = b""
        if select.select([self.peer.socket], [], [], timeout)[0]:
            data = self.peer.receive()
        self.peer.handle_timer(time.monotonic())
        self.peer.transmit()
        return data

    def write(self, data: bytes) -> None:
        """Send all of `data`, as fast as flow control allows."""
        while not self.connection.writable(self.stream):
            self.turn(1)
        self.connection.send(self.stream, data)
        self.peer.transmit()
        self.turn(0)


def never_read(server: Server) -> None:
    client = HostileClient(server, subscribe_step(LOAD_CHANNEL))
    client.peer.consumes = False
    while True:
        client.turn(1)


def stop_answering(server: Server) -> None:
    client = HostileClient(server, subscribe_step(LOAD_CHANNEL))
    time.sleep(70)
    client.peer.socket.close()


def publish_endlessly(server: Server) -> None:
    _publish_endlessly(HostileClient(server))


def ignore_replies(server: Server) -> None:
    client = HostileClient(server)
    client.peer.consumes = False
    _publish_endlessly(client)


def _publish_endlessly(client: HostileClient) -> None:
    lines = b"".join(
        [publish_line(NOISE_CHANNEL, b'"%b"' % (b"x" * 100), b',"id":%d' % number) for number in range(50)]
    )
    while True:
        client.write(lines.replace(b'"id":', b'"id":%d' % secrets.randbelow(1 << 40)))


def send_garbage(server: Server) -> None:
    client = HostileClient(server)
    for _ in range(50):
        client.write(b'{"type":' + b"[" * (LARGEST - 10) + b"}\n")
    client.write(b'{"type":"' + b"x" * LARGEST)
    while True:
        client.turn(1)


def open_streams(server: Server) -> None:
    client = HostileClient(server)
    connection = client.connection
    while True:
        for bidirectional in (True, False):
            while (stream := connection.open_stream(bidirectional=bidirectional)) is not None:
                connection.send(stream, b"x" * 1000)
        while connection.send_datagram(b"x" * 1000):
            pass
        client.peer.transmit()
        client.turn(0.001)


HARMS: dict[str, Sequence[Hostile]] = {
    "publishes": [publish_endlessly, ignore_replies],
    "garbage": [send_garbage],
    "streams": [open_streams],
}


def reconnect_forever(harm: Hostile, server: Server) -> None:
    """Run `harm`, and reconnect each time the broker disconnects it."""
    os.nice(5)
    while True:
        try:
            harm(server)
        except ConnectionClosed:
            time.sleep(0.1)


def publish_load(port: int, size: int, count: int) -> None:
    """Publish `count` messages of `size` bytes, and wait until all of them are acknowledged."""
    publisher = Publisher(WebSocketConnector(port, "/ws", [(frame(AUTH_STEP[0]), AUTH_STEP[1])], b"").connect_one())
    text = b'"%b"' % (b"x" * (size - 2))
    published = acknowledged = 0
    deadline = time.monotonic() + REPLY_TIMEOUT
    while acknowledged < count:
        while published < count and published - acknowledged < WINDOW and not publisher.blocked:
            numbers = range(published, min(published + OBJECTS_IN_FRAME, count))
            publisher.write(
                frame(b"".join([publish_line(LOAD_CHANNEL, text, b',"id":%d' % number) for number in numbers]))
            )
            published += len(numbers)
        lines = publisher.wait(time.monotonic() + 1)
        if b"error" in lines:
            sys.exit(f"refused: {lines!r}")
        if lines:
            acknowledged += lines.count(b'"type":"published"')
            deadline = time.monotonic() + REPLY_TIMEOUT
        elif time.monotonic() > deadline:
            sys.exit(f"{acknowledged} of {count} publishes have been acknowledged")


# Phases


@contextmanager
def running_clients(*clients: tuple[Hostile, Server]) -> Iterator[None]:
    running = [FORK.Process(target=reconnect_forever, args=each, daemon=True) for each in clients]
    for process in running:
        process.start()
    try:
        yield
        for process in running:
            if process.exitcode:
                sys.exit(f"a hostile peer has ended with status {process.exitcode}")
    finally:
        for process in running:
            process.terminate()
            process.join()


@contextmanager
def publishing_load(server: Server, size: int, count: int) -> Iterator[Callable[[], bool]]:
    process = FORK.Process(target=publish_load, args=(server.port, size, count), daemon=True)
    process.start()
    try:
        yield process.is_alive
        if process.exitcode:
            sys.exit("the load was not taken")
    finally:
        process.terminate()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=1e9, metavar="B", help="of load, twice (1e9)")
    parser.add_argument(
        "--peers", type=int, default=3, metavar="P", help="peers that never read, and peers that stop responding (3)"
    )
    parser.add_argument("--seconds", type=float, default=10, metavar="S", help="of each of the other phases (10)")
    options = parser.parse_args()
    harness.prepare()
    count = int(options.bytes / LOAD_SIZE)
    bound = 2 * options.peers * PEER_BOUND + FRAGMENTATION_BOUND

    print(
        f"{SUBSCRIBERS} subscribers over each transport get {RATE} messages a second; load of {options.bytes:.0f} bytes"
    )
    print(f"{options.peers} peers that never read and {options.peers} that stop responding")
    print(harness.describe_machine(), flush=True)
    print(f"\n{'':>10} {'':>6} {'CPU':>5} {'WebTransport ms':>21} {'WebSocket ms':>21} {'RSS MiB':>17}")
    print(f"{'':>10} {'s':>6} {'%':>5} {'p50':>10} {'p99':>10} {'p50':>10} {'p99':>10} {'after':>8} {'peak':>8}")
    found: dict[str, Measurement] = {}
    with ExitStack() as stack:
        server = stack.enter_context(harness.catbus_run("memory", webtransport=True))
        probe = stack.enter_context(closing(LatencyProbe(server)))

        def measure(name: str, is_running: Callable[[], bool]) -> None:
            found[name] = measurement = probe.measure(name, is_running)
            latency = [
                f"{percentile(each, share) * 1e3:10.2f}"
                for each in measurement.latencies.values()
                for share in (0.5, 0.99)
            ]
            memory = f"{measurement.memory / 2**20:8.1f} {measurement.peak / 2**20:8.1f}"
            print(f"{name:>10} {measurement.seconds:6.1f} {measurement.busy * 100:5.0f}", *latency, memory, flush=True)

        measure("calm", for_seconds(options.seconds))
        with publishing_load(server, SMALL_SIZE, SMALL_COUNT) as is_running:
            measure("small", is_running)
        with publishing_load(server, LOAD_SIZE, count) as is_running:
            measure("load", is_running)
        with running_clients(*itertools.chain([(never_read, server), (stop_answering, server)] * options.peers)):
            time.sleep(2)
            with publishing_load(server, LOAD_SIZE, count) as is_running:
                measure("unread", is_running)
        for name, harm in HARMS.items():
            with running_clients(*[(each, server) for each in harm]):
                measure(name, for_seconds(options.seconds))
        measure("after", for_seconds(options.seconds))
    quiet = max(found["small"].peak, found["load"].peak)
    growth = max(measurement.peak for measurement in found.values()) - quiet
    print(f"\nBeyond the {quiet / 2**20:.1f} MiB without them: {growth / 2**20:.1f} MiB, BOUND is {bound / 2**20:.0f}.")
    if growth > bound:
        sys.exit("that is too much")


if __name__ == "__main__":
    main()
