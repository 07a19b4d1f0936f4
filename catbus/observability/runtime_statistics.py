"""Runtime statistics of a replica: errors sent, read pauses, rejected tokens, event loop delay and latencies."""

from __future__ import annotations

import time
from collections import Counter

import trio

from ..auth.token_errors import RejectionReason
from ..delivery.fan_out import Delivery
from ..error_codes import ErrorCode
from ..log import Log
from .histogram import Histogram

MEASURING_INTERVAL = 0.25
"""Seconds between two measurements of the event loop's delay."""
READ_PAUSE_REASONS = "publishes", "replies", "rate"
"""Reasons why the broker pauses reading from a client: its publishes are pending, it does not read its replies, or it
publishes faster than it may."""


class RuntimeStatistics:
    """The runtime statistics of one replica. None of them costs anything per message."""

    def __init__(self, delivery: Delivery) -> None:
        self.errors_sent: Counter[ErrorCode] = Counter()
        """Errors sent to clients."""
        self.read_pauses = Counter(dict.fromkeys(READ_PAUSE_REASONS, 0))
        self.rejected_tokens: Counter[RejectionReason] = Counter()
        self.loop_delay = Histogram()
        """Seconds between the time for which a task set its alarm and the time at which it ran."""
        self.delivery_latency = Histogram()
        """Seconds from the log's timestamp of a message until it is sent to a live subscription. Measured once in each
        pass of the flusher, for its oldest message, by this machine's clock against the log's."""
        self.startup: float | None = None
        """Seconds until the log was open for the first time."""
        self._delivery = delivery

    def count_error(self, code: ErrorCode) -> None:
        """Count an error that was sent to a client."""
        self.errors_sent[code] += 1

    def record_flush(self) -> None:
        """Record that all messages offered so far have been sent, except those whose send queues may not be flushed."""
        stamped, self._delivery.unsent_since = self._delivery.unsent_since, 0
        if stamped:
            self.delivery_latency.observe(max(0.0, time.time() - stamped / 1000))

    async def run(self, log: Log) -> None:
        """Measure until cancelled. Call it at the start of the replica."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure_startup, log, trio.current_time())
            while True:
                due = trio.current_time() + MEASURING_INTERVAL
                await trio.sleep_until(due)
                self.loop_delay.observe(trio.current_time() - due)

    async def _measure_startup(self, log: Log, began: float) -> None:
        await log.wait_open()
        self.startup = trio.current_time() - began
