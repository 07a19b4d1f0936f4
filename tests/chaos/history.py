"""The events of a chaos run as its participants saw them, one per line. Times are in seconds since 1970."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

Message = tuple[str, int]
"""A message by its content: its publisher, and the number that the publisher gave it."""

REMOVAL: Message = ("", 0)
"""A message without content, which removes the retained message of its channel."""


class Event(Struct, tag=True, tag_field="event", array_like=True, frozen=True, kw_only=True):
    at: float


class Published(Event, frozen=True):
    """A publish is handed to the client. One publisher hands over its messages in the order of their numbers.

    An increment of a counter publishes `value`, and expects that the retained message has the seq `expect` (0: there is
    none). `read` is the message that its publisher has read.
    """

    publisher: str
    number: int
    channel: str
    value: int = 0
    expect: int | None = None
    read: Message | None = None


class Answered(Event, frozen=True):
    """The reply to a publish: a seq, or the code of an error. `conflict` comes with the seq of the retained message."""

    publisher: str
    number: int
    seq: int = 0
    refusal: str = ""


class SubscriptionBegan(Event, frozen=True):
    """A subscription begins, complete up to `cursor` of `epoch`. It keeps its name when it resumes at its cursor.

    `pattern`: the patterns, with spaces between them, of a subscription that has several.
    """

    subscriber: str
    pattern: str
    cursor: int
    epoch: str


class Received(Event, frozen=True):
    """A message reached a subscription. `sent`: when it was committed. An ephemeral message has no seq.

    `session` distinguishes the connections of a subscriber, where they are known.
    """

    subscriber: str
    pattern: str
    epoch: str
    seq: int
    channel: str
    message: Message
    sent: float
    session: int = 0


class CaughtUp(Event, frozen=True):
    """A subscription was told that it is complete up to `seq`."""

    subscriber: str
    pattern: str
    epoch: str
    seq: int


class GapAnnounced(Event, frozen=True):
    """A subscription received `gap` from `first` to `last`, and continues in `epoch`."""

    subscriber: str
    pattern: str
    epoch: str
    first: int
    last: int
    reason: str


class SubscriptionRevoked(Event, frozen=True):
    """A subscription was ended by `revoked`."""

    subscriber: str
    pattern: str


class Connected(Event, frozen=True):
    """A client has connected to a replica."""

    client: str
    replica: str
    transport: str


class ConnectionLost(Event, frozen=True):
    """A client has lost its connection without closing it."""

    client: str
    replica: str


class MapShown(Event, frozen=True):
    """What a live map of retained messages shows: the seq, the epoch and the message of each channel."""

    watcher: str
    shown: dict[str, tuple[int, str, str, int]]


class MemberJoined(Event, frozen=True):
    """A client has become a member again, on a connection to this replica."""

    member: str
    replica: str


class MemberLeft(Event, frozen=True):
    """A client has closed its connection. It need not come back."""

    member: str


class MembersShown(Event, frozen=True):
    """A watcher has received a snapshot of all members from this replica."""

    watcher: str
    replica: str
    members: tuple[str, ...]


class MemberAnnounced(Event, frozen=True):
    """A watcher was told that a member is there, or (not `joined`) gone."""

    watcher: str
    member: str
    joined: bool


class MembersListed(Event, frozen=True):
    """After the run: the members that a replica knows, and those that there are."""

    replica: str
    members: tuple[str, ...]
    expected: tuple[str, ...]


class FaultBegan(Event, frozen=True):
    """A fault begins, on one replica or, without `replica`, on several components."""

    number: int
    kind: str
    replica: str = ""
    in_flight: int = 0
    """Publishes without a reply at that moment."""


class FaultEnded(Event, frozen=True):
    """A fault has been undone."""

    number: int


class DatabaseStatusLogged(Event, frozen=True):
    """A replica has logged that its database is unreachable or (`available`) reachable again."""

    replica: str
    available: bool
    service: str = ""


class RoleChanged(Event, frozen=True):
    """The grants of a role were changed: the transaction began at `began` and was committed by `at`."""

    role: str
    began: float
    read: tuple[str, ...]
    write: tuple[str, ...]


class LogEntry(Event, frozen=True):
    """From the database after the run: an appended message, even if retention has deleted it since."""

    epoch: str
    seq: int
    channel: str
    message: Message


class Effect(Event, frozen=True):
    """From the database after the run, in order: a worker of the consumer has processed a message."""

    seq: int
    channel: str
    message: Message


class LogEpoch(Event, frozen=True):
    """From the database after the run, in order: an epoch, and the seq up to which it shares the log before it."""

    epoch: str
    after: int


class RunEnded(Event, frozen=True):
    """The load has ended, all faults are undone, and remaining subscribers were given time to catch up with `head`."""

    epoch: str
    head: int
    floor: int
    stayed: tuple[str, ...]
    """The subscribers that must be complete by now."""


AnyEvent = (
    Published
    | Answered
    | SubscriptionBegan
    | Received
    | CaughtUp
    | GapAnnounced
    | SubscriptionRevoked
    | Connected
    | ConnectionLost
    | MapShown
    | MemberJoined
    | MemberLeft
    | MembersShown
    | MemberAnnounced
    | MembersListed
    | FaultBegan
    | FaultEnded
    | DatabaseStatusLogged
    | RoleChanged
    | LogEntry
    | Effect
    | LogEpoch
    | RunEnded
)


class History:
    """Records events in memory and, with a path, in a file."""

    def __init__(self, path: Path | None = None) -> None:
        self.events: list[AnyEvent] = []
        self._file = None if path is None else path.open("wb")
        self._encode = msgspec.json.Encoder().encode

    def add(self, event: AnyEvent) -> None:
        self.events.append(event)
        if self._file is not None:
            self._file.write(self._encode(event) + b"\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def now() -> float:
    return time.time()


def read(path: Path) -> Iterator[AnyEvent]:
    """Read a recorded history."""
    decode = msgspec.json.Decoder(AnyEvent).decode
    with path.open("rb") as file:
        for line in file:
            yield decode(line)
