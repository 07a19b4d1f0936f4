"""The newest messages of a log, kept in memory for subscriptions that lag a little."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..protocol.channels import matches
from .interface import Entry, LogPage, erased

ENTRY_OVERHEAD = 256
"""Bytes of memory of an entry besides its texts, roughly."""

MAX_SEARCHED = 1000
"""Entries that one search looks at, which takes a millisecond at most."""

_COMPACTION_RATIO = 64
"""The list is compacted when one in so many of its entries has been dropped: seldom, and little at a time."""


class RecentMessages:
    """A contiguous range of entries, bounded by bytes: the newest stay. Found by arithmetic, never by searching."""

    def __init__(self, limit_bytes: int, applied: int = 0, *, overhead: int = ENTRY_OVERHEAD) -> None:
        self.limit = limit_bytes
        self._overhead = overhead
        self.size = 0
        """Bytes of memory, with the overhead."""
        self.first = applied + 1
        """The seq of the oldest entry, or of the next one to come."""
        self._entries: list[Entry] = []
        self._start = 0

    def __len__(self) -> int:
        return len(self._entries) - self._start

    def __getitem__(self, seq: int) -> Entry:
        """The entry with this seq, which must be here."""
        if seq < self.first:
            raise IndexError(seq)
        return self._entries[self._start + seq - self.first]

    @property
    def last(self) -> int:
        """The seq of the newest entry, or `first - 1` without entries."""
        return self.first + len(self) - 1

    def append(self, entries: Sequence[Entry]) -> int:
        """Add the entries that follow the newest, and drop the oldest over the limit. Returns how many were dropped."""
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
        if start * _COMPACTION_RATIO > len(held):
            del held[:start]
            start = 0
        self._start = start
        return dropped

    def since(self, after: int, rows: int, size: int) -> LogPage | None:
        """The entries after `after`, at most `rows`, and at most `size` bytes except for the first.

        None if some of them have been dropped.
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
        """Search for matches at or below `seq` in up to `MAX_SEARCHED` entries that are not below `floor`.

        Returns up to `wanted` of them, the newest first, and the seq at which to continue.
        """
        found: list[Entry] = []
        lowest = max(floor, self.first, seq + 1 - MAX_SEARCHED)
        while seq >= lowest and len(found) < wanted:
            entry = self[seq]
            if matches(pattern, entry.channel):
                found.append(entry)
            seq -= 1
        return found, seq

    def erase(self, seqs: Collection[int]) -> None:
        """Replace the entries with these seqs, as far as they are here, by erased ones."""
        offset = self._start - self.first
        for seq in seqs:
            if self.first <= seq <= self.last:
                entry = self._entries[offset + seq]
                rest = self._entries[offset + seq] = erased(entry)
                self.size += rest.size - entry.size

    def forget(self, last: int) -> None:
        """Drop the entries up to `last`, if there are any."""
        dropped = min(last, self.last) - self.first + 1
        if dropped > 0:
            start = self._start + dropped
            self.size -= sum(self._overhead + e.size for e in self._entries[self._start : start])
            del self._entries[:start]
            self._start = 0
            self.first += dropped

    def clear(self, applied: int) -> None:
        """Drop all entries; the next one is `applied + 1`."""
        self._entries = []
        self._start = 0
        self.size = 0
        self.first = applied + 1
