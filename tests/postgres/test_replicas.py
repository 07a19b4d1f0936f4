"""Replicas as real processes on one PostgreSQL: one order for all, graceful shutdown, and SIGKILL."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from itertools import count, zip_longest
from pathlib import Path

import pytest
import trio

from catbus.cli.development_credentials import CERTIFICATE_FILE
from catbus.client import Backoff, Bus, Disconnected, GoAway, Transport, connect, open_bus
from catbus.client.broker_address import parse_address
from catbus.client.websocket_transport import open_websocket
from catbus.client.webtransport_transport import make_configuration, open_webtransport
from catbus.close_codes import CloseCode
from tests.postgres.processes import Replica, open_replicas, token
from tests.postgres.sql import head_locked, open_sql, wait_until, waiting

PATIENCE = 60.0

Item = tuple[int, str, int]
"""A message: its seq, its publisher, and the publisher's number for it."""


class Tally:
    """Messages in the order of their arrival."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self._more = trio.Event()

    def add(self, item: Item) -> None:
        self.items.append(item)
        self._more.set()

    async def wait_for(self, number: int) -> None:
        """Wait until there are `number` messages."""
        while len(self.items) < number:
            self._more = trio.Event()
            await self._more.wait()


async def follow(
    replica: Replica,
    seen: Tally,
    since: int | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Subscribe to all channels while the log is empty, or since 0, and allow no gap. Started once subscribed."""
    async with (
        connect(replica.url, token=token("subscriber"), reconnect=False) as bus,
        bus.subscribe("*", since=since) as messages,
    ):
        task_status.started()
        async for message in messages:
            assert message.seq == len(seen.items) + 1
            seen.add((message.seq, *message.payload))


def difference(one: Sequence[object], other: Sequence[object]) -> object:
    """The first difference of two long lists, or None. An explanation by pytest would take minutes."""
    pairs = enumerate(zip_longest(one, other))
    return next(((index, left, right) for index, (left, right) in pairs if left != right), None)


