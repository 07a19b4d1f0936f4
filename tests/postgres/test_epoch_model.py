"""A model of logs that diverge at any point, and of the replicas and clients that follow them.

The listener, the tail, the epochs and delivery are real; the database, its failures and the clients are simulated.
"""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, cast

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from structlog.testing import CapturingLogger
from trio.testing import MockClock

from catbus.config import DatabaseSettings
from catbus.delivery.fan_out import Delivery
from catbus.log import Entry, LogPage
from catbus.postgres import PostgresLog
from catbus.postgres.access.asyncpg_bridge import DatabaseConnection
from catbus.postgres.follow.fingerprints import fingerprint
from catbus.postgres.listen import notification_listener
from catbus.postgres.listen.notification_listener import NotificationListener
from tests.simulation.clients import SimulatedSubscriber
from tests.test_delivery import exhaust


def now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that never waits."""

    async def run() -> Any:
        with trio.fail_after(0):
            return await coroutine

    return trio.run(run, clock=MockClock())


@dataclass(frozen=True)
class World:
    """The complete state of a database. Setting the database back replaces it by another state."""

    entries: tuple[Entry, ...] = ()
    epochs: tuple[tuple[str, int], ...] = (("e0", 0),)
    floor: int = 1
    place: int = 0
    """The place of the database, and `began`, that of its epoch: system identifier and timeline in one number."""
    began: int = 0

    @property
    def epoch(self) -> str:
        return self.epochs[-1][0]

    @property
    def head(self) -> int:
        return len(self.entries)

    def fingerprint(self, seq: int) -> bytes | None:
        return fingerprint(self.entries[seq - 1]) if self.floor <= seq <= self.head else None


class Model:
    """A simulated database that replies to the listener, and can be set back."""

    def __init__(self) -> None:
        self.world = World()
        self.saved = [self.world]
        self.names = count(1)
        self.texts = count(1)

    def append(self, number: int) -> None:
        world = self.world
        new = [Entry(world.head + i, 0, "a", b"%d" % next(self.texts)) for i in range(1, number + 1)]
        self.world = replace(world, entries=(*world.entries, *new))

    async def fetchrow(self, query: str, *args: Any, timeout: float = 0) -> tuple[Any, ...]:
        world = self.world
        match query:
            case notification_listener._POLL:
                same = world.place == world.began
                return (
                    world.epoch,
                    world.head,
                    world.floor,
                    world.fingerprint(args[0]),
                    False,
                    same,
                    same,
                    "",
                    "",
                    None,
                    0,
                    1,
                    0.0,
                )
            case notification_listener._READ_SECRET:
                return ("a secret",)
            case notification_listener._ERASED_SEQS:
                return ([], 1)
            case notification_listener._FINGERPRINT:
                return (world.fingerprint(args[0]),)
            case notification_listener._NEW_EPOCH:
                expected, agreed = args
                made = world.epoch == expected
                if made:
                    after = max(0, min(world.head if agreed is None else agreed, world.head))
                    epochs = (*world.epochs, (f"e{next(self.names)}", after))
                    self.world = replace(world, epochs=epochs, began=world.place)
                return (*self.world.epochs[-1], made)
        raise AssertionError(query)

    async def fetch(self, query: str, *args: Any, timeout: float = 0) -> list[tuple[str, int]]:
        assert query == notification_listener._EPOCHS
        names = [name for name, _ in self.world.epochs]
        return list(self.world.epochs[: names.index(args[0]) + 1])


class Replica:
    """The parts of a replica, without tasks and connections."""

    erasure = 0

    def __init__(self, model: Model, recent: int) -> None:
        self.model = model
        self.log = PostgresLog(DatabaseSettings(url="postgres://nowhere"), recent=recent)
        self.listener: NotificationListener = self.log._listener
        self.listener.poll_soon = lambda: None  # type: ignore[method-assign]
        self.tail = self.log._tail
        self.delivery = Delivery(self.log)
        self.tail.follow(self.delivery)
        self.look()

    def look(self) -> None:
        """Connect again, or poll."""
        self.tail.announce(now(self.listener._follow_log(cast(DatabaseConnection, self.model))))

    def lose(self) -> None:
        self.tail.distrust()

    def read(self) -> None:
        """Read some of the missing entries."""
        missing = self.tail.missing()
        if missing is not None:
            self.tail.fill(self.page(missing[0], 3), self.tail.generation)

    def page(self, after: int, rows: int) -> LogPage:
        world = self.model.world
        start = max(after, world.floor - 1)
        entries = world.entries[start : min(start + rows, self.tail.announced)]
        return LogPage(start, entries[-1].seq if entries else start, entries)

    def sweep(self) -> bool:
        """Serve lagging subscriptions, and return whether there were any."""
        position = self.delivery.next_position()
        if position is not None:
            page = self.tail.recent.since(position, 2, 1 << 20)
            if page is None:
                page = self.page(position, min(2, self.tail.applied - position))
            exhaust(self.delivery.serve(position, page))
        return position is not None


class ForkMachine(RuleBasedStateMachine):
    """Logs diverge at any point, and replicas poll them in any order.

    Once every replica has polled, each message that a subscribed client holds is in the log, and the client has, or
    will get, each message of the log above its last gap.

    Clients reconnect only then. A client need not learn of a divergence if all replicas that knew its log have ended,
    or have not polled yet.
    """

    @initialize(recents=st.lists(st.sampled_from([0, 700, 1 << 20]), min_size=1, max_size=3))
    def begin(self, recents: list[int]) -> None:
        self.model = Model()
        self.replicas = [Replica(self.model, recent) for recent in recents]
        self.clients: list[SimulatedSubscriber] = []

    def pick(self, index: int) -> Replica:
        return self.replicas[index % len(self.replicas)]

    # Rules of the database

    @rule(index=st.integers(0, 9), number=st.integers(1, 6))
    def append(self, index: int, number: int) -> None:
        """A writer appends only after its replica has polled, and only to the replica's epoch."""
        replica = self.pick(index)
        if replica.tail.trusted and replica.log.epoch == self.model.world.epoch:
            self.model.append(number)
            replica.tail.announce(self.model.world.head)

    @rule()
    def save(self) -> None:
        self.model.saved.append(self.model.world)

    @rule(index=st.integers(0, 9), moved=st.booleans())
    def set_back(self, index: int, moved: bool) -> None:
        """An earlier state replaces the present one, at this place or another one, and all connections are lost."""
        saved = self.model.saved[index % len(self.model.saved)]
        self.model.world = replace(saved, place=next(self.model.texts)) if moved else saved
        for replica in self.replicas:
            replica.lose()

    @rule(share=st.floats(0, 1))
    def lose_the_end(self, share: float) -> None:
        """The newest entries are lost, and nothing else."""
        world = self.model.world
        kept = max(int(world.head * share), world.floor - 1, *[after for _, after in world.epochs])
        self.model.world = replace(world, entries=world.entries[:kept])
        for replica in self.replicas:
            replica.lose()

    @rule(number=st.integers(1, 4))
    def retain(self, number: int) -> None:
        world = self.model.world
        self.model.world = replace(world, floor=min(world.floor + number, world.head + 1))

    # Rules of replicas

    @rule(index=st.integers(0, 9))
    def look(self, index: int) -> None:
        self.pick(index).look()

    @rule(index=st.integers(0, 9))
    def lose(self, index: int) -> None:
        self.pick(index).lose()

    @rule(index=st.integers(0, 9))
    def read(self, index: int) -> None:
        self.pick(index).read()

    @rule(index=st.integers(0, 9))
    def sweep(self, index: int) -> None:
        self.pick(index).sweep()

    @rule(recent=st.sampled_from([0, 1 << 20]))
    @precondition(lambda self: len(self.replicas) < 5)
    def start_another(self, recent: int) -> None:
        self.replicas.append(Replica(self.model, recent))

    # Rules of clients

    @rule(index=st.integers(0, 9))
    @precondition(lambda self: len(self.clients) < 6)
    def arrive(self, index: int) -> None:
        client = SimulatedSubscriber()
        client.connect(self.pick(index), anew=True)
        self.clients.append(client)

    @rule(index=st.integers(0, 9))
    @precondition(lambda self: self.clients)
    def leave(self, index: int) -> None:
        client = self.clients[index % len(self.clients)]
        if client.replica is not None:
            client.disconnect()

    @rule(index=st.integers(0, 9), where=st.integers(0, 9))
    @precondition(lambda self: self.clients)
    def come_back(self, index: int, where: int) -> None:
        client = self.clients[index % len(self.clients)]
        if client.replica is None:
            self.settle()
            client.connect(self.pick(where), anew=False)

    @rule(index=st.integers(0, 9))
    @precondition(lambda self: self.clients)
    def take(self, index: int) -> None:
        self.clients[index % len(self.clients)].read()

    @rule()
    def settle(self) -> None:
        epochs: set[str] = set()
        while len(epochs) != 1:
            for replica in self.replicas:
                replica.look()
            epochs = {replica.log.epoch for replica in self.replicas}
            if self.model.world.epoch not in epochs:
                epochs.clear()

    @rule()
    def check(self) -> None:
        self.settle()
        world = self.model.world
        for replica in self.replicas:
            while replica.tail.missing() is not None:
                replica.read()
            assert replica.tail.applied == world.head
        served = True
        while served:
            for client in self.clients:
                client.read()
            served = sum(replica.sweep() for replica in self.replicas) > 0
        for client in self.clients:
            if client.replica is None:
                continue
            assert client.subscription is not None and not client.subscription.lagging
            assert client.replica.delivery.position == world.head
            for seq, text in client.received.items():
                assert world.entries[seq - 1].payload == text.encode(), f"another {seq}"

    @invariant()
    def nobody_applies_what_nobody_trusts(self) -> None:
        for replica in getattr(self, "replicas", ()):
            assert replica.tail.applied == replica.delivery.position

    def teardown(self) -> None:
        if hasattr(self, "replicas"):
            self.check()


ForkMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestForks = ForkMachine.TestCase


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Discard the log lines: each epoch causes one, and the model begins thousands."""
    monkeypatch.setattr(notification_listener, "logger", CapturingLogger())


def test_delivered_messages_are_withdrawn_even_after_retention_has_passed_them() -> None:
    model = Model()
    one, other = Replica(model, 0), Replica(model, 0)
    client = SimulatedSubscriber()
    client.connect(one, anew=True)
    model.append(3)
    one.tail.announce(3)
    one.read()
    client.read()
    assert list(client.received) == [1, 2, 3]

    model.world = replace(model.saved[0], place=1)
    other.look()
    model.append(5)
    model.world = replace(model.world, floor=5)
    one.look()
    while one.tail.missing() is not None:
        one.read()
    client.read()
    assert list(client.received) == [5]
    assert [(gap.first, gap.last, gap.reason) for gap in client.gaps] == [(1, 0, "epoch"), (1, 4, "retention")]


def test_messages_that_the_database_has_lost_are_withdrawn() -> None:
    model = Model()
    one, other = Replica(model, 0), Replica(model, 0)
    client = SimulatedSubscriber()
    client.connect(one, anew=True)
    model.append(2)
    one.tail.announce(2)
    one.read()
    now(model.fetchrow(notification_listener._NEW_EPOCH, "e0", None))
    one.look()
    client.read()
    assert list(client.received) == [1, 2]

    model.world = replace(model.saved[0], place=1)
    other.look()
    model.append(4)
    model.world = replace(model.world, floor=4)
    one.look()
    while one.tail.missing() is not None:
        one.read()
    client.read()
    assert list(client.received) == [4]
