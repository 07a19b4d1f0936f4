"""What a message log is: the words that its implementations, delivery and the sessions share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio
from msgspec import Struct

from ..errors import ErrorCode

# Entries and answers are made by the ten thousand a second: a Struct is made in a tenth of a dataclass's time, and
# `gc=False` keeps the hundred thousand entries in memory out of the collector's way.


class Entry(Struct, frozen=True, gc=False):
    """One committed message. `at` is in milliseconds since 1970 by the log's own clock."""

    seq: int
    at: int
    channel: str
    payload: bytes
    sender: str | None = None
    origin: bytes | None = None
    """The producer that does not want it back (`echo: false`)."""

    @property
    def size(self) -> int:
        """Bytes of its texts."""
        sender = self.sender
        return len(self.channel) + len(self.payload) + (0 if sender is None else len(sender))


class Committed(Struct, frozen=True, gc=False):
    """The message is in the log under `seq`; `duplicate` when an earlier try had already put it there."""

    seq: int
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """The message is not in the log and never will be, except for `ErrorCode.UNKNOWN`, where nobody can say."""

    code: ErrorCode
    message: str


Outcome = Committed | Rejected

OVERLOADED = Rejected(ErrorCode.OVERLOADED, "too many messages are waiting to be written")
UNAVAILABLE = Rejected(ErrorCode.UNAVAILABLE, "the log cannot be written just now; the message was not published")
UNKNOWN = Rejected(ErrorCode.UNKNOWN, "the log did not answer in time; it may have the message: retry with the same id")
UNDECIDED = Rejected(ErrorCode.UNKNOWN, "whether the first try was published cannot be known any more")
CONFLICT = Rejected(ErrorCode.BAD_MESSAGE, "this id was used for another message")
SHUTTING_DOWN = Rejected(ErrorCode.SHUTTING_DOWN, "the broker is stopping; the message was not published")
REFUSED = Rejected(ErrorCode.INTERNAL, "the log refused this message")

PENDING = 100_000
"""How many messages may wait to be written, unless configured otherwise."""
PENDING_BYTES = 256 << 20
"""How many bytes of them."""

OVERHEAD = 200
"""Bytes that a message costs the log besides its own, roughly, so that many small ones count as work too."""

EPHEMERAL_SIZE = 7500
"""How many bytes an ephemeral message may have: those of channel and payload, and of the sender as JSON."""


class Append(Struct, eq=False, gc=False):
    """A message on its way into the log.

    `(producer, number)` is the key under which a retry is recognised; where `producer` is None the log takes a key
    of its own. `after` is None unless this is a retry: the head that the client knew when it first sent the message.
    `settle` is called exactly once, synchronously, and must not raise. Nothing that a message refers to refers to it.
    """

    channel: str
    payload: bytes
    settle: Callable[[Append, Outcome], None]
    producer: bytes | None = None
    number: int = 0
    sender: str | None = None
    origin: bytes | None = None
    after: int | None = None
    id: int | None = None
    """The client's number for the publish, to be repeated in the reply."""
    acknowledge: bool = True
    deadline: float = 0.0
    """Trio time at which an answer is owed; set by the log."""
    owner: object = None
    """What submitted it, such as a session, for `Log.withdraw`."""
    client: Hashable = None
    """Whose share of the log it takes: messages of one client keep their order, and clients take turns."""
    known: int | None = None
    """The newest seq that was known to be committed when the log took the message, where any was; set by the log."""
    size: int = 0
    """Bytes of its texts, which are not added up again wherever they count."""

    def __post_init__(self) -> None:
        sender = self.sender
        self.size = len(self.channel) + len(self.payload) + (0 if sender is None else len(sender))


def not_taken(append: Append, refusal: Rejected) -> Rejected:
    """The answer to a message that is not taken just now. A retry may be in the log already, by its first try."""
    return refusal if append.after is None else UNKNOWN


@dataclass(frozen=True, slots=True)
class LogPage:
    """A stretch of the log: all that still exists with `after < seq <= last`, in order.

    `after` is greater than what was asked for where entries in between are gone: `lost` is the reason of the gap.
    """

    after: int
    last: int
    entries: Sequence[Entry]
    lost: str = "retention"


@dataclass(frozen=True, slots=True)
class Resumption:
    """From where a subscription goes on. With `lost`, entries up to `cursor` may be missing, for that reason."""

    cursor: int
    lost: str | None = None


class Follower(Protocol):
    """Who is handed the log, in order. The calls are synchronous and must not raise."""

    def apply(self, entries: Sequence[Entry]) -> None:
        """Take the next entries: their seqs follow on one another and on all that came before."""

    def restart(self, applied: int, lost: str = "epoch") -> None:
        """The next entry is `applied + 1`: the log was opened, or has another epoch (`lost` is "epoch"), or entries
        after the last one that was applied are gone ("retention", or "repair" for a hole that was repaired)."""

    def broadcast(self, entry: Entry) -> None:
        """Take an ephemeral message of another replica's (its seq is 0), which is no part of the log."""


class Log(Protocol):
    """An append-only log that many replicas may share.

    All of it belongs to one Trio thread. The synchronous members never wait.
    """

    @property
    def epoch(self) -> str:
        """The incarnation of the log; empty until it has been opened for the first time."""

    @property
    def applied(self) -> int:
        """The newest seq that the follower has been handed."""

    @property
    def floor(self) -> int:
        """The oldest seq that still exists, or `applied + 1` where none does."""

    @property
    def recent(self) -> int:
        """The oldest seq from which on all entries are in memory, or `applied + 1` where none is."""

    @property
    def available(self) -> bool:
        """Whether appending and reading are possible just now."""

    @property
    def trouble(self) -> str:
        """What is wrong with the log, in a few words; empty where nothing is."""

    @property
    def allowance(self) -> int:
        """What the messages of a session may cost that have no answer yet, before no more are read from it."""

    def submit(self, append: Append) -> None:
        """Take a message to be appended. `append.settle` is called once its fate is known, perhaps at once."""

    def withdraw(self, client: Hashable, unwanted: Callable[[Append], bool], refusal: Rejected) -> None:
        """Take back what a client submitted and is on its way to nowhere yet. Messages of others are not looked at.

        A retry is answered `unknown` all the same.
        """

    def broadcast(self, entry: Entry) -> None:
        """Pass an ephemeral message (its seq is 0) on to the other replicas, at most once, past the log.

        It has at most `EPHEMERAL_SIZE` bytes. Our own follower is not handed it.
        """

    async def read(self, after: int, *, rows: int = 1000, size: int = 1 << 20) -> LogPage:
        """Read on from `after`, at most so many rows and (but for the first) so many bytes, up to `applied`.

        Raises `Unavailable` while the log cannot be read. Cancelling it harms nothing.
        """

    async def history(self, pattern: str, *, before: int | None, limit: int) -> tuple[Sequence[Entry], bool]:
        """The newest `limit` entries below `before` that match, oldest first, and whether there are older ones."""

    def resume(self, since: int, epoch: str | None) -> Resumption:
        """Where a subscription that was complete up to `since` in `epoch` goes on in the present epoch."""

    def report(self) -> dict[str, object]:
        """What whoever runs it may want to know of how it is kept, by name, as it is written in JSON."""

    async def wait_open(self) -> None:
        """Wait until the log has been opened for the first time."""

    async def run(
        self,
        follower: Follower,
        describe: Callable[[], Mapping[str, Any]] = dict,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled. Started at once; an absent database is waited for, not an error.

        A log that replicas share stores what `describe` returns, a report of this replica, where all of them find it.

        On cancellation whatever was not handed over is settled as `shutting_down`.
        """
