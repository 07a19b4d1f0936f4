"""The newest entries of a log, kept in memory for whoever is only a little behind."""

from __future__ import annotations

from collections.abc import Sequence

from ..protocol.channels import matches
from .interface import Entry, LogPage

OVERHEAD = 256
"""What an entry takes beside its texts, roughly, in bytes."""

LOOKS = 1000
"""Entries that are looked at in one turn: a millisecond at most."""

_SLACK = 64
"""The list is moved up when one in so many of its entries has been dropped: seldom, and little at a time."""


class RecentMessages:
    """A contiguous stretch of entries, bounded by bytes: the newest stay. Found by arithmetic, never by searching."""

    def __init__(self, limit_bytes: int, applied: int = 0, *, overhead: int = OVERHEAD) -> None:
        self.limit = limit_bytes
        self._overhead = overhead
        self.size = 0
        """Bytes held, with what Python adds."""
        self.first = applied + 1
        """The seq of the oldest entry held, or of the next to come."""
        self._entries: list[Entry] = []
        self._start = 0

    def __len__(self) -> int:
        return len(self._entries) - self._start

    def __getitem__(self, seq: int) -> Entry:
        """The entry with this seq, which must be held."""
        if seq < self.first:
            raise IndexError(seq)
        return self._entries[self._start + seq - self.first]

    @property
    def last(self) -> int:
        """The seq of the newest entry held, or the one before `first`."""
        return self.first + len(self) - 1

    def append(self, entries: Sequence[Entry]) -> int:
        """Take the entries that follow on the newest, drop the oldest until there is room; returns how many."""
        held = self._entries
        held.extend(entries)
        self.size += self._overhead * len(entries) + sum([entry.size for entry in entries])
        if self.size <= self.limit:
            return 0
        start = self._start
        while self.size > self.limit:
            self.size -= self._overhead + held[start].size
            start += 1
        dropped = start - self._start
        self.first += dropped
        if start * _SLACK > len(held):
            del held[:start]
            start = 0
        self._start = start
        return dropped

    def since(self, after: int, rows: int, size: int) -> LogPage | None:
        """The entries after `after`, at most `rows` and (but for the first) `size` bytes.

        None where some of them are not held any more.
        """
        if after < self.first - 1:
            return None
        start = self._start + after + 1 - self.first
        entries = self._entries[start : start + rows]
        if not entries:
            return LogPage(after, after, ())
        for index, entry in enumerate(entries):
            size -= entry.size
            if size < 0 and index:
                del entries[index:]
                break
        return LogPage(after, entries[-1].seq, entries)

    def search(self, pattern: str, seq: int, floor: int, wanted: int) -> tuple[list[Entry], int]:
        """Look for matches at or below `seq` in up to `LOOKS` entries that are held and not below `floor`.

        Returns up to `wanted` of them, the newest first, and the seq at which to go on.
        """
        found: list[Entry] = []
        lowest = max(floor, self.first, seq + 1 - LOOKS)
        while seq >= lowest and len(found) < wanted:
            entry = self[seq]
            if matches(pattern, entry.channel):
                found.append(entry)
            seq -= 1
        return found, seq

    def forget(self, last: int) -> None:
        """Drop the entries up to `last`, as far as there are any."""
        dropped = min(last, self.last) - self.first + 1
        if dropped > 0:
            start = self._start + dropped
            self.size -= sum(self._overhead + e.size for e in self._entries[self._start : start])
            del self._entries[:start]
            self._start = 0
            self.first += dropped

    def clear(self, applied: int) -> None:
        """Drop everything; the next entry is `applied + 1`."""
        self._entries = []
        self._start = 0
        self.size = 0
        self.first = applied + 1
