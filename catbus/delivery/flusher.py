"""When send queues are sent: at once when there is little to do, and many messages to a system call when there is much.

The more a pass over the waiting send queues costs, the longer those it served are left to fill before the next one
(the duty cycle). A send queue that did not take part in an expensive pass does not wait for those that did.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import trio

from .send_queue import SendQueue

LONGEST_REST = 0.02
"""Seconds that a send queue is left to fill at the most."""

SLICE = 0.001
"""Seconds of sending after which other tasks get a turn. A publish on its way in takes several turns."""

LOOK = 8
"""How many send queues are flushed from one look at the clock to the next."""


@dataclass(frozen=True, slots=True)
class FlushStatistics:
    """`waiting` and `resting` count send queues; `spent` is seconds inside passes."""

    passes: int
    flushes: int
    spent: float
    waiting: int
    resting: int


class Flusher:
    """The task that empties send queues into their outlets."""

    def __init__(
        self, clock: Callable[[], float] = perf_counter, *, on_flushed: Callable[[], None] = lambda: None
    ) -> None:
        """`on_flushed` is called after each pass."""
        self._clock = clock
        self._on_flushed = on_flushed
        self._waiting: list[SendQueue] = []
        self._resting: deque[SendQueue] = deque()
        self._work = trio.Event()
        self._passes = 0
        self._flushes = 0
        self._spent = 0.0

    def statistics(self) -> FlushStatistics:
        return FlushStatistics(self._passes, self._flushes, self._spent, len(self._waiting), len(self._resting))

    def wake(self, send_queue: SendQueue) -> None:
        """Something was put into an empty send queue."""
        if not send_queue.queued:
            send_queue.queued = True
            self._waiting.append(send_queue)
            self._work.set()

    async def run(self) -> None:
        """Flush for ever."""
        rest = 0.0
        while True:
            if not self._waiting:
                self._work = trio.Event()
                with trio.move_on_at(self._resting[0].rests_until if self._resting else float("inf")):
                    await self._work.wait()
            self._end_rests(trio.current_time())
            rest = min(await self._pass(rest), LONGEST_REST)
            self._on_flushed()

    def _end_rests(self, now: float) -> None:
        resting = self._resting
        while resting and resting[0].rests_until <= now:
            self._waiting.append(resting.popleft())

    async def _pass(self, rest: float) -> float:
        """Flush all that wait now, oldest first, and let each of them rest for as long as the last pass took."""
        clock = self._clock
        spent, began, now = 0.0, clock(), trio.current_time()
        until = now + rest
        send_queues, self._waiting = self._waiting, []
        self._passes += 1
        self._flushes += len(send_queues)
        for index, send_queue in enumerate(send_queues, 1):
            if send_queue.rests_until > now:
                self._resting.append(send_queue)
                continue
            send_queue.queued = False
            send_queue.rests_until = until
            send_queue.writer.flush()
            if index % LOOK == 0 and (elapsed := clock() - began) > SLICE:
                spent += elapsed
                await trio.lowlevel.checkpoint()
                began, now = clock(), trio.current_time()
                until = now + rest
        spent += clock() - began
        self._spent += spent
        return spent
