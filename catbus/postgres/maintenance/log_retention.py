"""Retention: the oldest part of the log is taken away when it is old, or when the log is too big."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ...config import RetentionSettings as Settings
from ...observability.loggers import get_logger
from ..access.asyncpg_bridge import DatabaseConnection

logger = get_logger("catbus.postgres")

PACE = 1.0
"""Seconds between looks, at the most: so much can come beyond the size before it is noticed."""
HELD_PACE = 10.0
"""The same while somebody uses what is to go."""
SLOTS = 8

_LOOK = "SELECT d.expired, d.bytes, d.expired IS NOT NULL OR d.closing FROM catbus.retention_due($1, $2) AS d"
_STEP = "CALL catbus.retain_transaction($1, $2, NULL, NULL, NULL, NULL, NULL, NULL)"

# Who has come just now is on the way out again, or gone by the time that processes are looked at. One whose state may
# not be seen is believed to stay, and what was prepared for a commit in two phases has no process. The text of a query
# is nobody's business: it may hold secrets.
_HOLDERS = """
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
class TableHolder:
    """A transaction that uses a partition which is to be emptied. `pid` is 0 for one that is prepared."""

    pid: int
    application: str | None
    state: str | None
    since: str | None


class LogRetention:
    """Looks after the log's age and size. Any replica does, and one of them takes a step that is due."""

    def __init__(self, settings: Settings) -> None:
        self.bytes = 0
        """What the log took up when it was looked at last; 0 before that."""
        self.steps = 0
        """How often we closed a slot or emptied one."""
        self.dropped = 0
        """How many entries we took away."""
        self.held = 0
        """How often something was to go and somebody used it."""
        self.holders: Sequence[TableHolder] = ()
        """Who did so when it was looked at last."""
        self.stepped: int | None = None
        """When we took our last step, in milliseconds since 1970."""
        self._age = round(settings.age * 1000)
        self._size = settings.size
        self._is_held = False

    async def look(self, connection: DatabaseConnection) -> float:
        """Look, take the steps that are due, and return in how many seconds to look again at the latest."""
        pace = PACE if await self._look(connection) else HELD_PACE
        return min(pace, self._age / 1000 / SLOTS)

    async def _look(self, connection: DatabaseConnection) -> bool:
        """Take the steps that are due; False where somebody is in the way."""
        while True:
            victim, self.bytes, due = await connection.fetchrow(_LOOK, self._age, self._size)
            if victim is None:
                self._is_held, self.holders = False, ()
            if not due:
                return True
            # While somebody is seen to use it, it is not even tried: every try holds up all who publish.
            if victim is not None and (holders := await self._ask_holders(connection, victim)):
                self._note_held(holders)
                return False
            floor, dropped, early, closed, held = await connection.fetchrow(_STEP, self._age, self._size)
            self._note_step(floor, dropped, early, closed)
            if held is not None:
                self._note_held(await self._ask_holders(connection, held))
                return False
            if not closed and not dropped:
                return True  # another replica was faster

    async def _ask_holders(self, connection: DatabaseConnection, slot: int) -> Sequence[TableHolder]:
        return [TableHolder(*row) for row in await connection.fetch(_HOLDERS, slot)]

    def _note_held(self, holders: Sequence[TableHolder]) -> None:
        self.held += 1
        self.holders = holders
        if not self._is_held:
            self._is_held = True
            logger.warning("the log grows: somebody uses what is to be dropped", holders=[*map(_shown, holders)])

    def _note_step(self, floor: int, dropped: int, early: bool, closed: bool) -> None:
        if closed or dropped:
            self.steps += 1
            self.stepped = time.time_ns() // 1_000_000
        if dropped:
            self.dropped += dropped
            reason = "size" if early else "age"
            logger.info("the oldest part of the log was dropped", entries=dropped, floor=floor, reason=reason)


def _shown(holder: TableHolder) -> dict[str, object]:
    return {name: getattr(holder, name) for name in TableHolder.__slots__}
