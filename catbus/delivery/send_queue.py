"""The send queue: messages and replies that wait to be written to one session, or one stream of it; bounded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from math import inf
from typing import Protocol

from ..log import Entry
from ..protocol.channels import selectors
from ..protocol.wire_messages import ProtocolVersion
from .encoded_messages import EncodedMessages, QueueItem
from .reply_lines import HeadLine, HistoryLine, PresenceLine, SubscriptionLine
from .snapshot_page import SnapshotPage

# Memory of objects besides their texts, in bytes, in CPython on a 64-bit machine.
LIST_SLOT_BYTES = 9
"""A slot in a list, which grows by an eighth at a time."""
REPLY_BYTES = 48 + LIST_SLOT_BYTES
"""A `bytes` object, rounded up to 16, and its slot."""
SUBSCRIPTION_LINE_BYTES = REPLY_BYTES + 256
"""The same with a `__dict__`."""
MAX_MEMORY_FACTOR = 4
"""Maximum memory of an `EncodedMessages` with many messages, as a multiple of its lines."""

JOIN_ABOVE = 8192
"""Bytes in a send queue above which replies are joined: a client soon reads fewer."""
MAX_JOINED = 4096
"""Bytes of an object above which no reply is joined to it."""


class TransportWriter(Protocol):
    """Writes the contents of a send queue to a transport."""

    def flush(self) -> None:
        """Take the contents of the send queue, send as much as possible without waiting, and send the rest later.

        Call `take` as soon as there is room for more, even if the send queue is empty: a task may wait for that.
        """


class DeliveryCount:
    """What the send queues of one session have done: messages that were taken from them to be sent, and ephemeral ones
    that they had no room for."""

    __slots__ = ("dropped", "messages")

    def __init__(self) -> None:
        self.messages = self.dropped = 0


class Budget:
    """The memory of all send queues of a replica, in bytes. Messages in several send queues count once.

    Replies have a part of their own, so a client that causes many replies and reads none takes no memory from
    messages. Replies count until they are sent, also after a writer has taken them. Pinned messages, which cannot be
    read from the log again, have a part of their own as well: above it, no more messages are pinned.
    """

    __slots__ = (
        "_withdraw_above",
        "delivered",
        "for_messages",
        "for_pinned",
        "for_replies",
        "messages",
        "pinned",
        "replies",
    )

    def __init__(self, limit: int = 256 << 20) -> None:
        self.for_replies = limit // 4
        self.for_messages = limit - self.for_replies
        self.for_pinned = self.for_messages // 4
        self.messages = 0
        self.pinned = 0
        """Bytes of messages that are pinned in a send queue."""
        self.replies = 0
        self.delivered = 0
        """Messages taken from send queues to be sent, once for each send queue."""
        self._withdraw_above = self.for_messages

    def check(self) -> bool:
        """Return whether the messages are within the budget. If not, send queues have to drop some."""
        if self.messages > self._withdraw_above:
            return False
        self._withdraw_above = max(self.for_messages, min(self._withdraw_above, self.messages + self.for_messages // 8))
        return True

    def note_withdrawal(self) -> None:
        """Send queues have dropped what they can. They are not searched again before an eighth of it has been added.

        Messages that are left cannot be read again from the log.
        """
        self._withdraw_above = max(self.for_messages, self.messages + self.for_messages // 8)

    @property
    def held(self) -> int:
        return self.messages + self.replies

    @property
    def room(self) -> int:
        """Bytes of lines from the log that fit. Half of the budget is kept free for live messages."""
        return (self.for_messages // 2 - self.messages) // MAX_MEMORY_FACTOR

    def hold(self, encoded: EncodedMessages) -> None:
        """Count messages that a send queue holds."""
        self.messages += LIST_SLOT_BYTES if encoded.holders else encoded.charge + LIST_SLOT_BYTES
        encoded.holders += 1

    def pin(self, items: Sequence[QueueItem]) -> None:
        """Count items as pinned."""
        for item in items:
            if isinstance(item, EncodedMessages):
                self.pinned += 0 if item.pins else item.charge
                item.pins += 1

    def unpin(self, items: Sequence[QueueItem]) -> None:
        """Count items as pinned no longer."""
        for item in items:
            if isinstance(item, EncodedMessages):
                item.pins -= 1
                self.pinned -= 0 if item.pins else item.charge

    def release(self, items: Sequence[QueueItem]) -> int:
        """Count items that a send queue holds no longer. Return the number of messages in them."""
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
    """What waits to be written to one session, or to one stream of it, in order.

    Replies are always accepted; the session stops reading from its client while the send queue is `full`. Messages are
    accepted while there is room; rejected ones are delivered from the log later. `Delivery` keeps all send queues
    together within the `budget` by calling `withdraw`.
    """

    __slots__ = (
        "_budget",
        "_items",
        "_pinned",
        "_unsent",
        "_waiting",
        "_wake",
        "count",
        "limit",
        "lingers_until",
        "protocol",
        "queued",
        "rejected",
        "size",
        "writer",
    )

    def __init__(
        self,
        writer: TransportWriter,
        wake: Callable[[SendQueue], None],
        limit: int = 512 * 1024,
        budget: Budget | None = None,
        count: DeliveryCount | None = None,
    ) -> None:
        """`count`: the count of the session, if the send queue is that of one of its streams."""
        self.writer = writer
        self.count = DeliveryCount() if count is None else count
        self.protocol = ProtocolVersion.V1
        """The version of the protocol that its client reads."""
        self.limit = limit
        self.size = 0
        self.rejected = 0
        self.lingers_until = 0.0
        self.queued = False
        """The flusher's own: until when the send queue lingers, and whether it waits to be flushed."""
        self._budget = Budget() if budget is None else budget
        self._items: list[QueueItem] = []
        self._pinned = 0
        """Number of the oldest items that are pinned: they cannot be read from the log again."""
        self._unsent = 0
        """Memory of replies that were taken and are not sent yet, in bytes."""
        self._wake = wake
        self._waiting: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._items)

    @property
    def awaited(self) -> bool:
        """Whether a callback waits until it is emptied, even if it is empty now."""
        return bool(self._waiting)

    @property
    def full(self) -> bool:
        """Whether reading from the client pauses, because each request adds a reply."""
        if self.size >= self.limit:
            return True
        return self._budget.replies > self._budget.for_replies and self.size + self._unsent > 0

    @property
    def to_be_emptied(self) -> bool:
        """Whether it must be emptied before anything that pins its messages."""
        return self.size > 0 and self._budget.pinned > self._budget.for_pinned

    @property
    def room(self) -> int:
        """Bytes of messages from the log that fit. Half of the send queue is kept free for live messages."""
        return max(0, min(self.limit // 2 - self.size, self._budget.room))

    @property
    def has_room(self) -> bool:
        """Whether there is room for a line that can also be sent later. Half of the room is kept free for replies."""
        if not self.size + self._unsent:
            return True
        return self.size < self.limit // 2 and self._budget.replies < self._budget.for_replies // 2

    def when_emptied(self, callback: Callable[[], None]) -> None:
        """Call back once, synchronously, when the writer has next taken everything, or has found nothing to take."""
        self._waiting.append(callback)

    def put(self, line: bytes) -> None:
        """Queue a reply, or a line about positions. A newer `head` replaces one that only replies follow."""
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
        """Join the two newest replies into one object, unless they are large.

        Python keeps small objects in arenas of a megabyte, and returns an arena to the system only when all of its
        objects are freed. So the replies of a client that does not read can keep arenas alive for long.
        """
        items = self._items
        if self.protocol is ProtocolVersion.FIRST or len(items) < 2:
            return
        first, second = items[-2:]
        if type(first) is bytes and type(second) is bytes and len(first) < MAX_JOINED:
            items[-2:] = [first + second]
            self._pinned = min(self._pinned, len(items))
            self.size -= REPLY_BYTES
            self._budget.replies -= REPLY_BYTES

    def _drop_head(self) -> None:
        """Drop the newest `head` unless more than replies follow it, because a newer one is about to be queued."""
        items = self._items
        for index in range(len(items) - 1, -1, -1):
            item = items[index]
            if isinstance(item, HeadLine):
                del items[index]
                self._pinned -= index < self._pinned
                self.size -= _size(item)
                self._budget.replies -= _size(item)
                return
            if isinstance(item, EncodedMessages | SubscriptionLine):
                return

    def offer(self, encoded: EncodedMessages) -> bool:
        """Queue messages if there is room for them. An empty send queue accepts one message of any size.

        Nothing is queued of no messages, unless they are an empty page of a snapshot.
        """
        if not encoded.size:
            return True
        size = self.size
        if size + encoded.size > self.limit and (size or len(encoded.entries) > 1):
            self.rejected += 1
            return False
        if not self._items:
            self._wake(self)
        self._items.append(encoded)
        self.size = size + encoded.size
        self._budget.hold(encoded)
        return True

    def take(self, most: float = inf) -> list[QueueItem]:
        """Take the oldest items, until they have `most` bytes or more."""
        items, fixed = self._items, self._pinned
        if self.size <= most:
            self._items, self._pinned, self.size = [], 0, 0
        else:
            count = taken = 0
            while taken < most:
                taken += _size(items[count])
                count += 1
            self._items = items[count:]
            self._pinned = max(0, fixed - count)
            self.size -= taken
            items = items[:count]
        if fixed:
            self._budget.unpin(items[:fixed])
        if items:
            delivered = self._budget.release(items)
            self.count.messages += delivered
            self._budget.delivered += delivered
        if self._waiting and not self._items:
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()
        return items

    def count_unsent(self, size: int) -> None:
        """Count the bytes of taken replies that the writer still holds. Call it again when the number changes.

        While it is not 0, the writer calls `take` as soon as it has room, even if the send queue is empty.
        """
        self._budget.replies += size - self._unsent
        self._unsent = size

    def close(self) -> None:
        """Drop everything, because nothing takes it any more."""
        self.count_unsent(0)
        self._budget.unpin(self._items[: self._pinned])
        self._budget.release(self._items)
        self._items, self._pinned, self.size = [], 0, 0
        self.take()
        self._budget = Budget()

    def pin(self) -> None:
        """Pin all items: the messages here cannot be read from the log again."""
        self._budget.pin(self._items[self._pinned :])
        self._pinned = len(self._items)

    def withdraw(self) -> dict[str, EncodedMessages]:
        """Drop the messages that are not pinned. Return what was dropped first of each pattern."""
        return self._drop(self._pinned, None)

    @property
    def has_retained(self) -> bool:
        """Whether a page of a snapshot with messages waits here."""
        return any(isinstance(item, SnapshotPage) and item.entries for item in self._items)

    def drop_retained(self) -> set[str]:
        """Drop the pages of snapshots that have messages, also pinned ones. Return their patterns."""
        patterns: set[str] = set()

        def without(item: QueueItem) -> QueueItem | None:
            if isinstance(item, SnapshotPage) and item.entries:
                patterns.add(item.pattern)
                return None
            return item

        self._rebuild(without)
        return patterns

    def revoke(self, patterns: Collection[str], others: Collection[str] = ()) -> None:
        """Drop the messages for these patterns; of messages for several patterns, those that no `others` match.

        The cost does not depend on the number of patterns.
        """
        self._drop(0, patterns)

        def permitted(entry: Entry) -> bool:
            return any(selector in others for selector in selectors(entry.channel))

        self._rebuild(lambda i: i.select(permitted) if isinstance(i, EncodedMessages) and not i.pattern else i)

    def _rebuild(self, change: Callable[[QueueItem], QueueItem | None]) -> None:
        """Replace each item by what `change` returns for it, and drop it if that is None."""
        items, fixed, self._items, self._pinned = self._items, self._pinned, [], 0
        self._budget.unpin(items[:fixed])
        for index, item in enumerate(items):
            rest = change(item)
            if rest is not item:
                self._budget.release([item])
                self.size -= _size(item)
                if rest is None:
                    continue
                self.size += _size(rest)
                if isinstance(rest, EncodedMessages):
                    self._budget.hold(rest)
                else:
                    self._budget.replies += _size(rest)
            self._items.append(rest)
            self._pinned += index < fixed
        self._budget.pin(self._items[: self._pinned])

    def lowest_seq(self) -> int | None:
        """Return the lowest seq of a message in the log that waits here; None without one."""
        seqs = [seq for item in self._items if type(item) is not bytes and (seq := _lowest_seq(item))]
        return min(seqs, default=None)

    def erase(self, seqs: Collection[int], remainders: dict[EncodedMessages, EncodedMessages | None]) -> None:
        """Drop the messages with these seqs, also pinned ones.

        `remainders` is shared by all send queues, so that they go on sharing what is left of the messages they share.
        """

        def without(item: QueueItem) -> QueueItem | None:
            if isinstance(item, EncodedMessages):
                if item not in remainders:
                    remainders[item] = item.select(lambda entry: entry.seq not in seqs)
                return remainders[item]
            if isinstance(item, HistoryLine) and not set(item.seqs).isdisjoint(seqs):
                return item.instead
            return item

        self._rebuild(without)

    def _drop(self, start: int, patterns: Collection[str] | None) -> dict[str, EncodedMessages]:
        """Drop messages of some or all patterns from an item on, and the lines that would count them as delivered."""
        first: dict[str, EncodedMessages] = {}
        items, fixed = self._items, self._pinned
        self._budget.unpin(items[:fixed])
        kept, dropped = items[:start], list[QueueItem]()
        self._pinned = min(start, fixed)
        for index, item in enumerate(items[start:], start):
            if isinstance(item, EncodedMessages):
                drop = patterns is None or item.pattern in patterns
                if drop and item.in_log:
                    first.setdefault(item.pattern, item)
            elif isinstance(item, PresenceLine):
                drop = patterns is not None and item.pattern in patterns
            else:
                drop = (
                    item.pattern in first
                    if isinstance(item, SubscriptionLine)
                    else isinstance(item, HeadLine) and bool(first)
                )
            (dropped if drop else kept).append(item)
            self._pinned += not drop and index < fixed
        self._items = kept
        self._budget.pin(kept[: self._pinned])
        self.size -= sum(_size(item) for item in dropped)
        self._budget.release(dropped)
        return first


def size_of_replies(items: Sequence[QueueItem]) -> int:
    """Return the memory of the replies among these items, in bytes."""
    return sum([_size(item) for item in items if isinstance(item, bytes)])


def _lowest_seq(item: QueueItem) -> int:
    """Return the lowest seq of an item with messages of the log; 0 without one."""
    if isinstance(item, EncodedMessages):
        return item.first_seq
    return min(item.seqs, default=0) if isinstance(item, HistoryLine) else 0


def _size(item: QueueItem) -> int:
    """Return the size of an item: of messages the size of their lines, of other lines their memory."""
    if type(item) is bytes:
        return len(item) + REPLY_BYTES
    if isinstance(item, EncodedMessages):
        return item.size
    if isinstance(item, HistoryLine):
        return len(item) + SUBSCRIPTION_LINE_BYTES + len(item.seqs) * item.seqs.itemsize + len(item.instead)
    return len(item) + (SUBSCRIPTION_LINE_BYTES if isinstance(item, SubscriptionLine | PresenceLine) else REPLY_BYTES)
