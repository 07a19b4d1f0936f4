"""One publisher to many subscribers: CPU time and latency of a delivery.

    python bench/fanout.py --subscribers 1000 --repeat 3 --compare nats
    python bench/fanout.py --transport sse
    python bench/fanout.py --transport webtransport

Each server is a process of its own, and so are its subscribers. The publisher is this process. Workloads:

    burst     --messages as fast as they are taken, 50 in a frame
    RATE/s    one message at a time, for --seconds

A subscriber that misses a message of a round ends the run. CPU is the CPU time of the server's process between the
first publish and the last delivery, including the kernel's work for it. The rows:

    catbus    `catbus run`, with the database of --database
    websocket with --transport sse: the same broker program, with WebSocket subscribers
    N workers `catbus run --workers N` (--workers N, with --database embedded or a URL): CPU of all its processes
    nats      nats-server (--compare nats; --nats names the program)
    bare      a loop that only relays what the publisher sends to each subscriber: with WebSocket a loop of `os.write`,
              which is the kernel's cost alone; with WebTransport a loop over aioquic, which handles packets,
              acknowledgements and timers with the same system calls

`x bare` is the CPU time of a delivery relative to `bare`: the median over pairs of rounds.

Latency is from just before the publisher's system call to just after the subscriber's, for a sample of subscribers that
has a process of its own. On few cores it includes the other subscribers' work. The publisher uses WebSocket, or plain
TCP to `bare`, whatever the subscribers use.
"""

from __future__ import annotations

import argparse
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
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import harness
from baseline_relays import HELLO, WELCOME, websocket_relay, webtransport_relay
from harness import BINARY, PAYLOAD_SIZE, PONG, Publisher, auth_line, bench_token, cpu_time, frame, payload, percentile
from subscriber_process import FORK, Connector, Request, Round, SubscriberProcess
from subscriber_transports import EventStreamConnector, Steps, WebSocketConnector, WebTransportConnector

from catbus.certificates import development_certificate
from catbus.endpoints.websocket.frame_encoder import text_header
from catbus.protocol.wire_messages import encode_message
from catbus.webtransport import server_configuration

CHANNEL, PATTERN = "bench.fanout", "bench.*"
OBJECTS_IN_FRAME = 50
WINDOW = 500
"""Maximum number of pending publishes."""
SAMPLE = 20
"""Subscribers whose latency is measured."""
DELIVERY_TIMEOUT = 60.0
"""Seconds after the last publish within which everything must have arrived."""

