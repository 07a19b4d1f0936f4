"""One case: replicas and clients, what they do, and what goes wrong. Then every promise must hold.

A case is plain data, so that Hypothesis can shrink it. It runs on a simulated database (`simulated_runner.py`) or on a
real one (`postgres_runner.py`).
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import trio
from hypothesis import strategies as st

from catbus.config import DatabaseSettings
from catbus.delivery.fan_out import Delivery
from catbus.delivery.send_queue import Budget
from catbus.log import Entry
from catbus.postgres import PostgresLog

from .clients import SimulatedClient, SimulatedSubscriber
from .log_model import LogModel, Row

REPLICAS = 2
CLIENTS = 3
EPISODES = 5
"""Maximum number of episodes of a case. Every promise must hold after each, and the next continues from there."""
LENGTH = 20
"""Maximum number of operations of an episode."""
PATTERNS = ("*", "a", "b.*")
CHANNELS = ("a", "b.x", "b.y", "c")
ERASED_PATTERNS = ("a", "b.*", "b.x", "*")
PAUSES = (0.0, 0.001, 0.01, 0.1, 0.3, 0.6, 1.2, 2.5)
POISON = "poison"
"""The database rejects payloads that contain this."""

_WEIGHTS = {
    "pause": 8,
    "publish_messages": 8,
    "disturb_statement": 6,
    "read_messages": 3,
    "move_client": 3,
    "start_database": 2,
    "disconnect_client": 1,
    "retry_publishes": 1,
    "publish_from_sql": 1,
    "cut_connections": 1,
    "freeze_connections": 1,
    "apply_retention": 1,
    "request_retention": 1,
    "lock_head": 1,
    "drop_notifications": 1,
    "delay_notifications": 1,
    "stop_database": 1,
    "enter_standby": 1,
    "fail_over": 1,
    "begin_epoch": 1,
    "erase": 2,
    "restart_replica": 1,
}
"""Each operation and its weight. It takes two numbers: on which object or how, and how much."""

_NAMES = [operation for operation, weight in _WEIGHTS.items() for _ in range(weight)]
OPERATIONS = len(_NAMES) * 256 * 8
RECOVER = OPERATIONS
"""The operation between two episodes."""


class PromiseBroken(AssertionError):
    """A promise does not hold."""


class Case(NamedTuple):
    """Each operation is one number: which operation, on which object, and how."""

    operations: Sequence[int]
    seed: int = 0
    recents: int = 0
    silent: bool = False
    """Whether the database may be set back without a trace. Only replicas that remember more can notice it then, so no
    replica restarts, and retention does not delete what they remember."""


def decode(operation: int) -> tuple[str, int, int]:
    if operation == RECOVER:
        return "recover", 0, 0
    rest, b = divmod(operation, 8)
    name, a = divmod(rest, 256)
    return _NAMES[name], a, b


def _joined(episodes: list[list[int]]) -> list[int]:
    return [operation for episode in episodes for operation in (*episode, RECOVER)][:-1]


cases = st.builds(
    Case,
    st.lists(st.lists(st.integers(0, OPERATIONS - 1), max_size=LENGTH), min_size=1, max_size=EPISODES).map(_joined),
    st.integers(0, 1 << 16),
    st.integers(0, 3),
    st.booleans(),
)


def random_case(source: random.Random) -> Case:
    """Return a random case, faster than Hypothesis, which prepares for shrinking."""
    episodes = [[source.randrange(OPERATIONS) for _ in range(source.randint(1, LENGTH))] for _ in range(EPISODES)]
    return Case(_joined(episodes), source.randrange(1 << 16), source.randrange(4), source.random() < 0.3)


class CheckedDelivery(Delivery):
    """Delivery that checks what it is given against the model."""

    def __init__(self, log: PostgresLog, model: LogModel, budget: Budget) -> None:
        super().__init__(log, budget)
        self._model = model

    def apply(self, entries: Sequence[Entry]) -> None:
        self._model.apply(self.position, [Row(e.seq, e.channel, e.payload.decode()) for e in entries])
        super().apply(entries)


class Replica:
    """A replica without endpoints."""

    def __init__(self, model: LogModel, url: str, recent: int, budget: int) -> None:
        self.url = url
        self.log = PostgresLog(DatabaseSettings(url=url, publish_timeout=0.6, connect_timeout=1.0), recent=recent)
        self.delivery = CheckedDelivery(self.log, model, Budget(budget))
        self.scope = trio.CancelScope()

    @property
    def erasure(self) -> int:
        """The number of the newest erasure that it has applied to its memory."""
        known = self.log._listener._erasure
        return 0 if known is None else known[1]

    async def run(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.log.run, self.delivery)
                nursery.start_soon(self.delivery.run)


class Position(NamedTuple):
    """The state of the database."""

    epoch: str
    head: int
    waiting: int
    """Messages in its outbox."""


class CaseRunner:
    """Runs a case. Subclasses provide the database."""

    scale = 1.0
    """Length of a second."""
    recovery_poll_interval = 0.2
    """Seconds between two checks whether everything has recovered."""
    retains = False
    """Whether messages are retained: where the database can be set back with its retained messages."""
    recovery_timeout = 30.0
    """Seconds within which everything must recover once nothing goes wrong any more."""

    def __init__(self, case: Case, nursery: trio.Nursery, model: LogModel) -> None:
        self.case = case
        self.model = model
        self.texts = count(1)
        self.starts = count(1)
        self.trace: list[str] = []
        self.episodes = 0
        """Episodes after which everything has recovered."""
        self.retention_end = 0
        """The newest seq that retention has ever deleted."""
        self.nursery = nursery
        self.replicas = [self.start(slot) for slot in range(REPLICAS)]
        self.clients = [
            SimulatedClient(b"%d" % i, SimulatedSubscriber(PATTERNS[i % len(PATTERNS)], model=model), model)
            for i in range(CLIENTS)
        ]

    # The database, provided by subclasses

    def url(self, slot: int, number: int) -> str:
        """Return the URL by which a replica that starts in a slot reaches the database."""
        raise NotImplementedError

    def cut_connections(self, a: int, b: int) -> None:
        raise NotImplementedError

    async def heal(self) -> None:
        """Stop starting new disturbances."""
        raise NotImplementedError

    async def position(self) -> Position:
        """Return the state of the database, and bring the model up to it."""
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """Whether a disturbance is still active."""
        raise NotImplementedError

    def start(self, slot: int) -> Replica:
        number = next(self.starts)
        recent, budget = [(1 << 20, 1 << 20), (0, 1 << 20), (700, 1 << 20), (0, 6000)][(self.case.recents + number) % 4]
        replica = Replica(self.model, self.url(slot, number), recent, budget)
        self.nursery.start_soon(replica.run)
        return replica

    # What clients and replicas do

    def publish_messages(self, a: int, b: int) -> None:
        client = self.clients[a % CLIENTS]
        if client.replica is None or not client.replica.log.epoch:
            return
        for i in range(b % 3 + 1):
            text = f'"{next(self.texts)}{(POISON if b == 7 and i else "")}{"x" * 500 * (b == 5)}"'
            channel = CHANNELS[(a + b + i) % 4]
            if self.retains and a & 32:
                expect = (None, 0, self.model.retained_seq(channel), self.model.retained_seq(channel))[(a + i) % 4]
                self.model.conditions[text] = expect
                client.publish(channel, text, retain=True, expect=expect)
            else:
                client.publish(channel, text)

    def disconnect_client(self, a: int, b: int) -> None:
        self.clients[a % CLIENTS].disconnect()

    def move_client(self, a: int, b: int) -> None:
        """Move a client to a replica, or reconnect it."""
        client, replica = self.clients[a % CLIENTS], self.replicas[b % REPLICAS]
        if client.replica is None or client.replica is not replica:
            client.disconnect()
            if replica.log.epoch:
                client.connect(replica)

    def read_messages(self, a: int, b: int) -> None:
        self.clients[a % CLIENTS].read(300 if b & 1 else float("inf"))

    def retry_publishes(self, a: int, b: int) -> None:
        client = self.clients[a % CLIENTS]
        if client.replica is not None:
            client.retry_all()

    def restart_replica(self, a: int, b: int) -> None:
        """Stop a replica, gracefully or not, and start another one in its place."""
        if self.case.silent:
            return
        replica = self.replicas[a % REPLICAS]
        if b & 1:
            for client in self.clients:
                if client.replica is replica:
                    client.disconnect()
            self.cut_connections(a, b)
        replica.scope.cancel()
        self.replicas[a % REPLICAS] = self.start(a % REPLICAS)

    async def pause(self, a: int, b: int) -> None:
        if b:
            await trio.sleep(PAUSES[b] * self.scale)
        for _ in range(a % 8):
            await trio.lowlevel.checkpoint()

    # The run

    async def play(self) -> None:
        await self.wait_open()
        for i, client in enumerate(self.clients):
            client.connect(self.replicas[i % REPLICAS])
        for operation in self.case.operations:
            name, a, b = decode(operation)
            self.trace.append(f"{trio.current_time():.3f} {name}({a}, {b})")
            result: Awaitable[None] | None = getattr(self, name)(a, b)
            if result is not None:
                await result
            if self.model.broken:
                return
        await self.recover()

    async def wait_open(self) -> None:
        for replica in self.replicas:
            await replica.log.wait_open()

    async def recover(self, *_: int) -> None:
        """End all disturbances, and wait until everything has recovered."""
        await self.heal()
        end = trio.current_time() + self.recovery_timeout
        while not self.model.broken:
            for i, client in enumerate(self.clients):
                if client.replica not in self.replicas:
                    self.move_client(i, i)
                if client.replica is not None:
                    client.retry_all()
                client.read()
            wrong = list(self.unfinished(await self.position()))
            if not wrong:
                self.check()
                self.episodes += 1
                return
            self.model.expect(trio.current_time() < end, f"it does not come right: {wrong}")
            await trio.sleep(self.recovery_poll_interval)

    def check(self) -> None:
        self.model.check()
        for replica in self.replicas:
            recent = replica.log._tail.recent
            for seq in range(recent.first, recent.last + 1):
                self.model.deliver(recent[seq].payload.decode(), replica.erasure)
        for client in self.clients:
            s = client.subscriber
            self.model.check_subscription(s.pattern, s.start, s.received, s.gaps, self.retention_end)

    def unfinished(self, position: Position) -> Iterator[str]:
        """Yield what has not recovered yet."""
        if self.busy:
            yield "something is on its way"
        if position.waiting:
            yield "the outbox is not empty"
        for replica in self.replicas:
            log = replica.log
            if not (log.available and (log.epoch, log.applied) == position[:2]):
                yield f"{replica.url} is at {log.applied} of {log.epoch}, the database at {position}"
            self.model.expect(not log.statistics().failures, "a service has failed")
            if replica.erasure < max(self.model.erasures.values(), default=0):
                yield f"{replica.url} does not know of an erasure"
        for client in self.clients:
            if client.replica not in self.replicas or not client.subscriber.live:
                yield f"{client.subscriber.pattern} is not live"
            if not client.all_settled:
                yield f"{client.pending} has no answer"
