"""The order in which received datagrams are processed: by authentication, and fair within each group."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from time import perf_counter
from typing import Generic, TypeVar

import trio

from .fair_queue import CpuUsage, FairQueue

T = TypeVar("T")

DatagramQueue = FairQueue[Hashable, Hashable, T]

TURN_TIME = 0.002
"""Seconds after which other tasks run, after however few datagrams."""
SHORT_TURN_TIME = 0.001
"""The same, while all waiting keys have exceeded their shares."""
IDLE_PASSES, IDLE_PASS_TIME = 2, 0.0001
"""Idle passes of the event loop before unauthenticated peers exceed their share, and the longest such pass."""
MAX_AUTHENTICATED_DATAGRAMS, MAX_UNAUTHENTICATED_DATAGRAMS = 4096, 1024
"""Maximum number of waiting datagrams: of authenticated clients, and of others. More are dropped, which makes QUIC
peers send less."""


class DatagramScheduler(Generic[T]):
    """Three fair queues of received datagrams that are served in rotation.

    In each queue, the key that has used the least CPU goes first. Authenticated peers are queued by client. All others
    are queued by network and have one share together. Peers whose address is not validated have a queue of their own,
    because their address may be forged. Over their shares, clients are served after all others, and the others when the
    event loop is idle.

    `serve` removes items of one source from the left of a deque until it is empty or a time of `perf_counter` has come,
    and returns the seconds of CPU to charge. `receive_waiting` queues the datagrams that have arrived meanwhile.
    """

    def __init__(self, serve: Callable[[deque[T], float], float], receive_waiting: Callable[[], None]) -> None:
        self.authenticated: DatagramQueue[T] = FairQueue(MAX_AUTHENTICATED_DATAGRAMS)
        """Peers with a valid token."""
        self.unauthenticated: DatagramQueue[T] = FairQueue(MAX_UNAUTHENTICATED_DATAGRAMS)
        """Peers without a valid token, whose address is validated."""
        self.unvalidated: DatagramQueue[T] = FairQueue(MAX_UNAUTHENTICATED_DATAGRAMS)
        self.unauthenticated_usage = CpuUsage()
        """The CPU use of all peers without a valid token."""
        self._queues = deque((self.authenticated, self.unauthenticated, self.unvalidated))
        self._serve = serve
        self._receive_waiting = receive_waiting
        self._running = False

    def charge(self, queue: DatagramQueue[T], key: Hashable, seconds: float, now: float) -> None:
        """Charge a key of one of the queues for work outside of `run`."""
        queue.charge(key, seconds, now)
        if queue is not self.authenticated:
            self.unauthenticated_usage.charge(seconds, now)

    async def run(self) -> None:
        """Serve until the queues are empty. Returns at once if another task is doing that."""
        if self._running:
            return
        self._running = True
        idle, took = 0, 0.0
        try:
            while True:
                served, ends = False, perf_counter() + TURN_TIME
                while self.serve_next(ends):
                    served = True
                    if perf_counter() >= ends:
                        break
                if not any(self._queues):
                    return
                if not served:
                    busy = took > IDLE_PASS_TIME or trio.lowlevel.current_statistics().tasks_runnable
                    idle = 0 if busy else idle + 1
                    if self.serve_over_share(perf_counter() + SHORT_TURN_TIME, idle=idle >= IDLE_PASSES):
                        idle = 0
                began = perf_counter()
                await trio.lowlevel.checkpoint()
                took = perf_counter() - began
                self._receive_waiting()
        finally:
            self._running = False

    def serve_next(self, ends: float) -> bool:
        """Serve one source within its share, from the next queue. Returns whether there was one."""
        now = trio.current_time()
        for _ in range(len(self._queues)):
            queue = self._queues[0]
            self._queues.rotate(-1)
            # Networks divide the share of all unauthenticated peers: a single network may use all of it.
            together = queue is not self.authenticated
            if together and self.unauthenticated_usage.exceeded(now):
                continue
            if self._serve_one(queue, ends, now, over_share=together):
                return True
        return False

    def serve_over_share(self, ends: float, *, idle: bool) -> bool:
        """Serve one source over its share. Returns whether there was one that may have more."""
        now = trio.current_time()
        queues = (self.authenticated, self.unauthenticated, self.unvalidated) if idle else (self.authenticated,)
        return any(self._serve_one(queue, ends, now, over_share=True) for queue in queues)

    def _serve_one(self, queue: DatagramQueue[T], ends: float, now: float, *, over_share: bool) -> bool:
        dequeued = queue.take(now, over_share=over_share)
        if dequeued is None:
            return False
        seconds = self._serve(dequeued.items, ends)
        queue.end(dequeued, seconds, now)
        if queue is not self.authenticated:
            self.unauthenticated_usage.charge(seconds, now)
        return True
