"""The revocations in the database: polls and notifications say that some have changed, and a task reads those."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from math import inf

import trio

from ...auth.revocations import Revocations, check_revocation
from ...config import DatabaseSettings
from ...errors import Unavailable
from ..access.asyncpg_bridge import DATABASE_ERRORS, DatabaseConnection, Row
from ..access.migrations import migrate, open_connection
from ..access.query_connection import QueryConnection
from ..access.reconnecting_tasks import ReportProgress

FIRST_READ_TIMEOUT = 5.0
"""Seconds for which a token waits until the revocations were read for the first time."""

WRITE_TIMEOUT = 5.0
"""Seconds after which storing a revocation fails."""

PAGE_ROWS = 2_000
"""Rows that are read at once, which takes some 5 ms. If more have changed, all are read, page by page."""

MIN_INTERVAL = 0.05
"""Seconds between two readings: repeated notifications cause one in each interval."""

_REVOKE = """
SELECT extract(epoch FROM catbus.revoke_client(
    $1, coalesce(to_timestamp($2), clock_timestamp()), coalesce(to_timestamp($3), 'infinity')
))::double precision
"""
_OLDEST = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
_READ_PAGE = """
SELECT r.client_id, extract(epoch FROM r.issued_before)::double precision
FROM catbus.revocations AS r WHERE r.client_id > $1 ORDER BY r.client_id LIMIT $2
"""
# A row of another cluster, from which the database was restored, may have the id of a transaction to come.
_READ_CHANGED = """
SELECT pg_snapshot_xmin(s.now)::text::bigint, (SELECT count(*) FROM catbus.revocations),
       r.client_id, extract(epoch FROM r.issued_before)::double precision
FROM (SELECT pg_current_snapshot() AS now) AS s
LEFT JOIN catbus.revocations AS r ON r.changed >= $1 AND r.changed < pg_snapshot_xmax(s.now)::text::bigint
LIMIT $2
"""
_DISCONNECT = "SELECT catbus.disconnect_client($1)"
_READ_DISCONNECTS = """
SELECT pg_snapshot_xmin(s.now)::text::bigint, d.client_id, d.changed
FROM (SELECT pg_current_snapshot() AS now) AS s
LEFT JOIN catbus.disconnects AS d ON d.changed >= $1 AND d.changed < pg_snapshot_xmax(s.now)::text::bigint
"""


async def revoke_client(
    settings: DatabaseSettings, client_id: str, issued_before: float | None, forget_after: float | None
) -> float:
    """Revoke tokens as `Revocations.revoke` does, through a connection of its own, after migrating the schema.

    Raises `ConfigError` for a database that cannot be used, and `Unavailable` if it cannot be reached or fails.
    """
    async with open_connection(settings) as connection:
        await migrate(connection)
        (in_force,) = await connection.fetchrow(_REVOKE, client_id, issued_before, forget_after)
        return float(in_force)


class StoredRevocations(Revocations):
    """The revocations of a database. `connect` connects to the log that this replica follows.

    All of them are in memory, so tokens are verified while the database is unreachable. A token waits until they have
    been read for the first time.
    """

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]]) -> None:
        super().__init__()
        self.reads = 0
        """How often all of them were read."""
        self._connection = QueryConnection(connect)
        self._version: tuple[str, str] | None = None
        self._has_changed = trio.Event()
        self._known = trio.Event()
        self._read_epoch = ""
        """The epoch of the log whose revocations are in memory."""
        self._oldest = 0
        """The oldest transaction that may not have been visible to the last reading."""
        self._oldest_disconnect = 0
        """The same for requests to disconnect."""
        self._disconnects: dict[str, int] = {}
        """By client_id, the transactions that have requested to disconnect it, as far as they may be read again."""

    def note_version(self, epoch: str, version: str) -> None:
        """A poll has returned the version of the revocations. In another epoch it may be another database."""
        if (epoch, version) != self._version:
            self._version = epoch, version
            self._has_changed.set()

    async def wait_known(self) -> None:
        if not self._known.is_set():
            with trio.move_on_after(FIRST_READ_TIMEOUT):
                await self._known.wait()
                return
            raise Unavailable("the database has not been reached yet")

    async def revoke(
        self, client_id: str, issued_before: float | None = None, forget_after: float | None = None
    ) -> float:
        check_revocation(client_id, issued_before, forget_after)
        [[in_force]] = await self._store(_REVOKE, client_id, issued_before, forget_after)
        self._put({client_id: in_force})
        return float(in_force)

    async def disconnect(self, client_id: str) -> int:
        check_revocation(client_id)
        here = len(self._sessions.get(client_id, ()))
        await self._store(_DISCONNECT, client_id)
        return here

    async def _store(self, query: str, *arguments: object) -> Sequence[Row]:
        """Run a statement that writes. Raises `Unavailable` unless the database answers in time."""
        with trio.move_on_after(WRITE_TIMEOUT):
            try:
                return await self._connection.fetch(query, *arguments)
            except DATABASE_ERRORS as error:
                raise Unavailable("the database for revocations cannot be reached") from error
        raise Unavailable("the database for revocations does not answer")

    async def follow(self, report_progress: ReportProgress) -> None:
        """Read what has changed, whenever something has, until the connection is lost."""
        while True:
            await self._has_changed.wait()
            self._has_changed = trio.Event()
            try:
                await self._read()
            except BaseException:
                self._has_changed.set()
                raise
            self._known.set()
            report_progress()
            await trio.sleep(MIN_INTERVAL)

    async def _read(self) -> None:
        assert self._version is not None
        epoch, _ = self._version
        await self._read_disconnects(another=epoch != self._read_epoch)
        if epoch != self._read_epoch or not await self._read_changed():
            await self._read_all()
            self._read_epoch = epoch

    async def _read_changed(self) -> bool:
        """Read the rows that have changed. Return whether memory has all rows now, and no others."""
        rows = await self._connection.fetch(_READ_CHANGED, self._oldest, PAGE_ROWS)
        if len(rows) == PAGE_ROWS:
            return False
        oldest, number, _, _ = rows[0]
        self._oldest = oldest
        self._put({client_id: before for _, _, client_id, before in rows if client_id is not None})
        return bool(len(self) == number)

    async def _read_disconnects(self, *, another: bool) -> None:
        """Close the sessions of the clients in new requests. Those in `another` epoch's log were for other sessions."""
        rows = await self._connection.fetch(_READ_DISCONNECTS, 0 if another else self._oldest_disconnect)
        found = {client_id: changed for _, client_id, changed in rows if client_id is not None}
        if not another:
            self._disconnect({name for name, changed in found.items() if self._disconnects.get(name) != changed})
        self._oldest_disconnect, self._disconnects = rows[0][0], found

    async def _read_all(self) -> None:
        self.reads += 1
        [[oldest]] = await self._connection.fetch(_OLDEST)
        found: dict[str, float] = {}
        rows = [("", -inf)]
        while rows:
            last = rows[-1][0]
            rows = [
                (client_id, before) for client_id, before in await self._connection.fetch(_READ_PAGE, last, PAGE_ROWS)
            ]
            found.update(rows)
        self._replace(found)
        self._oldest = oldest
