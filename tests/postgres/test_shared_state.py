"""The Python client's shared state on two replicas, one of which is killed: counters, live maps, and members."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count

import trio

from catbus.client import Backoff, Bus, Change, ConflictError, LiveMap, MemberKey, Message, PresentMember, open_bus
from catbus.client.broker_address import parse_address
from catbus.client.websocket_transport import open_websocket
from catbus.error_codes import ErrorCode
from catbus.errors import Refused
from tests.postgres.processes import Replica, open_replicas, token
from tests.postgres.sql import expire_replica, open_sql

PATIENCE = 90.0

COUNTERS = ("counters.a", "counters.b", "counters.c")


class Balancer:
    """Connects each client to the next replica in service."""

    def __init__(self, serving: list[Replica]) -> None:
        self.serving = serving
        self._dials = count()

    @asynccontextmanager
    async def connect(self, name: str) -> AsyncIterator[Bus]:
        async def dial() -> object:
            replica = self.serving[next(self._dials) % len(self.serving)]
            return await open_websocket(parse_address(replica.url))

        async with open_bus(dial, token=token(name), persist=True, reconnect=Backoff(0.05, 0.5)) as bus:  # type: ignore[arg-type]
            yield bus


class Writers:
    """Increments of counters by compare-and-set, and their outcomes."""

    def __init__(self) -> None:
        self.expected: Counter[tuple[str, int]] = Counter()
        """How often a publish with this channel and `expect` was acknowledged."""
        self.unknown = 0
        self.conflicts: list[tuple[int, int]] = []
        """What was expected, and what there was."""
        self.ended = False
        self._more = trio.Event()

    @property
    def acknowledged(self) -> int:
        return self.expected.total()

    async def wait_for(self, number: int) -> None:
        while self.acknowledged < number:
            self._more = trio.Event()
            await self._more.wait()

    async def run(self, balancer: Balancer, name: str) -> None:
        async with balancer.connect(name) as bus, bus.retained("counters.*") as counters:
            changes = counters.changes()
            for number in count():
                if self.ended:
                    return
                channel = COUNTERS[number % len(COUNTERS)]
                present = counters.get(channel)
                if not await self._increment(bus, channel, present):
                    while counters.get(channel) is present:
                        await anext(changes)

    async def _increment(self, bus: Bus, channel: str, present: Message | None) -> bool:
        expect = (present.seq or 0) if present else 0
        try:
            await bus.publish(channel, (present.payload if present else 0) + 1, retain=True, expect=expect)
        except ConflictError as conflict:
            self.conflicts.append((expect, conflict.seq))
            return False
        except Refused as error:
            if error.code is not ErrorCode.UNKNOWN:
                raise
            self.unknown += 1
            return True
        self.expected[channel, expect] += 1
        self._more.set()
        return True


async def test_every_acknowledged_increment_counts_once_when_a_replica_is_killed(database_url: str) -> None:
    writers = Writers()
    with trio.fail_after(PATIENCE):
        async with open_replicas(database_url, 2) as [victim, survivor]:
            balancer = Balancer([victim, survivor])
            async with balancer.connect("watcher") as bus, bus.retained("counters.*") as counters:
                async with trio.open_nursery() as nursery:
                    for number in range(8):
                        nursery.start_soon(writers.run, balancer, f"writer-{number}")
                    await writers.wait_for(100)
                    balancer.serving = [survivor]
                    victim.kill()
                    await writers.wait_for(writers.acknowledged + 100)
                    writers.ended = True
                # This is behind the last increment.
                head = await bus.publish("counters.end", True, retain=True)
                changes = counters.changes()
                while "counters.end" not in counters:
                    await anext(changes)
                chain = await read_counters(bus, head)
                assert {name: found.seq for name, found in counters.items()} == {
                    name: seqs[-1][0] for name, seqs in chain.items()
                }
    values = [[value for _, value in chain[name]] for name in COUNTERS]
    # Each message is the increment of the one before it.
    assert values == [list(range(1, len(each) + 1)) for each in values]
    assert writers.acknowledged <= sum(map(len, values)) <= writers.acknowledged + writers.unknown
    assert max(writers.expected.values()) == 1
    assert writers.conflicts
    assert all(present > expected for expected, present in writers.conflicts)
    assert not survivor.complaints


async def read_counters(bus: Bus, head: int) -> dict[str, list[tuple[int, object]]]:
    """Read the messages of each counter from the log, up to a seq."""
    found: dict[str, list[tuple[int, object]]] = {}
    async with bus.subscribe("counters.*", since=0) as messages:
        async for message in messages:
            assert message.seq is not None
            assert message.retain
            found.setdefault(message.channel, []).append((message.seq, message.payload))
            if message.seq == head:
                return found
    raise AssertionError


class MemberWatch:
    """The changes that one live map of members has told."""

    def __init__(self) -> None:
        self.left: Counter[str | None] = Counter()
        self.members: LiveMap[MemberKey, PresentMember] | None = None

    async def run(self, balancer: Balancer, *, task_status: trio.TaskStatus[None]) -> None:
        async with balancer.connect("watcher") as bus, bus.presence("room.*") as self.members:
            self.members.on_change(self._note)
            task_status.started()
            await trio.sleep_forever()

    def _note(self, change: Change[MemberKey, PresentMember]) -> None:
        if change.value is None:
            self.left[change.key.client_id] += 1

    async def wait_until(self, expected: set[str]) -> None:
        assert self.members is not None
        changes = self.members.changes()
        while {key.client_id for key in self.members} != expected:
            await anext(changes)


async def test_only_members_that_do_not_come_back_are_gone_when_a_replica_is_killed(database_url: str) -> None:
    stayed = {f"member-{number}" for number in range(6)}

    async def stay(balancer: Balancer, name: str) -> None:
        async with balancer.connect(name) as bus, bus.join("room.1", {"name": name}):
            await trio.sleep_forever()

    with trio.fail_after(PATIENCE):
        async with (
            open_replicas(database_url, 2, module="tests.postgres.impatient_replica") as [victim, survivor],
            open_sql(database_url) as sql,
            trio.open_nursery() as nursery,
        ):
            balancer = Balancer([victim, survivor])
            watches = [MemberWatch() for _ in range(2)]
            for name in stayed:
                nursery.start_soon(stay, balancer, name)
            for watch, replica in zip(watches, [victim, survivor], strict=True):
                # The first one has to come back itself.
                await nursery.start(watch.run, balancer if replica is victim else Balancer([survivor]))
            mortal = trio.CancelScope()

            async def be_killed() -> None:
                with mortal:
                    await stay(Balancer([victim]), "mortal")

            nursery.start_soon(be_killed)
            for watch in watches:
                await watch.wait_until({*stayed, "mortal"})
            balancer.serving = [survivor]
            victim.kill()
            mortal.cancel()
            await expire_replica(sql, "mortal", rejoined=len(stayed))
            for watch in watches:
                await watch.wait_until(stayed)
            async with Balancer([survivor]).connect("last") as bus:
                members = await bus.members("*")
            assert {(each.client_id, each.sessions, each.info["name"]) for each in members} == {
                (name, 1, name) for name in stayed
            }
            nursery.cancel_scope.cancel()
    assert [watch.left for watch in watches] == [Counter({"mortal": 1})] * 2
    assert not survivor.complaints
