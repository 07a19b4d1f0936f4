"""The maintenance task of a replica: retention, size of retained messages, heartbeats, VACUUM, lag of consumers."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from ..access.asyncpg_bridge import DatabaseConnection
from ..access.reconnecting_tasks import ReportProgress
from .consumer_lags import ConsumerLags
from .heartbeat import Heartbeat
from .log_retention import LogRetention
from .retained_budget import RetainedBudget
from .vacuum import Vacuum


class MaintenanceSchedule:
    """Runs all of it on one connection, one after the other: nothing of it is urgent, and connections are scarce."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[DatabaseConnection]],
        retention: LogRetention,
        retained_budget: RetainedBudget,
        heartbeat: Heartbeat,
        vacuum: Vacuum,
        consumer_lags: ConsumerLags,
    ) -> None:
        self._connect = connect
        self._retention = retention
        self._retained_budget = retained_budget
        self._heartbeat = heartbeat
        self._vacuum = vacuum
        self._consumer_lags = consumer_lags

    async def run(self, describe: Callable[[], Mapping[str, Any]], report_progress: ReportProgress) -> None:
        """Run until the connection is lost. `describe` returns the report for the heartbeats."""
        with await self._connect() as connection:
            while True:
                await self._heartbeat.send(connection, describe)
                await self._retained_budget.check_if_due(connection)
                await self._vacuum.run_if_due(connection)
                await self._consumer_lags.measure_if_due(connection)
                interval = await self._retention.run_due_steps(connection)
                report_progress()
                # At different moments on different replicas.
                await trio.sleep(interval * random.uniform(0.5, 1.0))  # noqa: S311
