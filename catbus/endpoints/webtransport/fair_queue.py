"""A fair queue: the key that has used the least CPU time lately is served first."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from heapq import heappop, heappush, heapreplace
from itertools import count
from math import inf
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
S = TypeVar("S", bound=Hashable)
T = TypeVar("T")

SHARE, MAX_SAVED = 0.4, 0.2
"""Seconds of CPU per second that one key may use before others go first, and seconds that it may save up."""
USE_FORGOTTEN_AFTER = 1.0
"""Seconds after which all use is forgotten, because use that nobody else needed is no debt."""
CREDIT = 0.02
"""Seconds of CPU by which a key that used less may go before others. So a key that uses little goes before any number
of keys that use much."""
MAX_DEBT = 0.1
"""Seconds of CPU that others may use before a key that was charged by `charge`."""
_SAVED_TIME = MAX_SAVED / SHARE
_FEW = 256


class CpuUsage:
    """The recent CPU use of one key. Times are arguments.

    `until` is the time when the use is paid off, at `SHARE` seconds per second.
    """

    __slots__ = ("until",)

    def __init__(self) -> None:
        self.until = -inf

    def charge(self, seconds: float, now: float) -> None:
        """Add CPU use."""
        self.until = min(max(self.until, now) + seconds / SHARE, now + USE_FORGOTTEN_AFTER)

    def exceeded(self, now: float) -> bool:
        """Whether the use exceeds the share and the savings."""
        return self.until - now > _SAVED_TIME


class Flow(Generic[S, T]):
    """The waiting items of one key, by source. Sources are served in rotation, the first one next."""

    __slots__ = ("size", "start", "usage", "waiting")

    def __init__(self) -> None:
        self.usage = CpuUsage()
        self.start = 0.0
        """Virtual start time: seconds of CPU used, as if the flow had always used as much as other waiting flows."""
        self.waiting: OrderedDict[S, deque[T]] = OrderedDict()
        self.size = 0


class DequeuedItems(Generic[S, T]):
    """The items of one source, taken from the queue. The caller removes from the left of `items` and calls `end`."""

    __slots__ = ("_count", "flow", "items", "source")

    def __init__(self, flow: Flow[S, T], source: S, items: deque[T]) -> None:
        self.flow = flow
        self.source = source
        self.items = items
        self._count = len(items)

    @property
    def taken(self) -> int:
        """The number of items that were removed so far."""
        return self._count - len(self.items)


class FairQueue(Generic[K, S, T]):
    """Waiting items, each of a source, which belongs to a key. All methods take constant or logarithmic time.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): the key that has used the least CPU goes first. So a key that
    seldom has items hardly waits, even among many others and with little CPU. Sources of one key are served in
    rotation. A key, and a source of it, may hold as many items as there is room left, so a flood of any size leaves
    room for others.
    """

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._size = 0
        self._flows: dict[K, Flow[S, T]] = {}
        self._heap: list[tuple[float, int, Flow[S, T]]] = []
        """Each flow with waiting items once, except the one being served."""
        self._order = count()
        self._many = _FEW
        self._served = 0.0
        """The latest start time of a flow that was served."""

    def __len__(self) -> int:
        return self._size

    def put(self, key: K, source: S, item: T, now: float) -> bool:
        """Add an item. Returns False if there is no room for it."""
        flow = self._flow(key, now)
        items = flow.waiting.get(source)
        held = 0 if items is None else len(items)
        if held + flow.size >= self._max_items - self._size:
            return False
        if items is None:
            items = flow.waiting[source] = deque()
        items.append(item)
        flow.size += 1
        self._size += 1
        if flow.size == 1:
            flow.start = max(flow.start, self._served - CREDIT)
            self._push(flow)
        return True

    def take(self, now: float, *, over_share: bool = False) -> DequeuedItems[S, T] | None:
        """Take the next source. Returns None if there is none, or if its key exceeds its share without `over_share`."""
        while self._heap:
            start, _, flow = self._heap[0]
            if flow.start > start:  # It was charged meanwhile.
                heapreplace(self._heap, (flow.start, next(self._order), flow))
                continue
            if not over_share and flow.usage.exceeded(now):
                return None
            heappop(self._heap)
            self._served = max(self._served, start)
            source, items = flow.waiting.popitem(last=False)
            return DequeuedItems(flow, source, items)
        return None

    def end(self, dequeued: DequeuedItems[S, T], seconds: float, now: float) -> None:
        """Charge the CPU time of serving a source, and put its remaining items back."""
        flow = dequeued.flow
        flow.usage.charge(seconds, now)
        flow.start += seconds
        flow.size -= dequeued.taken
        self._size -= dequeued.taken
        if dequeued.items:
            flow.waiting[dequeued.source] = dequeued.items
        if flow.waiting:
            self._push(flow)

    def charge(self, key: K, seconds: float, now: float) -> None:
        """Charge CPU time that was used for a key outside of `take` and `end`."""
        flow = self._flow(key, now)
        flow.usage.charge(seconds, now)
        flow.start = min(max(flow.start, self._served) + seconds, self._served + MAX_DEBT)

    def _push(self, flow: Flow[S, T]) -> None:
        heappush(self._heap, (flow.start, next(self._order), flow))

    def _flow(self, key: K, now: float) -> Flow[S, T]:
        flow = self._flows.get(key)
        if flow is None:
            if len(self._flows) >= self._many:
                self._flows = {k: f for k, f in self._flows.items() if f.size or f.usage.until > now}
                self._many = max(_FEW, 2 * len(self._flows))
            flow = self._flows[key] = Flow()
        return flow
