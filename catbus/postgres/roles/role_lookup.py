"""Looking roles up for those who authenticate: many at a time, and not for ever."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import trio

from ...auth.grants import Identity
from ...errors import Unavailable
from ...observability.loggers import RateLimitedLog, get_logger
from ..access.asyncpg_bridge import OUTAGE, DatabaseConnection
from ..access.query_connection import QueryConnection
from .role_changes import RoleChanges
from .role_store import SELECT, role_from_row

logger = get_logger("catbus.postgres")

PATIENCE = 5.0
"""Seconds after which somebody who asks is told that there is no answer."""

_FIND = f"{SELECT} WHERE r.key = ANY ($1::bytea[])"


@dataclass(slots=True)
class _Question:
    """What those who ask for one key wait for."""

    answered: trio.Event = field(default_factory=trio.Event)
    identity: Identity | None = None
    failed: bool = False


class RoleLookup:
    """A `RoleSource` in the database. What is asked for while one statement is under way is in the next.

    So each answer is of a moment after the question, and thousands who come back at once cost a few statements. Those
    are asked by a task of their own: who leaves while waiting would take the connection away from all others.
    """

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]], changes: RoleChanges) -> None:
        self._changes = changes
        self._inquiry = QueryConnection(connect)
        self._questions: dict[bytes, _Question] = {}
        self._asked = trio.Event()
        self._works = True
        self._failures = RateLimitedLog(logger.warning, burst=5)
        self._mistakes = RateLimitedLog(logger.error)

    async def find(self, keys: Collection[bytes]) -> Mapping[bytes, Identity]:
        """Whom the tokens with these keys belong to; a key that no role has is left out.

        Raises `Unavailable` where the database cannot be reached or has not answered within `PATIENCE`.
        """
        questions = {key: self._questions.setdefault(key, _Question()) for key in keys}
        self._asked.set()
        with trio.move_on_after(PATIENCE):
            for question in questions.values():
                if not question.answered.is_set():
                    await question.answered.wait()
        if not all(question.answered.is_set() and not question.failed for question in questions.values()):
            raise Unavailable("the database in which the token is to be looked up cannot be reached just now")
        return {key: question.identity for key, question in questions.items() if question.identity is not None}

    @property
    def changes(self) -> int:
        return self._changes.count

    @property
    def checked(self) -> float:
        return self._changes.checked

    async def wait_changes(self) -> Collection[bytes] | None:
        return await self._changes.wait()

    async def run(self) -> None:
        """Answer questions until cancelled."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            questions, self._questions = self._questions, {}
            await self._answer(questions)

    async def _answer(self, questions: dict[bytes, _Question]) -> None:
        identities: dict[bytes, Identity] = {}
        failed = True
        try:
            identities = await self._ask(list(questions))
            failed = False
        except OUTAGE as error:
            text = f"{type(error).__name__}: {error}"
            if self._works:
                self._failures.log(trio.current_time(), "roles cannot be looked up", kind=text, error=text)
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._mistakes.log(trio.current_time(), "looking roles up failed", exception=error)
        finally:
            self._works = not failed
            for key, question in questions.items():
                question.identity = identities.get(key)
                question.failed = failed
                question.answered.set()

    async def _ask(self, keys: Sequence[bytes]) -> dict[bytes, Identity]:
        roles = map(role_from_row, await self._inquiry.fetch(_FIND, keys, timeout=PATIENCE))
        return {role.key: Identity(role.client_id, role.grants, None, role=role.key) for role in roles}
