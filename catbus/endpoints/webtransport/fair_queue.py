"""Who goes first where many wait for the CPU: those who have used the least of it lately."""

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
"""Of each second, how many seconds of CPU one user may take before others go first, and how many it may save up."""
USE_FORGOTTEN_AFTER = 1.0
"""Seconds after which use is forgotten, however much it was: use that nobody else had a need for is no debt."""
CREDIT = 0.02
"""Seconds of CPU that a key had less of than others and may have before them. So a key that uses little goes before any
number of those that use much, and not after all of them that have begun with it."""
MAX_DEBT = 0.1
"""Seconds of CPU that others may have before a key that was charged beside its turns."""
_SAVED_TIME = MAX_SAVED / SHARE
_FEW = 256


class CpuUsage:
    """The CPU that one user has used lately. No clock: times are arguments.

    `until` is when that has been made up for, at `SHARE` seconds in a second.
    """

    __slots__ = ("until",)

    def __init__(self) -> None:
        self.until = -inf

    def charge(self, seconds: float, now: float) -> None:
        """Note that so much CPU was used."""
        self.until = min(max(self.until, now) + seconds / SHARE, now + USE_FORGOTTEN_AFTER)

    def exceeded(self, now: float) -> bool:
        """Whether that is more than the share, and more than was saved up."""
        return self.until - now > _SAVED_TIME


class Flow(Generic[S, T]):
    """What waits under one key, by its source: sources take turns, the first is next."""

    __slots__ = ("size", "start", "usage", "waiting")

    def __init__(self) -> None:
        self.usage = CpuUsage()
        self.start = 0.0
        """Seconds of CPU that it has had, as if it had always had as much as the others that wait."""
        self.waiting: OrderedDict[S, deque[T]] = OrderedDict()
        self.size = 0


class DequeuedItems(Generic[S, T]):
    """The items of one source, as they were taken. The caller takes from the left of `items` and calls `end`."""

    __slots__ = ("_count", "flow", "items", "source")

    def __init__(self, flow: Flow[S, T], source: S, items: deque[T]) -> None:
        self.flow = flow
        self.source = source
        self.items = items
        self._count = len(items)

    @property
    def taken(self) -> int:
        """How many items were taken so far."""
        return self._count - len(self.items)


class FairQueue(Generic[K, S, T]):
    """Items that wait, each of a source, which belongs to a key. All methods take constant or logarithmic time.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): the key that has used least CPU goes first. One that seldom
    has something waits for nearly nobody, however many others there are and however little CPU there is. Under one key
    the sources take turns. A key, and a source under it, may hold as many items as there are places left: a flood
    leaves room for others, however much of it there is.
    """

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._size = 0
        self._flows: dict[K, Flow[S, T]] = {}
        self._heap: list[tuple[float, int, Flow[S, T]]] = []
        """Each flow in which something waits, once, but for the one whose turn it is."""
        self._order = count()
        self._many = _FEW
        self._served = 0.0
        """The latest start of a flow that was served."""

    def __len__(self) -> int:
        return self._size

    def put(self, key: K, source: S, item: T, now: float) -> bool:
        """Have an item wait; False when there is no room for it."""
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
        """Whose turn it is; None when nothing waits, or, without `over_share`, when that one has exceeded its share."""
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
        """A turn is over, and has taken so much CPU. What is left of it waits again."""
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
        """Note CPU that was used for a key beside its turns."""
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
