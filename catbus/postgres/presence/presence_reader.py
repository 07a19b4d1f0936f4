"""The reader of presence: keeps the mirror of a replica up to date while somebody watches."""

from __future__ import annotations

from math import inf

import trio

from ...presence.mirror import Mirror
from ...presence.table_follower import TableFollower
from ..access.reconnecting_tasks import ReportProgress
from .presence_table import PresenceTable

POLL_INTERVAL = 1.0
"""Seconds after which changes are read, whether a notification has announced some or not."""

READ_INTERVAL = 0.05
"""Seconds between two readings: repeated notifications cause one in each interval."""


class PresenceReader:
    """Reads for the mirror, and announces what is due. While nothing is watched it reads nothing."""

    def __init__(self, mirror: Mirror, table: PresenceTable) -> None:
        self.reads = 0
        self._mirror = mirror
        self._table = table
        self._follower = TableFollower(mirror)
        self._has_work = trio.Event()

    def note_watched(self) -> None:
        """A pattern is watched, or not watched any more."""
        self._has_work.set()

    def note_version(self, version: int) -> None:
        """A notification has announced a version of the table. It need not be true."""
        if self._mirror and version != self._follower.version:
            self._has_work.set()

    async def run(self, report_progress: ReportProgress) -> None:
        """Read until the database fails."""
        self._follower.resume()
        due: float | None = None
        while True:
            self._has_work = trio.Event()
            began = trio.current_time()
            await self._read(began)
            report_progress()
            while (due := self._mirror.advance(began)) == began:
                await trio.lowlevel.checkpoint()
            await trio.sleep_until(began + READ_INTERVAL)
            poll = inf if not self._mirror else began if self._mirror.unread else began + POLL_INTERVAL
            with trio.move_on_at(poll if due is None else min(poll, due)):
                await self._has_work.wait()

    async def _read(self, began: float) -> None:
        steps = self._follower.read(began)
        request = next(steps, None)
        while request is not None:
            self.reads += 1
            page = await self._table.read(request)
            try:
                request = steps.send(page)
            except StopIteration:
                request = None
