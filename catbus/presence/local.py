"""The presence of a replica that has no others, for a log in memory."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from itertools import count
from math import inf

import trio
from msgspec import structs

from .interface import MembersPage, PresenceStatistics, decode_position, encode_position
from .mirror import Mirror
from .own_members import OwnMembers
from .replica_presence import ReplicaPresence

CHANGES_PER_CHECKPOINT = 500
"""Memberships that are applied before other tasks run."""


class LocalPresence(ReplicaPresence):
    """A `Presence` in memory, which ends with its process.

    `grace` is the time in seconds within which a session that ended is expected back. `clock` is used for the age of
    info only; its unit is seconds since 1970.
    """

    def __init__(self, grace: float = 10.0, clock: Callable[[], float] = time.time) -> None:
        super().__init__(OwnMembers(secrets.token_hex(8), max_ended=inf), Mirror(grace, complete=True), clock)
        self._versions = count(1)
        self._work = trio.Event()

    def _note_change(self) -> None:
        self._work.set()

    def _note_watched(self) -> None:
        """The mirror knows all members already."""

    async def members(self, pattern: str, after: str | None = None, limit: int = 100) -> MembersPage:
        await trio.lowlevel.checkpoint()
        position = None if after is None else decode_position(after)
        found, more = self._mirror.present(pattern, position, limit, counted=True)
        return MembersPage(found, encode_position(found[-1].position) if more else None)

    async def flush(self) -> None:
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        """Announce what has changed and what is due, until cancelled."""
        due: float | None = None
        while True:
            with trio.move_on_at(inf if due is None else due):
                await self._work.wait()
            self._work = trio.Event()
            while changes := self._own.take(CHANGES_PER_CHECKPOINT):
                self._mirror.apply(
                    [structs.replace(change, version=next(self._versions)) for change in changes], trio.current_time()
                )
                await trio.lowlevel.checkpoint()
            now = trio.current_time()
            while (due := self._mirror.advance(now)) == now:
                await trio.lowlevel.checkpoint()

    def statistics(self) -> PresenceStatistics:
        return self._statistics(writes=0, written=0, reads=0)
