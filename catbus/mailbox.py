"""What one session still has to be sent: one queue for messages, replies and marks, bounded and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Protocol as Interface

from .log import Entry
from .wire import Protocol, encode_entry, encode_first_version

OVERHEAD = 96
"""What a `message` line adds to its channel and payload, roughly, in bytes."""


class Run:
    """Consecutive matches of one pattern, encoded once for everyone who gets them."""

    def __init__(self, pattern: str, entries: Sequence[Entry]) -> None:
        self.pattern = pattern
        self.entries = entries
        self.size = sum(len(entry.payload) + len(entry.channel) for entry in entries) + len(entries) * (
            OVERHEAD + len(pattern)
        )

    @cached_property
    def lines(self) -> bytes:
        """All of them, a line each, as a `catbus.v1` client reads them."""
        pattern = self.pattern
        return b"".join(
            [encode_entry(e.channel, e.payload, pattern, e.seq or None, e.at, e.sender) for e in self.entries]
        )

    @cached_property
    def first_version_lines(self) -> list[bytes]:
        """A line each, as a first-version client reads them."""
        return [encode_first_version(e.channel, e.payload) for e in self.entries]


class Outlet(Interface):
    """The sending side of a session's transport."""

    def flush(self) -> None:
        """Take what the mailbox holds and send as much as goes without waiting; see to the rest later."""


Item = Run | bytes


class Mailbox:
    """The one way to a client.

    Replies are always taken: who makes them stops reading from the client while `full`. Messages are taken while
    there is room, and whoever is turned away gets them from the log later.
    """

    __slots__ = (
        "_items",
        "_waiting",
        "_wake",
        "limit",
        "outlet",
        "protocol",
        "queued",
        "rests_until",
        "size",
        "turned_away",
    )

    def __init__(self, outlet: Outlet, wake: Callable[[Mailbox], None], limit: int = 512 * 1024) -> None:
        self.outlet = outlet
        self.protocol = Protocol.V1
        """In whose words it is read."""
        self.limit = limit
        self.size = 0
        self.turned_away = 0
        self.rests_until = 0.0
        self.queued = False
        """When the flush pass may come again, and whether it is going to: the flusher's own marks."""
        self._items: list[Item] = []
        self._wake = wake
        self._waiting: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._items)

    @property
    def full(self) -> bool:
        """Whether the client should be given no reason for more replies."""
        return self.size >= self.limit

    @property
    def room(self) -> int:
        """How many bytes of older messages are welcome. Half the mailbox is kept free for what is new."""
        return max(0, self.limit // 2 - self.size)

    def when_emptied(self, callback: Callable[[], None]) -> None:
        """Call once, synchronously, when the outlet has next taken what is here."""
        self._waiting.append(callback)

    def put(self, line: bytes) -> None:
        """Queue a reply or a mark."""
        if not self._items:
            self._wake(self)
        self._items.append(line)
        self.size += len(line)

    def offer(self, run: Run) -> bool:
        """Queue messages, unless there is no room for them. An empty mailbox takes one message of any size."""
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
        return True

    def take(self) -> list[Item]:
        """Empty it, oldest first."""
        items, self._items = self._items, []
        self.size = 0
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()
        return items

    def withdraw(self, pattern: str) -> None:
        """Drop the messages for a pattern that are still here."""
        kept: list[Item] = []
        for item in self._items:
            if isinstance(item, Run) and item.pattern == pattern:
                self.size -= item.size
            else:
                kept.append(item)
        self._items = kept
