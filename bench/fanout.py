"""One publisher to many WebSocket subscribers: what a delivery costs the server, and how long it takes.

    python bench/fanout.py --subscribers 1000 --repeat 3 --compare nats

Each server is a process of its own, and so are its subscribers; the publisher is this one. Workloads:

    burst     --messages as fast as they are taken, 50 in a frame
    RATE/s    one message at a time, for --seconds

A subscriber that has not got every message of a round ends the run. CPU is all that the server's process has used
between the first publish and the last delivery, the kernel's work for it included. The rows:

    catbus    `catbus run`, with the database of --database
    nats      nats-server (--compare nats; --nats names the program)
    bare      a loop of `os.write` that passes what the publisher sends on to each socket: what the kernel alone costs

Latency is from right before the publisher's system call to right after the subscriber's, on a sample of the subscribers
that has a process of its own. On few cores the other subscribers' work is part of it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import harness
from crowd import Crowd, Door, Request, Round, processes
from harness import BINARY, PONG, Publisher, auth_line, cpu_time, frame, percentile

from catbus.endpoints.frames import text_header
from catbus.wire import encode_entry

CHANNEL, PATTERN = "bench.fanout", "bench.*"
PAYLOAD_SIZE = 128
OBJECTS_IN_FRAME = 50
WINDOW = 500
"""Publishes that may be unanswered."""
SAMPLE = 20
"""Subscribers whose latency is measured."""
PATIENCE = 60.0
"""Seconds after the last publish in which everything must have arrived."""

# Servers


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and how one speaks to it."""

    name: str
    pid: int
    door: Door
    publish: Callable[[Sequence[bytes]], bytes]
    """The bytes that publish some payloads."""
    publisher_door: Door
    answer: bytes = b""
    """What stands in the answer to each publish; empty where there is none."""


@contextmanager
def catbus_target(database: str) -> Iterator[Target]:
    def publish(payloads: Sequence[bytes]) -> bytes:
        lines = [b'{"type":"publish","channel":"%b","payload":%b}\n' % (CHANNEL.encode(), each) for each in payloads]
        return frame(b"".join(lines))

    hello = frame(auth_line()), b'"auth_ok"'
    subscribe = frame(b'{"type":"subscribe","pattern":"%b"}\n' % PATTERN.encode()), b'"subscribed"'
    alive = frame(b"", PONG)
    with harness.catbus_run(database) as server:
        door = Door(server.port, "/ws", [hello, subscribe], alive)
        publisher = Door(server.port, "/ws", [hello], alive)
        yield Target("catbus", server.pid, door, publish, publisher, b'"type":"published"')


@contextmanager
def nats_target(command: str) -> Iterator[Target]:
    def publish(payloads: Sequence[bytes]) -> bytes:
        lines = [b"PUB %b %d\r\n%b\r\n" % (CHANNEL.encode(), len(each), each) for each in payloads]
        return frame(b"".join(lines), BINARY)

    hello = b'CONNECT {"verbose":false,"protocol":1}\r\n'
    subscribe = b"SUB %b 1\r\n" % PATTERN.encode()
    alive = frame(b"PONG\r\n", BINARY)
    with tempfile.TemporaryDirectory() as directory, harness.nats_run(command, Path(directory)) as server:
        door = Door(server.port, "/", [(frame(hello + subscribe + b"PING\r\n", BINARY), b"PONG\r\n")], alive)
        publisher = Door(server.port, "/", [(frame(hello + b"PING\r\n", BINARY), b"PONG\r\n")], alive)
        yield Target("nats", server.pid, door, publish, publisher)


@contextmanager
def bare_target() -> Iterator[Target]:
    def publish(payloads: Sequence[bytes]) -> bytes:
        at = time.time_ns() // 1_000_000
        lines = b"".join([encode_entry(CHANNEL, each, PATTERN, 1_000_000, at, "bench") for each in payloads])
        return text_header(len(lines)) + lines

    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener:
        process = processes.Process(target=relay, args=(listener,), daemon=True)
        process.start()
        assert process.pid is not None
        port = listener.getsockname()[1]
        try:
            yield Target("bare", process.pid, Door(port, "/", [], b""), publish, Door(port, "/publish", [], b""))
        finally:
            process.terminate()
            process.join()


