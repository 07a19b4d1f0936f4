"""Sessions that lag far behind, as after an outage: time until all are live, and the latency of others meanwhile.

    python bench/catch_up.py --sessions 10000 --messages 30000 --channels 1000

One replica on a PostgreSQL, the embedded one unless --database names another. --messages are published to --channels.
Then the replica is stopped, and one with an empty cache takes its place. --sessions connect and authenticate, each with
a lag of --messages. Then each subscribes to one channel from before the first message: all at once, or within --over
seconds, as clients reconnect at random moments. The replica has to read the whole log for them; each session receives
the messages of its channel and counts them. (All messages to all sessions would be 300 million deliveries, which would
measure the clients.)

Meanwhile other subscribers receive 50 messages per second, whose latency is measured. The phases:

    calm       nothing else happens
    entering   the sessions connect and authenticate
    behind     they subscribe and catch up, until the last of them has received `live`
    after      nothing else happens

The sessions are WebSocket connections in --processes processes with a lower priority, because real clients run on
other machines. On few cores they are most of the work nevertheless.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection
from typing import NamedTuple

import harness
from harness import PAYLOAD_SIZE, PONG, Publisher, Server, auth_line, frame, payload, percentile
from latency_probe import AUTH_STEP, RATE, SUBSCRIBERS, LatencyProbe, Measurement, for_seconds, publish_line
from subscriber_process import FORK
from subscriber_transports import WebSocketConnector

OBJECTS_IN_FRAME = 50
WINDOW = 1000
LIVE_TIMEOUT = 300.0
"""Seconds within which all of them must be live."""
MARK = b'"mark":"behind"'


def channel(number: int) -> bytes:
    return b"bench.catch_up.%d" % number


def publish_all(server: Server, messages: int, channels: int) -> None:
    """Publish `messages` messages, and wait until they are committed."""
    publisher = Publisher(
        WebSocketConnector(server.port, "/ws", [(frame(AUTH_STEP[0]), AUTH_STEP[1])], b"").connect_one()
    )
    published = acknowledged = 0
    while acknowledged < messages:
        while published < messages and published - acknowledged < WINDOW and not publisher.blocked:
            numbers = range(published, min(published + OBJECTS_IN_FRAME, messages))
            lines = [publish_line(channel(number % channels), payload(MARK, number)) for number in numbers]
            publisher.write(frame(b"".join(lines)))
            published += len(numbers)
        lines_read = publisher.wait(time.monotonic() + 1)
        if b"error" in lines_read:
            sys.exit(f"refused: {lines_read!r}")
        acknowledged += lines_read.count(b'"type":"published"')
    publisher.peer.close()


def look(server: Server) -> tuple[int, str]:
    """Return the head and the epoch of the log."""
    peer = harness.connect(server.port)
    peer.sendall(frame(auth_line()))
    reply = harness.wait_for(peer, b"\n")
    peer.close()
    description = json.loads(reply[reply.index(b"{") :])
    return description["head"], description["epoch"]


# The sessions


class SessionsConnected(NamedTuple):
    """How many seconds it took to connect and authenticate."""

    seconds: float


class SessionsLive(NamedTuple):
    """When each session received `live`, by the monotonic clock, and how many messages it had by then."""

    at: list[float]
    messages: list[int]


class Task(NamedTuple):
    """Subscribe within `over` seconds, each session to one of the channels, from `since` on."""

    channels: int
    since: int
    epoch: str
    over: float


class SessionProcess:
    """Some of the sessions, in a process of their own."""

    def __init__(self, port: int, numbers: Sequence[int], task: Task) -> None:
        self.pipe, other = FORK.Pipe()
        self._process = FORK.Process(target=_live, args=(port, numbers, task, other), daemon=True)
        self._process.start()
        other.close()

    def read_reply(self) -> SessionsConnected | SessionsLive:
        try:
            reply: SessionsConnected | SessionsLive = self.pipe.recv()
        except EOFError:
            sys.exit("a session has been lost")
        return reply

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def _live(
    port: int, numbers: Sequence[int], task: Task, pipe: Connection[SessionsConnected | SessionsLive, None]
) -> None:
    os.nice(5)
    began = time.monotonic()
    connector = WebSocketConnector(port, "/ws", [(frame(AUTH_STEP[0]), AUTH_STEP[1])], frame(b"", PONG))
    peers = []
    for index in range(len(numbers)):
        peers.append(connector.connect_one())
        if index % 500 == 0:
            for peer in peers:
                peer.send(connector.alive)
    pipe.send(SessionsConnected(time.monotonic() - began))
    pipe.recv()
    poll = select.epoll()
    places = {peer.fileno(): index for index, peer in enumerate(peers)}
    at, messages, rests = [0.0] * len(peers), [0] * len(peers), [b""] * len(peers)
    began, asked = time.monotonic(), 0
    missing, deadline = len(peers), began + task.over + LIVE_TIMEOUT
    while missing:
        now = time.monotonic()
        if now > deadline:
            sys.exit(f"{missing} sessions are not live after {LIVE_TIMEOUT:.0f} s")
        while asked < len(peers) and now >= began + task.over * asked / len(peers):
            pattern = channel(numbers[asked] % task.channels).decode()
            request = {"type": "subscribe", "pattern": pattern, "since": task.since, "epoch": task.epoch}
            poll.register(peers[asked], select.EPOLLIN)
            peers[asked].send(frame(json.dumps(request).encode()))
            asked += 1
        for file, _ in poll.poll(0.01 if asked < len(peers) else 1):
            index = places[file]
            data = peers[index].recv(1 << 16)
            if not data:
                sys.exit("the broker has closed a session")
            lines, _, rests[index] = (rests[index] + data).rpartition(b"\n")
            if b'"type":"gap"' in lines:
                sys.exit("a session received a gap")
            messages[index] += lines.count(MARK)
            if not at[index] and re.search(rb'"type":"live"', lines):
                at[index] = time.monotonic()
                missing -= 1
    pipe.send(SessionsLive(at, messages))
    pipe.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=10_000, metavar="N", help="(10000)")
    parser.add_argument("--messages", type=int, default=30_000, metavar="M", help="that they are behind (30000)")
    parser.add_argument("--channels", type=int, default=1000, metavar="C", help="that these are spread over (1000)")
    parser.add_argument("--processes", type=int, default=4, metavar="P", help="that the sessions are in (4)")
    parser.add_argument("--over", type=float, default=0, metavar="T", help="seconds in which they subscribe (0)")
    parser.add_argument("--seconds", type=float, default=10, metavar="S", help="of the calm phases (10)")
    parser.add_argument("--database", metavar="URL", help="instead of the embedded PostgreSQL; its log is written to")
    options = parser.parse_args()
    harness.prepare()
    each = [len(range(number, options.messages, options.channels)) for number in range(options.channels)]

    print(f"{options.sessions} sessions over WebSocket, {options.messages} messages of {PAYLOAD_SIZE} bytes behind,")
    print(f"of which each gets those of one channel of {options.channels}: about {each[-1]}")
    print(f"{SUBSCRIBERS} others get {RATE} messages a second")
    print(harness.describe_machine(), flush=True)
    limits = f"\n[limits]\nconnections = {options.sessions + 100}\n"
    with ExitStack() as stack:
        url = stack.enter_context(harness.database(options.database))
        with harness.catbus_run(url) as server:
            since, epoch = look(server)
            publish_all(server, options.messages, options.channels)
        server = stack.enter_context(harness.catbus_run(url, settings=limits))
        probe = stack.enter_context(closing(LatencyProbe(server)))
        print(f"\n{'':>10} {'':>6} {'CPU':>5} {'WebSocket ms':>21} {'RSS MiB':>17}")
        print(f"{'':>10} {'s':>6} {'%':>5} {'p50':>10} {'p99':>10} {'after':>8} {'peak':>8}")
        show("calm", probe.measure("calm", for_seconds(options.seconds)))

        task = Task(options.channels, since, epoch, options.over)
        numbers = [range(number, options.sessions, options.processes) for number in range(options.processes)]
        processes = [
            stack.enter_context(closing(SessionProcess(server.port, process_numbers, task)))
            for process_numbers in numbers
        ]
        show("entering", probe.measure("entering", waiting_for(processes)))
        for process in processes:
            process.read_reply()
        began = time.monotonic()
        for process in processes:
            process.pipe.send(None)
        show("behind", probe.measure("behind", waiting_for(processes)))
        took: list[float] = []
        for process, process_numbers in zip(processes, numbers, strict=True):
            found = process.read_reply()
            assert isinstance(found, SessionsLive)
            if found.messages != [each[number % options.channels] for number in process_numbers]:
                sys.exit("a session has not got every message once")
            took += [at - began for at in found.at]
        show("after", probe.measure("after", for_seconds(options.seconds)))
    print(
        f"\nSeconds until they were live: half {percentile(took, 0.5):.1f}, of 100 all but one "
        f"{percentile(took, 0.99):.1f}, all {max(took):.1f}."
    )


def waiting_for(processes: Sequence[SessionProcess]) -> Callable[[], bool]:
    return lambda: not all(process.pipe.poll() for process in processes)


def show(name: str, measurement: Measurement) -> None:
    latencies = measurement.latencies["WebSocket"]
    latency = [f"{percentile(latencies, share) * 1e3:10.2f}" for share in (0.5, 0.99)]
    memory = f"{measurement.memory / 2**20:8.1f} {measurement.peak / 2**20:8.1f}"
    print(f"{name:>10} {measurement.seconds:6.1f} {measurement.busy * 100:5.0f}", *latency, memory, flush=True)


if __name__ == "__main__":
    main()
