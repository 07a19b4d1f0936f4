"""The end of the log, as this replica has applied it: delivers entries in order, and requests missing ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence

import trio

from ...log import Entry, Follower, LogPage, RecentMessages
from ..notifications.encryption import random_keys
from .fingerprints import Fingerprints

_MAX_WAITING = 16
"""Batches that may wait for the entries before them. Further ones are read from the table again."""


class LogTail:
    """Owns `applied` and the recent entries. The writer, the listener and the reader feed it. It is synchronous.

    Entries may arrive repeatedly, and batches in any order. Each entry is delivered once, in the order of the log.
    While the log is not trusted, arriving entries only raise `announced`: they may come from a database that was set
    back, and the log is recognised by the entries that were applied.
    """

    def __init__(self, recent: RecentMessages) -> None:
        self.recent = recent
        self.fingerprints = Fingerprints(recent)
        """The fingerprints by which the log is recognised."""
        self.trusted = False
        """Whether the database is known to have the log that was followed."""
        self.epoch = ""
        self.server: object = None
        """The start time of the server that was found to have the log. It identifies the server."""
        self.keys = random_keys()
        """The keys of the log's notifications."""
        self.clock_offset = 0.0
        """Seconds by which the database's clock is ahead of Trio's."""
        self.applied = 0
        self.floor = 1
        self.generation = 0
        """Changes when another log, or another part of it, may have replaced what was applied, and with an erasure."""
        self.announced = 0
        """The newest seq that is known to be committed."""
        self.jumps = 0
        """How often entries had to be read, because later ones or only their position arrived."""
        self._expected = 0
        self._read_until = 0
        """Entries up to this seq are only applied if they were read from the table after the newest erasure."""
        self._waiting: deque[Sequence[Entry]] = deque()
        self._follower: Follower | None = None
        self._missing = trio.Event()
        self._restarted = trio.Event()

    def follow(self, follower: Follower) -> None:
        """Deliver everything to `follower` from now on."""
        self._follower = follower

    def trust(self) -> None:
        """The database has the log that was followed: continue."""
        self.trusted = True
        self._request_missing()

    def distrust(self) -> None:
        """The database may have another log: drop waiting entries, and ignore pages that were requested before."""
        self.trusted = False
        self.generation += 1
        self._waiting.clear()

    def restart(
        self, epoch: str, applied: int, floor: int, lost: str = "epoch", *, fingerprint: bytes | None = None
    ) -> None:
        """Continue after the seq `applied`, whose entry has this fingerprint. Everything before is forgotten.

        `lost` tells the follower why entries may be missing.
        """
        if epoch != self.epoch:
            self._read_until = 0
        self.epoch = epoch
        self.applied = self.announced = self._expected = applied
        self.floor = floor
        self.generation += 1
        self._waiting.clear()
        self.recent.clear(applied)
        self.fingerprints.begin(applied, fingerprint)
        if self._follower is not None:
            self._follower.restart(applied, lost)
        self._restarted.set()
        self._restarted = trio.Event()

    def begin_erasure(self, head: int) -> int:
        """Entries up to `head` were erased: apply nothing of them that was sent or read before this call.

        Returns the lowest seq that is in memory, or the next one to be applied.
        """
        assert self._follower is not None
        self.generation += 1
        self._waiting.clear()
        self._read_until = head
        waiting = self._follower.begin_erasure()
        self._request_missing()
        return self.recent.first if waiting is None else min(waiting, self.recent.first)

    def erase(self, seqs: Collection[int]) -> Iterator[None]:
        """Erase these entries from memory, in steps."""
        assert self._follower is not None
        self.recent.erase(seqs)
        yield from self._follower.erase(seqs)

    async def wait_epoch(self, other_than: str = "") -> None:
        """Wait until the log is open in another epoch than this one."""
        while self.epoch == other_than:
            await self._restarted.wait()

    def broadcast(self, entry: Entry) -> None:
        """Deliver an ephemeral message, which is not in the log."""
        assert self._follower is not None
        self._follower.broadcast(entry)

    def database_time(self) -> float:
        """The time of the database's clock, in seconds since 1970. All replicas agree on it to a few milliseconds."""
        return trio.current_time() + self.clock_offset

    # Committed entries

    def announce(self, last: int) -> None:
        """Everything up to `last` is committed. Entries that were not offered have to be read."""
        if last > self.announced:
            self.announced = last
            self._request_missing()

    def expect(self, last: int) -> None:
        """Everything up to `last` is committed by the own writer, which is about to offer it."""
        self._expected = max(self._expected, last)

    def resolve(self) -> None:
        """The writer has offered its entries, or never will."""
        self.announce(self._expected)

    def offer(self, entries: Sequence[Entry]) -> None:
        """Accept consecutive entries: they are applied if they continue the log, and wait otherwise."""
        if entries[0].seq <= self._read_until:
            self.announce(entries[-1].seq)
        else:
            self._accept(entries)

    def _accept(self, entries: Sequence[Entry]) -> None:
        last = entries[-1].seq
        if last <= self.applied:
            return
        if not self.trusted:
            self.announced = max(self.announced, last)
            return
        if entries[0].seq > self.applied + 1:
            self._keep_waiting(entries)
            return
        self._apply(entries)
        while self._waiting and self._waiting[0][0].seq <= self.applied + 1:
            kept = self._waiting.popleft()
            if kept[-1].seq > self.applied:
                self._apply(kept)
        self._request_missing()

    def fill(self, page: LogPage, generation: int) -> None:
        """Accept a page that was read for `missing` in that generation."""
        if generation != self.generation:
            return
        if page.after > self.applied:
            # Retention has overtaken this replica, or a deleted range was repaired before which it had stopped.
            announced = self.announced
            floor = page.after + 1 if page.lost == "retention" else self.floor
            self.restart(self.epoch, page.after, floor, page.lost)
            self.announced = max(announced, page.after)
        if page.entries:
            self._accept(page.entries)
        elif page.last <= self.applied:
            self.announced = self.applied  # the announced entries are gone: the log was set back

    # Missing entries

    def missing(self) -> tuple[int, int] | None:
        """The range (after, up to) of entries to be read; None if none are missing."""
        if not self.trusted:
            return None
        last = self._waiting[0][0].seq - 1 if self._waiting else self.announced
        return (self.applied, last) if last > self.applied else None

    async def wait_missing(self) -> tuple[int, int]:
        """Wait until entries are missing."""
        while (gap := self.missing()) is None:
            self._missing = trio.Event()
            await self._missing.wait()
        return gap

    def _request_missing(self) -> None:
        if self.missing() is not None and not self._missing.is_set():
            self.jumps += 1
            self._missing.set()

    def _keep_waiting(self, entries: Sequence[Entry]) -> None:
        waiting = self._waiting
        if len(waiting) < _MAX_WAITING and (not waiting or waiting[-1][-1].seq < entries[0].seq):
            waiting.append(entries)
        self.announced = max(self.announced, entries[-1].seq)
        self._request_missing()

    def _apply(self, entries: Sequence[Entry]) -> None:
        behind = self.applied + 1 - entries[0].seq
        if behind:
            entries = entries[behind:]
        self.recent.append(entries)
        self.fingerprints.note(entries)
        self.applied = last = entries[-1].seq
        if last > self.announced:
            self.announced = last
        assert self._follower is not None
        self._follower.apply(entries)
