"""Many cheap subscribers in one process, which count what they receive."""

from __future__ import annotations

import itertools
import multiprocessing
import re
import select
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol

FORK = multiprocessing.get_context("fork")


class Connector(Protocol):
    """Connects subscribers: `subscriber_transports.py` has one for each transport."""

    def open(self, poll: select.epoll) -> Subscribers:
        """Return an empty set of subscribers, which will register their files with `poll`."""


class Subscribers(Protocol):
    """Subscribers of one connector, numbered from 0."""

    def connect_one(self) -> None:
        """Connect one more subscriber, and wait until it has subscribed."""

    def __len__(self) -> int: ...

    def receive(self, timeout: float) -> Iterable[tuple[int, bytes]]:
        """Yield what each subscriber has received, or receives within `timeout` seconds. Must be exhausted.

        Yields nothing if another file of the poll is ready first. Raises if a connection is lost.
        """

    def keep_alive(self) -> None:
        """Keep all connections alive."""


class Round(NamedTuple):
    """What to count: a text that each message contains once, the number of messages, and seconds to wait for them."""

    marker: bytes
    messages: int
    patience: float


class Stall(NamedTuple):
    """Stop reading until the next request, which is None, and then count, including what arrived meanwhile."""

    task: Round


class Received(NamedTuple):
    """How many subscribers received how many messages; and for each sampled one, number and latency in s of each."""

    counts: Counter[int]
    sample: list[list[tuple[int, float]]]


DONE = Received(Counter(), [])

Request = int | Round | Stall | None
"""Connect so many more subscribers; count; stop reading and then count; or keep the connections alive."""


class SubscriberProcess:
    """A process of subscribers. With `sampled` it records each message instead of counting."""

    def __init__(self, connector: Connector, *, sampled: bool) -> None:
        self._pipe, other = FORK.Pipe()
        self._process = FORK.Process(target=_live, args=(connector, other, sampled), daemon=True)
        self._process.start()
        other.close()

    def send_request(self, request: Request) -> None:
        """Send a request. `read_reply` returns its reply. `Round` and `Stall` have two: at begin and end."""
        self._pipe.send(request)

    def read_reply(self) -> Received:
        try:
            seen: Received = self._pipe.recv()
        except EOFError:
            sys.exit("a subscriber's connection has been lost")
        return seen

    def end(self) -> None:
        self._process.terminate()
        self._process.join()


def _live(connector: Connector, pipe: Connection[Received, Request], sampled: bool) -> None:
    poll = select.epoll()
    poll.register(pipe, select.EPOLLIN)
    peers = connector.open(poll)
    while True:
        while not pipe.poll():
            _drop(peers.receive(10))
        match pipe.recv():
            case int(count):
                for _ in range(count):
                    peers.connect_one()
                pipe.send(DONE)
            case Round() as task:
                _drop(peers.receive(0))
                pipe.send(DONE)
                pipe.send((_look if sampled else _count)(peers, task))
            case Stall(task):
                _drop(peers.receive(0))
                pipe.send(DONE)
                pipe.recv()
                pipe.send(_count(peers, task))
            case None:
                peers.keep_alive()
                pipe.send(DONE)


def _drop(received: Iterable[tuple[int, bytes]]) -> None:
    for _ in received:
        pass


def _count(peers: Subscribers, task: Round) -> Received:
    """Count what each subscriber receives."""
    marker, overlap = task.marker, len(task.marker) - 1
    counts = [0] * len(peers)
    tails = [b""] * len(peers)
    missing = len(peers) * task.messages
    deadline = time.monotonic() + task.patience
    while missing > 0 and time.monotonic() < deadline:
        for number, data in peers.receive(0.5):
            if tails[number]:
                data = tails[number] + data
            found = data.count(marker)
            # Most often a read ends where an object ends. Otherwise the marker may have been cut in two.
            tails[number] = b"" if data.endswith(b"\n") else data[-overlap:]
            counts[number] += found
            missing -= found
    return Received(Counter(counts), [])


def _look(peers: Subscribers, task: Round) -> Received:
    """Record what arrives with its time, and parse it after everything has arrived."""
    overlap = len(task.marker) - 1
    received: list[list[tuple[int, bytes]]] = [[] for _ in range(len(peers))]
    missing = [task.messages] * len(peers)
    tails = [b""] * len(peers)
    deadline = time.monotonic() + task.patience
    while any(left > 0 for left in missing) and time.monotonic() < deadline:
        for number, data in peers.receive(0.5):
            received[number].append((time.monotonic_ns(), data))
            data = tails[number] + data
            missing[number] -= data.count(task.marker)
            tails[number] = data[-overlap:]
    sample = [_messages(chunks, task.marker) for chunks in received]
    return Received(Counter(len(each) for each in sample), sample)


def _messages(chunks: Sequence[tuple[int, bytes]], marker: bytes) -> list[tuple[int, float]]:
    """Return number and latency of each message in the received chunks."""
    ends = list(itertools.accumulate(len(data) for _, data in chunks))
    hits = re.finditer(rb'"n":(\d+),"sent":(\d+),' + re.escape(marker), b"".join([data for _, data in chunks]))
    return [(int(hit[1]), (chunks[bisect_left(ends, hit.end())][0] - int(hit[2])) / 1e9) for hit in hits]
