"""Fingerprints of applied entries. They show whether a database still has the log that this replica has followed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256

from ...log import Entry, RecentMessages
from ...protocol.channels import ERASED

KEPT_FINGERPRINTS = 1024
"""How many fingerprints are kept, beside the entries in memory."""


class Fingerprints:
    """Fingerprints of applied entries: of all recent ones, and of ever fewer older ones.

    Two logs that have the same entry under a seq have the same entries under all lower seqs.
    """

    def __init__(self, recent: RecentMessages) -> None:
        self._recent = recent
        self._known: list[tuple[int, bytes | None]] = [(0, None)]

    @property
    def newest(self) -> bytes | None:
        """The fingerprint of the newest entry; None if the entry was gone when its fingerprint was read."""
        return self._known[-1][1]

    def begin(self, seq: int, known: bytes | None) -> None:
        """Forget all entries, and begin with the fingerprint `known` of the entry `seq`."""
        self._known = [(seq, known)]

    def note(self, entries: Sequence[Entry]) -> None:
        """Add entries that were applied."""
        known = self._known
        known.append((entries[-1].seq, fingerprint(entries[-1])))
        if len(known) > KEPT_FINGERPRINTS:
            # Old fingerprints are thinned out again and again, so their distances grow with their age.
            del known[: KEPT_FINGERPRINTS // 2 : 2]

    async def common_seq(self, fetch: Callable[[int], Awaitable[bytes | None]], floor: int, head: int) -> int | None:
        """The newest seq up to which another log certainly has the same entries; 0 for none.

        None if nothing can be compared: all known fingerprints are newer or older than the entries of the other log.

        `fetch` returns the other log's fingerprint of a seq. `floor` and `head` are the bounds of the other log.
        """
        recent = self._recent
        old = [(seq, known) for seq, known in self._known if seq < recent.first and known and floor <= seq <= head]
        first = max(recent.first, floor)
        low, high = 0, len(old) + max(min(recent.last, head) - first + 1, 0)
        agreed = 0 if low < high else None
        while low < high:
            middle = (low + high) // 2
            if middle < len(old):
                seq, known = old[middle]
            else:
                seq = first + middle - len(old)
                known = fingerprint(recent[seq])
            if same_entry(known, await fetch(seq)):
                agreed, low = seq, middle + 1
            else:
                high = middle
        return agreed


def fingerprint(entry: Entry) -> bytes:
    """The fingerprint of an entry, equal to that of the SQL function `catbus.fingerprint`."""
    at = entry.at.to_bytes(8, "big")
    if entry.channel == ERASED:
        return at
    return sha256(f"{entry.at} {entry.channel} ".encode() + entry.payload.strip(b" \t\r\n")).digest() + at


def same_entry(known: bytes | None, found: bytes | None) -> bool:
    """Whether the entry with the fingerprint `known` can have the fingerprint `found` now: it may have been erased.

    The fingerprint of an erased entry is the end of its former one: the time. Both are None if the entry is gone.
    """
    return known == found if known is None or found is None else known.endswith(found)
