"""A log in memory, which ends with its process: for embedding, tests and single nodes without a database."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import trio

from ..protocol.channels import ERASED, matches
from .append_queue import AppendQueue
from .interface import (
    KEY_REUSED,
    MAX_PENDING,
    MAX_PENDING_BYTES,
    MAX_RETAINED_BYTES,
    OVERLOADED,
    SHUTTING_DOWN,
    UNDECIDED,
    Append,
    Committed,
    Entry,
    Follower,
    LogPage,
    Outcome,
    Rejected,
    Resumption,
    RetainedPage,
    rejection_of,
)
from .recent_messages import ENTRY_OVERHEAD, RecentMessages
from .retained_messages import RetainedMessages

_BATCH, _BATCH_SIZE = 1000, 4 << 20
"""Entries, and their bytes, that are committed and applied at once."""
KEY_OVERHEAD = 200
"""Bytes of memory for the key of an entry, roughly."""


class MemoryLog:
    """A `Log` of `limit_bytes` in memory: the oldest messages are dropped.

    A retry is recognised while its original is in the log. `clock` is used for `Entry.at` only; its unit is seconds
    since 1970.
    """

    def __init__(
        self,
        limit_bytes: int = 64 << 20,
        clock: Callable[[], float] = time.time,
        *,
        pending: int = MAX_PENDING,
        pending_bytes: int = MAX_PENDING_BYTES,
        retained_bytes: int = MAX_RETAINED_BYTES,
    ) -> None:
        self._recent = RecentMessages(limit_bytes, overhead=ENTRY_OVERHEAD + KEY_OVERHEAD)
        self._retained = RetainedMessages(retained_bytes)
        self._keys: deque[tuple[bytes, int] | None] = deque()
        """The key of each entry."""
        self._seqs: dict[tuple[bytes, int], int] = {}
        self._clock = clock
        self._at = 0
        self._epoch = ""
        self._pending = AppendQueue(pending, pending_bytes)
        self._follower: Follower | None = None
        self._work = trio.Event()
        self._open = trio.Event()
        self._running = False
        self._stopped = False

    @property
    def epoch(self) -> str:
        return self._epoch

    @property
    def applied(self) -> int:
        return self._recent.last

    @property
    def floor(self) -> int:
        return self._recent.first

    @property
    def memory_floor(self) -> int:
        return self._recent.first

    @property
    def available(self) -> bool:
        return self._running

    @property
    def problem(self) -> str:
        return "" if self._running else "database"

    @property
    def allowance(self) -> int:
        return self._pending.allowance(_BATCH_SIZE)

    def submit(self, append: Append) -> None:
        """Submit a message to be appended: `run` appends it with all others that have been submitted by then."""
        if self._stopped:
            append.settle(append, rejection_of(append, SHUTTING_DOWN))
        elif self._pending.offer(append):
            self._work.set()
        else:
            append.settle(append, rejection_of(append, OVERLOADED))

    def withdraw(self, client: Hashable, unwanted: Callable[[Append], bool], rejected: Rejected) -> None:
        for append in self._pending.withdraw(unwanted, client):
            append.settle(append, rejection_of(append, rejected))

    def broadcast(self, entry: Entry) -> None:
        """There are no other replicas."""

    async def read(self, after: int, *, rows: int = 1000, size: int = 1 << 20) -> LogPage:
        await trio.lowlevel.checkpoint()
        page = self._recent.since(max(after, self.floor - 1), rows, size)
        assert page is not None
        return page

    async def history(self, pattern: str, *, before: int | None, limit: int) -> tuple[Sequence[Entry], bool]:
        seq = self.applied if before is None else min(before - 1, self.applied)
        found: list[Entry] = []
        while seq >= self.floor and len(found) <= limit:
            await trio.lowlevel.checkpoint()
            more, seq = self._recent.search(pattern, seq, self.floor, limit + 1 - len(found))
            found += more
        return found[:limit][::-1], len(found) > limit

    async def retained(
        self,
        pattern: str,
        *,
        after: str | None,
        until: int,
        rows: int = 1000,
        size: int = 1 << 20,
        newer: bool = False,
    ) -> RetainedPage:
        await trio.lowlevel.checkpoint()
        head = self.applied
        return self._retained.page(pattern, after, head if newer else until, rows, size, head)

    async def erase(self, pattern: str, *, sender: str | None = None, before: int | None = None) -> int:
        """As in `Log`. It never fails, and is complete as soon as it begins; then it waits for the follower."""
        await trio.lowlevel.checkpoint()
        page = self._recent.since(self.floor - 1, len(self._recent), self._recent.size)
        assert page is not None

        def unwanted(entry: Entry) -> bool:
            return (sender is None or entry.sender == sender) and (before is None or entry.at < before)

        seqs = {entry.seq for entry in page.entries if matches(pattern, entry.channel) and unwanted(entry)}
        seqs |= self._retained.erase(pattern, unwanted)
        if seqs and self._follower is not None:
            self._follower.begin_erasure()
            self._recent.erase(seqs)
            for _ in self._follower.erase(seqs):
                await trio.lowlevel.checkpoint()
        return len(seqs)

    def resume(self, since: int, epoch: str | None) -> Resumption:
        if epoch is None or epoch == self._epoch:
            return Resumption(since)
        return Resumption(0, "epoch")

    def report(self) -> dict[str, object]:
        retained = self._retained
        return {"size": self._recent.size, "retained": {"messages": len(retained), "bytes": retained.size}}

    async def finish(self) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_open(self) -> None:
        await self._open.wait()

    async def run(
        self,
        follower: Follower,
        describe: Callable[[], Mapping[str, Any]] = dict,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        self._stopped, self._running = False, True
        self._follower = follower
        self._epoch = self._epoch or secrets.token_hex(8)
        follower.restart(self.applied)
        self._open.set()
        task_status.started()
        try:
            while True:
                await self._work.wait()
                while self._pending:
                    self._commit(follower)
                    await trio.lowlevel.checkpoint()
                self._work = trio.Event()
        finally:
            self._stopped, self._running = True, False
            for append in self._pending.expire():
                append.settle(append, rejection_of(append, SHUTTING_DOWN))

    def _commit(self, follower: Follower) -> None:
        """Append a batch, apply it, and settle its messages, in this order."""
        batch = self._pending.take(_BATCH, _BATCH_SIZE)
        self._at = max(self._at, int(self._clock() * 1000))
        entries: list[Entry] = []
        outcomes = [self._take(append, entries) for append in batch]
        if entries:
            for _ in range(self._recent.append(entries)):
                key = self._keys.popleft()
                if key is not None:
                    del self._seqs[key]
            follower.apply(entries)
        for append, outcome in zip(batch, outcomes, strict=True):
            append.settle(append, outcome)

    def _take(self, append: Append, entries: list[Entry]) -> Outcome:
        """Give one message its seq, unless it is in the log already."""
        key = None if append.producer is None else (append.producer, append.number)
        if key is not None:
            seq = self._seqs.get(key)
            if seq is not None:
                known = self._recent[seq] if seq <= self.applied else entries[seq - self.applied - 1]
                same = known.channel == ERASED or (known.channel, known.payload) == (append.channel, append.payload)
                return Committed(seq, duplicate=True) if same else KEY_REUSED
            if append.retain and (held := self._retained.find(append.channel, key)) is not None:
                # Its entry was dropped, and it is still the retained message.
                return Committed(held.seq, duplicate=True) if held.payload == append.payload else KEY_REUSED
            if append.after is not None and append.after < self.floor - 1:
                return UNDECIDED
        if append.retain and (rejected := self._retained.check(append)) is not None:
            return rejected
        seq = self.applied + len(entries) + 1
        entry = Entry(seq, self._at, append.channel, append.payload, append.sender, append.origin, append.retain)
        entries.append(entry)
        self._keys.append(key)
        if key is not None:
            self._seqs[key] = seq
        if append.retain:
            self._retained.replace(entry, key)
        return Committed(seq)
