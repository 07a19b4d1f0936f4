"""The task that reads pages of retained messages for held subscriptions."""

from __future__ import annotations

from collections.abc import Callable

import trio

from ..errors import Unavailable
from ..log import Log
from .snapshots import SNAPSHOT_ROWS, Snapshots
from .subscription import Subscription

SNAPSHOT_RETRY_INTERVAL = 0.25
"""Seconds between attempts to read a log that is unavailable."""


class SnapshotReader:
    """Reads the pages of `snapshots`, one after another."""

    def __init__(
        self,
        log: Log,
        page_version: Callable[[], int],
        on_complete: Callable[[Subscription], None],
        on_served: Callable[[], None],
    ) -> None:
        """`on_complete`: see `Snapshots`. `on_served` is called after pages were put into send queues.

        A page is not used if `page_version` has changed since it was requested: its messages may be of the epoch
        before, or erased.
        """
        self.snapshots = Snapshots(self._wake, on_complete)
        self._log = log
        self._page_version = page_version
        self._on_served = on_served
        self._work = trio.Event()

    async def run(self) -> None:
        """Read and serve pages until cancelled. Live deliveries run in between."""
        while True:
            request = self.snapshots.next_request()
            if request is None:
                self._work = trio.Event()
                await self._work.wait()
                continue
            (pattern, *_), after = request.position
            version = self._page_version()
            try:
                page = await self._log.retained(
                    pattern, after=after, until=request.until, rows=SNAPSHOT_ROWS, size=request.size
                )
            except Unavailable:
                await trio.sleep(SNAPSHOT_RETRY_INTERVAL)
                continue
            await trio.lowlevel.checkpoint()
            if version != self._page_version():
                continue
            for _ in self.snapshots.serve(request, page):
                self._on_served()
                await trio.lowlevel.checkpoint()
                if version != self._page_version():
                    break
            self._on_served()

    def _wake(self) -> None:
        self._work.set()
