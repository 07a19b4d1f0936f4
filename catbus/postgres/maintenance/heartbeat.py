"""Which replicas share the log: each says every few seconds that it is there, and how it is, in a small table."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import msgspec
import trio

from ..access.asyncpg_bridge import DatabaseConnection

PACE = 5.0
"""Seconds between two times that a replica says that it is there."""

_BEAT = "SELECT id, age, report, queue, roles FROM catbus.heartbeat($1, $2)"


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """One that has said that it is there within the last minute, `silent` seconds before we looked."""

    id: str
    silent: float
    report: Mapping[str, Any]


class Heartbeat:
    """Calls our own name and hears those of the others. `describe` gives what there is to say of this replica."""

    def __init__(self, describe: Callable[[], Mapping[str, Any]]) -> None:
        self.id = secrets.token_hex(8)
        self.replicas: Sequence[ReplicaReport] = ()
        """Who was there when it was called last; we come first."""
        self.queue = 0.0
        """How much of the database's notification queue was in use then, from 0 to 1."""
        self.roles = 0
        """How many roles there were."""
        self._describe = describe
        self._next = -inf

    async def call(self, connection: DatabaseConnection) -> None:
        """Call it, unless that was a moment ago."""
        now = trio.current_time()
        if now < self._next:
            return
        report = msgspec.json.encode(self._describe()).decode()
        rows = await connection.fetch(_BEAT, self.id, report)
        self._next = now + PACE
        self.replicas = [ReplicaReport(name, silent, _read(text)) for name, silent, text, _, _ in rows]
        _, _, _, self.queue, self.roles = rows[0]


def _read(report: str) -> Mapping[str, Any]:
    """What a replica has said, perhaps one of another release."""
    try:
        return msgspec.json.decode(report, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}
