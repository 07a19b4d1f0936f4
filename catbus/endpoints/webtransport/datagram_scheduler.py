"""Who is served when, of those whose datagrams have arrived: clients, newcomers, and unverified by turns."""

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
"""Seconds after which other tasks have their turn, however few datagrams were dealt with."""
SHORT_TURN_TIME = 0.001
"""The same, where all that wait have had more than their shares."""
IDLE_PASSES, IDLE_PASS_TIME = 2, 0.0001
"""Passes of the event loop in which no other task was ready to run, and seconds that such a pass takes at the most."""
MAX_AUTHENTICATED_DATAGRAMS, MAX_UNAUTHENTICATED_DATAGRAMS = 4096, 1024
"""Datagrams that wait at the most: of clients with a token, and of those that have shown none. What comes beyond that
is dropped, by which QUIC tells a peer to send less."""


class DatagramScheduler(Generic[T]):
    """What waits to be served, in three queues that take turns.

    In each, the key that has used least of the CPU goes first. Clients go by themselves. All others go by their
    networks, and have one share together; what unverified say of where they come from may be false, so they are apart.
    Beyond their shares, clients are served when all others have been, and the others when the event loop is idle.

    `serve` takes items of one source from the left of a deque until it is empty or a time by `perf_counter`, and
    returns the seconds of CPU to charge for that. `receive_waiting` looks whether more has arrived.
    """

    def __init__(self, serve: Callable[[deque[T], float], float], receive_waiting: Callable[[], None]) -> None:
        self.authenticated: DatagramQueue[T] = FairQueue(MAX_AUTHENTICATED_DATAGRAMS)
        """Those that have shown a token that was good."""
        self.unauthenticated: DatagramQueue[T] = FairQueue(MAX_UNAUTHENTICATED_DATAGRAMS)
        """Those that have not, and whose addresses are known to be theirs."""
        self.unvalidated: DatagramQueue[T] = FairQueue(MAX_UNAUTHENTICATED_DATAGRAMS)
        self.unauthenticated_usage = CpuUsage()
        """What newcomers and unverified have used of the CPU together."""
        self._queues = deque((self.authenticated, self.unauthenticated, self.unvalidated))
        self._serve = serve
        self._receive_waiting = receive_waiting
        self._running = False

    def charge(self, queue: DatagramQueue[T], key: Hashable, seconds: float, now: float) -> None:
        """Charge a key of one of the queues for what was done for it outside its turns."""
        queue.charge(key, seconds, now)
        if queue is not self.authenticated:
            self.unauthenticated_usage.charge(seconds, now)

    async def run(self) -> None:
        """Serve what waits, until nothing does; at once if that is being done already."""
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
        """Serve one source that has not had its share, of the queue whose turn it is; whether there was one."""
        now = trio.current_time()
        for _ in range(len(self._queues)):
            queue = self._queues[0]
            self._queues.rotate(-1)
            # Networks share what those without a token have together: alone, one may have all of it.
            together = queue is not self.authenticated
            if together and self.unauthenticated_usage.exceeded(now):
                continue
            if self._serve_one(queue, ends, now, over_share=together):
                return True
        return False

    def serve_over_share(self, ends: float, *, idle: bool) -> bool:
        """Serve one source although it has had its share; whether there was one that may have more."""
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
