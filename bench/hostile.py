"""What hostile WebTransport peers cost a broker, and those who behave well beside them.

    python bench/hostile.py --bytes 1000000000 --peers 3

One `catbus run` with its log in memory. Beside the hostile peers, subscribers over WebTransport and over WebSocket get
50 messages a second, and their latencies are measured in every phase:

    calm       nothing else happens
    small      somebody publishes 300,000 messages of 100 bytes, acknowledged, which nobody hears
    load       somebody publishes --bytes in messages of 4 KiB, the same way
    unread     the same again, heard by --peers that acknowledge every packet and never take a byte, and by as many that
               are not heard of again: those that the broker gives up come back
    publishes  a peer publishes as fast as it can, for --seconds, and another that takes no answer
    garbage    a peer sends objects that mean nothing, as large as they may be, and then larger; it comes back
    streams    a peer opens streams and sends datagrams without end
    after      nothing else happens

Ends with status 1 when a subscriber who behaves well lacks a message or gets one out of order, or when a hostile phase
takes more than BOUND bytes of memory beyond what `small` and `load` took. By then the log's ring has been full
(`limits.recent`, 64 MiB, and as much as half of that again for what Python adds to small messages that have an id), so
what comes on top is what the peers make the broker keep. For one, by design: 512 KiB of mailbox; 256 KiB of its stream
that it has not acknowledged, and 64 KiB more; 512 KiB that it may send unasked. So BOUND is 2 MiB for each, and
32 MiB that the allocator may scatter.

The hostile peers run at a lower priority: real ones have machines of their own.
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
from calm import HELLO, RATE, SUBSCRIBERS, Calm, Figures, during, publish_line, subscribe_step
from crowd import processes
from doors import Lost, WebSocketDoor, WebTransportPeer
from harness import Publisher, Server, frame, percentile

from catbus.webtransport import client_configuration

LOAD, NOISE = b"bench.load", b"bench.noise"
LOAD_SIZE = 4096
SMALL_SIZE, SMALL_COUNT = 100, 300_000
"""More than the ring holds."""
OBJECTS_IN_FRAME = 10
WINDOW = 200
PATIENCE = 60.0
LARGEST = 65_536
"""Of an object: `limits.message_size`."""
PEER_BOUND = 2 << 20
SCATTERED = 32 << 20

Hostile = Callable[[Server], None]


# Who does harm, each in a process of its own


class Enemy:
    """A WebTransport client who has logged in, and whoever drives it can do wrong."""

    def __init__(self, server: Server, *steps: tuple[bytes, bytes]) -> None:
        self.peer = WebTransportPeer(client_configuration("127.0.0.1", ca=server.ca), server.quic_port)
        self.connection = self.peer.connection
        self.peer.transmit()
        while self.peer.stream is None:
            self.turn(1)
        self.stream = self.peer.stream
        for said, expected in (HELLO, *steps):
            self.connection.send(self.stream, said)
            self.peer.transmit()
            answer = b""
            while expected not in answer:
                answer += self.turn(1)

    def turn(self, timeout: float) -> bytes:
        """Take what comes until the time is up or a timer is due, and send what is due."""
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
        """Send all of it, as fast as it is taken."""
        while not self.connection.writable(self.stream):
            self.turn(1)
        self.connection.send(self.stream, data)
        self.peer.transmit()
        self.turn(0)


def never_read(server: Server) -> None:
    enemy = Enemy(server, subscribe_step(LOAD))
    enemy.peer.consumes = False
    while True:
        enemy.turn(1)


def go_deaf(server: Server) -> None:
    enemy = Enemy(server, subscribe_step(LOAD))
    time.sleep(70)
    enemy.peer.socket.close()


def publish_without_end(server: Server) -> None:
    _publish_without_end(Enemy(server))


def hear_no_answer(server: Server) -> None:
    enemy = Enemy(server)
    enemy.peer.consumes = False
    _publish_without_end(enemy)


def _publish_without_end(enemy: Enemy) -> None:
    lines = b"".join([publish_line(NOISE, b'"%b"' % (b"x" * 100), b',"id":%d' % number) for number in range(50)])
    while True:
        enemy.write(lines.replace(b'"id":', b'"id":%d' % secrets.randbelow(1 << 40)))


def send_garbage(server: Server) -> None:
    enemy = Enemy(server)
    for _ in range(50):
        enemy.write(b'{"type":' + b"[" * (LARGEST - 10) + b"}\n")
    enemy.write(b'{"type":"' + b"x" * LARGEST)
    while True:
        enemy.turn(1)


def open_streams(server: Server) -> None:
    enemy = Enemy(server)
    connection = enemy.connection
    while True:
        for bidirectional in (True, False):
            while (stream := connection.open_stream(bidirectional=bidirectional)) is not None:
                connection.send(stream, b"x" * 1000)
        while connection.send_datagram(b"x" * 1000):
            pass
        enemy.peer.transmit()
        enemy.turn(0.001)


HARMS: dict[str, Sequence[Hostile]] = {
    "publishes": [publish_without_end, hear_no_answer],
    "garbage": [send_garbage],
    "streams": [open_streams],
}


def again_and_again(harm: Hostile, server: Server) -> None:
    """Come back whenever the broker has had enough."""
    os.nice(5)
    while True:
        try:
            harm(server)
        except Lost:
            time.sleep(0.1)


def publish_load(port: int, size: int, count: int) -> None:
    """Publish so many messages of this size, and wait until all of them are acknowledged."""
    publisher = Publisher(WebSocketDoor(port, "/ws", [(frame(HELLO[0]), HELLO[1])], b"").enter())
    text = b'"%b"' % (b"x" * (size - 2))
    published = answered = 0
    deadline = time.monotonic() + PATIENCE
    while answered < count:
        while published < count and published - answered < WINDOW and not publisher.blocked:
            numbers = range(published, min(published + OBJECTS_IN_FRAME, count))
            publisher.write(frame(b"".join([publish_line(LOAD, text, b',"id":%d' % number) for number in numbers])))
            published += len(numbers)
        lines = publisher.wait(time.monotonic() + 1)
        if b"error" in lines:
            sys.exit(f"refused: {lines!r}")
        if lines:
            answered += lines.count(b'"type":"published"')
            deadline = time.monotonic() + PATIENCE
        elif time.monotonic() > deadline:
            sys.exit(f"{answered} of {count} publishes have been answered")


# Phases


@contextmanager
def at_work(*enemies: tuple[Hostile, Server]) -> Iterator[None]:
    running = [processes.Process(target=again_and_again, args=each, daemon=True) for each in enemies]
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
def load_of(server: Server, size: int, count: int) -> Iterator[Callable[[], bool]]:
    process = processes.Process(target=publish_load, args=(server.port, size, count), daemon=True)
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
    parser.add_argument("--peers", type=int, default=3, metavar="P", help="that never read, and that go deaf (3)")
    parser.add_argument("--seconds", type=float, default=10, metavar="S", help="of each of the other phases (10)")
    options = parser.parse_args()
    harness.prepare()
    count = int(options.bytes / LOAD_SIZE)
    bound = 2 * options.peers * PEER_BOUND + SCATTERED

    print(
        f"{SUBSCRIBERS} subscribers over each transport get {RATE} messages a second; load of {options.bytes:.0f} bytes"
    )
    print(f"{options.peers} peers that never read and {options.peers} that go deaf")
    print(harness.describe_machine(), flush=True)
    print(f"\n{'':>10} {'':>6} {'CPU':>5} {'WebTransport ms':>21} {'WebSocket ms':>21} {'RSS MiB':>17}")
    print(f"{'':>10} {'s':>6} {'%':>5} {'p50':>10} {'p99':>10} {'p50':>10} {'p99':>10} {'after':>8} {'peak':>8}")
    found: dict[str, Figures] = {}
    with ExitStack() as stack:
        server = stack.enter_context(harness.catbus_run("memory", webtransport=True))
        calm = stack.enter_context(closing(Calm(server)))

        def measure(name: str, going_on: Callable[[], bool]) -> None:
            found[name] = figures = calm.measure(name, going_on)
            latency = [
                f"{percentile(each, share) * 1e3:10.2f}" for each in figures.latencies.values() for share in (0.5, 0.99)
            ]
            memory = f"{figures.memory / 2**20:8.1f} {figures.peak / 2**20:8.1f}"
            print(f"{name:>10} {figures.seconds:6.1f} {figures.busy * 100:5.0f}", *latency, memory, flush=True)

        measure("calm", during(options.seconds))
        with load_of(server, SMALL_SIZE, SMALL_COUNT) as going_on:
            measure("small", going_on)
        with load_of(server, LOAD_SIZE, count) as going_on:
            measure("load", going_on)
        with at_work(*itertools.chain([(never_read, server), (go_deaf, server)] * options.peers)):
            time.sleep(2)
            with load_of(server, LOAD_SIZE, count) as going_on:
                measure("unread", going_on)
        for name, harm in HARMS.items():
            with at_work(*[(each, server) for each in harm]):
                measure(name, during(options.seconds))
        measure("after", during(options.seconds))
    quiet = max(found["small"].peak, found["load"].peak)
    growth = max(figures.peak for figures in found.values()) - quiet
    print(f"\nBeyond the {quiet / 2**20:.1f} MiB without them: {growth / 2**20:.1f} MiB, BOUND is {bound / 2**20:.0f}.")
    if growth > bound:
        sys.exit("that is too much")


if __name__ == "__main__":
    main()
