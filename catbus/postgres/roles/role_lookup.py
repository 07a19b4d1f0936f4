"""The lookup of roles for `auth`: many keys per statement, within a timeout."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from ...auth.grants import Identity
from ...errors import Unavailable
from ...observability.loggers import RateLimitedLog, get_logger
from ..access.asyncpg_bridge import DATABASE_ERRORS, DatabaseConnection
from ..access.query_connection import QueryConnection
from .role_changes import RoleChanges
from .role_store import SELECT, role_from_row

logger = get_logger("catbus.postgres")

LOOKUP_TIMEOUT = 5.0
"""Seconds after which a lookup fails."""

_FIND = f"{SELECT} WHERE r.key = ANY ($1::bytea[])"


@dataclass(slots=True)
class _PendingLookup:
    """The lookup of one key, which any number of callers await."""

    answered: trio.Event = field(default_factory=trio.Event)
    identity: Identity | None = None
    failed: bool = False


class RoleLookup:
    """A `RoleSource` in the database. Keys that are requested while a statement runs are in the next statement.

    So each result is newer than its request, and thousands of reconnecting clients cost a few statements. A task of its
    own runs the statements: otherwise a cancelled caller would close the connection for all others.
    """

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]], changes: RoleChanges) -> None:
        self._changes = changes
        self._connection = QueryConnection(connect)
        self._pending: dict[bytes, _PendingLookup] = {}
        self._requested = trio.Event()
        self._works = True
        self._failures = RateLimitedLog(logger.warning, burst=5)
        self._mistakes = RateLimitedLog(logger.error)

    async def find(self, keys: Collection[bytes]) -> Mapping[bytes, Identity]:
        """The identities for these keys. Keys without a role are left out.

        Raises `Unavailable` if the database cannot be reached or does not reply within `LOOKUP_TIMEOUT`.
        """
        lookups = {key: self._pending.setdefault(key, _PendingLookup()) for key in keys}
        self._requested.set()
        with trio.move_on_after(LOOKUP_TIMEOUT):
            for lookup in lookups.values():
                if not lookup.answered.is_set():
                    await lookup.answered.wait()
        if not all(lookup.answered.is_set() and not lookup.failed for lookup in lookups.values()):
            raise Unavailable("the database for the lookup of the token cannot be reached")
        return {key: lookup.identity for key, lookup in lookups.items() if lookup.identity is not None}

    @property
    def changes(self) -> int:
        return self._changes.count

    @property
    def checked(self) -> float:
        return self._changes.checked

    async def wait_changes(self) -> Collection[bytes] | None:
        return await self._changes.wait()

    async def run(self) -> None:
        """Answer lookups until cancelled."""
        while True:
            await self._requested.wait()
            self._requested = trio.Event()
            lookups, self._pending = self._pending, {}
            await self._answer(lookups)

    async def _answer(self, lookups: dict[bytes, _PendingLookup]) -> None:
        identities: dict[bytes, Identity] = {}
        failed = True
        try:
            identities = await self._fetch(list(lookups))
            failed = False
        except DATABASE_ERRORS as error:
            text = f"{type(error).__name__}: {error}"
            if self._works:
                self._failures.log(trio.current_time(), "roles cannot be looked up", kind=text, error=text)
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._mistakes.log(trio.current_time(), "the lookup of roles failed", exception=error)
        finally:
            self._works = not failed
            for key, lookup in lookups.items():
                lookup.identity = identities.get(key)
                lookup.failed = failed
                lookup.answered.set()

    async def _fetch(self, keys: Sequence[bytes]) -> dict[bytes, Identity]:
        roles = map(role_from_row, await self._connection.fetch(_FIND, keys, timeout=LOOKUP_TIMEOUT))
        return {
            role.key: Identity(role.client_id, role.grants, None, role=role.key, issued=role.created.timestamp())
            for role in roles
        }
