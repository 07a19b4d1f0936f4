"""Whose turn it is to use the CPU: one thread serves everybody, and nobody may keep the others waiting.

The scheduler of Trio runs every task that can go on, pass after pass. A thousand tasks that serve one busy client would
make each pass last a thousand turns, and a message to anybody else needs several passes. So `CpuScheduler` measures
what the tasks of each peer use, and where a pass has had its time, peers wait in a queue for one of the next passes.

Before a task works for its peer it calls `wait`, and where it has worked for about the `turn` of the `pace`, `next`:

- A client that has shown a token and uses little goes on at once: it has a token bucket of CPU time.
- Others go on at once while the pass has time left and nobody waits.
- Otherwise who goes on next is of the class that has had less, clients with tokens or strangers; of that, of the client
  or network that has had the least; and of that, the connection that has had the least.

Clients and classes are served by start-time fair queueing (Goyal, Vin and Cheng, 1996).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from heapq import heappop, heappush
from itertools import count
from time import perf_counter
from typing import NamedTuple
from weakref import WeakValueDictionary

import trio

from .token_bucket import TokenBucket


class Pace(NamedTuple):
    """Seconds that one peer is served in one go while others wait, and that all peers are in a pass before they do."""

    turn: float
    whole: float


QUICK = Pace(0.001, 0.002)
"""While a client that uses little works beside those that wait."""
STEADY = Pace(0.004, 0.008)
"""While only those are here that use much: a change of turns costs something, too."""
QUICK_TIME = 0.1
"""Seconds for which the pace stays quick."""
SHORTEST = 50e-6
"""Seconds that a turn is taken to last at the least: so many go on in one pass at the most."""

FREE_RATE = 0.1
"""Seconds of CPU in a second with which a client never waits."""
FREE_BURST = 0.02
"""And so many at once."""
FREE_DEBT = 0.1
"""What a client that used more owes at the most: seconds of CPU, which it has paid after a second."""

_peer: ContextVar[CpuUser | None] = ContextVar("peer", default=None)
_number = count()


class Waiter:
    """A task that waits for its turn; None once it has been cancelled."""

    __slots__ = ("share", "task")

    def __init__(self, share: CpuShare, task: trio.lowlevel.Task) -> None:
        self.share = share
        self.task: trio.lowlevel.Task | None = task


class CpuShare:
    """What one client, or one network of strangers, has had of the CPU."""

    __slots__ = ("__weakref__", "ahead", "entry", "free", "had", "proven", "turn", "waiters")

    def __init__(self, had: float, *, proven: bool, now: float) -> None:
        self.proven = proven
        self.had = had
        """Seconds, as if it had always had as much as the others that wait."""
        self.ahead = 0.0
        """What it is taken to use in this pass."""
        self.turn = STEADY.turn
        """Seconds that its turns have lasted, about."""
        self.free = TokenBucket(FREE_RATE, FREE_BURST, now)
        self.waiters: list[tuple[float, int, Waiter]] = []
        self.entry = 0
        """Its place in the queue of its class; other places that it has there mean nothing."""


class CpuUser:
    """One connection, which all tasks that serve it work for."""

    __slots__ = ("began", "cpu_scheduler", "had", "share")

    def __init__(self, cpu_scheduler: CpuScheduler, share: CpuShare) -> None:
        self.cpu_scheduler = cpu_scheduler
        self.share = share
        self.had = 0.0
        self.began = 0.0
        """What it had had when its turn began."""


class _Class:
    """All peers that have shown a token, or all strangers: those of them that wait."""

    __slots__ = ("_queue", "ahead", "had", "last", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.had = self.ahead = 0.0
        self.last = 0.0
        """What the share that was served last had had until then: newcomers begin with it."""
        self._queue: list[tuple[float, int, CpuShare]] = []

    def add(self, waiter: Waiter, had: float) -> None:
        """Have a peer wait that has had so much."""
        share = waiter.share
        if not share.waiters:
            share.had = max(share.had, self.last)
            self.enter(share)
        heappush(share.waiters, (had, next(_number), waiter))
        self.waiting += 1

    def enter(self, share: CpuShare) -> None:
        """Give a share that has waiters its place in the queue."""
        share.entry = next(_number)
        heappush(self._queue, (share.had + share.ahead, share.entry, share))

    def pop(self) -> Waiter:
        """Who is next; there is somebody."""
        while True:
            _, entry, share = heappop(self._queue)
            if entry != share.entry:
                continue
            while share.waiters:
                waiter = heappop(share.waiters)[-1]
                if waiter.task is not None:
                    self.last = max(self.last, share.had)
                    self.waiting -= 1
                    return waiter


class CpuScheduler(trio.abc.Instrument):
    """The CPU of one Trio thread, shared among peers. `run` has to run; until it does, nobody waits."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.waits = 0
        """How often a peer has had to wait for its turn."""
        self.pace = STEADY
        self._clock = clock
        self._shares: WeakValueDictionary[Hashable, CpuShare] = WeakValueDictionary()
        self._unauthenticated, self._proven = self._classes = _Class(), _Class()
        self._last = 0.0
        """What the class that was served last had had until then."""
        self._served: list[CpuShare] = []
        """In this pass."""
        self._left = STEADY.whole
        """What the pass has left for peers."""
        self._quick_until = 0.0
        self._running: CpuUser | None = None
        self._since = 0.0
        self._work = trio.Event()
        self._open = False

    @property
    def waiting(self) -> int:
        """How many peers wait for their turn."""
        return self._unauthenticated.waiting + self._proven.waiting

    # Who pays

    @contextmanager
    def serve(self, network: Hashable) -> Iterator[CpuUser]:
        """While this task, and those that it starts, work for a peer of this network that has shown no token yet."""
        peer = CpuUser(self, self._share(("stranger", network), proven=False))
        token = _peer.set(peer)
        try:
            yield peer
        finally:
            _peer.reset(token)

    def prove(self, client: Hashable) -> None:
        """The peer that this task works for has shown a token: it has a part of this client's share from now on."""
        self._move(("client", client), proven=True)

    def come_from(self, network: Hashable) -> None:
        """A stranger of this network is behind the peer that this task works for, which is a proxy."""
        self._move(("stranger", network), proven=False)

    def _move(self, key: Hashable, *, proven: bool) -> None:
        peer = _peer.get()
        if peer is not None:
            peer.share = self._share(key, proven=proven)

    def _share(self, key: Hashable, *, proven: bool) -> CpuShare:
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = CpuShare(self._class(proven).last, proven=proven, now=self._clock())
        return share

    def _class(self, proven: bool) -> _Class:
        return self._proven if proven else self._unauthenticated

    # Waiting for a turn

    async def wait(self) -> None:
        """Wait until the peer that this task works for may be served, which most often is at once."""
        peer = _peer.get()
        if peer is not None and self._must_wait(peer):
            await self._queue(peer)

    async def next(self) -> None:
        """End this turn, and wait for the next one: others have theirs in between. A checkpoint."""
        peer = _peer.get()
        if self._running is not None:
            self._charge(self._clock())
        if peer is None or not self._must_wait(peer):
            await trio.lowlevel.checkpoint()
        if peer is not None and self._must_wait(peer):
            await self._queue(peer)

    def _must_wait(self, peer: CpuUser) -> bool:
        if not self._open or (self._left > 0 and not self.waiting):
            return False
        now = self._clock()
        if not peer.share.proven or peer.share.free.level(now) <= 0:
            return True
        self._quick_until = now + QUICK_TIME
        return False

    async def _queue(self, peer: CpuUser) -> None:
        share, own = peer.share, self._class(peer.share.proven)
        if not own.waiting:
            # What a class did not use while it had nothing to do is not kept for it.
            own.had = max(own.had, self._last)
        used, peer.began = peer.had - peer.began, peer.had
        share.turn += (used - share.turn) / 4
        waiter = Waiter(share, trio.lowlevel.current_task())
        own.add(waiter, peer.had)
        self.waits += 1
        self._work.set()

        def abort(_: object) -> trio.lowlevel.Abort:
            waiter.task = None
            own.waiting -= 1
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def run(self) -> None:
        """Give turns to those that wait, for ever."""
        trio.lowlevel.add_instrument(self)
        self._open = True
        try:
            while True:
                if not self.waiting:
                    self._work = trio.Event()
                    await self._work.wait()
                # Everybody else first, once.
                await trio.lowlevel.checkpoint()
                self._settle()
                # One whole turn, or several that are short.
                whole = left = self.pace.turn
                while left >= whole / 2 and self.waiting:
                    left -= self._give_turn()
        finally:
            self._open = False
            while self.waiting:
                self._give_turn()
            trio.lowlevel.remove_instrument(self)

    def _settle(self) -> None:
        """What was served in the last pass has been charged by now."""
        for own in self._classes:
            own.ahead = 0.0
        for share in self._served:
            share.ahead = 0.0
            if share.waiters:
                self._class(share.proven).enter(share)
        self._served.clear()

    def _give_turn(self) -> float:
        """Let one go on; returns for how long, about."""
        own = min((each for each in self._classes if each.waiting), key=lambda each: each.had + each.ahead)
        waiter = own.pop()
        share = waiter.share
        lasts = max(SHORTEST, share.turn)
        self._last = own.had + own.ahead
        share.ahead += lasts
        own.ahead += lasts
        self._served.append(share)
        if share.waiters:
            own.enter(share)
        assert waiter.task is not None
        trio.lowlevel.reschedule(waiter.task)
        return lasts

    # What each task uses

    def _charge(self, now: float) -> None:
        peer, used = self._running, now - self._since
        self._since = now
        if peer is not None:
            share = peer.share
            peer.had += used
            share.had += used
            self._class(share.proven).had += used
            if share.free.level(now) > -FREE_DEBT:
                share.free.spend(used)
            self._left -= used

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._charge(self._clock())
        peer = task.context.get(_peer)
        self._running = peer if peer is not None and peer.cpu_scheduler is self else None

    def before_io_wait(self, timeout: float) -> None:
        self._charge(self._clock())
        self._running = None

    def after_io_wait(self, timeout: float) -> None:
        self._since = now = self._clock()
        self.pace = QUICK if now < self._quick_until else STEADY
        self._left = self.pace.whole
