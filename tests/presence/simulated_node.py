"""A replica on a virtual clock: what `StoredPresence` consists of, without Trio."""

from __future__ import annotations

from math import inf

from catbus.postgres.presence.presence_reader import POLL_INTERVAL
from catbus.postgres.presence.presence_writer import HEARTBEAT_INTERVAL
from catbus.postgres.presence.stored_presence import WRITE_SLACK
from catbus.presence import Member
from catbus.presence.batches import PresenceBatch, PresenceBatches
from catbus.presence.mirror import Mirror
from catbus.presence.own_members import OwnMembers
from catbus.presence.table_follower import ReadChanges, ReadingSteps, ReadPattern, TableFollower

from .simulated_table import SimulatedTable

GRACE = 10.0
PURGE_INTERVAL = 20.0


class SimulatedNode:
    """A replica. The caller calls `write` and `read` at each tick in which it reaches the table."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.connected = True
        self.resumes_at = 0.0
        """When it has connected again after an outage of the database."""
        self.deaf = False
        """Whether notifications are lost."""
        self.pages = 100
        """Pages that are read in a tick."""
        self.own = OwnMembers(name, max_ended=1)
        self.mirror = Mirror(GRACE + WRITE_SLACK)
        self.hinted = False
        self._batches = PresenceBatches(self.own, size=2)
        self._follower = TableFollower(self.mirror)
        self._interrupted = False
        self._next_write = self._next_read = self._next_purge = 0.0
        self._due: float | None = None
        self._steps: ReadingSteps | None = None
        self._request: ReadChanges | ReadPattern | None = None
        self._began = 0.0

    def present(self, pattern: str) -> list[Member]:
        found: list[Member] = []
        more, after = True, None
        while more:
            page, more = self.mirror.present(pattern, after, 2)
            found += page
            after = found[-1].position if found else None
        assert [each.position for each in found] == sorted({each.position for each in found})
        return found

    def cut(self) -> None:
        """The connection to the table is lost."""
        if self.connected:
            self.connected = False
            self._interrupted = True
            self._steps = None

    def next_time(self) -> float:
        """The time at which something is due; 0 if it is now."""
        if self.own.unwritten or self._batches.unfinished or self.mirror.unread or self._steps or self.hinted:
            return 0.0
        return min(
            self._next_write if len(self.own) else inf,
            self._next_read if self.mirror else inf,
            inf if self._due is None else self._due,
        )

    def write(self, table: SimulatedTable, now: float, *, lost: str = "") -> PresenceBatch | None:
        """Write what has to be written, if anything. `lost`: what does not arrive, the `batch` or the `reply`."""
        has_work = self.own.unwritten or self._batches.unfinished
        if not has_work and not (len(self.own) and now >= self._next_write):
            return None
        self._next_write = now + HEARTBEAT_INTERVAL
        batch = self._batches.take()
        if lost:
            self._batches.give_back(batch)
            self.cut()
            if lost == "batch":
                return batch
        first, more = table.write(self.name, batch, now)
        if lost:
            return batch
        if first is None:
            self._batches.note_rejected(batch)
        else:
            self._batches.note_written(batch, first, complete=not more)
        if now >= self._next_purge:
            self._next_purge = now + PURGE_INTERVAL
            table.purge(now)
        return batch

    def read(self, table: SimulatedTable, now: float) -> None:
        """Read some pages if it is time to."""
        if self._steps is None:
            is_due = self._due is not None and self._due <= now
            if not (self.hinted or is_due or self.mirror.unread or now >= self._next_read):
                return
            if self._interrupted:
                self._interrupted = False
                self._follower.resume()
            self.hinted, self._began, self._next_read = False, now, now + POLL_INTERVAL
            self._steps = self._follower.read(now)
            self._request = next(self._steps, None)
        for _ in range(self.pages):
            if self._request is None:
                self._finish()
                return
            try:
                self._request = self._steps.send(table.answer(self._request, now))
            except StopIteration:
                self._request = None

    def _finish(self) -> None:
        self._steps = None
        while (due := self.mirror.advance(self._began)) == self._began:
            pass
        self._due = due
