"""The table of memberships as the schema has it, in memory, for the simulation."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import structs

from catbus.presence.batches import PresenceBatch
from catbus.presence.own_members import Membership, MembershipState, Place
from catbus.presence.table_follower import ChangesPage, PatternPage, ReadChanges, ReadPattern
from catbus.protocol.channels import matches

FRESH = 12.0
"""Seconds for which the memberships of a replica count after a heartbeat."""
KEPT = 60.0
"""Seconds for which ended memberships are kept, and replicas without a heartbeat."""
PAGE = 2
"""Rows of a page."""
ENDED_AT_ONCE = 2


@dataclass
class _Replica:
    last_heartbeat: float
    batch: int
    expelled: bool = False


class SimulatedTable:
    """Each method is one transaction. The versions survive a crash, and nothing else."""

    def __init__(self) -> None:
        self.version = 0
        self.available = True
        self._tables = 0
        self.crash()

    def crash(self) -> None:
        """The server ends without a shutdown: the table is empty, and numbers of the sequence are skipped."""
        self.incarnation = ""
        self.purged = 0
        self.rows: dict[Place, tuple[Membership, float]] = {}
        self.replicas: dict[str, _Replica] = {}
        self.version += 32

    def write(self, replica: str, batch: PresenceBatch, now: float) -> tuple[int | None, bool]:
        """`catbus.write_presence`."""
        known = self.replicas.get(replica)
        if batch.begins:
            self._begin_table()
            if known is not None and known.batch >= batch.number:
                return None, False
            self.replicas[replica] = _Replica(now, batch.number)
        elif known is None or known.expelled or known.batch >= batch.number:
            return None, False
        else:
            known.last_heartbeat, known.batch = now, batch.number
        first = self._next_version()
        for membership in batch.memberships:
            self._put(membership, now)
        more = False
        if batch.ends_below is not None:
            more = self._end(replica, batch.ends_below or first, now)
        return first, more

    def purge(self, now: float) -> None:
        """`catbus.purge_presence`."""
        old = [
            place
            for place, (row, changed) in self.rows.items()
            if row.state is not MembershipState.PRESENT and changed < now - KEPT
        ]
        for place in old:
            row, _ = self.rows.pop(place)
            self.purged = max(self.purged, row.version)
        for name, replica in list(self.replicas.items()):
            if replica.last_heartbeat < now - KEPT:
                replica.expelled = True
                if not self._end(name, self.version + 1, now):
                    del self.replicas[name]

    def answer(self, request: ReadChanges | ReadPattern, now: float) -> ChangesPage | PatternPage:
        """`catbus.presence_changes` or `catbus.presence_page`."""
        rows = [row for row, _ in self.rows.values()]
        if isinstance(request, ReadChanges):
            return self._changes(rows, request, now)
        found = sorted(
            (
                row
                for row in rows
                if row.state is MembershipState.PRESENT
                and matches(request.pattern, row.channel)
                and (request.after is None or row.place > request.after.place)
            ),
            key=lambda row: row.place,
        )
        return PatternPage(self.incarnation, found[:PAGE], full=len(found) >= PAGE)

    def _changes(self, rows: list[Membership], request: ReadChanges, now: float) -> ChangesPage:
        found = sorted(
            (
                row
                for row in rows
                if request.after is not None
                and row.version > request.after
                and any(matches(pattern, row.channel) for pattern in request.patterns)
            ),
            key=lambda row: row.version,
        )
        fresh = {
            name
            for name, replica in self.replicas.items()
            if replica.last_heartbeat > now - FRESH and not replica.expelled
        }
        newest = max([self.purged, *(row.version for row in rows)])
        return ChangesPage(self.incarnation, self.purged, newest, fresh, found[:PAGE], full=len(found) >= PAGE)

    def _begin_table(self) -> None:
        if not self.incarnation:
            self._tables += 1
            self.incarnation = f"table {self._tables}"

    def _next_version(self) -> int:
        self.version += 1
        return self.version

    def _put(self, membership: Membership, now: float) -> None:
        self.rows[membership.place] = structs.replace(membership, version=self._next_version()), now

    def _end(self, replica: str, below: int, now: float) -> bool:
        """`catbus.end_presence`. Return whether more may be left."""
        found = [
            row
            for row, _ in self.rows.values()
            if row.replica == replica and row.state is MembershipState.PRESENT and row.version < below
        ]
        for row in found[:ENDED_AT_ONCE]:
            self._put(structs.replace(row, state=MembershipState.ENDED, info=None), now)
        return len(found) >= ENDED_AT_ONCE
