"""What any replica does beside serving: it looks after the log's age and size, and says that it is there."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import trio

from ..access.asyncpg_bridge import DatabaseConnection
from ..access.reconnecting_tasks import ReportProgress
from .heartbeat import Heartbeat
from .log_retention import LogRetention


class MaintenanceSchedule:
    """Does both through one connection, one after the other: neither is in a hurry, and connections are scarce."""

    def __init__(
        self, connect: Callable[[], Awaitable[DatabaseConnection]], retention: LogRetention, roll: Heartbeat
    ) -> None:
        self._connect = connect
        self._retention = retention
        self._roll = roll

    async def run(self, working: ReportProgress) -> None:
        """Until the connection is lost."""
        with await self._connect() as connection:
            while True:
                await self._roll.call(connection)
                pace = await self._retention.look(connection)
                working()
                # At different moments on different replicas.
                await trio.sleep(pace * random.uniform(0.5, 1.0))  # noqa: S311
