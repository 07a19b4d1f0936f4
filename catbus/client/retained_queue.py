"""The retained messages of the channels of a pattern, from a snapshot and the messages after it. Pure."""

from __future__ import annotations

from collections.abc import Callable

from msgspec.structs import force_setattr

from .live_state import set_entry
from .message_queue import CursorUpdate
from .server_messages import Gap, Head, Live, Message, SnapshotPage
from .state_queue import StateQueue

_REMOVED = b"null"


def _content(message: Message) -> object:
    """Return what tells two messages of a channel apart. In another epoch a message keeps its seq."""
    return message.seq, message.at, message.sender, bytes(message.raw)


class RetainedQueue(StateQueue[str, Message]):
    """The queue of a live map of channels to their retained messages.

    | It has | and takes |
    |---|---|
    | no cursor | the pages of a snapshot, from the start of the subscription, or from a gap |
    | a cursor | the messages after the snapshot; it also resumes there |

    A channel whose retained message is newer than the snapshot is missing in it, and comes with the messages. So the
    snapshot replaces the state when the subscription has caught up, not when it is complete. It also waits until it is
    as new as the state: a replica may lag behind the one before it, and the state of one epoch never goes back.
    """

    __slots__ = ("_caught_up", "_shown_epoch", "_shown_seq", "_snapshot")

    wants_retained = True

    def __init__(self, pattern: str, wake: Callable[[], None]) -> None:
        super().__init__(pattern, _content, wake)
        self._snapshot: dict[str, Message] | None = None
        """What will replace the state."""
        self._caught_up = False
        """Whether the snapshot has all that the broker had when it read the last page."""
        self._shown_seq, self._shown_epoch = 0, ""
        """The seq up to which the state is complete at least."""

    @property
    def needs_snapshot(self) -> bool:
        return not self.has_cursor

    def start(self, seq: int, epoch: str) -> None:
        begins = self.needs_snapshot
        super().start(seq, epoch)
        if begins:
            self._begin_snapshot()

    def add_page(self, page: SnapshotPage) -> None:
        """Take a page of the snapshot, unless none is needed: another queue may have caused it."""
        if self._snapshot is None or not self.needs_snapshot:
            return
        for message in page.messages:
            force_setattr(message, "epoch", self.received_epoch)
            self._snapshot[message.channel] = message
        self.has_cursor = page.complete

    def add_gap(self, gap: Gap) -> None:
        # A snapshot follows each gap of the subscription. The gap may be of another queue, which began earlier: then
        # the snapshot is older than this state. An erasure, whose gap is empty, begins an incomplete snapshot again.
        if self.needs_snapshot or gap.epoch != self.received_epoch or gap.last >= self.received_seq:
            self._begin_snapshot()
        super().add_gap(gap)

    def _begin_snapshot(self) -> None:
        self.has_cursor = False
        self._snapshot, self._caught_up = {}, False

    def _take(self, item: Message | CursorUpdate) -> None:
        if not isinstance(item, Message):
            self._apply(item)
        elif item.retain:
            force_setattr(item, "epoch", self.received_epoch)
            value = None if bytes(item.raw) == _REMOVED else item
            if self._snapshot is None:
                self._shown_seq = self.received_seq
                self.state.set(item.channel, value)
            else:
                set_entry(self._snapshot, item.channel, value)
                self._show_snapshot()

    def _apply(self, update: CursorUpdate) -> None:
        if isinstance(update.event, Live | Head) and self.has_cursor:
            self._caught_up = True
            self._show_snapshot()

    def _show_snapshot(self) -> None:
        """Replace the state, unless the snapshot is older than it."""
        if self._snapshot is None or not self._caught_up:
            return
        if self.received_epoch == self._shown_epoch and self.received_seq < self._shown_seq:
            return
        self._shown_seq, self._shown_epoch = self.received_seq, self.received_epoch
        snapshot, self._snapshot = self._snapshot, None
        self._show(snapshot)
