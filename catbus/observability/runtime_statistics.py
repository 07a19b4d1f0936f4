"""How a replica feels: how late its tasks get their turns, how long it took to start, how old what it sends is."""

from __future__ import annotations

import time
from collections import Counter

import trio

from ..auth.token_errors import RejectionReason
from ..delivery.fan_out import Delivery
from ..errors import ErrorCode
from ..log import Log
from .histogram import Histogram

INTERVAL = 0.25
"""Seconds between two looks at how late a task gets its turn."""
PAUSES = "publishes", "replies", "rate"
"""Why nothing more is read from a client: its publishes are not settled, its replies wait for it, or it has published
more than it may in a second."""


class RuntimeStatistics:
    """Belongs to one replica. Nothing in here costs anything per message."""

    def __init__(self, delivery: Delivery) -> None:
        self.refusals: Counter[ErrorCode] = Counter()
        """How often a client was refused something, by the code that it was told."""
        self.pauses = Counter(dict.fromkeys(PAUSES, 0))
        """How often nothing was read from a client for a while, by the reason."""
        self.refused_tokens: Counter[RejectionReason] = Counter()
        self.loop_delay = Histogram()
        """Seconds by which tasks are woken late."""
        self.delivery_latency = Histogram()
        """Seconds from the moment that the log stamped an entry to its being sent to who is not behind. Measured once
        for each pass of the flusher, of the oldest entry in it, by this machine's clock against the log's."""
        self.startup: float | None = None
        """Seconds until the log was open for the first time."""
        self._delivery = delivery

    def refused(self, code: ErrorCode) -> None:
        self.refusals[code] += 1

    def flushed(self) -> None:
        """Everything that was offered has been sent, but for those who are not to be sent anything yet."""
        stamped, self._delivery.unsent_since = self._delivery.unsent_since, 0
        if stamped:
            self.delivery_latency.observe(max(0.0, time.time() - stamped / 1000))

    async def run(self, log: Log) -> None:
        """Measure for ever, from the start on."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._time_startup, log, trio.current_time())
            while True:
                due = trio.current_time() + INTERVAL
                await trio.sleep_until(due)
                self.loop_delay.observe(trio.current_time() - due)

    async def _time_startup(self, log: Log, began: float) -> None:
        await log.wait_open()
        self.startup = trio.current_time() - began
