"""The interface of message logs, and the types that their implementations, delivery and the sessions share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio
from msgspec import Struct

from ..error_codes import ErrorCode
from ..protocol.channels import ERASED

# Ten thousand entries and outcomes are made per second. A Struct is made in a tenth of a dataclass's time, and
# `gc=False` keeps the hundred thousand entries in memory away from the garbage collector.


class Entry(Struct, frozen=True, gc=False):
    """A row of the log: one committed message. `at` is in milliseconds since 1970 by the log's own clock."""

    seq: int
    at: int
    channel: str
    payload: bytes
    sender: str | None = None
    origin: bytes | None = None
    """The producer, if it does not want to receive the message (`echo: false`)."""
    retain: bool = False
    """Whether it became its channel's retained message, or removed that (payload `null`)."""

    @property
    def size(self) -> int:
        """Bytes of its texts."""
        sender = self.sender
        return len(self.channel) + len(self.payload) + (0 if sender is None else len(sender))


def erased(entry: Entry) -> Entry:
    """The entry without its contents. It keeps its seq and its time, and has no channel that anybody publishes to."""
    return Entry(entry.seq, entry.at, ERASED, b"null")


class Committed(Struct, frozen=True, gc=False):
    """The message is in the log with this `seq`. `duplicate`: an earlier try had already put it there."""

    seq: int
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """The message is not in the log and never will be. With `ErrorCode.UNKNOWN` it may be there."""

    code: ErrorCode
    message: str
    retained_seq: int | None = None
    """With `ErrorCode.CONFLICT`: the seq of the channel's retained message, 0 for none."""


Outcome = Committed | Rejected

OVERLOADED = Rejected(ErrorCode.OVERLOADED, "too many messages are waiting to be written")
UNAVAILABLE = Rejected(ErrorCode.UNAVAILABLE, "the log cannot be written just now; the message was not published")
UNKNOWN = Rejected(ErrorCode.UNKNOWN, "the log did not answer in time; it may have the message: retry with the same id")
UNDECIDED = Rejected(ErrorCode.UNKNOWN, "the broker cannot tell any more whether the first try was published")
KEY_REUSED = Rejected(ErrorCode.BAD_MESSAGE, "this id was used for another message")
SHUTTING_DOWN = Rejected(ErrorCode.SHUTTING_DOWN, "the broker is stopping; the message was not published")
FAILED = Rejected(ErrorCode.INTERNAL, "the log rejected this message")
RETAINED_FULL = Rejected(ErrorCode.LIMIT, "the retained messages have no space left; the message was not published")

MAX_PENDING = 100_000
"""Messages that may wait to be appended, by default."""
MAX_PENDING_BYTES = 256 << 20
"""Bytes of messages that may wait to be appended, by default."""

MAX_RETAINED_BYTES = 256 << 20
"""Bytes of channels, payloads and senders that the retained messages may have together, by default."""

APPEND_OVERHEAD = 200
"""Cost of appending a message besides its bytes, in bytes, so that many small messages count as work, too."""

EPHEMERAL_SIZE = 7500
"""Bytes that an ephemeral message may have: those of channel and payload, and of the sender as JSON."""


class Append(Struct, eq=False, gc=False):
    """A request to append a message.

    A retry is recognised by the key `(producer, number)`; without a `producer` the log makes a key. A retry has
    `after`: the head that the client knew when it first sent the message. `settle` is called exactly once,
    synchronously, and must not raise. There is no reference cycle through an `Append`, as it is not collected.

    With `retain` it becomes the retained message of its channel, and with the payload `null` it removes that. `expect`,
    only with `retain`: the seq that the channel's retained message must have, 0 for none. Otherwise the message is
    rejected with `ErrorCode.CONFLICT`. A retry of a publish that was appended is a duplicate, whatever it expects.
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
    """The client's id of the publish, which the reply repeats."""
    acknowledge: bool = True
    deadline: float = 0.0
    """Trio time until which it must be settled; set by the log."""
    owner: object = None
    """What submitted it, such as a session, for `Log.withdraw`."""
    client: Hashable = None
    """The client whose share of the log it uses. Messages of one client keep their order."""
    retain: bool = False
    expect: int | None = None
    known: int | None = None
    """The newest seq that was known to be committed when the log accepted the message, if any; set by the log."""
    size: int = 0
    """Bytes of its texts, added up once."""

    def __post_init__(self) -> None:
        sender = self.sender
        self.size = len(self.channel) + len(self.payload) + (0 if sender is None else len(sender))


def rejection_of(append: Append, rejected: Rejected) -> Rejected:
    """The outcome of a message that the log does not accept. A retry may be in the log already: it is unknown."""
    return rejected if append.after is None else UNKNOWN


@dataclass(frozen=True, slots=True)
class LogPage:
    """A range of the log: the existing entries with `after < seq <= last`, in order.

    `after` is greater than requested if entries in between are gone. `lost` is the reason of this gap.
    """

    after: int
    last: int
    entries: Sequence[Entry]
    lost: str = "retention"


@dataclass(frozen=True, slots=True)
class Resumption:
    """The cursor at which a subscription continues. With `lost`, entries up to it may be missing, for that reason."""

    cursor: int
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class RetainedPage:
    """Retained messages in the byte order of their channels.

    `last` is the channel up to which the page was searched: the next page begins after it. It is None if there is
    nothing to search. A page may be empty and not `complete`. `head` is the newest seq that the page shows:
    with the messages up to there, the entries are a part of the state at `head`.
    """

    entries: Sequence[Entry]
    last: str | None
    complete: bool
    head: int


