"""The queue between a subscription and the task that iterates over it, and the history that is put before it. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from msgspec import structs

from ..errors import Refused
from .server_messages import Gap, Head, Live, Message, Page

Event = Live | Gap | Head


class QueuePhase(Enum):
    """How a queue is supplied.

    | Phase | |
    |---|---|
    | REQUESTED | a `subscribe` for it is in flight, or follows on the next connection |
    | ACTIVE | it receives the messages of the subscription |
    | PAUSED | it was full; when half of it is empty, a new `subscribe` resumes it at its cursor |
    | ENDED | the subscription was rejected, revoked or closed |
    """

    REQUESTED = auto()
    ACTIVE = auto()
    PAUSED = auto()
    ENDED = auto()


class CursorUpdate(NamedTuple):
    """An event in its place among the messages, and the cursor after it."""

    event: Event | None
    cursor: int
    epoch: str


def _do_nothing() -> None:
    pass


class MessageQueue:
    """The messages and cursor updates that one iteration has not taken yet.

    | Argument | |
    |---|---|
    | `since`, `epoch` | the cursor to begin after; with `since=None` the queue begins at the head |
    | `limit` | messages that may wait; more may be added while a task waits for what the broker sends after them |
    | `sends_epoch` | whether a `subscribe` names the epoch; without one the broker assumes its present epoch |
    | `wake` | called when an empty queue gets an item, and when the phase changes |
    """

    __slots__ = (
        "cursor",
        "epoch",
        "error",
        "excess_bytes",
        "has_cursor",
        "items",
        "limit",
        "notify_half_empty",
        "pattern",
        "phase",
        "received_epoch",
        "received_seq",
        "sends_epoch",
        "started",
        "wake",
    )

    wants_retained = False
    """Whether its subscription delivers the retained messages first."""
    wants_presence = False
    """Whether its subscription has the members of its channels."""

    def __init__(
        self,
        pattern: str,
        since: int | None,
        epoch: str,
        limit: int,
        *,
        sends_epoch: bool = True,
        wake: Callable[[], None] = _do_nothing,
    ) -> None:
        self.pattern = pattern
        self.sends_epoch = sends_epoch
        self.phase = QueuePhase.REQUESTED
        self.items: deque[Message | CursorUpdate] = deque()
        self.limit = limit
        self.started = False
        """Whether the broker has ever accepted a `subscribe` for this queue."""
        self.has_cursor = since is not None
        self.received_seq = self.cursor = since or 0
        """`received_seq`: complete up to here, including the queue. `cursor`: taken by the application up to here."""
        self.received_epoch = self.epoch = epoch
        self.notify_half_empty = False
        """Whether the subscription manager has to be told when the queue is half empty."""
        self.excess_bytes = 0
        """Approximate size of the messages that were added beyond the limit."""
        self.error: Refused | None = None
        """Raised to the application once the queue is empty."""
        self.wake = wake

    @property
    def needs_snapshot(self) -> bool:
        """Whether the next `subscribe` must begin with the retained messages, and so without a cursor."""
        return False

    def start(self, seq: int, epoch: str) -> None:
        """Activate the queue: the broker has accepted its `subscribe`, at `seq` of `epoch`."""
        self.phase = QueuePhase.ACTIVE
        self.started = True
        if not self.has_cursor:
            # New messages only, so the queue is complete here. With `since`, only later events tell.
            self.received_seq = self.cursor = seq
            self.received_epoch = self.epoch = epoch
            self.has_cursor = True
        self.wake()

    def confirm_epoch(self, epoch: str) -> None:
        """Move the cursor into `epoch`: a message arrived with no gap before it, so the seqs of both epochs agree."""
        if epoch != self.received_epoch:
            self.update_cursor(None, self.received_seq, epoch)

    def update_cursor(self, event: Event | None, seq: int, epoch: str) -> None:
        """Add an event: the queue is complete up to `seq` of `epoch`. In another epoch, seqs may begin lower."""
        if epoch == self.received_epoch:
            seq = max(seq, self.received_seq)
        self.received_seq, self.received_epoch = seq, epoch
        items = self.items
        if (
            isinstance(event, Head)
            and items
            and isinstance(last := items[-1], CursorUpdate)
            and isinstance(last.event, Head)
        ):
            items.pop()
        items.append(CursorUpdate(event, seq, epoch))
        if len(items) == 1:
            self.wake()

    def add_gap(self, gap: Gap) -> None:
        """Add the part of a gap that this queue has not received: another queue may begin at a lower cursor."""
        if gap.epoch == self.received_epoch:
            if gap.last <= self.received_seq:
                return
            gap = structs.replace(gap, first=max(gap.first, self.received_seq + 1))
        self.update_cursor(gap, gap.last, gap.epoch)

    def end(self, error: Refused | None) -> None:
        """End the queue: nothing is added any more, and the application gets `error` after the last item."""
        self.phase = QueuePhase.ENDED
        self.error = error
        self.wake()


class InitialHistory:
    """The newest `count` messages up to the start of a queue, fetched in pages and put before its items.

    The subscription has already started, so no message is missing between the pages and the queue. Request a page as
    `next_request` says and pass it to `add_page`, until `next_request` is None.
    """

    def __init__(self, queue: MessageQueue, count: int) -> None:
        self._queue = queue
        self._epoch = queue.epoch
        self._missing = count
        self._before = queue.cursor + 1
        self._messages: deque[Message] = deque()

    @property
    def next_request(self) -> tuple[int, int] | None:
        """The number of messages to request, and the seq that they precede. None when the history is complete."""
        return (self._missing, self._before) if self._missing else None

    def add_page(self, page: Page) -> None:
        """Keep a page. The last one puts all messages into the queue."""
        messages = page.messages[-self._missing :]
        self._messages.extendleft(reversed(messages))
        self._missing -= len(messages)
        if messages:
            self._before = messages[0].seq or 0
        if self._missing and messages and page.more:
            return
        self._missing = 0
        queue = self._queue
        # After a change of the epoch the pages may be from another log. The queue has a gap that covers them.
        if self._messages and queue.received_epoch == self._epoch:
            queue.cursor = (self._messages[0].seq or 1) - 1
            queue.items.extendleft(reversed(self._messages))
