"""VACUUM after an erasure: removes the old rows of erased messages from the files of the tables."""

from __future__ import annotations

from math import inf

import trio

from ...observability.loggers import get_logger
from ..access.asyncpg_bridge import DatabaseConnection

logger = get_logger("catbus.postgres")

CHECK_INTERVAL = 5.0
"""Seconds between two checks of a replica."""
VACUUM_TIMEOUT = 600.0
"""Seconds for one table. A full eighth of the log takes some seconds."""

_DUE = "SELECT name, erasure, blocked FROM catbus.vacuum_due()"
# Without INDEX_CLEANUP, channels would stay in an index if only a few rows are old.
_VACUUM = "VACUUM (INDEX_CLEANUP ON) catbus.{}"
_DONE = "UPDATE catbus.erasures SET vacuumed = greatest(vacuumed, $2) WHERE name = $1"


class Vacuum:
    """Checks whether a table is to be vacuumed. All replicas check. If two of them find the same, the second does
    nothing but wait for the first."""

    def __init__(self) -> None:
        self.due = 0
        """Tables that were not vacuumed since their newest erasure, at the last check."""
        self._next = -inf

    async def run_if_due(self, connection: DatabaseConnection) -> None:
        """Check, if it is time for that, and vacuum at most one table, so that heartbeats do not wait for all."""
        if trio.current_time() >= self._next:
            self.due = len(await vacuum_tables(connection, most=1))
            self._next = trio.current_time() + (0 if self.due else CHECK_INTERVAL)


async def vacuum_tables(connection: DatabaseConnection, most: int | None = None) -> list[str]:
    """Vacuum tables after an erasure, all or at most so many. Returns the names of those that are still due.

    A table stays due while a transaction is open that began before the erasure. Raises one of `DATABASE_ERRORS`.
    """
    rows = await connection.fetch(_DUE)
    done = [(name, erasure) for name, erasure, blocked in rows if not blocked][:most]
    for name, erasure in done:
        await connection.execute(_VACUUM.format(name), timeout=VACUUM_TIMEOUT)
        await connection.fetch(_DONE, name, erasure)
        logger.info("the old rows of erased messages were removed", table=name)
    return [name for name, _, _ in rows if name not in dict(done)]
