"""The harness of a log under test: a follower and a publisher that record, and check the order and the outcomes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from catbus.log import Append, Committed, Entry, Log, Outcome

TEST_TIMEOUT = 20
"""Seconds that a test waits for a condition. Generous, because the machines that run the tests are shared."""


class RecordingFollower:
    """A follower that records the entries that it receives, and checks their order."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.messages: list[Entry] = []
        """The ephemeral messages."""
        self.restarts: list[int] = []
        self.erased: set[int] = set()
        self.applied: int | None = None
        self._changed = trio.Event()

    def apply(self, entries: Sequence[Entry]) -> None:
        assert entries, "an empty batch was applied"
        for entry in entries:
            assert self.applied is not None, "a batch was applied before the follower was opened"
            assert entry.seq == self.applied + 1, f"{entry.seq} after {self.applied}"
            self.applied = entry.seq
        self.entries.extend(entries)
        self._wake()

    def restart(self, applied: int, lost: str = "epoch") -> None:
        self.restarts.append(applied)
        self.applied = applied
        self._wake()

    def broadcast(self, entry: Entry) -> None:
        assert entry.seq == 0, "an ephemeral message has no place in the log"
        self.messages.append(entry)
        self._wake()

    def begin_erasure(self) -> int | None:
        return None

    def erase(self, seqs: Collection[int]) -> Iterator[None]:
        self.erased.update(seqs)
        self._wake()
        yield

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait_until(self, reached: Callable[[RecordingFollower], bool]) -> None:
        with trio.fail_after(TEST_TIMEOUT):
            while not reached(self):
                await self._changed.wait()

    async def wait_for(self, seq: int) -> None:
        await self.wait_until(lambda self: (self.applied or 0) >= seq)

    @property
    def texts(self) -> list[str]:
        return [entry.payload.decode() for entry in self.entries]


class Publisher:
    """A publisher that records the outcome of each message. A second outcome for the same message is an error."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.outcomes: dict[Append, Outcome] = {}
        self.submitted: list[Append] = []
        self._changed = trio.Event()

    def submit(self, channel: str, payload: bytes, **fields: Any) -> Append:
        append = Append(channel, payload, self._settle, **fields)
        self.submitted.append(append)
        self.log.submit(append)
        return append

    def _settle(self, append: Append, outcome: Outcome) -> None:
        assert append not in self.outcomes, "a publish was settled twice"
        self.outcomes[append] = outcome
        self._changed.set()
        self._changed = trio.Event()

    async def wait(self, *appends: Append) -> list[Outcome]:
        """Wait for the outcomes of these appends, or of all so far. Returns them in the order of submission."""
        wanted = appends or tuple(self.submitted)
        with trio.fail_after(TEST_TIMEOUT):
            while not all(append in self.outcomes for append in wanted):
                await self._changed.wait()
        return [self.outcomes[append] for append in wanted]

    async def publish(self, channel: str, payload: bytes, **fields: Any) -> Outcome:
        (outcome,) = await self.wait(self.submit(channel, payload, **fields))
        return outcome

    async def publish_seq(self, channel: str, payload: bytes, **fields: Any) -> int:
        """Publish a message that must be committed. Returns its seq."""
        outcome = await self.publish(channel, payload, **fields)
        assert isinstance(outcome, Committed), outcome
        return outcome.seq


@asynccontextmanager
async def running(log: Log) -> AsyncIterator[tuple[RecordingFollower, Publisher]]:
    """Run a log, with a follower and a publisher, until the block ends."""
    recorder, publisher = RecordingFollower(), Publisher(log)
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run, recorder)
        with trio.fail_after(TEST_TIMEOUT):
            await log.wait_open()
        yield recorder, publisher
        nursery.cancel_scope.cancel()
    assert len(publisher.outcomes) == len(publisher.submitted), "a publish was never settled"


async def read_all(log: Log, after: int = 0, **limits: int) -> list[Entry]:
    """Read all entries up to `applied`, page by page."""
    entries: list[Entry] = []
    while after < log.applied:
        page = await log.read(after, **limits)
        assert page.last > after, "a page made no progress"
        assert page.after == after, "entries are missing"
        assert [entry.seq for entry in page.entries] == list(range(after + 1, page.last + 1))
        entries.extend(page.entries)
        after = page.last
    return entries


async def wait_read(log: Log, expected: Sequence[Entry]) -> None:
    """Wait until the log reads as expected: other replicas apply an erasure after its commit."""
    with trio.fail_after(TEST_TIMEOUT):
        while await read_all(log) != list(expected):
            await trio.sleep(0.01)
