"""Entries from the table: pages of the whole log, and the history of a pattern."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from ...errors import Unavailable
from ...log import Entry, LogPage
from ...protocol.channels import matches, prefix_range
from ..access.asyncpg_bridge import OUTAGE, DatabaseConnection, Row
from ..access.query_connection import QueryConnection
from .deleted_ranges import DeletedRangeError

DOUBTS = 3
"""How often a page may disagree with what was found out about it."""

STEP = 100
"""Messages of a history that are read before others have their turn."""

HISTORY_SIZE = 1 << 20
"""Bytes after which no more are read of one."""

PATIENCE = 4.5
"""Seconds for a page of the log. A history may take longer: it has more to look for."""

_PAGE = """
SELECT seq, at, channel, payload, sender, origin
FROM (
    SELECT *, sum(size) OVER (ORDER BY seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
    FROM (
        SELECT seq, at, channel, payload, sender, origin, octet_length(channel) + octet_length(payload) AS size
        FROM catbus.entries
        WHERE seq > $1 AND seq <= $2
    ) AS page
) AS measured
WHERE before IS NULL OR before + size <= $3
ORDER BY seq
"""

_POSITION = "SELECT head, floor FROM catbus.position()"
_HOLE = "SELECT first, last, repaired FROM catbus.record_deleted_range($1)"

_HISTORY = """
SELECT seq, at, channel, payload, sender, origin
FROM catbus.entries
WHERE seq < $1 AND {condition}
ORDER BY seq DESC
LIMIT $2
"""
_HISTORY_OF_ALL = _HISTORY.format(condition="true")
_HISTORY_OF_ONE = _HISTORY.format(condition="channel = $3")
_HISTORY_OF_MANY = _HISTORY.format(condition='channel COLLATE "C" >= $3 AND channel COLLATE "C" < $4')


class LogReader:
    """Reads through a connection of its own, one statement at a time."""

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]]) -> None:
        self._inquiry = QueryConnection(connect)

    @property
    def reads(self) -> int:
        return self._inquiry.statements

    async def connect(self) -> None:
        """Make sure that there is a connection. Raises one of `OUTAGE`."""
        await self._inquiry.connect()

    async def page(self, after: int, last: int, rows: int, size: int) -> LogPage:
        """What there is with `after < seq <= last`, from the beginning, at most so many rows and bytes.

        The page ends where it began only if the log does too, whatever was announced. Raises one of `OUTAGE`, and that
        is `Hole` where somebody has taken entries away by hand.
        """
        start, lost = after, "retention"
        doubts = 0
        while doubts < DOUBTS:
            # Numbers are gapless, so the range bounds the rows, and whatever plan is chosen it is a cheap one.
            found = await self._inquiry.fetch(_PAGE, start, min(last, start + rows), size, timeout=PATIENCE)
            entries = [_entry(row) for row in found]
            if entries and entries[0].seq == start + 1:
                if entries[-1].seq != start + len(entries):
                    del entries[next(i for i, entry in enumerate(entries, 1) if entry.seq != start + i) - 1 :]
                return LogPage(start, entries[-1].seq, entries, lost)
            # Not where it was looked for. Retention may have taken it, and then the floor says so by now.
            ((head, floor),) = await self._inquiry.fetch(_POSITION, timeout=PATIENCE)
            if head <= after:
                return LogPage(after, after, ())
            if floor > last:
                return LogPage(last, last, ())
            if floor > start + 1:
                start, lost = floor - 1, "retention"
                continue
            holes = await self._inquiry.fetch(_HOLE, start, timeout=PATIENCE)
            if not holes:
                # It may have been committed between the looks.
                doubts += 1
                continue
            ((first, end, repaired),) = holes
            if not repaired:
                raise DeletedRangeError(first, end)
            start, lost = end, "repair"
            if start >= last:
                return LogPage(last, last, (), lost)
        raise OSError(f"the table has entries after {start} at one moment and lacks them at the next")

    async def history(self, pattern: str, before: int, limit: int) -> tuple[list[Entry], bool]:
        """The newest matches below `before`, oldest first, and whether there are more. Raises `Unavailable`.

        They are `limit` at the most, and fewer where they are large. They are read a few at a time, so that others who
        ask wait for a few as well, and not for all.
        """
        bounds = prefix_range(pattern)
        values: tuple[str, ...]
        if pattern == "*":
            query, values = _HISTORY_OF_ALL, ()
        elif bounds is None:
            query, values = _HISTORY_OF_ONE, (pattern,)
        else:
            query, values = _HISTORY_OF_MANY, bounds
        entries: list[Entry] = []
        size, more = 0, True
        while more and len(entries) <= limit and size <= HISTORY_SIZE:
            wanted = min(STEP, limit + 1 - len(entries))
            try:
                found = await self._inquiry.fetch(query, before, wanted, *values)
            except OUTAGE as error:
                raise unavailable(error) from error
            more = len(found) == wanted
            if found:
                before = found[-1][0]
            some = [entry for entry in map(_entry, found) if matches(pattern, entry.channel)]
            entries += some
            size += sum([entry.size for entry in some])
        return entries[:limit][::-1], more or len(entries) > limit


def unavailable(error: BaseException) -> Unavailable:
    """What a reader is told of an outage."""
    return Unavailable(f"the log cannot be read just now ({type(error).__name__})")


def _entry(row: Row) -> Entry:
    seq, at, channel, payload, sender, origin = row
    return Entry(seq, at, channel, payload.encode(), sender, origin)
