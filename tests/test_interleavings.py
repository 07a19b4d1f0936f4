"""Orders of events in which a simpler rule goes wrong, many of them: the rule never does, the simpler one often.

The delivery is the real one. The database, and when everything happens, are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from catbus.delivery.fan_out import Delivery, Subscription
from catbus.delivery.send_queue import EncodedMessages, SendQueue
from catbus.log import Entry, LogPage, Resumption
from catbus.protocol.channels import matches
from tests.test_delivery import TransportWriter, entry, exhaust

CHANNELS = ["a.b", "a.c", "d"]


class Replica:
    """Delivery over a log that others commit to: what is committed is applied here a little later.

    Late subscriptions are read for up to what was applied or, with `to_head`, up to what is committed.
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
        """A page, which is served later."""
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
    """One send queue, and what came out of it: which pattern's, and which seq."""

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
        """Do what still has to be done, until nothing has."""
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


# The seam between catching up and live


def goes_right_at_the_seam(random: Random, *, to_head: bool) -> bool:
    """Whether one who comes back at any time, anywhere up to what is committed, gets each message once and in order."""
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
    """Catching up ends at what this replica has applied. What is only committed comes by the live way, once."""
    wrong = [seed for seed in range(20_000) if not goes_right_at_the_seam(Random(seed), to_head=False)]
    assert wrong == []


def test_catching_up_to_the_head_of_the_database_would_repeat_messages() -> None:
    right = sum(goes_right_at_the_seam(Random(seed), to_head=True) for seed in range(1000))
    assert right < 750


# Overlapping patterns


PATTERNS = ["*", "a.*", "a.b"]


def tagged(got: Sequence[tuple[str, Entry]], cursors: dict[str, int]) -> dict[str, list[int]]:
    """What each pattern's reader is handed by a client that reads which subscription a message is for."""
    handed: dict[str, list[int]] = {pattern: [] for pattern in cursors}
    for pattern, message in got:
        handed[pattern].append(message.seq)
    return handed


def untagged(got: Sequence[tuple[str, Entry]], cursors: dict[str, int]) -> dict[str, list[int]]:
    """The same by one that does not, and hands each message to whatever pattern matches it and has not had it."""
    handed: dict[str, list[int]] = {pattern: [] for pattern in cursors}
    for _, message in got:
        for pattern in cursors:
            if matches(pattern, message.channel) and message.seq > cursors[pattern]:
                handed[pattern].append(message.seq)
                cursors[pattern] = message.seq
    return handed


def with_one_cursor(got: Sequence[tuple[str, Entry]], cursors: dict[str, int]) -> dict[str, list[int]]:
    """The same by one that reads it, and keeps one cursor for all patterns."""
    handed: dict[str, list[int]] = {pattern: [] for pattern in cursors}
    newest = 0
    for pattern, message in got:
        if message.seq >= newest:
            handed[pattern].append(message.seq)
            newest = message.seq
    return handed


CLIENTS = [tagged, untagged, with_one_cursor]


def complete(random: Random) -> list[bool]:
    """Which kinds of clients get all of it, each once and in order, for all their patterns."""
    replica = Replica(random)
    for _ in range(random.randint(2, 5)):
        replica.commit()
    for _ in range(random.randint(1, 4)):
        replica.apply()
    session = Session(replica)
    cursors: dict[str, int] = {}
    joins = [(pattern, random.randint(0, replica.delivery.position)) for pattern in PATTERNS]

    def join() -> None:
        if joins:
            pattern, since = joins.pop()
            cursors[pattern] = since
            session.subscribe(pattern, since)

    for step in random.choices([replica.commit, replica.apply, replica.read, replica.serve, session.take, join], k=15):
        step()
    while joins:
        join()
    session.finish()
    due = {pattern: owed(replica, pattern, since) for pattern, since in cursors.items()}
    return [client(session.got, dict(cursors)) == due for client in CLIENTS]


def test_overlapping_patterns_are_complete_in_2000_interleavings() -> None:
    """Without the name of the pattern in a message, or a cursor for each, hardly any would come out complete."""
    counts = [sum(kind) for kind in zip(*(complete(Random(seed)) for seed in range(2000)), strict=True)]
    right, without_names, without_cursors = counts
    assert right == 2000
    assert without_names < 400
    assert without_cursors < 400
