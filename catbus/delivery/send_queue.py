"""What one session still has to be sent: one queue for messages, replies and marks, bounded and counted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import Protocol, Self

from ..log import Entry
from ..protocol.channels import selectors
from ..protocol.wire_messages import ProtocolVersion, encode_first_version_message, encode_message

OVERHEAD = 96
"""What a `message` line adds to its channel and payload, roughly, in bytes."""

# What objects take in memory besides their texts, in bytes, as CPython lays them out on a 64-bit machine.
LIST_SLOT_BYTES = 9
"""A place in a list, which grows by an eighth at a time."""
REPLY_BYTES = 48 + LIST_SLOT_BYTES
"""A `bytes` object, rounded up to 16, and its place."""
SUBSCRIPTION_LINE_BYTES = REPLY_BYTES + 256
"""The same with a `__dict__`."""
ENTRY_BYTES = 240
"""An entry with its numbers, and what its texts take as objects."""
ENCODED_MESSAGES_BYTES = 256
"""A run with its list, its numbers, and what its lines take as an object."""
MAX_MEMORY_FACTOR = 4
"""How many times what its lines have a run of many messages takes at the most."""


JOIN_ABOVE = 8192
"""Bytes in a send queue from which on replies are joined: less is soon read."""
MAX_JOINED = 4096
"""Bytes to which they are joined, in each object."""


class EncodedMessages:
    """Consecutive matches of one pattern, encoded once for everyone who gets them."""

    __slots__ = ("_first_version_lines", "_lines", "charge", "entries", "holders", "pattern", "pins", "size")

    def __init__(self, pattern: str, entries: Sequence[Entry]) -> None:
        self.pattern = pattern
        self.entries = entries
        self.holders = 0
        """How many send queues it is in."""
        self.pins = 0
        """In how many of them it stays whatever happens."""
        count, texts = len(entries), sum([entry.size for entry in entries])
        self.size = texts + count * (OVERHEAD + len(pattern))
        """About how many bytes its lines have."""
        self.charge = self.size + texts + count * ENTRY_BYTES + ENCODED_MESSAGES_BYTES
        """What it takes in memory, once for all who hold it: the entries, and their lines once they are encoded."""
        self._lines: bytes | None = None
        self._first_version_lines: list[bytes] | None = None

    @property
    def lines(self) -> bytes:
        """All of them, a line each, as a `catbus.v1` client reads them."""
        if self._lines is None:
            pattern = self.pattern
            self._lines = b"".join(
                [encode_message(e.channel, e.payload, pattern, e.seq or None, e.at, e.sender) for e in self.entries]
            )
        return self._lines

    @property
    def first_version_lines(self) -> list[bytes]:
        """A line each, as a first-version client reads them."""
        if self._first_version_lines is None:
            self._first_version_lines = [encode_first_version_message(e.channel, e.payload) for e in self.entries]
        return self._first_version_lines


QueueItem = EncodedMessages | bytes


class HeadLine(bytes):
    """A line that says up to where all is complete that the send queue is for.

    It counts the messages before it as delivered, and is never sent without them.
    """

    __slots__ = ()


class SubscriptionLine(bytes):
    """The same of one pattern."""

    pattern: str

    def __new__(cls, line: bytes, pattern: str) -> Self:
        mark = super().__new__(cls, line)
        mark.pattern = pattern
        return mark


class TransportWriter(Protocol):
    """The sending side of a session's transport."""

    def flush(self) -> None:
        """Take what the send queue holds and send as much as goes without waiting; see to the rest later.

        `take` is due as soon as there is room for more, even where the send queue is empty: somebody may wait for it.
        """


