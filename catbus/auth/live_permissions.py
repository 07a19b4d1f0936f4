"""Live permissions: a change of a role reaches the connected sessions that use its token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from math import inf
from time import perf_counter
from typing import Protocol

import trio

from ..errors import Unavailable
from ..observability.audit_log import log_role_change
from ..protocol.wire_messages import clip
from .grants import Identity
from .role_tokens import RoleSource, role_handle

MAX_STALENESS = 60.0
"""Seconds without a check of the database after which the permissions of roles count as unknown."""

LOOKUP_BATCH = 500
"""Roles that are looked up together."""

MAX_UPDATE_TIME = 0.002
"""Seconds for which sessions are updated before other tasks run."""

RETRY_INTERVAL = 0.5
"""Seconds between tries to look up roles that may have changed."""


class RoleSession(Protocol):
    """A session that was authenticated with a role token."""

    def update_role(self, identity: Identity | None) -> bool:
        """Apply the present permissions of the role; None: the role was deleted. Return whether anything changes."""


class LivePermissions:
    """The sessions of each role, and the one task that updates them. Without `roles` it does nothing."""

    def __init__(self, roles: RoleSource | None) -> None:
        self.updates = 0
        """How often a session was updated."""
        self._roles = roles
        self._sessions: dict[bytes, set[RoleSession]] = {}
        """The sessions of each role, by its key."""
        self._roles_of: dict[RoleSession, tuple[bytes, int]] = {}
        """The role of each session, and when the session was added (a place in `_order`)."""
        self._order = count()
        self._changed: set[bytes] = set()
        """Roles that have changed."""
        self._unchecked: set[bytes] = set()
        """Roles that may have changed."""
        self._failed: set[bytes] = set()
        """Roles of either kind whose lookup has failed."""
        self._failing_since = inf
        """The Trio time since when there are failed lookups."""
        self._work = trio.Event()

    @property
    def changes(self) -> int:
        """A number that rises whenever a role may have changed."""
        return 0 if self._roles is None else self._roles.changes

    def is_known(self) -> bool:
        """Return whether the permissions of the sessions were those in the database within `MAX_STALENESS`."""
        if self._roles is None:
            return True
        return trio.current_time() - min(self._roles.checked, self._failing_since) <= MAX_STALENESS

    def add(self, session: RoleSession, key: bytes | None, changes: int) -> None:
        """Add a session with its role, or None for a session without one.

        `changes` is the number before the role was looked up. A change since then may have been missed by the lookup,
        and its update came before the session was here: the role is looked up again.
        """
        self.remove(session)
        if key is not None:
            self._roles_of[session] = key, next(self._order)
            self._sessions.setdefault(key, set()).add(session)
            if changes != self.changes:
                self._changed.add(key)
                self._work.set()

    def remove(self, session: RoleSession) -> None:
        """Remove a session, if it is here."""
        if session in self._roles_of:
            key, _ = self._roles_of.pop(session)
            sessions = self._sessions[key]
            sessions.discard(session)
            if not sessions:
                del self._sessions[key]

    async def run(self) -> None:
        """Update sessions until cancelled. While the database is unreachable their permissions stay."""
        if self._roles is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, self._roles)
            while True:
                await self._work.wait()
                # Roles that have changed go first, however many may have changed.
                waiting = self._changed or self._unchecked
                if not waiting:
                    self._work = trio.Event()
                    continue
                keys = [waiting.pop() for _ in range(min(LOOKUP_BATCH, len(waiting)))]
                keys = [key for key in keys if key in self._sessions]
                asked = next(self._order)
                try:
                    identities = await self._roles.find(keys) if keys else {}
                except Unavailable:
                    self._changed.update(keys)
                    self._failed.update(keys)
                    self._failing_since = min(self._failing_since, trio.current_time())
                    await trio.sleep(RETRY_INTERVAL)
                else:
                    self._failed = (self._failed & self._sessions.keys()) - set(keys)
                    self._failing_since = self._failing_since if self._failed else inf
                    await self._update(keys, identities, asked)

    async def _watch(self, roles: RoleSource) -> None:
        while True:
            keys = await roles.wait_changes()
            if keys is None:
                self._unchecked.update(self._sessions)
            else:
                self._changed.update(self._sessions.keys() & keys)
            self._work.set()

    async def _update(self, keys: Sequence[bytes], identities: Mapping[bytes, Identity], asked: int) -> None:
        sessions = [(session, key) for key in keys for session in self._sessions.get(key, ())]
        changed: Counter[bytes] = Counter()
        began = perf_counter()
        for session, key in sessions:
            # A session that was added after the lookup may have a newer identity. Removed sessions are skipped.
            present, added = self._roles_of.get(session, (None, asked))
            if present == key and added < asked:
                changed[key] += session.update_role(identities.get(key))
                self.updates += 1
            if perf_counter() - began > MAX_UPDATE_TIME:
                await trio.lowlevel.checkpoint()
                began = perf_counter()
        for key, number in changed.items():
            if number:
                identity = identities.get(key)
                client_id = None if identity is None else identity.client_id
                permissions = "the role was deleted" if identity is None else clip(str(identity.grants))
                log_role_change(role_handle(key), client_id, permissions, sessions=number)
