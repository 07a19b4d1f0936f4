"""Authenticated, unauthenticated and unvalidated peers are served in rotation, within their shares."""

from __future__ import annotations

from collections import deque
from functools import partial
from time import perf_counter

import trio

from catbus.endpoints.webtransport.datagram_scheduler import IDLE_PASS_TIME, DatagramScheduler
from catbus.endpoints.webtransport.fair_queue import MAX_SAVED


class Served:
    """A scheduler of names, each of which costs `cost` seconds of CPU, and the order in which they are served."""

    def __init__(self, cost: float = 0.001) -> None:
        self.names: list[str] = []
        self.cost = cost
        self.gathered = 0
        self.scheduler: DatagramScheduler[str] = DatagramScheduler(self._serve, self._gather)

    def _serve(self, items: deque[str], ends: float) -> float:
        self.names.append(items.popleft())
        return self.cost

    def _gather(self) -> None:
        self.gathered += 1


async def test_three_queues_are_served_in_rotation() -> None:
    served = Served(0.0)
    scheduler = served.scheduler
    now = trio.current_time()
    for number in range(3):
        scheduler.unvalidated.put("network", number, "stranger", now)
        scheduler.unauthenticated.put("network", number, "newcomer", now)
        scheduler.authenticated.put("client", number, "client", now)
    await scheduler.run()
    assert [sorted(served.names[start : start + 3]) for start in (0, 3, 6)] == [["client", "newcomer", "stranger"]] * 3


async def test_unauthenticated_peers_share_one_limit_across_networks() -> None:
    served = Served(0.01)
    scheduler = served.scheduler
    now = trio.current_time()
    for number in range(500):
        scheduler.unauthenticated.put(f"network {number}", number, "newcomer", now)
    while scheduler.serve_next(0.0):
        pass
    assert MAX_SAVED / served.cost <= len(served.names) < 3 * MAX_SAVED / served.cost
    scheduler.authenticated.put("client", 0, "client", now)
    assert scheduler.serve_next(0.0)
    assert served.names[-1] == "client"


async def test_unauthenticated_peers_over_their_share_get_idle_time() -> None:
    served = Served(0.0)
    scheduler = served.scheduler
    scheduler.unauthenticated_usage.charge(1000.0, trio.current_time())
    scheduler.unauthenticated.put("network", 0, "newcomer", trio.current_time())
    passes: list[bool] = []

    async def busy() -> None:
        """Do some work in each pass of the event loop."""
        for _ in range(50):
            until = perf_counter() + 2 * IDLE_PASS_TIME
            while perf_counter() < until:
                pass
            await trio.lowlevel.checkpoint()
            passes.append(bool(served.names))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(busy)
        await trio.lowlevel.checkpoint()
        await scheduler.run()
    assert served.names == ["newcomer"]
    assert not any(passes[:-1])


async def test_client_over_its_share_is_served_after_the_others() -> None:
    served = Served(0.0)
    scheduler = served.scheduler
    now = trio.current_time()
    scheduler.charge(scheduler.authenticated, "heavy", 1000.0, now)
    for number in range(5):
        scheduler.authenticated.put("heavy", 0, "heavy", now)
        scheduler.authenticated.put(f"light {number}", 0, "light", now)
    await scheduler.run()
    assert served.names == ["light"] * 5 + ["heavy"] * 5
    # Other tasks ran after each of those.
    assert served.gathered >= 5


async def test_only_one_task_serves() -> None:
    served = Served(1000.0)
    scheduler = served.scheduler
    for number in range(3):
        scheduler.authenticated.put("client", number, "client", trio.current_time())
    scheduler.authenticated.charge("client", 1000.0, trio.current_time())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scheduler.run)
        while not served.names:
            await trio.lowlevel.checkpoint()
        await scheduler.run()
        assert len(served.names) < 3
    assert len(served.names) == 3


async def test_scheduler_serves_again_after_a_cancellation() -> None:
    served = Served(0.0)
    scheduler = served.scheduler
    put = partial(scheduler.authenticated.put, "client", 0)
    put("first", trio.current_time())
    scheduler.authenticated.charge("client", 1000.0, trio.current_time())
    put("second", trio.current_time())
    with trio.CancelScope() as scope:
        scope.cancel()
        await scheduler.run()
    assert scope.cancelled_caught
    assert served.names == ["first"]
    await scheduler.run()
    assert served.names == ["first", "second"]
