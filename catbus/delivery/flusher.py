"""The flusher: has send queues written at once under low load, and many messages per system call under high load.

The longer a pass over the waiting send queues takes, the longer these send queues linger before the next flush. A send
queue that was not part of an expensive pass does not wait for the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import trio

from .send_queue import SendQueue

MAX_LINGER = 0.02
"""Maximum number of seconds that a send queue lingers."""

CHECKPOINT_AFTER = 0.001
"""Seconds of flushing after which other tasks run. A publish needs several runs of its tasks."""

FLUSHES_PER_CLOCK_READING = 8
"""Number of send queues that are flushed before the clock is read again."""


@dataclass(frozen=True, slots=True)
class FlushStatistics:
    """`waiting` and `lingering`: send queues. `spent`: seconds inside passes."""

    passes: int
    flushes: int
    spent: float
    waiting: int
    lingering: int


class Flusher:
    """The task that has the writers of send queues flush them."""

    def __init__(
        self, clock: Callable[[], float] = perf_counter, *, on_flushed: Callable[[], None] = lambda: None
    ) -> None:
        """`on_flushed` is called after each pass."""
        self._clock = clock
        self._on_flushed = on_flushed
        self._waiting: list[SendQueue] = []
        self._lingering: deque[SendQueue] = deque()
        self._work = trio.Event()
        self._passes = 0
        self._flushes = 0
        self._spent = 0.0

    def statistics(self) -> FlushStatistics:
        return FlushStatistics(self._passes, self._flushes, self._spent, len(self._waiting), len(self._lingering))

    def wake(self, send_queue: SendQueue) -> None:
        """Flush a send queue soon, because an item was put into it while it was empty."""
        if not send_queue.queued:
            send_queue.queued = True
            self._waiting.append(send_queue)
            self._work.set()

    async def run(self) -> None:
        """Flush until cancelled."""
        linger = 0.0
        while True:
            if not self._waiting:
                self._work = trio.Event()
                with trio.move_on_at(self._lingering[0].lingers_until if self._lingering else float("inf")):
                    await self._work.wait()
            self._end_lingering(trio.current_time())
            linger = min(await self._pass(linger), MAX_LINGER)
            self._on_flushed()

    def _end_lingering(self, now: float) -> None:
        lingering = self._lingering
        while lingering and lingering[0].lingers_until <= now:
            self._waiting.append(lingering.popleft())

    async def _pass(self, linger: float) -> float:
        """Flush all waiting send queues, oldest first. Each lingers for as long as the last pass took."""
        clock = self._clock
        spent, began, now = 0.0, clock(), trio.current_time()
        until = now + linger
        send_queues, self._waiting = self._waiting, []
        self._passes += 1
        self._flushes += len(send_queues)
        for index, send_queue in enumerate(send_queues, 1):
            if send_queue.lingers_until > now:
                self._lingering.append(send_queue)
                continue
            send_queue.queued = False
            send_queue.lingers_until = until
            send_queue.writer.flush()
            if index % FLUSHES_PER_CLOCK_READING == 0 and (elapsed := clock() - began) > CHECKPOINT_AFTER:
                spent += elapsed
                await trio.lowlevel.checkpoint()
                began, now = clock(), trio.current_time()
                until = now + linger
        spent += clock() - began
        self._spent += spent
        return spent
