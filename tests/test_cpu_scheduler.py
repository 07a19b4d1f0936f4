"""catbus.limits.cpu_scheduler, on a clock that only the simulated work moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

import pytest
import trio

from catbus.limits.cpu_scheduler import CREDIT_RATE, LONG_SLICES, SHORT_SLICES, CpuScheduler


class Machine:
    """A simulated CPU, the tasks that use it, and how much each of them has used."""

    def __init__(self) -> None:
        self.now = 0.0
        self.used: Counter[Hashable] = Counter()
        self.cpu_scheduler = CpuScheduler(lambda: self.now)

    def work(self, name: Hashable, seconds: float) -> None:
        self.now += seconds
        self.used[name] += seconds

    async def be_busy(
        self,
        name: Hashable,
        *,
        network: Hashable = "",
        client: Hashable = None,
        behind: Hashable = None,
    ) -> None:
        """Use all available CPU; unauthenticated without a client, and perhaps from `behind` a proxy."""
        with self.cpu_scheduler.serve(network or name):
            if behind is not None:
                self.cpu_scheduler.set_network(behind)
            if client is not None:
                self.cpu_scheduler.authenticate(client)
            while True:
                await self.cpu_scheduler.yield_cpu()
                self.work(name, self.cpu_scheduler.slices.peer)

    async def use_little(self, name: Hashable, *, seconds: float, every: float, times: int) -> list[float]:
        """Work now and then as a separate client; return how long it waited each time."""
        waited = []
        with self.cpu_scheduler.serve(name):
            self.cpu_scheduler.authenticate(name)
            for _ in range(times):
                until = self.now + every
                while self.now < until:
                    await trio.lowlevel.checkpoint()
                began = self.now
                await self.cpu_scheduler.yield_cpu()
                waited.append(self.now - began)
                self.work(name, seconds)
        return waited

    async def run_for(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            await trio.lowlevel.checkpoint()


@pytest.fixture
def machine() -> Machine:
    return Machine()


@asynccontextmanager
async def running(machine: Machine) -> AsyncIterator[trio.Nursery]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.cpu_scheduler.run)
        yield nursery
        nursery.cancel_scope.cancel()


async def test_client_that_uses_little_waits_for_one_tick_beside_many_busy_connections(
    machine: Machine,
) -> None:
    async with running(machine) as nursery:
        for number in range(200):
            nursery.start_soon(machine.be_busy, number)
        waited = await machine.use_little("honest", seconds=0.0002, every=0.02, times=200)
    # At first the slices are still long, as only busy peers were there.
    assert max(waited[1:]) <= SHORT_SLICES.tick + SHORT_SLICES.peer
    assert max(waited) <= LONG_SLICES.tick + LONG_SLICES.peer


async def test_without_the_scheduler_a_client_waits_for_all_others(machine: Machine) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(machine.be_busy, number)
        waited = await machine.use_little("honest", seconds=0.0002, every=0.02, times=20)
        nursery.cancel_scope.cancel()
    assert max(waited) > 50 * LONG_SLICES.tick


async def test_clients_have_equal_shares_for_any_number_of_connections(machine: Machine) -> None:
    async with running(machine) as nursery:
        for client, connections in ("one", 1), ("few", 7), ("many", 50):
            for _ in range(connections):
                nursery.start_soon(lambda name: machine.be_busy(name, client=name), client)
        await machine.run_for(6.0)
    shares = [machine.used[name] for name in ("one", "few", "many")]
    assert max(shares) <= 1.1 * min(shares)


async def test_unauthenticated_networks_have_equal_shares(machine: Machine) -> None:
    async with running(machine) as nursery:
        for network, connections in ("one", 1), ("many", 50):
            for _ in range(connections):
                nursery.start_soon(lambda name: machine.be_busy(name, network=name), network)
        await machine.run_for(6.0)
    assert machine.used["many"] <= 1.1 * machine.used["one"]


async def test_unauthenticated_networks_behind_one_proxy_have_equal_shares(machine: Machine) -> None:
    async with running(machine) as nursery:
        for network, connections in ("one", 1), ("many", 50):
            for _ in range(connections):
                nursery.start_soon(lambda name: machine.be_busy(name, network="proxy", behind=name), network)
        await machine.run_for(6.0)
    assert machine.used["many"] <= 1.1 * machine.used["one"]


async def test_connections_of_a_client_have_equal_parts_of_its_share(machine: Machine) -> None:
    async with running(machine) as nursery:
        for number in range(10):
            nursery.start_soon(lambda name: machine.be_busy(name, client="one"), number)
        await machine.run_for(6.0)
    assert max(machine.used.values()) <= 1.1 * min(machine.used.values())


async def test_unauthenticated_peers_of_many_networks_have_half_beside_a_busy_client(machine: Machine) -> None:
    async with running(machine) as nursery:
        for number in range(300):
            nursery.start_soon(machine.be_busy, number)
        nursery.start_soon(lambda: machine.be_busy("client", client="client"))
        await machine.run_for(6.0)
    unauthenticated = sum(used for name, used in machine.used.items() if name != "client")
    assert 0.4 <= machine.used["client"] / (machine.used["client"] + unauthenticated) <= 0.6


async def test_unused_share_is_not_saved_up(machine: Machine) -> None:
    async with running(machine) as nursery:
        for number in range(5):
            nursery.start_soon(lambda name: machine.be_busy(name, client=name), number)
        with machine.cpu_scheduler.serve("late"):
            machine.cpu_scheduler.authenticate("late")
            await machine.run_for(10.0)
            before = machine.now
            nursery.start_soon(lambda: machine.be_busy("late", client="late"))
            await machine.run_for(3.0)
    assert machine.used["late"] <= (machine.now - before) / 6 * 1.2 + CREDIT_RATE * 3.0


async def test_busy_client_has_credit_again_a_second_later(machine: Machine) -> None:
    async with running(machine) as nursery:
        async with trio.open_nursery() as busy:
            busy.start_soon(lambda: machine.be_busy("client", client="client"))
            with machine.cpu_scheduler.serve("client"):
                machine.cpu_scheduler.authenticate("client")
                await machine.run_for(5.0)
                busy.cancel_scope.cancel()
        machine.now += 1.3
        for number in range(50):
            nursery.start_soon(machine.be_busy, number)
        waited = await machine.use_little("client", seconds=0.0002, every=0.02, times=20)
    assert max(waited[1:]) <= SHORT_SLICES.tick + SHORT_SLICES.peer


async def test_child_tasks_are_charged_to_their_connection(machine: Machine) -> None:
    async def serve(network: str, children: int) -> None:
        with machine.cpu_scheduler.serve(network):
            async with trio.open_nursery() as own:
                for _ in range(children):
                    own.start_soon(work, network)

    async def work(network: str) -> None:
        while True:
            await machine.cpu_scheduler.yield_cpu()
            machine.work(network, machine.cpu_scheduler.slices.peer)

    async with running(machine) as nursery:
        nursery.start_soon(serve, "one", 1)
        nursery.start_soon(serve, "many", 20)
        await machine.run_for(4.0)
    assert machine.used["many"] <= 1.1 * machine.used["one"]


async def test_cancelled_tasks_leave_the_queue(machine: Machine) -> None:
    async with running(machine) as nursery:
        nursery.start_soon(lambda: machine.be_busy("stays", client="stays"))
        for _ in range(20):
            with trio.move_on_after(0) as scope:
                async with trio.open_nursery() as leaving:
                    for number in range(100):
                        leaving.start_soon(machine.be_busy, number)
                    scope.deadline = trio.current_time() + 60
                    await machine.run_for(0.05)
                    assert machine.cpu_scheduler.waiting > 50
                    scope.cancel()
        assert machine.cpu_scheduler.waiting <= 1
        before = machine.used["stays"]
        await machine.run_for(0.1)
        assert machine.used["stays"] > before


async def test_single_peer_never_waits(machine: Machine) -> None:
    async with running(machine):
        with machine.cpu_scheduler.serve("alone"):
            for _ in range(10):
                await machine.cpu_scheduler.acquire()
                await trio.lowlevel.checkpoint()
                machine.work("alone", LONG_SLICES.tick / 2)
        assert machine.cpu_scheduler.waits == 0


async def test_waiting_tasks_continue_when_the_scheduler_ends(machine: Machine) -> None:
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with running(machine):
                for number in range(50):
                    nursery.start_soon(machine.be_busy, number)
                await machine.run_for(0.05)
                assert machine.cpu_scheduler.waiting > 40
                scope.cancel()
        assert machine.cpu_scheduler.waiting == 0
        await machine.run_for(0.5)
        assert len(machine.used) == 50
        nursery.cancel_scope.cancel()


async def test_two_schedulers_in_a_thread_charge_only_their_own_peers(machine: Machine) -> None:
    other = CpuScheduler(lambda: machine.now)
    async with running(machine) as nursery:
        nursery.start_soon(other.run)
        nursery.start_soon(lambda: machine.be_busy("here", client="here"))
        with other.serve("there") as peer:
            await machine.run_for(1.0)
        assert peer.used == 0
        assert other.waits == 0
