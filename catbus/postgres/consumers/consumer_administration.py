"""Consumers in the database: listing, creating, moving and dropping them, and their dead letters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Protocol

from ...error_codes import ErrorCode
from ...errors import PeerError, Unavailable
from ...log.consumers import ConsumerPartition, ConsumerReport, DeadLetter, SkippedRange
from ..access.asyncpg_bridge import DATABASE_ERRORS, Row, sqlstate

_REJECTED = {
    "22023": ErrorCode.CONFLICT,
    "42501": ErrorCode.NOT_FOUND,
    "42710": ErrorCode.CONFLICT,
    "55000": ErrorCode.CONFLICT,
    "55P03": ErrorCode.UNAVAILABLE,
}
"""The codes for the SQLSTATEs of a wrong argument, and of a consumer that does not exist, exists, has no URL
or is in use."""

_POSITIONS = """
SELECT consumer, owner, pattern, hold, partition, cursor, lag, lag_seconds, moved, gap, dead_letters
FROM (
    SELECT *, dense_rank() OVER (ORDER BY consumer COLLATE "C") AS nth
    FROM catbus.consumer_positions()
    WHERE coalesce(consumer = $1, consumer COLLATE "C" > $2)
) AS p
WHERE coalesce(nth <= $3::bigint, true) ORDER BY nth, partition
"""
_CREATE = """
SELECT catbus.create_consumer($1, $2, partitions => $3, start => $4, hold => $5,
                              owner => (SELECT r.oid FROM pg_roles AS r WHERE r.rolname = $6)::regrole,
                              push => $7, secret => $8)
"""
_HAS_ROLE = "SELECT EXISTS (SELECT FROM pg_roles AS r WHERE r.rolname = $1)"
_DROP = "SELECT catbus.drop_consumer($1)"
_RESET = "SELECT catbus.reset_consumer($1, $2)"
_SKIP = "SELECT partition, first, last FROM catbus.skip_gap($1)"
# One more than the page may have shows whether others follow.
_DEAD = """
SELECT m.seq, m.at, m.channel, m.payload, m.sender, m.reason, m.rejected, m.found
FROM (
    SELECT *, count(*) OVER () AS found,
           sum(octet_length(payload)) OVER (ORDER BY seq ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
    FROM (
        SELECT d.* FROM catbus.dead_letters AS d
        WHERE d.consumer = $1 AND d.seq > $2 ORDER BY d.seq LIMIT $3::bigint + 1
    ) AS l
) AS m
WHERE coalesce(m.before, 0) = 0 OR m.before + octet_length(m.payload) <= $4::bigint ORDER BY m.seq
"""
_DELETE = "DELETE FROM catbus.dead_letters AS d WHERE d.consumer = $1 AND d.seq = ANY ($2) RETURNING d.seq"
_PUBLISH = """
WITH deleted AS (
    DELETE FROM catbus.dead_letters AS d WHERE d.consumer = $1 AND d.seq = ANY ($2)
    RETURNING d.seq, d.channel, d.payload
)
SELECT l.seq, catbus.publish(l.channel, l.payload) FROM (SELECT * FROM deleted ORDER BY seq OFFSET 0) AS l
"""


class Statements(Protocol):
    """Runs one statement at a time, each in a transaction of its own."""

    async def fetch(self, query: str, *args: object) -> list[Row]: ...


class ConsumerAdministration:
    """The `Consumers` of a database that its user may use: calls the functions of `016_consumers.sql`."""

    def __init__(self, statements: Statements) -> None:
        self._statements = statements

    async def reports(self, *, after: str = "", most: int | None = None) -> list[ConsumerReport]:
        return await self._reports(None, after, most)

    async def report(self, name: str) -> ConsumerReport:
        for report in await self._reports(name, "", None):
            return report
        raise PeerError(ErrorCode.NOT_FOUND, f'there is no consumer "{name}": `catbus consumer list` shows all')

    async def _reports(self, name: str | None, after: str, most: int | None) -> list[ConsumerReport]:
        with reported_errors():
            rows = await self._statements.fetch(_POSITIONS, name, after, most)
        return [
            ConsumerReport(name, owner, pattern, hold, tuple(ConsumerPartition(*row[4:]) for row in part))
            for (name, owner, pattern, hold), part in groupby(map(tuple, rows), lambda row: row[:4])
        ]

    async def create(
        self,
        name: str,
        pattern: str,
        *,
        partitions: int,
        start: str,
        hold: bool,
        owner: str | None,
        push: str | None = None,
        secret: str | None = None,
    ) -> None:
        """Create a consumer. See `catbus.create_consumer`."""
        with reported_errors():
            if owner is not None and not (await self._statements.fetch(_HAS_ROLE, owner))[0][0]:
                raise PeerError(ErrorCode.CONFLICT, f'the database has no role "{owner}"')
            await self._statements.fetch(_CREATE, name, pattern, partitions, start, hold, owner, push, secret)

    async def drop(self, name: str) -> None:
        with reported_errors():
            await self._statements.fetch(_DROP, name)

    async def reset(self, name: str, start: str) -> None:
        with reported_errors():
            await self._statements.fetch(_RESET, name, start)

    async def skip_gap(self, name: str) -> list[SkippedRange]:
        with reported_errors():
            return [SkippedRange(*row) for row in await self._statements.fetch(_SKIP, name)]

    async def dead_letters(self, name: str, *, after: int = 0, rows: int, size: int) -> tuple[list[DeadLetter], bool]:
        with reported_errors():
            found = await self._statements.fetch(_DEAD, name, after, rows, size)
        letters = [DeadLetter(*row[:-1]) for row in map(tuple, found[:rows])]
        return letters, bool(found) and len(letters) < found[0][-1]

    async def delete_dead_letters(self, name: str, seqs: Sequence[int]) -> list[int]:
        return await self._take_dead_letters(_DELETE, name, seqs)

    async def publish_dead_letters(self, name: str, seqs: Sequence[int]) -> list[int]:
        return await self._take_dead_letters(_PUBLISH, name, seqs)

    async def _take_dead_letters(self, query: str, name: str, seqs: Sequence[int]) -> list[int]:
        with reported_errors():
            rows = await self._statements.fetch(query, name, seqs)
        return sorted(row[0] for row in rows)


@contextmanager
def reported_errors() -> Iterator[None]:
    """Raise errors of the database as `PeerError` if it rejects a call, and as `Unavailable` otherwise."""
    try:
        yield
    except DATABASE_ERRORS as error:
        code = _REJECTED.get(sqlstate(error) or "")
        if code is not None:
            raise PeerError(code, str(error)) from None
        raise Unavailable(f"the database cannot be used: {type(error).__name__}: {error}") from error
