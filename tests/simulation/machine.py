"""One case: some replicas and clients, what they do, and what goes wrong meanwhile; then everything has to come right.

A case is plain data, so that Hypothesis can make it small. All of it runs on Trio's virtual clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple

import pytest
import trio
from hypothesis import strategies as st
from trio._core._run import _r as _scheduler
from trio.testing import MockClock

from catbus.config import Database as Settings
from catbus.delivery import Delivery
from catbus.log import Entry
from catbus.mailbox import Budget
from catbus.postgres import PostgresLog, listener, outbox, retention, supervise, writer
from catbus.postgres import log as log_module

from .clients import Client, Subscriber
from .database import POISON, Stored
from .model import Model, Row
from .network import FATES, KINDS, Fate, Network

REPLICAS = 2
CLIENTS = 3
PATTERNS = ("*", "a", "b.*")
CHANNELS = ("a", "b.x", "b.y", "c")
PAUSES = (0.0, 0.001, 0.01, 0.1, 0.3, 0.6, 1.2, 2.5)
LENGTH = 30
"""Operations of a case, at the most."""
PATIENCE = 30.0
"""Virtual seconds within which everything has to come right once nothing goes wrong any more."""


class Case(NamedTuple):
    """Operations are a number each: which, of whom, and how."""

    operations: Sequence[int]
    seed: int = 0
    recents: int = 0
    silent: bool = False
    """Whether the database may be set back without a trace. Then only replicas notice it that remember more: none of
    them ends, and retention does not take away what they remember."""


class Watched(Delivery):
    """Delivery that has the model look at what it is handed."""

    def __init__(self, log: PostgresLog, model: Model, budget: Budget) -> None:
        super().__init__(log, budget)
        self._model = model

    def apply(self, entries: Sequence[Entry]) -> None:
        self._model.apply(self.position, [Row(e.seq, e.channel, e.payload.decode()) for e in entries])
        super().apply(entries)


class Replica:
    """A replica without its doors."""

    def __init__(self, model: Model, url: str, recent: int, budget: int) -> None:
        self.url = url
        self.log = PostgresLog(Settings(url=url, publish_timeout=0.6, connect_timeout=1.0), recent=recent)
        self.delivery = Watched(self.log, model, Budget(budget))
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.log.run, self.delivery)
                nursery.start_soon(self.delivery.run)


class Machine:
    """What a case is played with."""

    def __init__(self, case: Case, nursery: trio.Nursery) -> None:
        self.case = case
        self.model = Model()
        self.network = Network()
        self.database = self.network.database
        self.database.committed = self.committed
        self.texts = count(1)
        self.urls = count(1)
        self.trace: list[str] = []
        self.rotates = True
        """Not once the database was set back without a trace: what tells of that must not be gone."""
        self._nursery = nursery
        nursery.start_soon(self.network.run)
        self.replicas = [self.start() for _ in range(REPLICAS)]
        self.clients = [Client(b"%d" % i, Subscriber(PATTERNS[i % len(PATTERNS)]), self.model) for i in range(CLIENTS)]

    def start(self) -> Replica:
        number = next(self.urls)
        recent, budget = [(1 << 20, 1 << 20), (0, 1 << 20), (700, 1 << 20), (0, 1200)][(self.case.recents + number) % 4]
        replica = Replica(self.model, f"postgres://replica-{number}", recent, budget)
        self._nursery.start_soon(replica.run)
        return replica

    def committed(self, rows: Sequence[Stored], epoch: str) -> None:
        # Only who follows the present log may append to it.
        self.model.expect(epoch == self.database.state.epoch, f"appended from {epoch}")
        self.model.commit([Row(row.seq, row.channel, row.payload) for row in rows])

    # Operations: `a` says of whom or how, `b` how much

    def publish(self, a: int, b: int) -> None:
        client = self.clients[a % CLIENTS]
        if client.replica is None or not client.replica.log.epoch:
            return
        for i in range(b % 3 + 1):
            text = f'"{next(self.texts)}{(POISON if b == 7 and i else "")}{"x" * 500 * (b == 5)}"'
            client.publish(CHANNELS[(a + b + i) % 4], text)

    def publish_from_sql(self, a: int, b: int) -> None:
        if self.network.away or self.database.standby:
            return
        text = f'"{next(self.texts)}"'
        self.model.promised.add(text)
        self.database.publish(CHANNELS[a % 4], text)

    def leave(self, a: int, b: int) -> None:
        self.clients[a % CLIENTS].leave()

    def come(self, a: int, b: int) -> None:
        """Move to a replica, or come back to one."""
        client, replica = self.clients[a % CLIENTS], self.replicas[b % REPLICAS]
        if client.replica is None or client.replica is not replica:
            client.leave()
            if replica.log.epoch:
                client.join(replica)

    def take(self, a: int, b: int) -> None:
        self.clients[a % CLIENTS].take(300 if b & 1 else float("inf"))

    def retry(self, a: int, b: int) -> None:
        client = self.clients[a % CLIENTS]
        if client.replica is not None:
            client.retry_all()

    def cut(self, a: int, b: int) -> None:
        self.network.cut(self.replicas[a % REPLICAS].url)

    def freeze(self, a: int, b: int) -> None:
        self.network.frozen[self.replicas[a % REPLICAS].url] = trio.current_time() + PAUSES[b]

    def meet(self, a: int, b: int) -> None:
        """Decide what becomes of a coming statement."""
        owner = self.replicas[a % REPLICAS].url
        kind, what = KINDS[(a >> 1) % len(KINDS)], FATES[b]
        event = (self.rotate, self.fail_over, self.cut, self.publish_from_sql)[(a >> 4) % 4]
        delay = PAUSES[2 + (a >> 4) % 6]
        self.network.fates[owner, kind].append(Fate(what, delay, lambda: event(a, a >> 6)))

    def stop_database(self, a: int, b: int) -> None:
        self.network.stop()
        self.network.away = True

    def stand_by(self, a: int, b: int) -> None:
        """The primary is gone, and there is a standby which takes over when the database is started."""
        self.network.stop()
        self.database.standby = True

    def start_database(self, a: int, b: int) -> None:
        if self.network.away:
            self.network.away = False
        elif self.database.standby:
            self.fail_over(a, 0)

    def fail_over(self, a: int, b: int) -> None:
        """A standby takes over, or the database is set back as it is; the last commits may be lost."""
        self.network.stop()
        self.database.standby = False
        silent = self.case.silent and bool(b & 1)
        self.rotates = self.rotates and not silent
        self.database.set_back(a % 4 if silent or b & 6 else 0, moved=not silent)
        self.model.set_back(self.database.state.head, [text for _, text in self.database.state.outbox])

    def begin_epoch(self, a: int, b: int) -> None:
        """Somebody has restored something by hand, and says so. As it happens nothing has changed."""
        self.database.begin_epoch()

    def rotate(self, a: int, b: int) -> None:
        if self.rotates:
            self.database.rotate(a % 5 + 1)

    def let_rotate(self, a: int, b: int) -> None:
        """Have a replica find that retention is due."""
        if self.rotates:
            self.database.overdue = a % 5 + 1

    def lock(self, a: int, b: int) -> None:
        self.network.locked = trio.current_time() + PAUSES[b]

    def deafen(self, a: int, b: int) -> None:
        self.network.deaf[self.replicas[a % REPLICAS].url] = b

    def slow_down(self, a: int, b: int) -> None:
        """Have the notifications of some senders come late."""
        self.network.slow[self.replicas[a % REPLICAS].url, (a >> 1) % 2] = PAUSES[b]

    def crash(self, a: int, b: int) -> None:
        """A replica ends, in order or not, and another takes its place."""
        if self.case.silent:
            return
        replica = self.replicas[a % REPLICAS]
        if b & 1:
            for client in self.clients:
                if client.replica is replica:
                    client.leave()
            self.network.cut(replica.url)
        replica.scope.cancel()
        self.replicas[a % REPLICAS] = self.start()

    async def pause(self, a: int, b: int) -> None:
        if b:
            await trio.sleep(PAUSES[b])
        for _ in range(a % 8):
            await trio.lowlevel.checkpoint()

    # The run

    async def play(self) -> None:
        await trio.sleep(0.2)
        for i, client in enumerate(self.clients):
            client.join(self.replicas[i % REPLICAS])
        for operation in self.case.operations:
            name, a, b = decode(operation)
            self.trace.append(f"{trio.current_time():.3f} {name}({a}, {b})")
            result = getattr(self, name)(a, b)
            if result is not None:
                await result
            if self.model.broken:
                break
        await self.calm_down()

    async def calm_down(self) -> None:
        """Nothing goes wrong any more: everything has to come right, and everybody hears of it."""
        self.start_database(0, 0)
        self.network.heal()
        end = trio.current_time() + PATIENCE
        while not self.model.broken:
            for i, client in enumerate(self.clients):
                if client.replica not in self.replicas:
                    self.come(i, i)
                if client.replica is not None:
                    client.retry_all()
                client.take()
            wrong = list(self.unsettled())
            if not wrong:
                break
            self.model.expect(trio.current_time() < end, f"it does not come right: {wrong}")
            await trio.sleep(0.2)
        if not self.model.broken:
            self.model.check()
            for client in self.clients:
                s = client.subscriber
                self.model.check_subscription(s.pattern, s.start, s.known, s.gaps, self.database.gone)

    def unsettled(self) -> Iterator[str]:
        """What is still to come right."""
        state = self.database.state
        if self.network.busy:
            yield "something is on its way"
        if state.outbox:
            yield "the outbox is not empty"
        for replica in self.replicas:
            log = replica.log
            if not (log.available and log.applied == state.head and log.epoch == state.epoch):
                yield f"{replica.url} is at {log.applied} of {log.epoch}, the log at {state.head} of {state.epoch}"
            self.model.expect(not log.statistics().failures, "a service has failed")
        for client in self.clients:
            if client.replica not in self.replicas or not client.subscriber.live:
                yield f"{client.subscriber.pattern} is not live"
            if not client.settled:
                yield f"{client.pending} has no answer"


_WEIGHTS: dict[Callable[..., Any], int] = {
    Machine.pause: 8,
    Machine.publish: 8,
    Machine.take: 3,
    Machine.come: 3,
    Machine.meet: 6,
    Machine.leave: 1,
    Machine.retry: 1,
    Machine.publish_from_sql: 1,
    Machine.cut: 1,
    Machine.freeze: 1,
    Machine.rotate: 1,
    Machine.let_rotate: 1,
    Machine.lock: 1,
    Machine.deafen: 1,
    Machine.slow_down: 1,
    Machine.stop_database: 1,
    Machine.start_database: 2,
    Machine.stand_by: 1,
    Machine.fail_over: 1,
    Machine.begin_epoch: 1,
    Machine.crash: 1,
}
_NAMES = [operation.__name__ for operation, weight in _WEIGHTS.items() for _ in range(weight)]
OPERATIONS = len(_NAMES) * 256 * 8


def decode(operation: int) -> tuple[str, int, int]:
    rest, b = divmod(operation, 8)
    name, a = divmod(rest, 256)
    return _NAMES[name], a, b


cases = st.builds(
    Case,
    st.lists(st.integers(0, OPERATIONS - 1), max_size=LENGTH),
    st.integers(0, 1 << 16),
    st.integers(0, 3),
    st.booleans(),
)


def random_case(source: random.Random) -> Case:
    """A case by chance, in less time than it takes Hypothesis to make one that it could make smaller."""
    operations = [source.randrange(OPERATIONS) for _ in range(source.randint(1, LENGTH))]
    return Case(operations, source.randrange(1 << 16), source.randrange(4), source.random() < 0.3)


class Broken(AssertionError):
    """Something was not as promised."""


def play(case: Case) -> None:
    """Run a case, within `quiet()`; raises `Broken`."""
    random.seed(case.seed)
    _scheduler.seed(case.seed)

    async def run() -> None:
        nonlocal machine
        async with trio.open_nursery() as nursery:
            machine = Machine(case, nursery)
            patch.setattr(log_module, "open_bridge", machine.network.open_bridge)
            await machine.play()
            nursery.cancel_scope.cancel()

    machine: Machine | None = None
    try:
        with pytest.MonkeyPatch.context() as patch:
            trio.run(run, clock=MockClock(autojump_threshold=0))
    except Exception as error:
        raise Broken("\n".join([*(machine.trace if machine else ()), repr(error)])) from error
    assert machine is not None
    if machine.model.broken:
        raise Broken("\n".join([*machine.trace, *machine.model.broken[:3]]).replace("x" * 500, "..."))


@contextmanager
def quiet() -> Iterator[None]:
    """Say nothing, and do not read the schema's files for every replica."""

    async def migrate(connection: object) -> None:
        await trio.lowlevel.checkpoint()

    with pytest.MonkeyPatch.context() as patch:
        for module in (listener, outbox, retention, supervise, writer):
            if hasattr(module, "logger"):
                patch.setattr(module, "logger", Silence())
        patch.setattr(log_module, "migrate", migrate)
        # Whoever waits for an answer waits for a fifth of the time, and who looks for work looks more seldom: there are
        # fewer turns in a case, and the same happens in them.
        for module, name, seconds in (
            (writer, "PATIENCE", 2.0),
            (writer, "EPOCH_PATIENCE", 1.0),
            (listener, "PATIENCE", 0.6),
            (outbox, "PATIENCE", 0.6),
            (outbox, "PACE", 1.0),
            (outbox, "BRISK_PACE", 1.0),
            (outbox, "SHARE", 1),
        ):
            patch.setattr(module, name, seconds)
        yield


class Silence:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def reduce(case: Case) -> tuple[Case, Broken]:
    """A broken case without what it does not need to be broken."""
    operations, size = list(case.operations), len(case.operations)
    broken = _broken(case)
    assert broken is not None, "played again it is not broken any more"
    while size:
        place = 0
        while place < len(operations):
            fewer = operations[:place] + operations[place + size :]
            found = _broken(case._replace(operations=fewer))
            if found is None:
                place += size
            else:
                operations, broken = fewer, found
        size //= 2
    return case._replace(operations=operations), broken


def _broken(case: Case) -> Broken | None:
    try:
        play(case)
    except Broken as broken:
        return broken
    return None
