"""Who goes first where many wait for the CPU: those who have used the least of it lately."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
S = TypeVar("S", bound=Hashable)
T = TypeVar("T")

SHARE, SAVED = 0.4, 0.2
"""Of each second, how many seconds of CPU one user may take before others go first, and how many it may save up."""
LONGEST_WAIT = 1.0
"""Seconds after which use is forgotten, however much it was: use that nobody else had a need for is no debt."""
_SAVED_FOR = SAVED / SHARE
_FEW = 256


class Usage:
    """The CPU that one user has used lately. No clock: times are arguments.

    `until` is when that has been made up for, at `SHARE` seconds in a second. So it also says who has used less.
    """

    __slots__ = ("until",)

    def __init__(self) -> None:
        self.until = -inf

    def charge(self, seconds: float, now: float) -> None:
        """Note that so much CPU was used."""
        self.until = min(max(self.until, now) + seconds / SHARE, now + LONGEST_WAIT)

    def exceeded(self, now: float) -> bool:
        """Whether that is more than the share, and more than was saved up."""
        return self.until - now > _SAVED_FOR


class Flow(Generic[S, T]):
    """What waits under one key, by its source: sources take turns, the first is next."""

    __slots__ = ("size", "usage", "waiting")

    def __init__(self) -> None:
        self.usage = Usage()
        self.waiting: OrderedDict[S, deque[T]] = OrderedDict()
        self.size = 0


class Turn(Generic[S, T]):
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

    The key that has used least CPU goes first, so one that seldom has something waits for nearly nobody, however many
    others there are. Under one key the sources take turns. A key, and a source under it, may hold as many items as
    there are places left: a flood leaves room for others, however much of it there is.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._flows: dict[K, Flow[S, T]] = {}
        self._heap: list[tuple[float, int, Flow[S, T]]] = []
        """Each flow in which something waits, once, but for the one whose turn it is."""
        self._order = count()
        self._many = _FEW

    def __len__(self) -> int:
        return self._size

    def put(self, key: K, source: S, item: T, now: float) -> bool:
        """Have an item wait; False when there is no room for it."""
        flow = self._flow(key, now)
        items = flow.waiting.get(source)
        held = 0 if items is None else len(items)
        if held + flow.size >= self._most - self._size:
            return False
        if items is None:
            items = flow.waiting[source] = deque()
        items.append(item)
        flow.size += 1
        self._size += 1
        if flow.size == 1:
            self._push(flow)
        return True

    def take(self, now: float, *, beyond: bool = False) -> Turn[S, T] | None:
        """Whose turn it is; None when nothing waits, or, without `beyond`, when all have exceeded their shares."""
        while self._heap:
            until, _, flow = self._heap[0]
            if until - now > _SAVED_FOR and not beyond:
                return None
            heappop(self._heap)
            if flow.usage.until > until:  # It was charged meanwhile.
                self._push(flow)
                continue
            source, items = flow.waiting.popitem(last=False)
            return Turn(flow, source, items)
        return None

    def end(self, turn: Turn[S, T], seconds: float, now: float) -> None:
        """A turn is over, and has taken so much CPU. What is left of it waits again."""
        flow = turn.flow
        flow.usage.charge(seconds, now)
        flow.size -= turn.taken
        self._size -= turn.taken
        if turn.items:
            flow.waiting[turn.source] = turn.items
        if flow.waiting:
            self._push(flow)

    def charge(self, key: K, seconds: float, now: float) -> None:
        """Note CPU that was used for a key beside its turns."""
        self._flow(key, now).usage.charge(seconds, now)

    def _push(self, flow: Flow[S, T]) -> None:
        heappush(self._heap, (flow.usage.until, next(self._order), flow))

    def _flow(self, key: K, now: float) -> Flow[S, T]:
        flow = self._flows.get(key)
        if flow is None:
            if len(self._flows) >= self._many:
                self._flows = {k: f for k, f in self._flows.items() if f.size or f.usage.until > now}
                self._many = max(_FEW, 2 * len(self._flows))
            flow = self._flows[key] = Flow()
        return flow
