"""The relay of the transactional outbox: polls for messages published from SQL, and has them moved to the log."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from math import inf

import trio

from .access.asyncpg_bridge import DatabaseConnection
from .access.reconnecting_tasks import ReportProgress

POLL_INTERVAL = 0.1
"""Seconds between polls."""
BUSY_POLL_INTERVAL = 0.02
"""Seconds between polls while the outbox is in use."""
BUSY_TIME = 5.0
"""Seconds for which the outbox counts as in use after a poll has found messages."""
POLL_TIME_SHARE = 10
"""Polling takes at most one part in so many of the time, however slow a poll is."""
ROTATION_INTERVAL = 1.0
"""Seconds between attempts to rotate the outbox, which keeps its tables small."""
POLL_TIMEOUT = 3.0
"""Seconds for one statement. After that the connection is dropped."""

_PENDING = "SELECT catbus.outbox_pending()"
_ROTATE = "CALL catbus.rotate_outbox_transaction()"


class OutboxRelay:
    """Polls the outbox through a connection of its own, and calls `move` when it contains messages.

    It does not poll while `move` runs. Replicas poll at different moments, so that usually one of them finds the
    messages. If several do, each of them calls the database.
    """

    def __init__(
        self, connect: Callable[[], Awaitable[DatabaseConnection]], move: Callable[[], Awaitable[None]]
    ) -> None:
        self.looks = 0
        self._connect = connect
        self._move = move
        self._used = -inf

    async def run(self, report_progress: ReportProgress) -> None:
        """Poll until the connection is lost, or the database rejects a move."""
        with await self._connect() as connection:
            rotated = -inf
            while True:
                began = trio.current_time()
                self.looks += 1
                (waits,) = await connection.fetchrow(_PENDING, timeout=POLL_TIMEOUT)
                took = trio.current_time() - began
                if waits:
                    await self._move()
                    self._used = trio.current_time()
                report_progress()
                if began - rotated >= ROTATION_INTERVAL:
                    rotated = began
                    await connection.fetch(_ROTATE, timeout=POLL_TIMEOUT)
                await trio.sleep(max(self._pause(), (POLL_TIME_SHARE - 1) * took))

    def _pause(self) -> float:
        """Seconds until the next poll."""
        pause = BUSY_POLL_INTERVAL if trio.current_time() - self._used < BUSY_TIME else POLL_INTERVAL
        return pause * random.uniform(0.75, 1.25)  # noqa: S311
