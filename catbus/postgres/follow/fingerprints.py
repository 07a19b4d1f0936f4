"""What a replica remembers of the log that it has followed, and by which it recognises it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256

from ...log import Entry, RecentMessages

KEPT = 1024
"""How many are kept beside the entries that are in memory anyway."""


class Fingerprints:
    """Marks of entries that were applied: each of the recent ones, and of older ones ever fewer.

    Two logs that have the same entry under a seq have the same ones under all lower seqs.
    """

    def __init__(self, recent: RecentMessages) -> None:
        self._recent = recent
        self._marks: list[tuple[int, bytes | None]] = [(0, None)]

    @property
    def newest(self) -> bytes | None:
        """The mark of the newest entry; None where that was not there any more when it was looked at."""
        return self._marks[-1][1]

    def begin(self, seq: int, known: bytes | None) -> None:
        """Forget everything but the entry `seq`, whose mark this is."""
        self._marks = [(seq, known)]

    def note(self, entries: Sequence[Entry]) -> None:
        """Remember entries that were applied."""
        marks = self._marks
        marks.append((entries[-1].seq, fingerprint(entries[-1])))
        if len(marks) > KEPT:
            # Whatever has become old is thinned again and again, so that the distances grow with the age.
            del marks[: KEPT // 2 : 2]

    async def agreement(self, look: Callable[[int], Awaitable[bytes | None]], floor: int, head: int) -> int | None:
        """The newest seq for which it is certain that another log has the same entries up to there; 0 for none.

        None where there is nothing to compare: what is remembered is newer, or older, than all that the other log has.

        `look` gives the other log's mark of a seq; `floor` and `head` are where it begins and ends.
        """
        recent = self._recent
        old = [(seq, known) for seq, known in self._marks if seq < recent.first and known and floor <= seq <= head]
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
            if await look(seq) == known:
                agreed, low = seq, middle + 1
            else:
                high = middle
        return agreed


def fingerprint(entry: Entry) -> bytes:
    """By what an entry is recognised, as `catbus.fingerprint` makes it."""
    return sha256(f"{entry.at} {entry.channel} ".encode() + entry.payload.strip(b" \t\r\n")).digest()
