"""The lag of the consumers, measured every few seconds for metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import inf

import trio

from ..access.asyncpg_bridge import DatabaseConnection

CHECK_INTERVAL = 5.0
"""Seconds between two measurements of a replica."""
CHECK_TIME_SHARE = 50
"""Measurements take at most one part in so many of the time."""
MAX_NAMED = 100
"""Consumers that are measured by name. The others are measured together."""
OTHERS = "*"
"""The name of the other consumers together: no consumer can have it."""

_MEASURE = """
SELECT p.consumer, max(p.lag), max(p.lag_seconds), count(*) FILTER (WHERE p.gap),
       (SELECT count(*) FROM catbus.rejected_messages AS r WHERE r.consumer = p.consumer)
FROM catbus.partition_positions() AS p GROUP BY p.consumer
"""


@dataclass(frozen=True, slots=True)
class ConsumerLag:
    """How far a consumer is: the lag of its slowest partition, its partitions with a gap, and its dead letters."""

    messages: int
    seconds: float
    gaps: int
    dead_letters: int


class ConsumerLags:
    """Measures the consumers. All replicas do, each for its own metrics."""

    def __init__(self) -> None:
        self.consumers: dict[str, ConsumerLag] = {}
        """By name, as they were at the last measurement."""
        self._next = -inf

    async def measure_if_due(self, connection: DatabaseConnection) -> None:
        """Measure them, if it is time for that."""
        began = trio.current_time()
        if began < self._next:
            return
        rows = await connection.fetch(_MEASURE)
        now = trio.current_time()
        self._next = now + max(CHECK_INTERVAL, CHECK_TIME_SHARE * (now - began))
        self.consumers = collect((name, ConsumerLag(*figures)) for name, *figures in rows)


def collect(measured: Iterable[tuple[str, ConsumerLag]]) -> dict[str, ConsumerLag]:
    """The first `MAX_NAMED` consumers, in the order of their names, and all others together."""
    found: Sequence[tuple[str, ConsumerLag]] = sorted(measured, key=lambda each: each[0])
    others = [lag for _, lag in found[MAX_NAMED:]]
    return dict(found[:MAX_NAMED]) | ({OTHERS: reduce(_together, others)} if others else {})


def _together(one: ConsumerLag, other: ConsumerLag) -> ConsumerLag:
    return ConsumerLag(
        max(one.messages, other.messages),
        max(one.seconds, other.seconds),
        one.gaps + other.gaps,
        one.dead_letters + other.dead_letters,
    )
