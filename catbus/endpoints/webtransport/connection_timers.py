"""One task for the timers of all connections."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from heapq import heappop, heappush
from math import inf
from time import perf_counter
from typing import Generic, TypeVar

import trio

T = TypeVar("T", bound=Hashable)

_PER_SECOND = 1000
"""The kernel's wait is no finer."""
_TURN = 0.002
"""Seconds after which other tasks have their turn."""


class ConnectionTimers(Generic[T]):
    """Calls `fire` for each of its members when its time has come; then it has none until it is set again.

    Every packet moves a timer, mostly to later. So a timer that is moved to later fires at its old time all the same,
    and `fire` sets it again. Members with nearly one time share an entry of the heap, and a member is never in two.
    """

    def __init__(self, fire: Callable[[T, float], None]) -> None:
        self._fire = fire
        self._ticks: dict[T, int] = {}
        self._members: dict[int, set[T]] = {}
        self._heap: list[int] = []
        self._past = 0
        self._alarm = trio.CancelScope()

    def __len__(self) -> int:
        return len(self._ticks)

    def set(self, member: T, at: float | None) -> None:
        """Fire at this Trio time, or somewhat earlier, or never."""
        held = self._ticks.get(member)
        if at is None:
            if held is not None:
                self._remove(member, held)
            return
        # A time that has been dealt with already is the next one, so that none can keep the task from waiting.
        tick = max(math.ceil(at * _PER_SECOND), self._past + 1)
        if held is not None:
            if held <= tick:
                return
            self._remove(member, held)
        self._ticks[member] = tick
        if (members := self._members.get(tick)) is not None:
            members.add(member)
            return
        self._members[tick] = {member}
        heappush(self._heap, tick)
        if tick / _PER_SECOND < self._alarm.deadline:
            self._alarm.deadline = tick / _PER_SECOND

    def _remove(self, member: T, tick: int) -> None:
        del self._ticks[member]
        if (members := self._members.get(tick)) is not None:
            members.discard(member)

    async def run(self) -> None:
        """Fire for ever."""
        heap = self._heap
        while True:
            with trio.CancelScope(deadline=heap[0] / _PER_SECOND if heap else inf) as self._alarm:
                await trio.sleep_forever()
            now, ends = trio.current_time(), perf_counter() + _TURN
            while heap and heap[0] / _PER_SECOND <= now:
                self._past = heappop(heap)
                for member in self._members.pop(self._past):
                    if self._ticks.pop(member, None) is not None:
                        self._fire(member, now)
                    if perf_counter() >= ends:
                        await trio.lowlevel.checkpoint()
                        now, ends = trio.current_time(), perf_counter() + _TURN
