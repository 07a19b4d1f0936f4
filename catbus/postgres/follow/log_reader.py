"""Reading entries from the table: pages of the whole log, and the history of a pattern."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from ...errors import Unavailable
from ...log import Entry, LogPage, RetainedPage
from ...protocol.channels import channel_range, matches, prefix_range
from ..access.asyncpg_bridge import DATABASE_ERRORS, DatabaseConnection, Row
from ..access.query_connection import QueryConnection
from .deleted_ranges import DeletedRangeError

MAX_CONFLICTS = 3
"""How often a page and the position of the log may contradict each other."""

HISTORY_ROWS = 100
"""Messages of a history that are read at a time, so that other readers need not wait for all of it."""

HISTORY_BYTES = 1 << 20
"""Bytes after which a history ends."""

PAGE_TIMEOUT = 4.5
"""Seconds for a page of the log. A history may take longer, as it searches."""

# Behind a pooler, a connection may lead to another server from one statement to the next, and so into another epoch.
# A later epoch is in each snapshot that has an entry of it, so these statements return entries of one epoch alone.
_PAGE = """
SELECT seq, at, channel, payload, sender, origin, retain
FROM (
    SELECT *, sum(size) OVER (ORDER BY seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
    FROM (
        SELECT seq, at, channel, payload, sender, origin, retain, octet_length(channel) + octet_length(payload) AS size
        FROM catbus.entries
        WHERE seq > $1 AND seq <= $2 AND (SELECT h.epoch FROM catbus.head AS h) = $4
    ) AS page
) AS measured
WHERE before IS NULL OR before + size <= $3
ORDER BY seq
"""

_POSITION = "SELECT epoch, head, floor FROM catbus.log_position()"
_ERASED_SEQS = "SELECT catbus.erased_seqs($1, $2)"
_RECORD_DELETED_RANGE = "SELECT first, last, repaired FROM catbus.record_deleted_range($1)"

_HISTORY = """
SELECT seq, at, channel, payload, sender, origin, retain
FROM catbus.entries
WHERE seq < $1 AND (SELECT h.epoch FROM catbus.head AS h) = $3 AND {condition}
ORDER BY seq DESC
LIMIT $2
"""
# "*" does not match reserved channels. Without the condition, a log full of them would be read to its end.
_HISTORY_OF_ALL = _HISTORY.format(condition="NOT starts_with(channel, '_')")
_HISTORY_OF_ONE = _HISTORY.format(condition="channel = $4")
_HISTORY_OF_MANY = _HISTORY.format(condition='channel COLLATE "C" >= $4 AND channel COLLATE "C" < $5')

_ANY_SEQ = 2**63 - 1
"""A seq above all others."""

# One statement, so one snapshot: the head shows whether it has every message up to a seq. It is null in another epoch.
# Retained messages above `$3` come without their payload. One more than the page may have shows whether others follow.
_RETAINED = """
SELECT known.head, page.channel, page.seq, page.at, page.payload, page.sender, page.searched
FROM (
    SELECT CASE WHEN h.epoch = $6 THEN greatest(newest.seq, h.floor - 1) END AS head
    FROM catbus.head AS h
    LEFT JOIN (SELECT e.seq FROM catbus.entries AS e ORDER BY e.seq DESC LIMIT 1) AS newest ON true
) AS known
LEFT JOIN (
    SELECT *
    FROM (
        SELECT *, count(*) OVER () AS searched,
               sum(size) OVER (ORDER BY channel ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
        FROM (
            SELECT r.channel, r.seq, r.at, r.sender, CASE WHEN r.seq <= $3 THEN r.payload END AS payload,
                   CASE WHEN r.seq > $3 THEN 0
                        ELSE octet_length(r.channel) + octet_length(r.payload) + coalesce(octet_length(r.sender), 0)
                   END AS size
            FROM catbus.retained AS r WHERE r.channel >= $1 AND r.channel < $2 ORDER BY r.channel LIMIT $4::bigint + 1
        ) AS found
    ) AS measured
    WHERE coalesce(before, 0) = 0 OR before + size <= $5
) AS page ON true
ORDER BY page.channel
"""


class OtherEpochError(OSError):
    """The database has another epoch than the one that was to be read."""


class LogReader:
    """Reads through a connection of its own, one statement at a time."""

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]]) -> None:
        self._connection = QueryConnection(connect)

    @property
    def reads(self) -> int:
        return self._connection.statements

    async def connect(self) -> None:
        """Connect, unless there is a connection. Raises one of `DATABASE_ERRORS`."""
        await self._connection.connect()

    async def page(self, epoch: str, after: int, last: int, rows: int, size: int) -> LogPage:
        """The first entries of `epoch` with `after < seq <= last`: at most so many rows and bytes.

        An empty page means that the log ends there, whatever was announced. Raises one of `DATABASE_ERRORS`:
        `DeletedRangeError` if somebody deleted the entries by hand, and `OtherEpochError`.
        """
        start, lost = after, "retention"
        conflicts = 0
        while conflicts < MAX_CONFLICTS:
            # Seqs have no gaps, so the range limits the rows, and every plan is a cheap one.
            until = min(last, start + rows)
            found = await self._connection.fetch(_PAGE, start, until, size, epoch, timeout=PAGE_TIMEOUT)
            entries = [_entry(row) for row in found]
            if entries and entries[0].seq == start + 1:
                if entries[-1].seq != start + len(entries):
                    del entries[next(i for i, entry in enumerate(entries, 1) if entry.seq != start + i) - 1 :]
                return LogPage(start, entries[-1].seq, entries, lost)
            # The first entry is missing. If retention has removed it, the floor shows that by now.
            head, floor = await self._position(epoch)
            if head <= after:
                return LogPage(after, after, ())
            if floor > last:
                return LogPage(last, last, ())
            if floor > start + 1:
                start, lost = floor - 1, "retention"
                continue
            found_range = await self._connection.fetch(_RECORD_DELETED_RANGE, start, timeout=PAGE_TIMEOUT)
            if not found_range:
                # It may have been committed between the two statements.
                conflicts += 1
                continue
            ((first, end, repaired),) = found_range
            if not repaired:
                raise DeletedRangeError(first, end)
            start, lost = end, "repair"
            if start >= last:
                return LogPage(last, last, (), lost)
        raise OSError(f"the table has entries after {start} at one moment and lacks them at the next")

    async def _position(self, epoch: str) -> tuple[int, int]:
        """The head and the floor. The connection is dropped if the database has another epoch."""
        ((present, head, floor),) = await self._connection.fetch(_POSITION, timeout=PAGE_TIMEOUT)
        if present != epoch:
            self._connection.drop()
            raise OtherEpochError("the database has another epoch")
        return head, floor

    async def history(self, epoch: str, pattern: str, before: int, limit: int) -> tuple[list[Entry], bool]:
        """The newest matches of `epoch` below `before`, oldest first, and whether there are more. Raises `Unavailable`.

        Returns at most `limit` entries, and fewer if they are large. They are read a few at a time, so that other
        readers wait for a few entries and not for all.
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
        while more and len(entries) <= limit and size <= HISTORY_BYTES:
            wanted = min(HISTORY_ROWS, limit + 1 - len(entries))
            try:
                found = await self._connection.fetch(query, before, wanted, epoch, *values)
                if not found:
                    await self._position(epoch)
            except DATABASE_ERRORS as error:
                raise read_error(error) from error
            more = len(found) == wanted
            if found:
                before = found[-1][0]
            some = [entry for entry in map(_entry, found) if matches(pattern, entry.channel)]
            entries += some
            size += sum([entry.size for entry in some])
        return entries[:limit][::-1], more or len(entries) > limit

    async def retained(
        self, epoch: str, pattern: str, after: str | None, until: int, rows: int, size: int, newer: bool = False
    ) -> RetainedPage:
        """A page of retained messages, as `Log.retained`, in a log of `epoch`. Raises `Unavailable`."""
        args = *channel_range(pattern, after), _ANY_SEQ if newer else until, rows, size, epoch
        try:
            found = await self._connection.fetch(_RETAINED, *args, timeout=PAGE_TIMEOUT)
            head = found[0][0]
            if head is None or head < until:
                self._connection.drop()
                raise OtherEpochError("the database has another epoch, or lacks entries of this one")
        except DATABASE_ERRORS as error:
            raise read_error(error) from error
        if found[0][1] is None:
            return RetainedPage((), after, True, head)
        searched, page = found[0][6], found[:rows]
        entries = [
            Entry(seq, at, channel, payload.encode(), sender, retain=True)
            for _, channel, seq, at, payload, sender, _ in page
            if payload is not None and matches(pattern, channel)
        ]
        return RetainedPage(entries, page[-1][1], len(page) == searched, head)

    async def without_erased(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries, in order, that are not erased now. Raises `Unavailable`."""
        try:
            ((seqs,),) = await self._connection.fetch(_ERASED_SEQS, entries[0].seq - 1, entries[-1].seq)
        except DATABASE_ERRORS as error:
            raise read_error(error) from error
        erased = set(seqs)
        return [entry for entry in entries if entry.seq not in erased]


def read_error(error: BaseException) -> Unavailable:
    """The error of a reader during an outage."""
    return Unavailable(f"the log cannot be read just now ({type(error).__name__})")


def _entry(row: Row) -> Entry:
    seq, at, channel, payload, sender, origin, retain = row
    return Entry(seq, at, channel, payload.encode(), sender, origin, retain is True)
