"""Thousands of random orders of events, in which the rules of delivery always hold and simpler rules often fail.

The delivery is the real one. A list takes the place of the database, and the test decides when each event happens.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from catbus.delivery.encoded_messages import EncodedMessages
from catbus.delivery.fan_out import Delivery, Subscription
from catbus.delivery.send_queue import SendQueue
from catbus.log import Entry, LogPage, Resumption
from catbus.protocol.channels import matches
from tests.test_delivery import TransportWriter, entry, exhaust

CHANNELS = ["a.b", "a.c", "d"]


class Replica:
    """Delivery over a log to which other replicas commit. This replica applies the committed messages a little later.

    Pages for lagging subscriptions end at the last applied message or, with `to_head`, at the last committed one.
    """

    epoch = "e"
    memory_floor = 1

    def __init__(self, random: Random, *, to_head: bool = False) -> None:
        self.random = random
        self.to_head = to_head
        self.committed: list[Entry] = []
        self.delivery = Delivery(self)  # type: ignore[arg-type]
        self.page: tuple[int, LogPage] | None = None

    def resume(self, since: int, epoch: str | None) -> Resumption:
        return Resumption(since)

    def commit(self) -> None:
        for _ in range(self.random.randint(1, 4)):
            self.committed.append(entry(len(self.committed) + 1, self.random.choice(CHANNELS)))

    def apply(self) -> None:
        applied = self.delivery.position
        entries = self.committed[applied : applied + self.random.randint(1, 2)]
        if entries:
            self.delivery.apply(entries)

    def read(self) -> None:
        """Read a page, to be served later."""
        position = self.delivery.next_position()
        if position is not None:
            last = len(self.committed) if self.to_head else self.delivery.position
            entries = self.committed[position : min(position + self.random.randint(1, 8), last)]
            self.page = position, LogPage(position, position + len(entries), entries)

    def serve(self) -> None:
        page, self.page = self.page, None
        if page is not None:
            exhaust(self.delivery.serve(*page))

    @property
    def idle(self) -> bool:
        return self.delivery.position == len(self.committed) and self.delivery.next_position() is None


class Session:
    """One send queue, and the pattern and message of everything taken from it."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.send_queue = SendQueue(TransportWriter(), lambda _: None, replica.random.choice([400, 4000, 4000]))
        self.got: list[tuple[str, Entry]] = []

    def subscribe(self, pattern: str, since: int) -> None:
        self.replica.delivery.subscribe(Subscription(self.send_queue), pattern, since)

    def take(self) -> None:
        for item in self.send_queue.take():
            if isinstance(item, EncodedMessages):
                self.got += [(item.pattern, message) for message in item.entries]

    def finish(self) -> None:
        """Apply and serve until the replica is idle and the send queue is empty."""
        replica = self.replica
        replica.serve()
        self.take()
        while not replica.idle:
            replica.read()
            replica.serve()
            replica.apply()
            self.take()


def owed(replica: Replica, pattern: str, since: int) -> list[int]:
    return [message.seq for message in replica.committed[since:] if matches(pattern, message.channel)]


# The transition from catching up to live


def delivers_each_message_once(random: Random, *, to_head: bool) -> bool:
    """Whether a subscription that resumes at a random time and cursor gets each message once and in order."""
    replica = Replica(random, to_head=to_head)
    for _ in range(random.randint(2, 4)):
        replica.commit()
    replica.apply()
    session = Session(replica)
    since = random.choice([0, random.randint(0, len(replica.committed))])
    session.subscribe("a.*", since)
    for step in random.choices(
        [replica.commit, replica.commit, replica.apply, replica.read, replica.serve, session.take], k=10
    ):
        step()
    session.finish()
    return [message.seq for _, message in session.got] == owed(replica, "a.*", since)


def test_catching_up_meets_live_delivery_without_gap_or_repeat_in_20000_interleavings() -> None:
    """Catching up ends at the last message that the replica has applied. Later messages arrive live, once."""
    wrong = [seed for seed in range(20_000) if not delivers_each_message_once(Random(seed), to_head=False)]
    assert wrong == []


def test_page_beyond_the_last_applied_message_repeats_nothing_either() -> None:
    """The subscription gets live messages when the replica has applied what it has got already."""
    wrong = [seed for seed in range(1000) if not delivers_each_message_once(Random(seed), to_head=True)]
    assert wrong == []


# Overlapping patterns


PATTERNS = ["*", "a.*", "a.b"]


def tagged(got: Sequence[tuple[str, Entry]], cursors: dict[str, int]) -> dict[str, list[int]]:
    """The seqs per pattern, for a client that dispatches a message by the pattern named in it."""
    dispatched: dict[str, list[int]] = {pattern: [] for pattern in cursors}
    for pattern, message in got:
        dispatched[pattern].append(message.seq)
    return dispatched


def untagged(got: Sequence[tuple[str, Entry]], cursors: dict[str, int]) -> dict[str, list[int]]:
    """The same for a client that dispatches a message to all matching patterns whose cursors are below its seq."""
    dispatched: dict[str, list[int]] = {pattern: [] for pattern in cursors}
    for _, message in got:
        for pattern in cursors:
            if matches(pattern, message.channel) and message.seq > cursors[pattern]:
                dispatched[pattern].append(message.seq)
                cursors[pattern] = message.seq
    return dispatched


def with_one_cursor(got: Sequence[tuple[str, Entry]], cursors: dict[str, int]) -> dict[str, list[int]]:
    """The same for a client that dispatches by pattern, with one cursor for all patterns."""
    dispatched: dict[str, list[int]] = {pattern: [] for pattern in cursors}
    newest = 0
    for pattern, message in got:
        if message.seq >= newest:
            dispatched[pattern].append(message.seq)
            newest = message.seq
    return dispatched


CLIENTS = [tagged, untagged, with_one_cursor]


def complete(random: Random) -> list[bool]:
    """For each kind of client: whether it gets all messages of all its patterns, each once and in order."""
    replica = Replica(random)
    for _ in range(random.randint(2, 5)):
        replica.commit()
    for _ in range(random.randint(1, 4)):
        replica.apply()
    session = Session(replica)
    cursors: dict[str, int] = {}
    subscriptions = [(pattern, random.randint(0, replica.delivery.position)) for pattern in PATTERNS]

    def subscribe_next() -> None:
        if subscriptions:
            pattern, since = subscriptions.pop()
            cursors[pattern] = since
            session.subscribe(pattern, since)

    for step in random.choices(
        [replica.commit, replica.apply, replica.read, replica.serve, session.take, subscribe_next], k=15
    ):
        step()
    while subscriptions:
        subscribe_next()
    session.finish()
    due = {pattern: owed(replica, pattern, since) for pattern, since in cursors.items()}
    return [client(session.got, dict(cursors)) == due for client in CLIENTS]


def test_overlapping_patterns_are_complete_in_2000_interleavings() -> None:
    """Few would be complete if messages did not name a pattern, or if all patterns had one cursor."""
    counts = [sum(kind) for kind in zip(*(complete(Random(seed)) for seed in range(2000)), strict=True)]
    right, without_patterns, without_cursors = counts
    assert right == 2000
    assert without_patterns < 400
    assert without_cursors < 400
