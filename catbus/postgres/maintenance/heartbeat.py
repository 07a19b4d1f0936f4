"""Heartbeats: every few seconds each replica writes a report of itself into a small table, and reads those of all."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import msgspec
import trio

from ..access.asyncpg_bridge import DatabaseConnection

HEARTBEAT_INTERVAL = 5.0
"""Seconds between two heartbeats of a replica."""

_HEARTBEAT = "SELECT id, age, report, queue, roles FROM catbus.heartbeat($1, $2)"


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """The report of a replica that sent a heartbeat within the last minute. `age` is in seconds."""

    id: str
    age: float
    report: Mapping[str, Any]


class Heartbeat:
    """Sends this replica's heartbeats, and keeps what the newest one has returned."""

    def __init__(self) -> None:
        self.id = secrets.token_hex(8)
        self.replicas: Sequence[ReplicaReport] = ()
        """The replicas with a recent heartbeat; this one comes first."""
        self.queue = 0.0
        """How much of the database's notification queue was in use, from 0 to 1."""
        self.roles = 0
        """The number of roles."""
        self._next = -inf

    async def send(self, connection: DatabaseConnection, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Send a heartbeat with the report that `describe` returns, if one is due.

        The `id` in the report identifies the replica.
        """
        now = trio.current_time()
        if now < self._next:
            return
        report = describe()
        self.id = report.get("id", self.id)
        rows = await connection.fetch(_HEARTBEAT, self.id, msgspec.json.encode(report).decode())
        self._next = now + HEARTBEAT_INTERVAL
        self.replicas = [ReplicaReport(name, age, _decode(text)) for name, age, text, _, _ in rows]
        _, _, _, self.queue, self.roles = rows[0]


def _decode(report: str) -> Mapping[str, Any]:
    """The report of a replica, which may run another release."""
    try:
        return msgspec.json.decode(report, type=dict[str, Any])
    except msgspec.DecodeError:
        return {}
