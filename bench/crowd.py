"""Many subscribers in a process of their own, which count what they get and cost little."""

from __future__ import annotations

import itertools
import multiprocessing
import re
import select
import socket
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

import harness

processes = multiprocessing.get_context("fork")


@dataclass(frozen=True, slots=True)
class Door:
    """How a subscriber gets in."""

    port: int
    path: str
    steps: Sequence[tuple[bytes, bytes]]
    """What it sends, frame by frame, and what comes in return."""
    alive: bytes
    """What it sends now and then to be taken for alive."""

    def enter(self) -> socket.socket:
        """A socket that is subscribed, and does not block."""
        peer = harness.connect(self.port, self.path)
        for said, expected in self.steps:
            peer.sendall(said)
            harness.wait_for(peer, expected)
        peer.setblocking(False)
        return peer


class Round(NamedTuple):
    """What is to be counted: a text that stands in each message once, and how many seconds there are for it."""

    marker: bytes
    messages: int
    patience: float


class Seen(NamedTuple):
    """How many subscribers got how many messages, and for each of a sample every message: (number, latency in s)."""

    counts: Counter[int]
    sample: list[list[tuple[int, float]]]


DONE = Seen(Counter(), [])

Request = int | Round | None
"""So many subscribers more; count; or say that all of them are alive."""


class Crowd:
    """Such a process. `sampled`: look at each message instead of counting them."""

    def __init__(self, door: Door, *, sampled: bool) -> None:
        self._pipe, other = processes.Pipe()
        self._process = processes.Process(target=_live, args=(door, other, sampled), daemon=True)
        self._process.start()
        other.close()

    def ask(self, request: Request) -> None:
        """Ask for something, to which there is one `answer`; to a `Round` two: it has begun, it has ended."""
        self._pipe.send(request)

    def answer(self) -> Seen:
        try:
            seen: Seen = self._pipe.recv()
        except EOFError:
            sys.exit("the subscribers have ended")
        return seen

    def end(self) -> None:
        self._process.terminate()
        self._process.join()


def _live(door: Door, pipe: Connection[Seen, Request], sampled: bool) -> None:
    peers: dict[int, socket.socket] = {}
    poll = select.epoll()
    while True:
        match pipe.recv():
            case int(count):
                for peer in [door.enter() for _ in range(count)]:
                    poll.register(peer, select.EPOLLIN)
                    peers[peer.fileno()] = peer
                pipe.send(DONE)
            case Round() as task:
                while ready := poll.poll(0):
                    for file, _ in ready:
                        peers[file].recv(1 << 18)
                pipe.send(DONE)
                pipe.send((_look if sampled else _count)(poll, peers, task))
            case None:
                for peer in peers.values():
                    peer.send(door.alive)
                pipe.send(DONE)


def _count(poll: select.epoll, peers: dict[int, socket.socket], task: Round) -> Seen:
    """Count what each of them gets."""
    marker, overlap = task.marker, len(task.marker) - 1
    counts = dict.fromkeys(peers, 0)
    tails = dict.fromkeys(peers, b"")
    missing = len(peers) * task.messages
    deadline = time.monotonic() + task.patience
    while missing > 0 and time.monotonic() < deadline:
        for file, _ in poll.poll(0.5):
            data = peers[file].recv(1 << 16)
            if not data:
                sys.exit(f"the server has closed a subscriber's connection, {missing} messages early")
            if tails[file]:
                data = tails[file] + data
            found = data.count(marker)
            # Most often a read ends where an object ends. Otherwise the marker may have been cut in two.
            tails[file] = b"" if data.endswith(b"\n") else data[-overlap:]
            counts[file] += found
            missing -= found
    return Seen(Counter(counts.values()), [])


def _look(poll: select.epoll, peers: dict[int, socket.socket], task: Round) -> Seen:
    """Keep what comes with its time, and look into it when all is there."""
    overlap = len(task.marker) - 1
    received: dict[int, list[tuple[int, bytes]]] = {file: [] for file in peers}
    missing = dict.fromkeys(peers, task.messages)
    tails = dict.fromkeys(peers, b"")
    deadline = time.monotonic() + task.patience
    while any(left > 0 for left in missing.values()) and time.monotonic() < deadline:
        for file, _ in poll.poll(0.5):
            data = peers[file].recv(1 << 18)
            if not data:
                sys.exit("the server has closed a subscriber's connection")
            received[file].append((time.monotonic_ns(), data))
            data = tails[file] + data
            missing[file] -= data.count(task.marker)
            tails[file] = data[-overlap:]
    sample = [_messages(chunks, task.marker) for chunks in received.values()]
    return Seen(Counter(len(each) for each in sample), sample)


def _messages(chunks: Sequence[tuple[int, bytes]], marker: bytes) -> list[tuple[int, float]]:
    """The number and the latency of each message in what was received at some times."""
    ends = list(itertools.accumulate(len(data) for _, data in chunks))
    hits = re.finditer(rb'"n":(\d+),"sent":(\d+),' + re.escape(marker), b"".join([data for _, data in chunks]))
    return [(int(hit[1]), (chunks[bisect_left(ends, hit.end())][0] - int(hit[2])) / 1e9) for hit in hits]
