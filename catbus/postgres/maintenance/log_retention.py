"""Retention: removes the oldest part of the log when it is too old, or when the log is too large."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ...config import RetentionSettings as Settings
from ...observability.loggers import get_logger
from ..access.asyncpg_bridge import DatabaseConnection

logger = get_logger("catbus.postgres")

CHECK_INTERVAL = 1.0
"""The longest time between two checks, in seconds. Meanwhile the log may exceed its size."""
BLOCKED_INTERVAL = 10.0
"""The same while a transaction uses the partition that is to be emptied."""
SLOTS = 8

_DUE = "SELECT d.expired, d.bytes, d.expired IS NOT NULL OR d.closing, d.held FROM catbus.retention_due($1, $2) AS d"
_STEP = "CALL catbus.retain_transaction($1, $2, NULL, NULL, NULL, NULL, NULL, NULL)"

# A transaction that began a moment ago is about to end, or has ended when pg_stat_activity is read. A transaction whose
# state may not be seen counts as lasting, and one that is prepared for a two-phase commit has no process. The text of a
# query is not read: it may contain secrets.
_BLOCKERS = """
SELECT coalesce(l.pid, 0), coalesce(nullif(a.application_name, ''), a.backend_type, p.gid), a.state,
       to_char(coalesce(a.xact_start, p.prepared) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
FROM pg_locks AS l
LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
LEFT JOIN pg_prepared_xacts AS p ON l.virtualtransaction = '-1/' || p.transaction
WHERE l.locktype = 'relation' AND l.granted AND l.pid IS DISTINCT FROM pg_backend_pid()
      AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
      AND l.relation = format('catbus.entries_%s', $1::smallint)::regclass
      AND (a.xact_start < clock_timestamp() - interval '50 ms'
           OR a.pid IS NOT NULL AND a.state IS NULL
           OR l.pid IS NULL)
ORDER BY a.xact_start
"""


@dataclass(frozen=True, slots=True)
class BlockingTransaction:
    """A transaction that uses the partition to be emptied. `pid` is 0 for a prepared transaction."""

    pid: int
    application: str | None
    state: str | None
    since: str | None


class LogRetention:
    """Checks the age and the size of the log. All replicas check, and one of them takes the step that is due."""

    def __init__(self, settings: Settings) -> None:
        self.bytes = 0
        """The size of the log at the last check; 0 before the first one."""
        self.steps = 0
        """How often this replica closed or emptied a slot."""
        self.dropped = 0
        """How many entries this replica removed."""
        self.held = 0
        """How often a partition was to be emptied and a transaction used it."""
        self.held_by_consumer = False
        """Whether a consumer with `hold` kept a part that is too old at the last check."""
        self.holders: Sequence[BlockingTransaction] = ()
        """The transactions that did so at the last check."""
        self.stepped: int | None = None
        """The time of this replica's last step, in milliseconds since 1970."""
        self._age = round(settings.age * 1000)
        self._size = settings.size
        self._is_blocked = False

    async def run_due_steps(self, connection: DatabaseConnection) -> float:
        """Check, take the steps that are due, and return the longest time until the next check, in seconds."""
        interval = CHECK_INTERVAL if await self._run_steps(connection) else BLOCKED_INTERVAL
        return min(interval, self._age / 1000 / SLOTS)

    async def _run_steps(self, connection: DatabaseConnection) -> bool:
        """Take the steps that are due. Returns False if a transaction blocks one."""
        while True:
            expired, self.bytes, due, self.held_by_consumer = await connection.fetchrow(_DUE, self._age, self._size)
            if expired is None:
                self._is_blocked, self.holders = False, ()
            if not due:
                return True
            # While a transaction visibly uses the partition, do not try: each attempt delays all publishes.
            if expired is not None and (holders := await self._find_blockers(connection, expired)):
                self._note_blocked(holders)
                return False
            floor, dropped, by_size, closed, held = await connection.fetchrow(_STEP, self._age, self._size)
            self._note_step(floor, dropped, by_size, closed)
            if held is not None:
                self._note_blocked(await self._find_blockers(connection, held))
                return False
            if not closed and not dropped:
                return True  # another replica was faster

    async def _find_blockers(self, connection: DatabaseConnection, slot: int) -> Sequence[BlockingTransaction]:
        return [BlockingTransaction(*row) for row in await connection.fetch(_BLOCKERS, slot)]

    def _note_blocked(self, holders: Sequence[BlockingTransaction]) -> None:
        self.held += 1
        self.holders = holders
        if not self._is_blocked:
            self._is_blocked = True
            logger.warning(
                "the log grows: a transaction uses the partition that is to be emptied",
                holders=[*map(_as_dict, holders)],
            )

    def _note_step(self, floor: int, dropped: int, by_size: bool, closed: bool) -> None:
        if closed or dropped:
            self.steps += 1
            self.stepped = time.time_ns() // 1_000_000
        if dropped:
            self.dropped += dropped
            reason = "size" if by_size else "age"
            logger.info("the oldest part of the log was dropped", entries=dropped, floor=floor, reason=reason)


def _as_dict(holder: BlockingTransaction) -> dict[str, object]:
    return {name: getattr(holder, name) for name in BlockingTransaction.__slots__}
