"""The timers of all connections, in one task."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from heapq import heappop, heappush
from math import inf
from time import perf_counter
from typing import Generic, TypeVar

import trio

T = TypeVar("T", bound=Hashable)

_TICKS_PER_SECOND = 1000
"""The resolution of the kernel's wait."""
_TURN_TIME = 0.002
"""Seconds after which other tasks run."""


class ConnectionTimers(Generic[T]):
    """Calls `on_timer` for each member at its time. After that, the member has no timer until it is set again.

    Every packet moves a timer, mostly to a later time. So a timer that is moved to later still fires at its old time,
    and `on_timer` sets it again. Members with nearly the same time share one heap entry, and no member has two.
    """

    def __init__(self, on_timer: Callable[[T, float], None]) -> None:
        self._on_timer = on_timer
        self._ticks: dict[T, int] = {}
        self._members: dict[int, set[T]] = {}
        self._heap: list[int] = []
        self._past = 0
        self._alarm = trio.CancelScope()

    def __len__(self) -> int:
        return len(self._ticks)

    def set(self, member: T, at: float | None) -> None:
        """Fire at this Trio time or a little earlier, or never if `at` is None."""
        held = self._ticks.get(member)
        if at is None:
            if held is not None:
                self._remove(member, held)
            return
        # A tick in the past becomes the next one, so that no timer can keep the task from waiting.
        tick = max(math.ceil(at * _TICKS_PER_SECOND), self._past + 1)
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
        if tick / _TICKS_PER_SECOND < self._alarm.deadline:
            self._alarm.deadline = tick / _TICKS_PER_SECOND

    def _remove(self, member: T, tick: int) -> None:
        del self._ticks[member]
        if (members := self._members.get(tick)) is not None:
            members.discard(member)

    async def run(self) -> None:
        """Fire timers, forever."""
        heap = self._heap
        while True:
            with trio.CancelScope(deadline=heap[0] / _TICKS_PER_SECOND if heap else inf) as self._alarm:
                await trio.sleep_forever()
            now, ends = trio.current_time(), perf_counter() + _TURN_TIME
            while heap and heap[0] / _TICKS_PER_SECOND <= now:
                self._past = heappop(heap)
                for member in self._members.pop(self._past):
                    if self._ticks.pop(member, None) is not None:
                        self._on_timer(member, now)
                    if perf_counter() >= ends:
                        await trio.lowlevel.checkpoint()
                        now, ends = trio.current_time(), perf_counter() + _TURN_TIME
