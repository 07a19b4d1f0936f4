"""Permissions are live: what changes about a role reaches the sessions of those who bear its token by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from math import inf
from time import perf_counter
from typing import Protocol

import trio

from ..errors import Unavailable
from .tokens import Identity, RoleSource

STALE = 60.0
"""Seconds without a look at the database after which nobody can say what a role may."""

CHUNK = 500
"""Roles that are looked up together."""

TURN = 0.002
"""Seconds for which sessions are told in one go while others wait."""

RETRY = 0.5
"""Seconds between tries to look up what may have changed."""


class Holder(Protocol):
    """A session whose token stands for a role."""

    def regrant(self, identity: Identity | None) -> None:
        """The role is this now; None: it is no more."""


class LivePermissions:
    """Which sessions depend on which role, and the one task that keeps them up to date. Without `roles`, none do."""

    def __init__(self, roles: RoleSource | None) -> None:
        self.refreshed = 0
        """How often a session was told what its role may."""
        self._roles = roles
        self._holders: dict[bytes, set[Holder]] = {}
        self._held: dict[Holder, tuple[bytes, int]] = {}
        """What each of them depends on, and in what order they have come."""
        self._order = count()
        self._named: set[bytes] = set()
        """Roles that are known to have changed."""
        self._others: set[bytes] = set()
        """Roles that may have."""
        self._failed: set[bytes] = set()
        """Those of them that could not be looked up."""
        self._unsure = inf
        """Since when there have been some of these."""
        self._doubts = trio.Event()

    @property
    def changes(self) -> int:
        return 0 if self._roles is None else self._roles.changes

    @property
    def known(self) -> bool:
        """Whether what the sessions may is what the database says, or said not long ago."""
        return self._roles is None or trio.current_time() - min(self._roles.checked, self._unsure) <= STALE

    def hold(self, holder: Holder, key: bytes | None, changes: int) -> None:
        """A session depends on a role, or (None) on none. `changes`: as they were before the role was looked up.

        What changed meanwhile may have been missed by the look, and has been told before the session was here.
        """
        self.release(holder)
        if key is not None:
            self._held[holder] = key, next(self._order)
            self._holders.setdefault(key, set()).add(holder)
            if changes != self.changes:
                self._named.add(key)
                self._doubts.set()

    def release(self, holder: Holder) -> None:
        if holder in self._held:
            key, _ = self._held.pop(holder)
            holders = self._holders[key]
            holders.discard(holder)
            if not holders:
                del self._holders[key]

    async def run(self) -> None:
        """Tell the sessions what changes, for ever. While the database is away nothing changes for them."""
        if self._roles is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._hear, self._roles)
            while True:
                await self._doubts.wait()
                # What is known to have changed goes before what only may have, however much that is.
                doubted = self._named or self._others
                if not doubted:
                    self._doubts = trio.Event()
                    continue
                keys = [doubted.pop() for _ in range(min(CHUNK, len(doubted)))]
                keys = [key for key in keys if key in self._holders]
                asked = next(self._order)
                try:
                    identities = await self._roles.find(keys) if keys else {}
                except Unavailable:
                    self._named.update(keys)
                    self._failed.update(keys)
                    self._unsure = min(self._unsure, trio.current_time())
                    await trio.sleep(RETRY)
                else:
                    self._failed = (self._failed & self._holders.keys()) - set(keys)
                    self._unsure = self._unsure if self._failed else inf
                    await self._tell(keys, identities, asked)

    async def _hear(self, roles: RoleSource) -> None:
        while True:
            keys = await roles.wait_changes()
            if keys is None:
                self._others.update(self._holders)
            else:
                self._named.update(self._holders.keys() & keys)
            self._doubts.set()

    async def _tell(self, keys: Sequence[bytes], identities: Mapping[bytes, Identity], asked: int) -> None:
        told = [(holder, key) for key in keys for holder in self._holders.get(key, ())]
        began = perf_counter()
        for holder, key in told:
            # Whoever has come after the question may know better, and nobody is told who has left.
            held, since = self._held.get(holder, (None, asked))
            if held == key and since < asked:
                holder.regrant(identities.get(key))
                self.refreshed += 1
            if perf_counter() - began > TURN:
                await trio.lowlevel.checkpoint()
                began = perf_counter()