def relay(listener: socket.socket) -> None:
    """Pass what the last to connect sends, who asks for `/publish`, on to everyone before."""
    peers: list[socket.socket] = []
    while True:
        peer, _ = listener.accept()
        request = harness.wait_for(peer, b"\r\n\r\n")
        peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        if request.startswith(b"GET /publish "):
            break
        peers.append(peer)
    files = [each.fileno() for each in peers]
    write = os.write
    while data := peer.recv(65_536):
        for file in files:
            write(file, data)


# Rounds


class Arena:
    """A server with its subscribers and its publisher."""

    def __init__(self, target: Target, subscribers: int) -> None:
        self.target = target
        self._subscribers = subscribers
        sample = min(SAMPLE, subscribers)
        self._crowds = [Crowd(target.door, sampled=False), Crowd(target.door, sampled=True)]
        # The sample stands everywhere in the order in which the server serves them.
        ends = [(subscribers - sample) * (index + 1) // sample for index in range(sample)]
        for previous, end in pairwise([0, *ends]):
            self._all(end - previous, 1)
        self._publisher = Publisher(target.publisher_door.enter())
        self._answered = 0

    def keep_alive(self) -> None:
        """Without it a server would take the silent subscribers for dead."""
        self._all(None, None)
        self._publisher.write(self.target.publisher_door.alive)

    def run(self, workload: Workload) -> Result:
        """One round: publish, and wait until everybody has everything."""
        mark = b'"mark":"%b"' % secrets.token_hex(4).encode()
        task = Round(mark, workload.messages, workload.seconds + PATIENCE)
        self._all(task, task)
        self._answered = 0
        cpu, began = cpu_time(self.target.pid), time.monotonic()
        if workload.rate:
            self._pace(mark, workload)
        else:
            self._burst(mark, workload.messages)
        if self.target.answer:
            self._wait_answered(workload.messages)
        seen = [crowd.answer() for crowd in self._crowds]
        ended, cpu = time.monotonic(), cpu_time(self.target.pid) - cpu
        counts = sum((each.counts for each in seen), Counter[int]())
        if counts != {workload.messages: self._subscribers}:
            sys.exit(f"{self.target.name}: of {workload.messages} messages came (how many: to how many) {counts}")
        numbers = list(range(workload.messages))
        for each in seen[1].sample:
            if [number for number, _ in each] != numbers:
                sys.exit(f"{self.target.name}: a subscriber got them in another order")
        deliveries = self._subscribers * workload.messages
        latencies = [latency for each in seen[1].sample for _, latency in each]
        return Result(
            cpu / deliveries * 1e6,
            deliveries / (ended - began),
            percentile(latencies, 0.5) * 1e3,
            percentile(latencies, 0.99) * 1e3,
        )

    def close(self) -> None:
        for crowd in self._crowds:
            crowd.end()

    def _all(self, *requests: Request) -> None:
        for crowd, request in zip(self._crowds, requests, strict=True):
            crowd.ask(request)
        for crowd in self._crowds:
            crowd.answer()

    def _burst(self, mark: bytes, messages: int) -> None:
        for first in range(0, messages, OBJECTS_IN_FRAME):
            numbers = range(first, min(first + OBJECTS_IN_FRAME, messages))
            self._wait_answered(first - WINDOW + OBJECTS_IN_FRAME)
            self._publisher.write(self.target.publish([_payload(mark, number) for number in numbers]))
            self._wait_sent()

    def _pace(self, mark: bytes, workload: Workload) -> None:
        began = time.monotonic()
        for number in range(workload.messages):
            due = began + number / workload.rate
            while time.monotonic() < due:
                self._listen(due)
            self._publisher.write(self.target.publish([_payload(mark, number)]))
            self._wait_sent()

    def _wait_sent(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._publisher.blocked:
            self._listen(deadline)
            if time.monotonic() > deadline:
                sys.exit(f"{self.target.name} does not read what is published")

    def _wait_answered(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.target.answer and self._answered < count:
            self._listen(deadline)
            if time.monotonic() > deadline:
                sys.exit(f"{self.target.name} has answered {self._answered} publishes of {count}")

    def _listen(self, until: float) -> None:
        lines = self._publisher.wait(until)
        if self.target.answer:
            self._answered += lines.count(self.target.answer)
            if b"error" in lines:
                sys.exit(f"{self.target.name} refuses: {lines!r}")


def _payload(mark: bytes, number: int) -> bytes:
    """128 bytes of JSON: which message it is, of which round, and when it was published."""
    text = b'{"n":%d,"sent":%d,%b,"pad":"' % (number, time.monotonic_ns(), mark)
    return text + b"x" * (PAYLOAD_SIZE - len(text) - 2) + b'"}'


class Workload(NamedTuple):
    """`rate` messages a second, or all at once."""

    name: str
    messages: int
    rate: float
    seconds: float


class Result(NamedTuple):
    """CPU in microseconds a delivery, deliveries a second, and latencies in milliseconds."""

    cpu: float
    speed: float
    p50: float
    p99: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subscribers", type=int, default=1000, metavar="N")
    parser.add_argument("--messages", type=int, default=500, metavar="M", help="in a burst (500)")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[50, 100], metavar="R", help="paced, a second (50 100)"
    )
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="of each paced round (5)")
    parser.add_argument("--repeat", type=int, default=3, metavar="K", help="rounds, interleaved; medians are shown (3)")
    parser.add_argument("--database", default="memory", metavar="URL", help="of Catbus (memory)")
    parser.add_argument("--compare", action="append", default=[], choices=["nats"], help="measure another server too")
    parser.add_argument("--nats", default="nats-server", metavar="PROGRAM", help="nats-server, unless it is on PATH")
    options = parser.parse_args()
    harness.prepare()

    workloads = [Workload(f"burst of {options.messages}", options.messages, 0, 0)]
    workloads += [
        Workload(f"{rate:g}/s", max(1, int(rate * options.seconds)), rate, options.seconds) for rate in options.rates
    ]
    print(
        f"1 publisher to {options.subscribers} WebSocket subscribers, {PAYLOAD_SIZE} bytes, medians of {options.repeat}"
    )
    print(harness.describe_machine(), flush=True)
    results: dict[tuple[Workload, str], list[Result]] = defaultdict(list)
    with ExitStack() as stack:
        targets = [stack.enter_context(catbus_target(options.database))]
        if "nats" in options.compare:
            program = shutil.which(options.nats)
            if program is None:
                sys.exit(f"{options.nats} is not there: `apt install nats-server`, or name it with --nats")
            targets.append(stack.enter_context(nats_target(program)))
        targets.append(stack.enter_context(bare_target()))
        arenas = [stack.enter_context(closing(Arena(target, options.subscribers))) for target in targets]
        for _ in range(options.repeat):
            for workload in workloads:
                for arena in arenas:
                    for each in arenas:
                        each.keep_alive()
                    time.sleep(0.3)
                    results[workload, arena.target.name].append(arena.run(workload))
    print(f"\n{'':>14} {'':>8} {'CPU us/delivery':>16} {'deliveries/s':>13} {'p50 ms':>8} {'p99 ms':>8}")
    for (workload, name), rounds in results.items():
        cpu, speed, p50, p99 = (statistics.median(values) for values in zip(*rounds, strict=True))
        latency = f"{p50:8.2f} {p99:8.2f}" if workload.rate else f"{'-':>8} {'-':>8}"
        print(f"{workload.name:>14} {name:>8} {cpu:16.2f} {speed:13,.0f} {latency}")


if __name__ == "__main__":
    main()
