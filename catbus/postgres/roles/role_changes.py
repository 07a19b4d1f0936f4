"""What is known of changes to roles: a notification names one at once, and the poll finds what was not heard of."""

from __future__ import annotations

from collections.abc import Collection
from math import inf

import trio

PAUSE = 0.05
"""Seconds from one answer to the next: a notification that is sent again and again costs one look in each."""
_MANY = 1000
"""Roles that may wait to be looked at by name; for more it is as well to look at all of them."""


class RoleChanges:
    """Which roles may have changed since somebody looked. The listener fills it, one task empties it."""

    def __init__(self) -> None:
        self.count = 0
        self.checked = -inf
        """The Trio time up to which the database has been asked for changes."""
        self._seen: tuple[str, str] | None = None
        self._keys: set[bytes] | None = set()
        """None: any of them."""
        self._news = trio.Event()
        self._taken = -inf

    def hear(self, key: bytes) -> None:
        """A notification has named a role."""
        self._note({key})

    def look(self, epoch: str, version: str) -> None:
        """The database has been asked what it knows of changes. In another epoch it may be another database."""
        if (epoch, version) != self._seen:
            self._seen = epoch, version
            self._note(None)

    def _note(self, keys: set[bytes] | None) -> None:
        self.count += 1
        if self._keys is not None:
            self._keys = None if keys is None or len(self._keys) >= _MANY else self._keys | keys
        self._news.set()

    async def wait(self) -> Collection[bytes] | None:
        """Wait for changes and take them: keys, or None for any role. Cancelling it takes none."""
        await self._news.wait()
        await trio.sleep_until(self._taken + PAUSE)
        self._taken = trio.current_time()
        self._news = trio.Event()
        keys, self._keys = self._keys, set()
        return keys
