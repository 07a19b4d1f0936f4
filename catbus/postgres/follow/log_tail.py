"""The end of the log as this replica has applied it: what continues it is handed on, what is missing is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import trio

from ...log import Entry, Follower, LogPage, RecentMessages
from ..notifications.encryption import random_keys
from .fingerprints import Fingerprints

_AHEAD = 16
"""Batches that may wait for the rows before them; more are read from the table again."""


class LogTail:
    """Owns `applied`, and what is recent. Fed by the writer, the listener and the reader; synchronous.

    Entries may come more than once and in any order of batches: each is handed on once, in the order of the log. While
    nobody trusts the log they only announce themselves: they may come from a database that was set back, and what was
    applied would be what the log is recognised by.
    """

    def __init__(self, recent: RecentMessages) -> None:
        self.recent = recent
        self.marks = Fingerprints(recent)
        """By what the log is recognised."""
        self.trusted = False
        """Whether the database's log is known to be the one that was followed."""
        self.epoch = ""
        self.server: object = None
        """When the server was started that was found to have the log: by this it is known from any other one."""
        self.seal = random_keys()
        """The secret of the log."""
        self.clock_offset = 0.0
        """Seconds by which the database's clock is ahead of Trio's."""
        self.applied = 0
        self.floor = 1
        self.generation = 0
        """Changes when another log, or another stretch of it, takes the place of what was here, or might."""
        self.announced = 0
        """The newest seq that is known to be committed."""
        self.jumps = 0
        """How often entries had to be read because news of later ones came first, or came without them."""
        self._expected = 0
        self._ahead: deque[Sequence[Entry]] = deque()
        self._follower: Follower | None = None
        self._missing = trio.Event()
        self._restarted = trio.Event()

    def follow(self, follower: Follower) -> None:
        """Hand everything to `follower` from now on."""
        self._follower = follower

    def trust(self) -> None:
        """The database has the log that was followed."""
        self.trusted = True
        self._ask()

    def distrust(self) -> None:
        """It may have another one. What was asked for until now is not taken any more, nor what waits to be applied."""
        self.trusted = False
        self.generation += 1
        self._ahead.clear()

    def restart(self, epoch: str, applied: int, floor: int, lost: str = "epoch", *, mark: bytes | None = None) -> None:
        """Go on after `applied`, the entry with this `mark`; what was here belongs to the past.

        `lost` is for whoever follows.
        """
        self.epoch = epoch
        self.applied = self.announced = self._expected = applied
        self.floor = floor
        self.generation += 1
        self._ahead.clear()
        self.recent.clear(applied)
        self.marks.begin(applied, mark)
        if self._follower is not None:
            self._follower.restart(applied, lost)
        self._restarted.set()
        self._restarted = trio.Event()

    async def wait_epoch(self, other_than: str = "") -> None:
        """Wait until the log has been opened, in another epoch than this."""
        while self.epoch == other_than:
            await self._restarted.wait()

    def broadcast(self, entry: Entry) -> None:
        """Hand on an ephemeral message, which is no part of the log."""
        assert self._follower is not None
        self._follower.broadcast(entry)

    def database_time(self) -> float:
        """What the database's clock shows, in seconds since 1970. All replicas agree on it to some milliseconds."""
        return trio.current_time() + self.clock_offset

    # What is known to be there

    def announce(self, last: int) -> None:
        """Everything up to `last` is committed; what has not been offered is to be read."""
        if last > self.announced:
            self.announced = last
            self._ask()

    def expect(self, last: int) -> None:
        """Everything up to `last` is committed by our own writer, which is about to offer it."""
        self._expected = max(self._expected, last)

    def resolve(self) -> None:
        """The writer has offered what it had, or never will."""
        self.announce(self._expected)

    def offer(self, entries: Sequence[Entry]) -> None:
        """Take entries that follow on one another: what continues the log is applied, what jumps has to wait."""
        last = entries[-1].seq
        if last <= self.applied:
            return
        if not self.trusted:
            self.announced = max(self.announced, last)
            return
        if entries[0].seq > self.applied + 1:
            self._keep(entries)
            return
        self._apply(entries)
        while self._ahead and self._ahead[0][0].seq <= self.applied + 1:
            kept = self._ahead.popleft()
            if kept[-1].seq > self.applied:
                self._apply(kept)
        self._ask()

    def fill(self, page: LogPage, generation: int) -> None:
        """Take what was read from the table for `missing`, in that generation."""
        if generation != self.generation:
            return
        if page.after > self.applied:
            # Retention has overtaken this replica, or a hole was repaired that it had stopped before.
            announced = self.announced
            floor = page.after + 1 if page.lost == "retention" else self.floor
            self.restart(self.epoch, page.after, floor, page.lost)
            self.announced = max(announced, page.after)
        if page.entries:
            self.offer(page.entries)
        elif page.last <= self.applied:
            self.announced = self.applied  # what was announced is gone: the log was set back

    # What is to be read

    def missing(self) -> tuple[int, int] | None:
        """Between which seqs (after, up to) entries are to be read; None when there are none."""
        if not self.trusted:
            return None
        last = self._ahead[0][0].seq - 1 if self._ahead else self.announced
        return (self.applied, last) if last > self.applied else None

    async def wait_missing(self) -> tuple[int, int]:
        """Wait until something is missing."""
        while (gap := self.missing()) is None:
            self._missing = trio.Event()
            await self._missing.wait()
        return gap

    def _ask(self) -> None:
        if self.missing() is not None and not self._missing.is_set():
            self.jumps += 1
            self._missing.set()

    def _keep(self, entries: Sequence[Entry]) -> None:
        ahead = self._ahead
        if len(ahead) < _AHEAD and (not ahead or ahead[-1][-1].seq < entries[0].seq):
            ahead.append(entries)
        self.announced = max(self.announced, entries[-1].seq)
        self._ask()

    def _apply(self, entries: Sequence[Entry]) -> None:
        behind = self.applied + 1 - entries[0].seq
        if behind:
            entries = entries[behind:]
        self.recent.append(entries)
        self.marks.note(entries)
        self.applied = last = entries[-1].seq
        if last > self.announced:
            self.announced = last
        assert self._follower is not None
        self._follower.apply(entries)
