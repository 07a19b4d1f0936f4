"""The budget of the retained messages: their size is checked every few seconds, and append rejects more above it."""

from __future__ import annotations

from math import inf

import trio

from ...observability.loggers import get_logger
from ..access.asyncpg_bridge import DatabaseConnection

logger = get_logger("catbus.postgres")

CHECK_INTERVAL = 2.0
"""Seconds between two checks of a replica. Meanwhile the retained messages may exceed their budget."""
CHECK_TIME_SHARE = 50
"""Checks take at most one part in so many of the time: each reads the whole table."""

_MEASURE = "SELECT messages, bytes FROM catbus.measure_retained($1)"


class RetainedBudget:
    """Measures the retained messages, and records in the database whether they exceed the budget. All replicas do."""

    def __init__(self, budget: int) -> None:
        self.messages = 0
        """Retained messages at the last check; 0 before the first one."""
        self.bytes = 0
        """Bytes of their channels, payloads and senders."""
        self._budget = budget
        self._exceeded = False
        self._next = -inf

    async def check_if_due(self, connection: DatabaseConnection) -> None:
        """Measure them, if it is time for that."""
        began = trio.current_time()
        if began < self._next:
            return
        self.messages, self.bytes = await connection.fetchrow(_MEASURE, self._budget)
        now = trio.current_time()
        self._next = now + max(CHECK_INTERVAL, CHECK_TIME_SHARE * (now - began))
        exceeded = self.bytes > self._budget
        if exceeded and not self._exceeded:
            logger.warning(
                "the retained messages exceed their budget: only removing is possible",
                messages=self.messages,
                bytes=self.bytes,
                budget=self._budget,
            )
        self._exceeded = exceeded
