"""Changes of roles: notifications name changed roles at once, and polls find all other changes."""

from __future__ import annotations

from collections.abc import Collection
from math import inf

import trio

MIN_INTERVAL = 0.05
"""Seconds between two results of `wait`: a repeated notification causes one lookup in each interval."""
_MAX_KEYS = 1000
"""Changed roles that are kept by key. If there are more, all roles count as changed."""


class RoleChanges:
    """The roles that may have changed. The listener adds them, and one task takes them."""

    def __init__(self) -> None:
        self.count = 0
        self.checked = -inf
        """The Trio time of the last poll for changes."""
        self._seen: tuple[str, str] | None = None
        self._keys: set[bytes] | None = set()
        """None stands for all roles."""
        self._changed = trio.Event()
        self._taken_at = -inf

    def note_role(self, key: bytes) -> None:
        """A notification names a role."""
        self._note({key})

    def note_version(self, epoch: str, version: str) -> None:
        """A poll has returned the version of the roles. In another epoch it may be another database."""
        if (epoch, version) != self._seen:
            self._seen = epoch, version
            self._note(None)

    def _note(self, keys: set[bytes] | None) -> None:
        self.count += 1
        if self._keys is not None:
            self._keys = None if keys is None or len(self._keys) >= _MAX_KEYS else self._keys | keys
        self._changed.set()

    async def wait(self) -> Collection[bytes] | None:
        """Wait for changes and take them: keys, or None for all roles. Cancellation takes none."""
        await self._changed.wait()
        await trio.sleep_until(self._taken_at + MIN_INTERVAL)
        self._taken_at = trio.current_time()
        self._changed = trio.Event()
        keys, self._keys = self._keys, set()
        return keys