def conflict(retained_seq: int) -> Rejected:
    """The outcome of a message whose channel has another retained message than it expects. 0: it has none."""
    return Rejected(ErrorCode.CONFLICT, "the channel's retained message is another one", retained_seq)


class Follower(Protocol):
    """The receiver of a log's entries, in order. The calls are synchronous and must not raise."""

    def apply(self, entries: Sequence[Entry]) -> None:
        """Take the next entries. Their seqs are consecutive and follow those of the entries before."""

    def restart(self, applied: int, lost: str = "epoch") -> None:
        """The next entry is `applied + 1`: the log was opened, or has another epoch (`lost` is "epoch"), or entries
        after the last one that was applied are gone ("retention", or "repair" for a hole that was repaired)."""

    def broadcast(self, entry: Entry) -> None:
        """Take an ephemeral message of another replica. It is not part of the log, and its seq is 0."""

    def begin_erasure(self) -> int | None:
        """Use no page of the log that was read before this call: entries of it were erased.

        Returns the lowest seq of the messages that wait to be sent; None if there are none.
        """

    def erase(self, seqs: Collection[int]) -> Iterator[None]:
        """Drop these messages wherever they wait, in steps between which anything else may happen.

        The pages that were read before the first step are not used any more.
        """


class Log(Protocol):
    """An append-only log that many replicas may share. Belongs to one Trio thread."""

    @property
    def epoch(self) -> str:
        """The epoch of the log; empty until the log has been opened for the first time."""

    @property
    def applied(self) -> int:
        """The newest seq that the follower has received."""

    @property
    def floor(self) -> int:
        """The oldest seq that exists, or `applied + 1` in an empty log."""

    @property
    def memory_floor(self) -> int:
        """The oldest seq from which on all entries are in memory, or `applied + 1` if none is."""

    @property
    def available(self) -> bool:
        """Whether the log can be written and read at present."""

    @property
    def problem(self) -> str:
        """A few words about the problem of the log; empty if there is none."""

    @property
    def allowance(self) -> int:
        """The cost of a client's pending messages up to which its sessions are read."""

    def submit(self, append: Append) -> None:
        """Submit a message to be appended. `append.settle` is called with the outcome, perhaps at once."""

    def withdraw(self, client: Hashable, unwanted: Callable[[Append], bool], rejected: Rejected) -> None:
        """Withdraw messages of a client that are not being written yet, and settle them.

        Retries are settled as `unknown`. Messages of other clients cost nothing.
        """

    def broadcast(self, entry: Entry) -> None:
        """Send an ephemeral message (its seq is 0) to the other replicas, at most once, without the log.

        It has at most `EPHEMERAL_SIZE` bytes. The follower of this log does not receive it.
        """

    async def read(self, after: int, *, rows: int = 1000, size: int = 1 << 20) -> LogPage:
        """Read entries after `after`, up to `applied`: at most `rows`, and (but for the first) at most `size` bytes.

        Raises `Unavailable` while the log cannot be read. May be cancelled.
        """

    async def history(self, pattern: str, *, before: int | None, limit: int) -> tuple[Sequence[Entry], bool]:
        """Read the newest `limit` matches below `before`, oldest first; return also whether there are older ones."""

    async def retained(
        self,
        pattern: str,
        *,
        after: str | None,
        until: int,
        rows: int = 1000,
        size: int = 1 << 20,
        newer: bool = False,
    ) -> RetainedPage:
        """Read retained messages of the channels that match and are above `after` (None: from the first one on).

        The page searches up to `rows` channels, and ends after `size` bytes, but not before its first message. It
        leaves out retained messages with a seq above `until`, which is a seq that the follower has received. So after
        all pages, the messages that the follower receives after `until` complete the state, as soon as they have
        reached the `head` of each page: the log may have more messages than the follower has received.

        `newer`: leave out none. For a caller to whom no messages follow, a channel would be missing whose retained
        message was just replaced.

        Raises `Unavailable` while the log cannot be read, and if its epoch changes meanwhile. May be cancelled.
        """

    async def erase(self, pattern: str, *, sender: str | None = None, before: int | None = None) -> int:
        """Erase the contents of messages that match, and return the number of these messages. Their seqs stay.

        The channels whose retained message is erased have none then.

        `sender` and `before` (milliseconds since 1970) restrict it to messages of that sender, and to older ones.
        Raises `Unavailable`; then, and when it is cancelled, a part of them may be erased.
        """

    def resume(self, since: int, epoch: str | None) -> Resumption:
        """The cursor, in the present epoch, of a subscription that was complete up to `since` in `epoch`."""

    def report(self) -> dict[str, object]:
        """A report about the log for operators, for JSON."""

    async def finish(self) -> None:
        """Give back what this replica holds and others would have to wait for, before it stops. May be cancelled."""

    async def wait_open(self) -> None:
        """Wait until the log has been opened for the first time."""

    async def run(
        self,
        follower: Follower,
        describe: Callable[[], Mapping[str, Any]] = dict,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until cancelled. An unreachable database is not an error: the log waits for it.

        A log that replicas share stores what `describe` returns, a report of this replica, where all of them find it.

        On cancellation, messages that are not being written are settled as `shutting_down`.
        """
