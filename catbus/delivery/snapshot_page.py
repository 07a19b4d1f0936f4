"""Pages of retained messages as the items of send queues, and the position of a subscription in its snapshot. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from ..log import Entry
from ..protocol.channels import selectors
from ..protocol.server_sent_events import encode_retained_event
from ..protocol.wire_messages import encode_message_object, encode_retained
from .encoded_messages import EncodedMessages

PAGE_OVERHEAD = 96
"""Approximate size of a page besides its messages, in bytes."""


class SnapshotPosition(NamedTuple):
    """Where a snapshot continues: at the channels above `after` that match the first pattern, then at the next one."""

    patterns: tuple[str, ...]
    after: str | None = None


def begin_snapshot(patterns: Collection[str]) -> SnapshotPosition:
    """Return the position of a new snapshot. No channel matches two of its patterns.

    Of two patterns that match the same channel, one covers the other.
    """
    return SnapshotPosition(tuple(p for p in patterns if not any(s in patterns for s in selectors(p) if s != p)))


class SnapshotPage(EncodedMessages):
    """A page of a snapshot, which begins at `position`. Its messages are in the order of their channels."""

    __slots__ = ("complete", "position")

    def __init__(self, pattern: str, entries: Sequence[Entry], position: SnapshotPosition, complete: bool) -> None:
        """`pattern`: that of the subscription, or "" for an event stream. `complete`: it is the last page."""
        super().__init__(pattern, entries)
        self.position = position
        self.complete = complete
        # The pattern stands once in it, and not in each message.
        once = PAGE_OVERHEAD + len(pattern) - len(entries) * len(pattern)
        self.size += once
        self.charge += once

    @property
    def first_seq(self) -> int:
        """0: an erasure drops the page whatever its seqs are, as most of them are below the floor of the log."""
        return 0

    @property
    def in_log(self) -> bool:
        return True

    @property
    def lines(self) -> bytes:
        if self._lines is None:
            self._lines = encode_retained(self.pattern, self._objects(), self.complete)
        return self._lines

    @property
    def events(self) -> bytes:
        if self._events is None:
            self._events = encode_retained_event(self._objects(), self.complete)
        return self._events

    def _objects(self) -> list[bytes]:
        return [encode_message_object(e.channel, e.payload, e.seq, e.at, e.sender, True) for e in self.entries]

    def select(self, wanted: Callable[[Entry], bool]) -> SnapshotPage:
        """Return a page of the messages that are wanted. It stays, even if none is: it may complete the snapshot."""
        kept = [entry for entry in self.entries if wanted(entry)]
        if len(kept) == len(self.entries):
            return self
        return SnapshotPage(self.pattern, kept, self.position, self.complete)