async def test_subscribers_of_both_replicas_see_all_messages_in_one_gapless_order(database_url: str) -> None:
    publishers, each, batch = 8, 1250, 50
    total = publishers * each
    acknowledged = Tally()
    subscribers = [Tally() for _ in range(4)]
    latecomers = [Tally() for _ in range(3)]
    joined = trio.Event()

    async def publish(replica: Replica, name: str) -> None:
        async with connect(replica.url, token=token(name)) as bus:
            for first in range(0, each, batch):
                if first >= each * 3 // 4:
                    # Otherwise the later subscribers might find the complete log already.
                    await joined.wait()
                numbers = range(first, first + batch)
                seqs = await bus.publish_many([(f"test.{name}", (name, n)) for n in numbers])
                for n, seq in zip(numbers, seqs, strict=True):
                    assert isinstance(seq, int), seq
                    acknowledged.add((seq, name, n))

    with trio.move_on_after(PATIENCE) as limit:
        async with open_replicas(database_url, 2) as replicas, trio.open_nursery() as nursery:
            for index, subscriber in enumerate(subscribers):
                await nursery.start(follow, replicas[index % 2], subscriber)
            for index in range(publishers):
                nursery.start_soon(publish, replicas[index % 2], f"publisher-{index}")
            for index, latecomer in enumerate(latecomers):
                await subscribers[0].wait_for(total * (index + 1) // 5)
                await nursery.start(follow, replicas[index % 2], latecomer, 0)
            joined.set()
            for tally in (*subscribers, *latecomers, acknowledged):
                await tally.wait_for(total)
            nursery.cancel_scope.cancel()

    counts = [len(tally.items) for tally in (acknowledged, *subscribers, *latecomers)]
    assert not limit.cancelled_caught, f"no end after {PATIENCE:g} s: {counts}"
    log = sorted(acknowledged.items)
    assert difference([seq for seq, _, _ in log], range(1, total + 1)) is None
    for seen in (*subscribers, *latecomers):
        assert difference(seen.items, log) is None
    for index in range(publishers):
        assert difference([n for _, name, n in log if name == f"publisher-{index}"], range(each)) is None
    assert not [complaint for replica in replicas for complaint in replica.complaints]


async def test_stopping_replica_replies_to_accepted_publishes_and_drains_its_clients(database_url: str) -> None:
    answered: list[object] = []
    stopping, sent_away = trio.Event(), trio.Event()

    async def idle(replica: Replica, *, task_status: trio.TaskStatus[None]) -> None:
        with pytest.raises(Disconnected) as end:
            await follow(replica, Tally(), task_status=task_status)
        assert end.value.code == CloseCode.SHUTTING_DOWN
        sent_away.set()

    async def publish(replica: Replica) -> None:
        def note(event: object) -> None:
            if isinstance(event, GoAway):
                stopping.set()

        bearer = token("publisher")
        async with (
            connect(replica.url, token=bearer, reconnect=False, on_event=note) as bus,
            bus.subscribe("nothing.ever") as messages,
        ):
            answered.extend(await bus.publish_many([("test.stop", n) for n in range(100)]))
            with pytest.raises(Disconnected) as end:
                await anext(messages)
        assert end.value.code == CloseCode.SHUTTING_DOWN

    with trio.fail_after(PATIENCE):
        async with open_replicas(database_url, 1) as [replica], open_sql(database_url) as sql:
            async with trio.open_nursery() as nursery:
                await nursery.start(idle, replica)
                async with head_locked(database_url):
                    nursery.start_soon(publish, replica)
                    await wait_until(lambda: waiting(sql))
                    replica.terminate()
                    await stopping.wait()
                    # A session without pending publishes does not wait for the others.
                    await sent_away.wait()
                    with pytest.raises(Disconnected):
                        await follow(replica, Tally())
                    assert not answered
            assert await replica.wait() == 0
            rows = await sql.fetch("SELECT seq, payload::int FROM catbus.entries ORDER BY seq")

    assert [tuple(row) for row in rows] == [(n + 1, n) for n in range(100)]
    assert answered == [seq for seq, _ in rows]
    assert replica.events[-1]["event"] == "stopped"
    assert not replica.complaints


async def test_message_acknowledged_by_a_killed_replica_is_in_the_log(database_url: str) -> None:
    connections, tasks, enough = 4, 10, 500
    tried: set[tuple[str, int]] = set()
    numbers = count()
    by_victim, by_survivor, live, whole = Tally(), Tally(), Tally(), Tally()

    async def publish(bus: Bus, name: str, acknowledged: Tally) -> None:
        # One at a time, so that the publishes acknowledged before the kill are known.
        with suppress(Disconnected):
            while True:
                n = next(numbers)
                tried.add((name, n))
                acknowledged.add((await bus.publish("test.kill", (name, n)), name, n))

    async def publish_to(replica: Replica, name: str, acknowledged: Tally) -> None:
        async with connect(replica.url, token=token(name), reconnect=False) as bus, trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(publish, bus, name, acknowledged)

    with trio.fail_after(PATIENCE):
        async with open_replicas(database_url, 2) as [victim, survivor], trio.open_nursery() as nursery:
            await nursery.start(follow, survivor, live)
            async with trio.open_nursery() as publishers:
                for _ in range(connections):
                    publishers.start_soon(publish_to, survivor, "survivor", by_survivor)
                async with trio.open_nursery() as victims:
                    for _ in range(connections):
                        victims.start_soon(publish_to, victim, "victim", by_victim)
                    await by_victim.wait_for(enough)
                    victim.kill()
                # The remaining replica continues.
                await by_survivor.wait_for(len(by_survivor.items) + enough)
                publishers.cancel_scope.cancel()
            async with connect(survivor.url, token=token("last")) as bus:
                last = await bus.publish("test.kill", ("last", 0))
            tried.add(("last", 0))
            await nursery.start(follow, survivor, whole, 0)
            await whole.wait_for(last)
            await live.wait_for(last)
            nursery.cancel_scope.cancel()

    log = whole.items
    assert difference([seq for seq, _, _ in log], range(1, last + 1)) is None
    assert difference(live.items, log) is None
    assert len({(name, n) for _, name, n in log}) == len(log)
    assert {(name, n) for _, name, n in log} <= tried
    assert len(by_victim.items) >= enough
    assert not {*by_victim.items, *by_survivor.items} - {*log}
    assert not survivor.complaints


class Balancer:
    """A load balancer that connects each client to the next replica in service."""

    def __init__(self, transport: str, certificate: Path) -> None:
        self.serving: list[Replica] = []
        self.sent = 0
        self._transport = transport
        self._certificate = certificate

    async def dial(self) -> Transport:
        self.sent += 1
        replica = self.serving[self.sent % len(self.serving)]
        if self._transport == "websocket":
            return await open_websocket(parse_address(replica.urls[0]))
        address = parse_address(replica.urls[1])
        return await open_webtransport(address, make_configuration(address, self._certificate))


@pytest.mark.parametrize("transport", ["websocket", "webtransport"])
async def test_clients_survive_the_kills_of_their_replicas(database_url: str, transport: str, tmp_path: Path) -> None:
    publishers, tasks, enough = 3, 10, 300
    balancer = Balancer(transport, tmp_path / CERTIFICATE_FILE)
    acknowledged = Tally()
    subscribers = [Tally() for _ in range(4)]
    over = trio.Event()

    async def open_client(stack: AsyncExitStack, name: str) -> Bus:
        return await stack.enter_async_context(
            open_bus(
                balancer.dial, token=token(name), reconnect=Backoff(0.1, 0.5), keepalive=0.5, timeout=2, persist=True
            )
        )

    async def publish(bus: Bus, name: str, numbers: count[int]) -> None:
        while not over.is_set():
            n = next(numbers)
            acknowledged.add((await bus.publish("test.kill", (name, n)), name, n))

    async def listen(bus: Bus, seen: Tally, stream: bool) -> None:
        async with bus.subscribe("*", since=0, stream=stream) as messages:
            async for message in messages:
                assert message.seq == len(seen.items) + 1
                seen.add((message.seq, *message.payload))

    with trio.fail_after(PATIENCE):
        async with open_replicas(database_url, 3, tmp_path) as replicas, AsyncExitStack() as stack:
            balancer.serving = replicas[:2]
            listening = [await open_client(stack, "subscriber") for _ in subscribers]
            publishing = [await open_client(stack, f"publisher-{index}") for index in range(publishers)]
            async with trio.open_nursery() as nursery:
                for index, bus in enumerate(listening):
                    nursery.start_soon(listen, bus, subscribers[index], index % 2 == 1)
                async with trio.open_nursery() as busy:
                    for index, bus in enumerate(publishing):
                        numbers = count()
                        for _ in range(tasks):
                            busy.start_soon(publish, bus, f"publisher-{index}", numbers)
                    for victim in (0, 1, None):
                        for tally in (acknowledged, *subscribers):
                            await tally.wait_for(len(acknowledged.items) + enough)
                        if victim is not None:
                            # Another replica takes its place.
                            balancer.serving = replicas[victim + 1 :][:2]
                            replicas[victim].kill()
                    over.set()
                for seen in subscribers:
                    await seen.wait_for(len(acknowledged.items))
                nursery.cancel_scope.cancel()

    log = sorted(acknowledged.items)
    assert difference([seq for seq, _, _ in log], range(1, len(log) + 1)) is None
    assert len({(name, n) for _, name, n in log}) == len(log)
    for seen in subscribers:
        assert difference(seen.items, log) is None
    assert balancer.sent > publishers + len(subscribers)
    assert not replicas[2].complaints
