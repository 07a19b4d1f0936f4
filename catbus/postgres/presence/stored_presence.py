"""The presence of replicas with a common database."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable

import trio

from ...errors import Unavailable
from ...presence.interface import MembersPage, PresenceStatistics, decode_position, encode_position
from ...presence.mirror import Mirror
from ...presence.own_members import OwnMembers
from ...presence.replica_presence import ReplicaPresence
from ..access.asyncpg_bridge import DATABASE_ERRORS, DatabaseConnection
from ..access.query_connection import QueryConnection
from .presence_reader import PresenceReader
from .presence_table import PresenceTable
from .presence_writer import PresenceWriter

WRITE_SLACK = 1.0
"""Seconds that are added to the grace, for the time that a membership takes into the table."""


class StoredPresence(ReplicaPresence):
    """A `Presence` in PostgreSQL. `grace` is the time in seconds within which a session that ended is expected back.

    The log runs `writer` and `reader`, each with a connection of its own that is opened when it is first needed.
    """

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]], grace: float = 10.0) -> None:
        super().__init__(OwnMembers(secrets.token_hex(8)), Mirror(grace + WRITE_SLACK))
        self._table = PresenceTable(QueryConnection(connect))
        self.writer = PresenceWriter(self._own, PresenceTable(QueryConnection(connect)))
        self.reader = PresenceReader(self._mirror, self._table)

    @property
    def replica(self) -> str:
        """Identifies this replica in the table."""
        return self._own.replica

    def _note_change(self) -> None:
        self.writer.note_change()

    def _note_watched(self) -> None:
        self.reader.note_watched()

    async def members(self, pattern: str, after: str | None = None, limit: int = 100) -> MembersPage:
        position = None if after is None else decode_position(after)
        try:
            found = await self._table.members(pattern, position, limit + 1)
        except DATABASE_ERRORS as error:
            raise Unavailable("the members cannot be read") from error
        page = found[:limit]
        return MembersPage(page, encode_position(page[-1].position) if len(found) > limit else None)

    async def flush(self) -> None:
        await self.writer.wait_written()

    async def run(self) -> None:
        """The log runs what there is to do, with the database."""
        await trio.sleep_forever()

    def statistics(self) -> PresenceStatistics:
        return self._statistics(writes=self.writer.writes, written=self.writer.written, reads=self.reader.reads)