class Budget:
    """What all send queues of a replica hold together, in bytes of memory. Messages that several hold count once.

    Replies have a part of it to themselves: they cannot be had again, and who makes others write many and reads none
    takes no room for messages. They count until they are sent, also after an outlet has taken them. Messages that
    cannot be had again have a part of it, too: over it, no more of them become so.
    """

    __slots__ = ("delivered", "for_messages", "for_pinned", "for_replies", "messages", "pinned", "replies")

    def __init__(self, limit: int = 256 << 20) -> None:
        self.for_replies = limit // 4
        self.for_messages = limit - self.for_replies
        self.for_pinned = self.for_messages // 4
        self.messages = 0
        self.pinned = 0
        """What of them cannot be had again."""
        self.replies = 0
        self.delivered = 0
        """How many messages were taken to be sent, each as often as it was taken."""

    @property
    def held(self) -> int:
        return self.messages + self.replies

    @property
    def room(self) -> int:
        """How many bytes of lines of older messages are welcome. Half of it is kept free for what is new."""
        return (self.for_messages // 2 - self.messages) // MAX_MEMORY_FACTOR

    def hold(self, run: EncodedMessages) -> None:
        """A send queue holds these messages."""
        self.messages += LIST_SLOT_BYTES if run.holders else run.charge + LIST_SLOT_BYTES
        run.holders += 1

    def pin(self, items: Sequence[QueueItem]) -> None:
        """A send queue keeps these whatever happens."""
        for item in items:
            if isinstance(item, EncodedMessages):
                self.pinned += 0 if item.pins else item.charge
                item.pins += 1

    def unpin(self, items: Sequence[QueueItem]) -> None:
        """It does not any more."""
        for item in items:
            if isinstance(item, EncodedMessages):
                item.pins -= 1
                self.pinned -= 0 if item.pins else item.charge

    def release(self, items: Sequence[QueueItem]) -> int:
        """A send queue does not hold these any more; returns how many messages they are."""
        messages = replies = count = 0
        for item in items:
            if isinstance(item, bytes):
                replies += _size(item)
            else:
                count += len(item.entries)
                item.holders -= 1
                messages += LIST_SLOT_BYTES if item.holders else item.charge + LIST_SLOT_BYTES
        self.messages -= messages
        self.replies -= replies
        return count


class SendQueue:
    """The one way to a client.

    Replies are always taken: who makes them stops reading from the client while `full`. Messages are taken while
    there is room, and whoever is turned away gets them from the log later. All of them together are kept within
    `budget` by whoever offers messages: `withdraw` makes room.
    """

    __slots__ = (
        "_budget",
        "_fixed",
        "_items",
        "_unsent",
        "_waiting",
        "_wake",
        "limit",
        "protocol",
        "queued",
        "rests_until",
        "size",
        "turned_away",
        "writer",
    )

    def __init__(
        self,
        writer: TransportWriter,
        wake: Callable[[SendQueue], None],
        limit: int = 512 * 1024,
        budget: Budget | None = None,
    ) -> None:
        self.writer = writer
        self.protocol = ProtocolVersion.V1
        """In whose words it is read."""
        self.limit = limit
        self.size = 0
        self.turned_away = 0
        self.rests_until = 0.0
        self.queued = False
        """When the flush pass may come again, and whether it is going to: the flusher's own marks."""
        self._budget = Budget() if budget is None else budget
        self._items: list[QueueItem] = []
        self._fixed = 0
        """How many of them, from the oldest on, stay whatever happens."""
        self._unsent = 0
        """Bytes of memory of replies that were taken and not sent yet."""
        self._wake = wake
        self._waiting: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._items)

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for it to be emptied, even where it is empty."""
        return bool(self._waiting)

    @property
    def full(self) -> bool:
        """Whether the client should be given no reason for more replies."""
        if self.size >= self.limit:
            return True
        return self._budget.replies > self._budget.for_replies and self.size + self._unsent > 0

    @property
    def to_be_emptied(self) -> bool:
        """Whether it should be emptied before anything is done for which what is here has to stay."""
        return self.size > 0 and self._budget.pinned > self._budget.for_pinned

    @property
    def room(self) -> int:
        """How many bytes of older messages are welcome. Half the send queue is kept free for what is new."""
        return max(0, min(self.limit // 2 - self.size, self._budget.room))

    def when_emptied(self, callback: Callable[[], None]) -> None:
        """Call once, synchronously, when the outlet has next taken all that is here, or has found it empty."""
        self._waiting.append(callback)

    def put(self, line: bytes) -> None:
        """Queue a reply or a mark. A newer `head` takes the place of one behind which there are only replies."""
        if not self._items:
            self._wake(self)
        elif isinstance(line, HeadLine):
            self._drop_head()
        if self.size > JOIN_ABOVE:
            self._join()
        self._items.append(line)
        size = _size(line)
        self.size += size
        self._budget.replies += size

    def _join(self) -> None:
        """Make one object of the two newest replies, unless they are large.

        Python keeps small objects in arenas of a megabyte, and an arena goes back to the system only when the last of
        them has gone. What lies beside the replies of somebody who does not read may stay for long.
        """
        items = self._items
        if self.protocol is ProtocolVersion.FIRST or len(items) < 2:
            return
        first, second = items[-2:]
        if type(first) is bytes and type(second) is bytes and len(first) < MAX_JOINED:
            items[-2:] = [first + second]
            self._fixed = min(self._fixed, len(items))
            self.size -= REPLY_BYTES
            self._budget.replies -= REPLY_BYTES

    def _drop_head(self) -> None:
        """Drop the newest `head`, which is about to be said anew, unless there is more than replies behind it."""
        items = self._items
        for index in range(len(items) - 1, -1, -1):
            item = items[index]
            if isinstance(item, HeadLine):
                del items[index]
                self._fixed -= index < self._fixed
                self.size -= _size(item)
                self._budget.replies -= _size(item)
                return
            if isinstance(item, EncodedMessages | SubscriptionLine):
                return

    def offer(self, run: EncodedMessages) -> bool:
        """Queue messages, unless there is no room for them. An empty send queue takes one message of any size."""
        if not run.entries:
            return True
        size = self.size
        if size + run.size > self.limit and (size or len(run.entries) > 1):
            self.turned_away += 1
            return False
        if not self._items:
            self._wake(self)
        self._items.append(run)
        self.size = size + run.size
        self._budget.hold(run)
        return True

    def take(self, most: float = inf) -> list[QueueItem]:
        """Take what is oldest: up to `most` bytes, and what goes beyond that by less than an item."""
        items, fixed = self._items, self._fixed
        if self.size <= most:
            self._items, self._fixed, self.size = [], 0, 0
        else:
            count = taken = 0
            while taken < most:
                taken += _size(items[count])
                count += 1
            self._items = items[count:]
            self._fixed = max(0, fixed - count)
            self.size -= taken
            items = items[:count]
        if fixed:
            self._budget.unpin(items[:fixed])
        if items:
            self._budget.delivered += self._budget.release(items)
        if self._waiting and not self._items:
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()
        return items

    def count_unsent(self, size: int) -> None:
        """Of the replies that were taken, the outlet holds so many bytes: they count until it says how many are left.

        While it says that there are some, it takes again as soon as there is room, even where the send queue is empty.
        """
        self._budget.replies += size - self._unsent
        self._unsent = size

    def close(self) -> None:
        """Drop everything; nobody takes it any more."""
        self.count_unsent(0)
        self._budget.unpin(self._items[: self._fixed])
        self._budget.release(self._items)
        self._items, self._fixed, self.size = [], 0, 0
        self.take()
        self._budget = Budget()

    def fix(self) -> None:
        """What is here cannot be had again from the log, so that it stays."""
        self._budget.pin(self._items[self._fixed :])
        self._fixed = len(self._items)

    def withdraw(self) -> dict[str, int]:
        """Drop the messages that can be had again; returns for each pattern from which seq on they were dropped."""
        return self._drop(self._fixed, None)

    def revoke(self, patterns: Collection[str], others: Collection[str] = ()) -> None:
        """Drop the messages for these patterns that are still here; of copies for several, what `others` do not match.

        It costs no more for many patterns than for one.
        """
        self._drop(0, patterns)
        items, fixed, self._items, self._fixed = self._items, self._fixed, [], 0
        self._budget.unpin(items[:fixed])
        for index, item in enumerate(items):
            if isinstance(item, EncodedMessages) and not item.pattern:
                kept = EncodedMessages("", [e for e in item.entries if any(s in others for s in selectors(e.channel))])
                self._budget.release([item])
                self.size += kept.size - item.size
                if not kept.entries:
                    continue
                self._budget.hold(kept)
                item = kept
            self._items.append(item)
            self._fixed += index < fixed
        self._budget.pin(self._items[: self._fixed])

    def _drop(self, start: int, patterns: Collection[str] | None) -> dict[str, int]:
        """Drop messages, of some patterns or all, from an item on, and the marks that would count them as delivered."""
        first: dict[str, int] = {}
        items, fixed = self._items, self._fixed
        self._budget.unpin(items[:fixed])
        kept, dropped = items[:start], list[QueueItem]()
        self._fixed = min(start, fixed)
        for index, item in enumerate(items[start:], start):
            if isinstance(item, EncodedMessages):
                drop = patterns is None or item.pattern in patterns
                if drop and (seq := item.entries[0].seq):
                    first.setdefault(item.pattern, seq)
            else:
                drop = (
                    item.pattern in first
                    if isinstance(item, SubscriptionLine)
                    else isinstance(item, HeadLine) and bool(first)
                )
            (dropped if drop else kept).append(item)
            self._fixed += not drop and index < fixed
        self._items = kept
        self._budget.pin(kept[: self._fixed])
        self.size -= sum(_size(item) for item in dropped)
        self._budget.release(dropped)
        return first


def size_of_replies(items: Sequence[QueueItem]) -> int:
    """Bytes that the replies among these take in memory."""
    return sum([_size(item) for item in items if isinstance(item, bytes)])


def _size(item: QueueItem) -> int:
    """What it takes of a send queue: messages about what their lines have, anything else what it takes in memory."""
    if isinstance(item, EncodedMessages):
        return item.size
    return len(item) + (SUBSCRIPTION_LINE_BYTES if isinstance(item, SubscriptionLine) else REPLY_BYTES)