# Servers


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and how to talk to it."""

    name: str
    pids: Sequence[int]
    connector: Connector
    publish: Callable[[Sequence[bytes]], bytes]
    """Encodes some payloads as publishes."""
    connect_publisher: Callable[[], socket.socket]
    publisher_alive: bytes = b""
    """What the publisher sends to stay connected."""
    reply: bytes = b""
    """What every reply to a publish contains; empty if there are no replies."""


@contextmanager
def catbus_target(database: str, transport: str, name: str = "catbus", workers: int = 1) -> Iterator[Target]:
    def publish(payloads: Sequence[bytes]) -> bytes:
        lines = [b'{"type":"publish","channel":"%b","payload":%b}\n' % (CHANNEL.encode(), each) for each in payloads]
        return frame(b"".join(lines))

    hello = auth_line(), b'"auth_ok"'
    subscribe = b'{"type":"subscribe","pattern":"%b"}\n' % PATTERN.encode(), b'"subscribed"'
    alive = frame(b"", PONG)
    with harness.catbus_run(database, webtransport=transport == "webtransport", workers=workers) as server:
        match transport:
            case "webtransport":
                connector: Connector = WebTransportConnector(server.quic_port, server.ca, [hello, subscribe])
            case "sse":
                connector = EventStreamConnector(server.port, f"/events?pattern={PATTERN}&access_token={bench_token()}")
            case _:
                connector = WebSocketConnector(server.port, "/ws", framed([hello, subscribe]), alive)
        publisher = WebSocketConnector(server.port, "/ws", framed([hello]), alive)
        pids = [server.pid, *harness.worker_pids(server.pid)]
        yield Target(name, pids, connector, publish, publisher.connect_one, alive, b'"type":"published"')


@contextmanager
def nats_target(command: str) -> Iterator[Target]:
    def publish(payloads: Sequence[bytes]) -> bytes:
        lines = [b"PUB %b %d\r\n%b\r\n" % (CHANNEL.encode(), len(each), each) for each in payloads]
        return frame(b"".join(lines), BINARY)

    hello = b'CONNECT {"verbose":false,"protocol":1}\r\n'
    subscribe = b"SUB %b 1\r\n" % PATTERN.encode()
    alive = frame(b"PONG\r\n", BINARY)
    with tempfile.TemporaryDirectory() as directory, harness.nats_run(command, Path(directory)) as server:
        connector = WebSocketConnector(
            server.port, "/", [(frame(hello + subscribe + b"PING\r\n", BINARY), b"PONG\r\n")], alive
        )
        publisher = WebSocketConnector(server.port, "/", [(frame(hello + b"PING\r\n", BINARY), b"PONG\r\n")], alive)
        yield Target("nats", [server.pid], connector, publish, publisher.connect_one, alive)


@contextmanager
def bare_target() -> Iterator[Target]:
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as listener, running(websocket_relay, listener) as pid:
        port = listener.getsockname()[1]
        publisher = WebSocketConnector(port, "/publish", [], b"")
        yield Target("bare", [pid], WebSocketConnector(port, "/", [], b""), publish_framed, publisher.connect_one)


@contextmanager
def bare_webtransport_target() -> Iterator[Target]:
    with (
        tempfile.TemporaryDirectory() as directory,
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.bind(("127.0.0.1", 0))
        made = development_certificate(Path(directory), datetime.now(UTC))
        configuration = server_configuration(made.certificate_pem, made.key_pem)
        connector = WebTransportConnector(sock.getsockname()[1], made.certificate_pem, [(HELLO, WELCOME)])
        with running(webtransport_relay, listener, sock, configuration) as pid:
            yield Target(
                "bare", [pid], connector, publish_lines, lambda: socket.create_connection(listener.getsockname())
            )


@contextmanager
def running(relay: Callable[..., None], *arguments: object) -> Iterator[int]:
    """Run a relay in a process for the duration of the block, and yield its pid."""
    process = FORK.Process(target=relay, args=arguments, daemon=True)
    process.start()
    assert process.pid is not None
    try:
        yield process.pid
    finally:
        process.terminate()
        process.join()


def publish_lines(payloads: Sequence[bytes]) -> bytes:
    """Encode messages as Catbus would, for relays that pass them on unchanged."""
    at = time.time_ns() // 1_000_000
    return b"".join([encode_message(CHANNEL, each, PATTERN, 1_000_000, at, "bench") for each in payloads])


def framed(steps: Steps) -> Steps:
    return [(frame(said), expected) for said, expected in steps]


def publish_framed(payloads: Sequence[bytes]) -> bytes:
    lines = publish_lines(payloads)
    return text_header(len(lines)) + lines


# Rounds


class FanOutBench:
    """A server with its subscribers and its publisher."""

    def __init__(self, target: Target, subscribers: int) -> None:
        self.target = target
        self._subscribers = subscribers
        sample = min(SAMPLE, subscribers)
        self._processes = [
            SubscriberProcess(target.connector, sampled=False),
            SubscriberProcess(target.connector, sampled=True),
        ]
        # The sample is spread evenly over the order in which the server serves subscribers.
        ends = [(subscribers - sample) * (index + 1) // sample for index in range(sample)]
        for previous, end in pairwise([0, *ends]):
            self._all(end - previous, 1)
        self._publisher = Publisher(target.connect_publisher())
        self._acknowledged = 0

    def keep_alive(self) -> None:
        """Keep silent subscribers and the publisher connected."""
        self._all(None, None)
        self._publisher.write(self.target.publisher_alive)

    def run(self, workload: Workload) -> Result:
        """Run one round: publish, and wait until every subscriber has every message."""
        mark = b'"mark":"%b"' % secrets.token_hex(4).encode()
        task = Round(mark, workload.messages, workload.seconds + DELIVERY_TIMEOUT)
        self._all(task, task)
        self._acknowledged = 0
        cpu, began = sum(map(cpu_time, self.target.pids)), time.monotonic()
        if workload.rate:
            self._pace(mark, workload)
        else:
            self._burst(mark, workload.messages)
        if self.target.reply:
            self._wait_acknowledged(workload.messages)
        seen = [process.read_reply() for process in self._processes]
        ended, cpu = time.monotonic(), sum(map(cpu_time, self.target.pids)) - cpu
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
        for process in self._processes:
            process.end()

    def _all(self, *requests: Request) -> None:
        for process, request in zip(self._processes, requests, strict=True):
            process.send_request(request)
        for process in self._processes:
            process.read_reply()

    def _burst(self, mark: bytes, messages: int) -> None:
        for first in range(0, messages, OBJECTS_IN_FRAME):
            numbers = range(first, min(first + OBJECTS_IN_FRAME, messages))
            self._wait_acknowledged(first - WINDOW + OBJECTS_IN_FRAME)
            self._publisher.write(self.target.publish([payload(mark, number) for number in numbers]))
            self._wait_sent()

    def _pace(self, mark: bytes, workload: Workload) -> None:
        began = time.monotonic()
        for number in range(workload.messages):
            due = began + number / workload.rate
            while time.monotonic() < due:
                self._listen(due)
            self._publisher.write(self.target.publish([payload(mark, number)]))
            self._wait_sent()

    def _wait_sent(self) -> None:
        deadline = time.monotonic() + DELIVERY_TIMEOUT
        while self._publisher.blocked:
            self._listen(deadline)
            if time.monotonic() > deadline:
                sys.exit(f"{self.target.name} does not read what is published")

    def _wait_acknowledged(self, count: int) -> None:
        deadline = time.monotonic() + DELIVERY_TIMEOUT
        while self.target.reply and self._acknowledged < count:
            self._listen(deadline)
            if time.monotonic() > deadline:
                sys.exit(f"{self.target.name} has acknowledged {self._acknowledged} publishes of {count}")

    def _listen(self, until: float) -> None:
        lines = self._publisher.wait(until)
        if self.target.reply:
            self._acknowledged += lines.count(self.target.reply)
            if b"error" in lines:
                sys.exit(f"{self.target.name} refuses: {lines!r}")


class Workload(NamedTuple):
    """`rate` messages per second, or all at once if it is 0."""

    name: str
    messages: int
    rate: float
    seconds: float


class Result(NamedTuple):
    """CPU microseconds per delivery, deliveries per second, and latencies in milliseconds."""

    cpu: float
    speed: float
    p50: float
    p99: float


SUBSCRIBERS = {"websocket": 1000, "sse": 1000, "webtransport": 40}
"""As many as two cores can serve."""
NAMES = {"websocket": "WebSocket", "sse": "server-sent events", "webtransport": "WebTransport"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", choices=SUBSCRIBERS, default="websocket", help="of the subscribers (websocket)")
    parser.add_argument("--subscribers", type=int, metavar="N", help="(1000; 40 over WebTransport)")
    parser.add_argument("--messages", type=int, default=500, metavar="M", help="in a burst (500)")
    parser.add_argument(
        "--rates", type=float, nargs="*", default=[50, 100], metavar="R", help="paced, a second (50 100)"
    )
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="of each paced round (5)")
    parser.add_argument("--repeat", type=int, default=3, metavar="K", help="rounds, interleaved; medians are shown (3)")
    parser.add_argument("--database", default="memory", metavar="URL", help="of Catbus (memory)")
    parser.add_argument("--compare", action="append", default=[], choices=["nats"], help="measure another server too")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="measure a broker with N workers, too (1)")
    parser.add_argument("--nats", default="nats-server", metavar="PROGRAM", help="nats-server, unless it is on PATH")
    options = parser.parse_args()
    webtransport = options.transport == "webtransport"
    subscribers = options.subscribers or SUBSCRIBERS[options.transport]
    if webtransport and options.compare:
        parser.error("--compare: over WebTransport there is none")
    if options.workers > 1 and options.database == "memory":
        parser.error("--workers: they need a --database")
    harness.prepare()

    workloads = [Workload(f"burst of {options.messages}", options.messages, 0, 0)]
    workloads += [
        Workload(f"{rate:g}/s", max(1, int(rate * options.seconds)), rate, options.seconds) for rate in options.rates
    ]
    kind = NAMES[options.transport]
    print(f"1 publisher to {subscribers} {kind} subscribers, {PAYLOAD_SIZE} bytes, medians of {options.repeat}")
    print(harness.describe_machine(), flush=True)
    results: dict[tuple[Workload, str], list[Result]] = defaultdict(list)
    with ExitStack() as stack:
        targets = [stack.enter_context(catbus_target(options.database, options.transport))]
        if options.workers > 1:
            name = f"{options.workers} workers"
            targets.append(
                stack.enter_context(catbus_target(options.database, options.transport, name, options.workers))
            )
        if options.transport == "sse":
            targets.append(stack.enter_context(catbus_target(options.database, "websocket", "websocket")))
        if "nats" in options.compare:
            program = shutil.which(options.nats)
            if program is None:
                sys.exit(f"{options.nats} is not there: `apt install nats-server`, or name it with --nats")
            targets.append(stack.enter_context(nats_target(program)))
        targets.append(stack.enter_context(bare_webtransport_target() if webtransport else bare_target()))
        benches = [stack.enter_context(closing(FanOutBench(target, subscribers))) for target in targets]
        for _ in range(options.repeat):
            for workload in workloads:
                for bench in benches:
                    for each in benches:
                        each.keep_alive()
                    time.sleep(0.3)
                    results[workload, bench.target.name].append(bench.run(workload))
    print(f"\n{'':>14} {'':>9} {'CPU us/delivery':>16} {'x bare':>8} {'deliveries/s':>13} {'p50 ms':>8} {'p99 ms':>8}")
    for (workload, name), rounds in results.items():
        cpu, speed, p50, p99 = (statistics.median(values) for values in zip(*rounds, strict=True))
        ratio = statistics.median(
            mine.cpu / bare.cpu for mine, bare in zip(rounds, results[workload, "bare"], strict=True)
        )
        latency = f"{p50:8.2f} {p99:8.2f}" if workload.rate else f"{'-':>8} {'-':>8}"
        print(f"{workload.name:>14} {name:>9} {cpu:16.2f} {ratio:8.2f} {speed:13,.0f} {latency}")


if __name__ == "__main__":
    main()
