"""What happened, as those who took part in it saw it: one event a line. Times are in seconds since 1970."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

Message = tuple[str, int]
"""A message by its content: who published it, and the number that the publisher gave it."""


class Event(Struct, tag=True, tag_field="event", array_like=True, frozen=True, kw_only=True):
    at: float


class Published(Event, frozen=True):
    """A publish is handed to the client. Those of one publisher are handed over in the order of their numbers."""

    publisher: str
    number: int
    channel: str


class Answered(Event, frozen=True):
    """What came of it: a seq, or the code of a refusal."""

    publisher: str
    number: int
    seq: int = 0
    refusal: str = ""


class SubscriptionBegan(Event, frozen=True):
    """A subscription begins, complete up to `cursor` of `epoch`. One name begins again and again where it was."""

    subscriber: str
    pattern: str
    cursor: int
    epoch: str


class Received(Event, frozen=True):
    """A message of a subscription. `sent`: when it was committed. An ephemeral one has no seq.

    `session` tells one connection of a subscriber from the next, where that is known.
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
    """The subscription was told that it has everything up to there."""

    subscriber: str
    pattern: str
    epoch: str
    seq: int


class GapAnnounced(Event, frozen=True):
    """The subscription was told what may be missing: from `first` to `last`, where it goes on in `epoch`."""

    subscriber: str
    pattern: str
    epoch: str
    first: int
    last: int
    reason: str


class SubscriptionRevoked(Event, frozen=True):
    """The subscription was ended: the permission was withdrawn."""

    subscriber: str
    pattern: str


class Connected(Event, frozen=True):
    """A client has a connection to a replica."""

    client: str
    replica: str
    transport: str


class ConnectionLost(Event, frozen=True):
    """It has lost it, and not left it by itself."""

    client: str
    replica: str


class FaultBegan(Event, frozen=True):
    """A fault begins. `replica`: whose, where it is not everybody's."""

    number: int
    kind: str
    replica: str = ""
    in_flight: int = 0
    """Publishes that had no answer at that moment."""


class FaultEnded(Event, frozen=True):
    """What the fault did has been undone."""

    number: int


class DatabaseStatusLogged(Event, frozen=True):
    """A replica has logged that it has no database, or (`available`) that it has it again."""

    replica: str
    available: bool
    service: str = ""


class RoleChanged(Event, frozen=True):
    """A role was changed, and the transaction had been committed at `at`; `began`: when it was about to be."""

    role: str
    began: float
    read: tuple[str, ...]
    write: tuple[str, ...]


class LogEntry(Event, frozen=True):
    """From the database, in the end: what a commit appended to the log, also where retention has taken it since."""

    epoch: str
    seq: int
    channel: str
    message: Message


class LogEpoch(Event, frozen=True):
    """From the database, in the end, in order: an epoch, and up to where its log is the one of the epoch before."""

    epoch: str
    after: int


class RunEnded(Event, frozen=True):
    """The load has ended, everything is healed, and whoever stayed has caught up, or never will. `head`: of the log."""

    epoch: str
    head: int
    floor: int
    stayed: tuple[str, ...]
    """The subscribers that were to be complete by then."""


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
    | FaultBegan
    | FaultEnded
    | DatabaseStatusLogged
    | RoleChanged
    | LogEntry
    | LogEpoch
    | RunEnded
)


class History:
    """Takes events down, in memory or in a file too."""

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
    """What a history has written."""
    decode = msgspec.json.Decoder(AnyEvent).decode
    with path.open("rb") as file:
        for line in file:
            yield decode(line)
