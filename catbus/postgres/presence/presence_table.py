"""The statements that write and read the table of memberships."""

from __future__ import annotations

from collections.abc import Sequence

from ...presence.batches import PresenceBatch
from ...presence.interface import Member
from ...presence.own_members import Membership, MembershipState
from ...presence.table_follower import ChangesPage, PatternPage, ReadChanges, ReadPattern
from ...protocol.channels import is_reserved, prefix_range
from ..access.asyncpg_bridge import Row
from ..access.query_connection import QueryConnection

STATEMENT_TIMEOUT = 3.0
"""Seconds for a statement. After that the connection is dropped."""

MAX_ROWS = 5000
"""Memberships that are read at once."""

MAX_PATTERNS = 1000
"""Patterns by which changes are selected. If more are watched, all changes are read."""

_WRITE = "SELECT first, more FROM catbus.write_presence($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)"
_PURGE = "SELECT catbus.purge_presence()"
_CHANGES = """
SELECT incarnation, purged, newest, replicas, replica, session, channel, client_id, info, at, state, version
FROM catbus.presence_changes($1, $2, $3, $4, $5)
"""
_PAGE = """
SELECT incarnation, replica, session, channel, client_id, info, at, state, version
FROM catbus.presence_page($1, $2, $3, $4, $5, $6, $7)
"""
_MEMBERS = """
SELECT channel, member, sessions, client_id, session, info
FROM catbus.presence_members($1, $2, $3, $4, $5, $6)
"""
_BEGINNING = "", "", "", 0


class PresenceTable:
    """The table, through a connection. Each method runs one statement, and raises one of `DATABASE_ERRORS`."""

    def __init__(self, connection: QueryConnection) -> None:
        self._connection = connection

    async def write(self, replica: str, batch: PresenceBatch) -> tuple[int | None, bool]:
        """Write a batch. Return what `catbus.write_presence` does."""
        found = batch.memberships
        [[first, more]] = await self._fetch(
            _WRITE,
            replica,
            batch.number,
            batch.begins,
            batch.ends_below,
            [each.channel for each in found],
            [each.key for each in found],
            [each.session for each in found],
            [each.client_id for each in found],
            [None if each.info is None else each.info.decode(errors="replace") for each in found],
            [each.at for each in found],
            [int(each.state) for each in found],
        )
        return first, more

    async def purge(self) -> None:
        """Delete what nobody needs any more."""
        await self._fetch(_PURGE)

    async def read(self, request: ReadChanges | ReadPattern) -> ChangesPage | PatternPage:
        """Read the page for a request of a `TableFollower`."""
        match request:
            case ReadChanges(after, patterns):
                return await self._read_changes(after, patterns)
            case ReadPattern(pattern, last):
                position = _BEGINNING if last is None else last.place
                rows = await self._fetch(_PAGE, *_bounds(pattern), *position, MAX_ROWS)
                found = [_membership(row[1:]) for row in rows if row[1] is not None]
                return PatternPage(rows[0][0], found, full=len(found) == MAX_ROWS)

    async def _read_changes(self, after: int | None, patterns: Sequence[str]) -> ChangesPage:
        exact = [pattern for pattern in patterns if not pattern.endswith("*")]
        prefixes = [pattern[:-1] for pattern in patterns if pattern.endswith(".*")]
        everything = len(exact) + len(prefixes) < len(patterns) or len(patterns) > MAX_PATTERNS
        if everything:
            exact, prefixes = [], []
        most = 0 if after is None else MAX_ROWS
        rows = await self._fetch(_CHANGES, after or 0, everything, exact, prefixes, most)
        incarnation, purged, newest, replicas, *first = rows[0]
        found = [] if first[0] is None else [_membership(row[4:]) for row in rows]
        return ChangesPage(incarnation, purged, newest, frozenset(replicas), found, full=len(found) == MAX_ROWS)

    async def members(self, pattern: str, after: tuple[str, str] | None, limit: int) -> Sequence[Member]:
        """Read up to `limit` members in the channels that match, in order."""
        reserved = is_reserved(pattern)
        rows = await self._fetch(_MEMBERS, *_bounds(pattern), reserved, *(after or ("", "")), limit)
        return [
            Member(channel, key, sessions, client_id, session, None if info is None else info.encode())
            for channel, key, sessions, client_id, session, info in rows
        ]

    async def _fetch(self, query: str, *arguments: object) -> Sequence[Row]:
        return await self._connection.fetch(query, *arguments, timeout=STATEMENT_TIMEOUT)


def _bounds(pattern: str) -> tuple[str, str]:
    """The bounds of the channels that match, in byte order. No channel contains `!` or `~`."""
    if pattern == "*":
        return "", "~"
    return prefix_range(pattern) or (pattern, f"{pattern}!")


def _membership(row: Row) -> Membership:
    replica, session, channel, client_id, info, at, state, version = row
    return Membership(
        replica,
        session,
        channel,
        client_id,
        None if info is None else info.encode(),
        at,
        MembershipState(state),
        version,
    )
