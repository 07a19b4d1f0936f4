"""The maintenance task of a replica: retention and heartbeats."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from ..access.asyncpg_bridge import DatabaseConnection
from ..access.reconnecting_tasks import ReportProgress
from .heartbeat import Heartbeat
from .log_retention import LogRetention


class MaintenanceSchedule:
    """Runs both on one connection, one after the other: neither is urgent, and connections are scarce."""

    def __init__(
        self, connect: Callable[[], Awaitable[DatabaseConnection]], retention: LogRetention, heartbeat: Heartbeat
    ) -> None:
        self._connect = connect
        self._retention = retention
        self._heartbeat = heartbeat

    async def run(self, describe: Callable[[], Mapping[str, Any]], report_progress: ReportProgress) -> None:
        """Run until the connection is lost. `describe` returns the report for the heartbeats."""
        with await self._connect() as connection:
            while True:
                await self._heartbeat.send(connection, describe)
                interval = await self._retention.run_due_steps(connection)
                report_progress()
                # At different moments on different replicas.
                await trio.sleep(interval * random.uniform(0.5, 1.0))  # noqa: S311
