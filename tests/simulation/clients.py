"""Clients as specified: subscribers with a cursor, and publishers that retry unanswered publishes by their ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from catbus.delivery.encoded_messages import EncodedMessages
from catbus.delivery.fan_out import Delivery
from catbus.delivery.send_queue import SendQueue
from catbus.delivery.subscription import Subscription
from catbus.error_codes import ErrorCode
from catbus.log import Append, Committed, Log, Outcome
from catbus.protocol import wire_messages as wire

from .log_model import Gap, LogModel


class Replica(Protocol):
    """What a client uses of a replica."""

    @property
    def log(self) -> Log: ...
    @property
    def delivery(self) -> Delivery: ...
    @property
    def erasure(self) -> int: ...


class NoFlush:
    def flush(self) -> None:
        """Do nothing: the test reads the send queue itself."""


@dataclass(eq=False)
class SimulatedSubscriber:
    """One subscription on any replica, and what it has received."""

    pattern: str = "*"
    start: int = 0
    """The seq at which it began: nothing up to here has to be delivered."""
    epoch: str = ""
    cursor: int = 0
    received: dict[int, str] = field(default_factory=dict)
    gaps: list[Gap] = field(default_factory=list)
    replica: Replica | None = None
    subscription: Subscription | None = None
    replica_epoch: str = ""
    """The epoch of the replica."""
    model: LogModel = field(default_factory=LogModel)

    def connect(self, replica: Replica, *, anew: bool) -> None:
        delivery = replica.delivery
        self.replica, self.replica_epoch = replica, replica.log.epoch
        self.subscription = Subscription(SendQueue(NoFlush(), lambda _: None, 1100, delivery.budget))
        if anew:
            self.received.clear()
            self.gaps.clear()
            self.epoch, self.start = replica.log.epoch, delivery.position
            self.cursor = self.start
            delivery.subscribe(self.subscription, self.pattern)
        else:
            delivery.subscribe(self.subscription, self.pattern, self.cursor, self.epoch)

    def disconnect(self) -> None:
        """Lose the connection, and everything that was not read."""
        if self.replica is not None and self.subscription is not None:
            self.replica.delivery.unsubscribe(self.subscription, self.pattern)
            self.subscription.send_queue.close()
        self.replica = self.subscription = None

    @property
    def live(self) -> bool:
        return self.subscription is not None and not self.subscription.lagging and not self.subscription.send_queue

    def read(self, most: float = float("inf")) -> None:
        if self.subscription is None:
            return
        for item in self.subscription.send_queue.take(most):
            if isinstance(item, EncodedMessages):
                assert self.replica is not None
                for entry in item.entries:
                    self.model.deliver(entry.payload.decode(), self.replica.erasure)
                    assert entry.seq > self.cursor, f"{entry.seq} comes after {self.cursor}"
                    if self.pattern == "*":
                        missing = set(range(self.cursor + 1, entry.seq)) - self.model.erased_seqs
                        assert not missing, f"{entry.seq} follows on {self.cursor} without a gap"
                    self.received[entry.seq] = entry.payload.decode()
                    self.cursor, self.epoch = entry.seq, self.replica_epoch
                continue
            event = wire.decode_server(item)
            if isinstance(event, wire.Gap):
                self.cursor, self.epoch = event.last, event.epoch
                self.gaps.append(Gap(event.first, event.last, event.reason))
                if event.reason == "epoch":
                    self.replica_epoch = event.epoch
                    self.start = min(self.start, event.last)
                    self.received = {seq: text for seq, text in self.received.items() if seq <= event.last}
                    # Gaps of seqs that the old epoch had say nothing about the messages that replace them.
                    self.gaps = [Gap(g.first, min(g.last, event.last), g.reason) for g in self.gaps]
            else:
                assert isinstance(event, wire.Live)
                assert event.seq >= self.cursor, f"live at {event.seq}, behind {self.cursor}"
                self.cursor, self.epoch = event.seq, self.replica_epoch


@dataclass(eq=False)
class PendingPublish:
    """A message without a final reply."""

    channel: str
    text: str
    after: int
    epoch: str
    retain: bool = False
    expect: int | None = None
    answered: bool = True
    """Whether no attempt is pending on the present connection."""
    unknown: bool = False
    """Whether the reply was `unknown`, for good."""


@dataclass(eq=False)
class SimulatedClient:
    """A producer that keeps the ids of its publishes, and a subscription."""

    producer: bytes
    subscriber: SimulatedSubscriber
    model: LogModel
    pending: dict[int, PendingPublish] = field(default_factory=dict)
    replica: Replica | None = None
    head: int = 0
    epoch: str = ""
    """The epoch of the log that the client knows, to which `head` belongs."""
    connections: int = 0
    """Counts connections, so that replies to an earlier one are recognised."""
    ids: count[int] = field(default_factory=lambda: count(1))

    def connect(self, replica: Replica) -> None:
        """Connect, subscribe from the cursor, and retry unanswered publishes in the order of their ids."""
        self.replica = replica
        self.head, self.epoch = replica.delivery.position, replica.log.epoch
        self.subscriber.connect(replica, anew=not self.subscriber.epoch)
        for number in sorted(self.pending):
            self.retry(number)

    def disconnect(self) -> None:
        self.connections += 1
        self.replica = None
        self.subscriber.disconnect()
        for publish in self.pending.values():
            publish.answered = True

    def read(self, most: float = float("inf")) -> None:
        """Read what has arrived."""
        subscriber = self.subscriber
        subscriber.read(most)
        if self.replica is not None and subscriber.replica_epoch != self.epoch:
            self.head, self.epoch = subscriber.cursor, subscriber.replica_epoch

    def publish(self, channel: str, text: str, *, retain: bool = False, expect: int | None = None) -> None:
        """Publish a new message."""
        assert self.replica is not None
        number = next(self.ids)
        self.pending[number] = PendingPublish(channel, text, self.head, self.epoch, retain, expect)
        self._send(number, after=None)

    def retry(self, number: int) -> None:
        """Retry a publish. One of another epoch stays unknown."""
        assert self.replica is not None
        publish, log = self.pending[number], self.replica.log
        if publish.epoch != log.epoch:
            publish.unknown = True  # as the replica answers it
        elif publish.answered:
            self._send(number, after=publish.after)

    def retry_all(self) -> None:
        for number in sorted(self.pending):
            self.retry(number)

    @property
    def all_settled(self) -> bool:
        return all(publish.unknown for publish in self.pending.values())

    def _send(self, number: int, after: int | None) -> None:
        assert self.replica is not None
        publish = self.pending[number]
        publish.answered = False
        settle = self._answer(number, self.connections, self.replica.log)
        self.replica.log.submit(
            Append(
                publish.channel,
                publish.text.encode(),
                settle,
                self.producer,
                number,
                after=after,
                retain=publish.retain,
                expect=publish.expect,
            )
        )

    def _answer(self, number: int, connection: int, log: Log) -> Callable[[Append, Outcome], None]:
        def settle(append: Append, outcome: Outcome) -> None:
            if connection != self.connections:
                return
            publish = self.pending[number]
            publish.answered = True
            if isinstance(outcome, Committed):
                del self.pending[number]
                self.head = max(self.head, outcome.seq)
                self.model.acknowledge(publish.text, outcome.seq)
            elif outcome.code is ErrorCode.CONFLICT:
                del self.pending[number]
                self.model.conflict(publish.text)
            elif outcome.code is not ErrorCode.UNKNOWN:
                del self.pending[number]
                self.model.refuse(publish.text)
            elif append.after is not None and (publish.epoch != log.epoch or publish.after < log.floor - 1):
                publish.unknown = True

        return settle
