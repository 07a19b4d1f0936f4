"""The retained messages of a log in memory: the newest message that was published with `retain`, for each channel."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

from ..protocol.channels import channel_range, matches
from .interface import MAX_RETAINED_BYTES, RETAINED_FULL, Append, Entry, Rejected, RetainedPage, conflict

REMOVAL = b"null"
"""The payload that removes a retained message."""

Key = tuple[bytes, int]


class RetainedMessages:
    """At most one entry for each channel, and at most `limit` bytes of texts in all of them together."""

    def __init__(self, limit: int = MAX_RETAINED_BYTES) -> None:
        self.size = 0
        """Bytes of texts."""
        self._limit = limit
        self._entries: dict[str, Entry] = {}
        self._keys: dict[str, Key | None] = {}
        self._channels: list[str] = []
        """All channels, in order."""

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, channel: str, key: Key) -> Entry | None:
        """The retained message of a channel, if it was published with this key."""
        return self._entries[channel] if self._keys.get(channel) == key else None

    def check(self, append: Append) -> Rejected | None:
        """The reason why a message may not replace the channel's retained one; None if it may."""
        held = self._entries.get(append.channel)
        seq = 0 if held is None else held.seq
        if append.expect is not None and append.expect != seq:
            return conflict(seq)
        freed = 0 if held is None else held.size
        if append.payload != REMOVAL and self.size + append.size - freed > self._limit:
            return RETAINED_FULL
        return None

    def replace(self, entry: Entry, key: Key | None) -> None:
        """Make an entry its channel's retained message, or remove that."""
        channel = entry.channel
        if entry.payload == REMOVAL:
            self._remove(channel)
            return
        held = self._entries.get(channel)
        if held is None:
            insort(self._channels, channel)
        else:
            self.size -= held.size
        self._entries[channel] = entry
        self._keys[channel] = key
        self.size += entry.size

    def page(self, pattern: str, after: str | None, until: int, rows: int, size: int, head: int) -> RetainedPage:
        """As `Log.retained`."""
        low, high = channel_range(pattern, after)
        start, end = bisect_left(self._channels, low), bisect_left(self._channels, high)
        entries: list[Entry] = []
        last = after
        for channel in self._channels[start : min(end, start + rows)]:
            entry = self._entries[channel]
            if entry.seq <= until and matches(pattern, channel):
                size -= entry.size
                if size < 0 and entries:
                    return RetainedPage(entries, last, False, head)
                entries.append(entry)
            last = channel
        return RetainedPage(entries, last, end <= start + rows, head)

    def erase(self, pattern: str, unwanted: Callable[[Entry], bool]) -> set[int]:
        """Remove the unwanted messages of matching channels, and return their seqs."""
        found = [entry for entry in self._entries.values() if matches(pattern, entry.channel) and unwanted(entry)]
        for entry in found:
            self._remove(entry.channel)
        return {entry.seq for entry in found}

    def _remove(self, channel: str) -> None:
        held = self._entries.pop(channel, None)
        if held is not None:
            del self._keys[channel]
            del self._channels[bisect_left(self._channels, channel)]
            self.size -= held.size
