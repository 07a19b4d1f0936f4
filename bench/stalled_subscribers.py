"""Subscribers that stop reading, and the latency of the others.

    python bench/stalled_subscribers.py --subscribers 500 --share 0.1

One `catbus run` with its log in memory. In each round --fill bytes are published as fast as possible, in messages of 4
KiB. That is more than the broker and both kernels buffer for a subscriber that does not read. Then --rate messages per
second follow for --seconds, whose latency is measured. All subscribers receive all messages. The rows, whose rounds are
interleaved:

    none       all subscribers read
    stalled    --share of them read nothing from before the fill until after the last message

Then the stalled subscribers read again, and must receive every message of the round.

Latency is from just before the publisher's system call to just after the subscriber's, for a sample of subscribers that
read and that have a process of their own. On few cores it includes the other subscribers' work.
"""

from __future__ import annotations

import argparse
import secrets
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

import harness
from harness import PAYLOAD_SIZE, PONG, Publisher, Server, frame, payload, percentile
from latency_probe import AUTH_STEP, publish_line, subscribe_step
from subscriber_process import Received, Request, Round, Stall, SubscriberProcess
from subscriber_transports import WebSocketConnector

CHANNEL = b"bench.stalled"
FILL_SIZE = 4096
OBJECTS_IN_FRAME = 10
SAMPLE = 20
GROUPS = 10
"""Subscribers connect in groups, so that stalling and sampled ones are spread among the others."""
DELIVERY_TIMEOUT = 60.0
BAR = 1.5


class Load(NamedTuple):
    fill: int
    """Messages."""
    rate: float
    seconds: float

    @property
    def paced(self) -> int:
        return max(1, int(self.rate * self.seconds))


class StallBench:
    """A broker's subscribers, and a publisher for them."""

    def __init__(self, server: Server, subscribers: int, stalling: int) -> None:
        steps = [AUTH_STEP, subscribe_step(CHANNEL)]
        framed = [(frame(said), expected) for said, expected in steps]
        connector = WebSocketConnector(server.port, "/ws", framed, frame(b"", PONG))
        sample = min(SAMPLE, subscribers - stalling)
        self._sizes = subscribers - stalling - sample, sample, stalling
        self._processes = [SubscriberProcess(connector, sampled=sampled) for sampled in (False, True, False)]
        for group in range(GROUPS):
            self._ask([size * (group + 1) // GROUPS - size * group // GROUPS for size in self._sizes])
        self._publisher = Publisher(WebSocketConnector(server.port, "/ws", framed[:1], b"").connect_one())

    def run(self, load: Load, *, stall: bool) -> list[float]:
        """Run one round, and return latencies in seconds."""
        self._ask([None] * len(self._processes))
        self._publisher.write(frame(b"", PONG))
        *steady, stalling = self._processes
        name = secrets.token_hex(4).encode()
        whole_round = Round(b'"mark":"%b-' % name, load.fill + load.paced, DELIVERY_TIMEOUT)
        stalling.send_request(Stall(whole_round) if stall else whole_round)
        stalling.read_reply()

        fill, paced = (b'"mark":"%b-%b"' % (name, part) for part in (b"fill", b"paced"))
        self._begin(steady, Round(fill, load.fill, DELIVERY_TIMEOUT))
        for first in range(0, load.fill, OBJECTS_IN_FRAME):
            numbers = range(first, min(first + OBJECTS_IN_FRAME, load.fill))
            self._publish([payload(fill, number, FILL_SIZE) for number in numbers])
        self._end(steady, load.fill)

        self._begin(steady, Round(paced, load.paced, load.seconds + DELIVERY_TIMEOUT))
        began = time.monotonic()
        for number in range(load.paced):
            while time.monotonic() < (due := began + number / load.rate):
                self._publisher.wait(due)
            self._publish([payload(paced, number)])
        sample = self._end(steady, load.paced)[1].sample
        if stall:
            stalling.send_request(None)
        self._end([stalling], load.fill + load.paced)
        for each in sample:
            if [number for number, _ in each] != list(range(load.paced)):
                sys.exit("a subscriber got them in another order")
        return [latency for each in sample for _, latency in each]

    def close(self) -> None:
        for process in self._processes:
            process.end()

    def _ask(self, requests: Sequence[Request]) -> None:
        for process, request in zip(self._processes, requests, strict=True):
            process.send_request(request)
        for process in self._processes:
            process.read_reply()

    def _begin(self, processes: Sequence[SubscriberProcess], task: Round) -> None:
        for process in processes:
            process.send_request(task)
        for process in processes:
            process.read_reply()

    def _end(self, processes: Sequence[SubscriberProcess], messages: int) -> list[Received]:
        """Wait until all of them have received all messages."""
        seen = [process.read_reply() for process in processes]
        counts = sum((each.counts for each in seen), Counter[int]())
        if set(counts) - {messages}:
            sys.exit(f"of {messages} messages came (how many: to how many) {counts}")
        return seen

    def _publish(self, payloads: Sequence[bytes]) -> None:
        self._publisher.write(frame(b"".join([publish_line(CHANNEL, each, b',"ack":false') for each in payloads])))
        deadline = time.monotonic() + DELIVERY_TIMEOUT
        while self._publisher.blocked:
            if b"error" in (lines := self._publisher.wait(deadline)) or time.monotonic() > deadline:
                sys.exit(f"the broker does not take what is published: {lines!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subscribers", type=int, default=500, metavar="N", help="(500)")
    parser.add_argument("--share", type=float, default=0.1, metavar="X", help="of them that stall (0.1)")
    parser.add_argument("--fill", type=float, default=4e6, metavar="B", help="bytes (4e6)")
    parser.add_argument("--rate", type=float, default=50, metavar="R", help="messages a second (50)")
    parser.add_argument("--seconds", type=float, default=5, metavar="S", help="of each round (5)")
    parser.add_argument("--repeat", type=int, default=5, metavar="K", help="rounds, interleaved; medians are shown (5)")
    parser.add_argument("--database", default="memory", metavar="URL", help="of the broker (memory)")
    options = parser.parse_args()
    harness.prepare()
    stalling = max(1, round(options.subscribers * options.share))
    load = Load(max(1, int(options.fill / FILL_SIZE)), options.rate, options.seconds)

    print(f"{options.subscribers} subscribers, of which {stalling} stall; {options.rate:g} messages a second")
    print(f"{PAYLOAD_SIZE} bytes, medians of {options.repeat}")
    print(harness.describe_machine(), flush=True)
    results: dict[str, list[tuple[float, float]]] = {"none": [], "stalled": []}
    with ExitStack() as stack:
        server = stack.enter_context(harness.catbus_run(options.database))
        bench = stack.enter_context(closing(StallBench(server, options.subscribers, stalling)))
        for _ in range(options.repeat):
            for name, rounds in results.items():
                latencies = bench.run(load, stall=name == "stalled")
                rounds.append((percentile(latencies, 0.5), percentile(latencies, 0.99)))
    print(f"\n{'':>10} {'p50 ms':>8} {'p99 ms':>8}")
    tails: list[float] = []
    for name, rounds in results.items():
        p50, p99 = (statistics.median(values) * 1e3 for values in zip(*rounds, strict=True))
        tails.append(p99)
        print(f"{name:>10} {p50:8.2f} {p99:8.2f}")
    print(f"\np99 of the subscribers that read, as a multiple: {tails[1] / tails[0]:.2f}; the bar is {BAR}.")


if __name__ == "__main__":
    main()
