"""The outbox: what was published from SQL waits there, and is looked for until it is found."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from math import inf

import trio

from .access.asyncpg_bridge import DatabaseConnection
from .access.reconnecting_tasks import ReportProgress

PACE = 0.1
"""Seconds between looks."""
BRISK_PACE = 0.02
"""Seconds between looks while the outbox is in use."""
RECENT = 5.0
"""So many seconds after something was found, the outbox is in use."""
SHARE = 10
"""Looking takes one part in so many of the time at the most, however much there is to look through."""
TURN_PACE = 1.0
"""Seconds between tries to keep what has to be looked through small."""
PATIENCE = 3.0
"""A connection that does not answer for so long is given up."""

_LOOK = "SELECT catbus.outbox_pending()"
_TURN = "CALL catbus.rotate_outbox_transaction()"


class OutboxRelay:
    """Looks for messages through a connection of its own, and has `move` called when there are some.

    No look is made while `move` has not returned. Replicas look at different moments, so that mostly one of them finds
    what there is; that several find it costs a call.
    """

    def __init__(
        self, connect: Callable[[], Awaitable[DatabaseConnection]], move: Callable[[], Awaitable[None]]
    ) -> None:
        self.looks = 0
        self._connect = connect
        self._move = move
        self._used = -inf

    async def run(self, working: ReportProgress) -> None:
        """Look until the connection is lost, or the database refuses to move what was found."""
        with await self._connect() as connection:
            turned = -inf
            while True:
                began = trio.current_time()
                self.looks += 1
                (waits,) = await connection.fetchrow(_LOOK, timeout=PATIENCE)
                took = trio.current_time() - began
                if waits:
                    await self._move()
                    self._used = trio.current_time()
                working()
                if began - turned >= TURN_PACE:
                    turned = began
                    await connection.fetch(_TURN, timeout=PATIENCE)
                await trio.sleep(max(self._pace(), (SHARE - 1) * took))

    def _pace(self) -> float:
        """How long to wait before the next look."""
        pace = BRISK_PACE if trio.current_time() - self._used < RECENT else PACE
        return pace * random.uniform(0.75, 1.25)  # noqa: S311
