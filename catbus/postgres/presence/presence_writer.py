"""The writer of presence: puts the memberships of a replica's sessions into the table, and keeps them fresh."""

from __future__ import annotations

from math import inf

import trio

from ...presence.batches import PresenceBatches
from ...presence.own_members import OwnMembers
from ..access.reconnecting_tasks import ReportProgress
from .presence_table import PresenceTable

WRITE_INTERVAL = 0.1
"""Seconds between two batches. Changes are collected in between."""

HEARTBEAT_INTERVAL = 3.0
"""Seconds after which a replica with memberships writes, if only a heartbeat. After 12 s without one its memberships do
not count. The heartbeats in `catbus.replicas` would not do, as they wait for retention and VACUUM."""

PURGE_INTERVAL = 20.0
"""Seconds between two calls that delete from the table what nobody needs any more."""


class PresenceWriter:
    """Writes what changes in `own`. A replica without memberships writes nothing."""

    def __init__(self, own: OwnMembers, table: PresenceTable) -> None:
        self.writes = 0
        self.written = 0
        self._own = own
        self._table = table
        self._batches = PresenceBatches(own)
        self._has_work = trio.Event()
        self._has_written = trio.Event()
        self._writing = False

    def note_change(self) -> None:
        """Something in `own` may have changed."""
        if self._own.unwritten:
            self._has_work.set()

    async def wait_written(self) -> None:
        """Wait until everything is written."""
        while self._own.unwritten or self._writing:
            await self._has_written.wait()

    async def run(self, report_progress: ReportProgress) -> None:
        """Write until the database fails. What was not written then is written by the next call."""
        purged = trio.current_time()
        while True:
            with trio.move_on_after(HEARTBEAT_INTERVAL if self._own else inf):
                await self._has_work.wait()
            self._has_work = trio.Event()
            began = trio.current_time()
            await self._write()
            # Not at once after an outage, during which no replica has sent heartbeats.
            if began >= purged + PURGE_INTERVAL:
                purged = began
                await self._table.purge()
            report_progress()
            await trio.sleep_until(began + WRITE_INTERVAL)

    async def _write(self) -> None:
        batch = self._batches.take()
        self._writing = True
        try:
            first, more = await self._table.write(self._own.replica, batch)
        except BaseException:
            self._batches.give_back(batch)
            self._has_work.set()
            raise
        finally:
            self._writing = False
            self._has_written.set()
            self._has_written = trio.Event()
        self.writes += 1
        if first is None:
            self._batches.note_rejected(batch)
        else:
            self._batches.note_written(batch, first, complete=not more)
            self.written += len(batch.memberships)
        if self._own.unwritten or self._batches.unfinished:
            self._has_work.set()
