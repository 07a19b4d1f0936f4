"""A scheduler that shares the CPU of one thread fairly among clients and networks.

Trio's run loop resumes every task that is ready, once per tick. A thousand tasks that serve one busy client would make
each tick last a thousand time slices, and a message to another client needs several ticks. So `CpuScheduler` measures
what the tasks of each peer use. When the peers have used up their time in a tick, they wait in a queue for a later one.

A task calls `acquire` before it works for its peer, and `yield_cpu` after about one slice of work:

- An authenticated client that uses little continues at once: it has a token bucket of CPU time.
- Other peers continue at once while the tick has time left and no peer waits.
- Otherwise the next task is one of the class that has used less (authenticated or unauthenticated), of its client or
  network that has used least, of the connection that has used least.

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


class TimeSlices(NamedTuple):
    """Seconds for which one peer works before it yields, and for which all peers work in a tick before they wait."""

    peer: float
    tick: float


SHORT_SLICES = TimeSlices(0.001, 0.002)
"""While a client that uses little works beside peers that wait."""
LONG_SLICES = TimeSlices(0.004, 0.008)
"""While all peers use much: a switch costs something, too."""
SHORT_SLICES_TIME = 0.1
"""Seconds for which slices stay short."""
MIN_SLICE = 50e-6
"""Seconds that a slice counts at least. It bounds how many tasks continue in one tick."""

CREDIT_RATE = 0.1
"""Seconds of CPU per second with which a client never waits."""
CREDIT_BURST = 0.02
"""Seconds of CPU that a client may use at once without waiting."""
MAX_DEBT = 0.1
"""Seconds of CPU that a client owes at most after it has used more. The debt is paid after a second."""

_peer: ContextVar[ScheduledPeer | None] = ContextVar("peer", default=None)
_number = count()


class WaitingTask:
    """A task that waits for the CPU. `task` is None once it was cancelled."""

    __slots__ = ("share", "task")

    def __init__(self, share: CpuShare, task: trio.lowlevel.Task) -> None:
        self.share = share
        self.task: trio.lowlevel.Task | None = task


class CpuShare:
    """The CPU time of one client, or of the unauthenticated peers of one network."""

    __slots__ = ("__weakref__", "authenticated", "credit", "expected", "place", "slice", "used", "waiting")

    def __init__(self, used: float, *, authenticated: bool, now: float) -> None:
        self.authenticated = authenticated
        self.used = used
        """Virtual time in seconds: as if it had always used as much as the others that wait."""
        self.expected = 0.0
        """What it is expected to use in this tick."""
        self.slice = LONG_SLICES.peer
        """Average length of its slices, in seconds."""
        self.credit = TokenBucket(CREDIT_RATE, CREDIT_BURST, now)
        self.waiting: list[tuple[float, int, WaitingTask]] = []
        self.place = 0
        """Its valid place in the queue of its class. Other places of the same share there are void."""


class ScheduledPeer:
    """One connection: all tasks that serve it are charged to it."""

    __slots__ = ("began", "scheduler", "share", "used")

    def __init__(self, scheduler: CpuScheduler, share: CpuShare) -> None:
        self.scheduler = scheduler
        self.share = share
        self.used = 0.0
        self.began = 0.0
        """What it had used when its slice began."""


class PeerClass:
    """The shares of all authenticated clients, or of all unauthenticated networks, that have waiting tasks."""

    __slots__ = ("_queue", "expected", "used", "virtual_time", "waiting")

    def __init__(self) -> None:
        self.waiting = 0
        self.used = self.expected = 0.0
        self.virtual_time = 0.0
        """What the share that was served last had used until then: new shares begin with it."""
        self._queue: list[tuple[float, int, CpuShare]] = []

    def add(self, task: WaitingTask, used: float) -> None:
        """Queue a task of a peer that has used so much."""
        share = task.share
        if not share.waiting:
            share.used = max(share.used, self.virtual_time)
            self.enqueue(share)
        heappush(share.waiting, (used, next(_number), task))
        self.waiting += 1

    def enqueue(self, share: CpuShare) -> None:
        """Give a share with waiting tasks its place in the queue."""
        share.place = next(_number)
        heappush(self._queue, (share.used + share.expected, share.place, share))

    def pop(self) -> WaitingTask:
        """Take out the next task. There must be one."""
        while True:
            _, place, share = heappop(self._queue)
            if place != share.place:
                continue
            while share.waiting:
                task = heappop(share.waiting)[-1]
                if task.task is not None:
                    self.virtual_time = max(self.virtual_time, share.used)
                    self.waiting -= 1
                    return task


class CpuScheduler(trio.abc.Instrument):
    """Shares the CPU of one Trio thread among peers. No peer waits unless `run` is running."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.waits = 0
        """How often a peer had to wait."""
        self.slices = LONG_SLICES
        self._clock = clock
        self._shares: WeakValueDictionary[Hashable, CpuShare] = WeakValueDictionary()
        self._unauthenticated, self._authenticated = self._classes = PeerClass(), PeerClass()
        self._virtual_time = 0.0
        """What the class that was served last had used until then."""
        self._served: list[CpuShare] = []
        """The shares that were served in this tick."""
        self._left = LONG_SLICES.tick
        """Seconds that the tick has left for peers."""
        self._short_until = 0.0
        self._current: ScheduledPeer | None = None
        self._charged_until = 0.0
        self._work = trio.Event()
        self._running = False

    @property
    def waiting(self) -> int:
        """How many peers wait."""
        return self._unauthenticated.waiting + self._authenticated.waiting

    # Charging

    @contextmanager
    def serve(self, network: Hashable) -> Iterator[ScheduledPeer]:
        """Charge this task, and those that it starts, to a new unauthenticated peer of this network."""
        peer = ScheduledPeer(self, self._share(("network", network), authenticated=False))
        token = _peer.set(peer)
        try:
            yield peer
        finally:
            _peer.reset(token)

    def authenticate(self, client: Hashable) -> None:
        """Charge the peer of this task to this client from now on."""
        self._move(("client", client), authenticated=True)

    def set_network(self, network: Hashable) -> None:
        """Charge the peer of this task to this network: the connection comes from a proxy."""
        self._move(("network", network), authenticated=False)

    def _move(self, key: Hashable, *, authenticated: bool) -> None:
        peer = _peer.get()
        if peer is not None:
            peer.share = self._share(key, authenticated=authenticated)

    def _share(self, key: Hashable, *, authenticated: bool) -> CpuShare:
        share = self._shares.get(key)
        if share is None:
            used = self._class(authenticated).virtual_time
            share = self._shares[key] = CpuShare(used, authenticated=authenticated, now=self._clock())
        return share

    def _class(self, authenticated: bool) -> PeerClass:
        return self._authenticated if authenticated else self._unauthenticated

    # Waiting

    async def acquire(self) -> None:
        """Wait until the peer of this task may use the CPU, which most often is at once."""
        peer = _peer.get()
        if peer is not None and self._must_wait(peer):
            await self._wait(peer)

    async def yield_cpu(self) -> None:
        """End the slice of this task's peer, let other tasks run, and wait for the next slice. A checkpoint."""
        peer = _peer.get()
        if self._current is not None:
            self._charge(self._clock())
        if peer is None or not self._must_wait(peer):
            await trio.lowlevel.checkpoint()
        if peer is not None and self._must_wait(peer):
            await self._wait(peer)

    def _must_wait(self, peer: ScheduledPeer) -> bool:
        if not self._running or (self._left > 0 and not self.waiting):
            return False
        now = self._clock()
        if not peer.share.authenticated or peer.share.credit.level(now) <= 0:
            return True
        self._short_until = now + SHORT_SLICES_TIME
        return False

    async def _wait(self, peer: ScheduledPeer) -> None:
        share, own = peer.share, self._class(peer.share.authenticated)
        if not own.waiting:
            # A class does not save up what it did not use while none of its tasks waited.
            own.used = max(own.used, self._virtual_time)
        used, peer.began = peer.used - peer.began, peer.used
        share.slice += (used - share.slice) / 4
        waiting = WaitingTask(share, trio.lowlevel.current_task())
        own.add(waiting, peer.used)
        self.waits += 1
        self._work.set()

        def abort(_: object) -> trio.lowlevel.Abort:
            waiting.task = None
            own.waiting -= 1
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    async def run(self) -> None:
        """Resume waiting tasks until cancelled."""
        trio.lowlevel.add_instrument(self)
        self._running = True
        try:
            while True:
                if not self.waiting:
                    self._work = trio.Event()
                    await self._work.wait()
                # All other ready tasks run once.
                await trio.lowlevel.checkpoint()
                self._end_tick()
                # One whole slice, or several short ones.
                whole = left = self.slices.peer
                while left >= whole / 2 and self.waiting:
                    left -= self._resume_task()
        finally:
            self._running = False
            while self.waiting:
                self._resume_task()
            trio.lowlevel.remove_instrument(self)

    def _end_tick(self) -> None:
        """Forget what was expected: the use of the last tick has been charged."""
        for own in self._classes:
            own.expected = 0.0
        for share in self._served:
            share.expected = 0.0
            if share.waiting:
                self._class(share.authenticated).enqueue(share)
        self._served.clear()

    def _resume_task(self) -> float:
        """Resume one task; return how long its slice is expected to last."""
        own = min((each for each in self._classes if each.waiting), key=lambda each: each.used + each.expected)
        waiting = own.pop()
        share = waiting.share
        expected = max(MIN_SLICE, share.slice)
        self._virtual_time = own.used + own.expected
        share.expected += expected
        own.expected += expected
        self._served.append(share)
        if share.waiting:
            own.enqueue(share)
        assert waiting.task is not None
        trio.lowlevel.reschedule(waiting.task)
        return expected

    # Measuring

    def _charge(self, now: float) -> None:
        peer, used = self._current, now - self._charged_until
        self._charged_until = now
        if peer is not None:
            share = peer.share
            peer.used += used
            share.used += used
            self._class(share.authenticated).used += used
            if share.credit.level(now) > -MAX_DEBT:
                share.credit.spend(used)
            self._left -= used

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._charge(self._clock())
        peer = task.context.get(_peer)
        self._current = peer if peer is not None and peer.scheduler is self else None

    def before_io_wait(self, timeout: float) -> None:
        self._charge(self._clock())
        self._current = None

    def after_io_wait(self, timeout: float) -> None:
        self._charged_until = now = self._clock()
        self.slices = SHORT_SLICES if now < self._short_until else LONG_SLICES
        self._left = self.slices.tick
