"""A log under test: who follows it, who publishes to it, and how often each message was answered."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from catbus.log import Append, Committed, Entry, Log, Outcome

PATIENCE = 20
"""Seconds after which a test has failed: the machines that run this are shared."""


class Recorder:
    """A follower that keeps what it was handed, and knows when that was out of order."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.messages: list[Entry] = []
        """The ephemeral ones."""
        self.restarts: list[int] = []
        self.applied: int | None = None
        self._news = trio.Event()

    def apply(self, entries: Sequence[Entry]) -> None:
        assert entries, "applied nothing"
        for entry in entries:
            assert self.applied is not None, "applied before it was opened"
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

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def wait_until(self, reached: Callable[[Recorder], bool]) -> None:
        with trio.fail_after(PATIENCE):
            while not reached(self):
                await self._news.wait()

    async def wait_for(self, seq: int) -> None:
        await self.wait_until(lambda self: (self.applied or 0) >= seq)

    @property
    def texts(self) -> list[str]:
        return [entry.payload.decode() for entry in self.entries]


class Publisher:
    """Publishes, and keeps each answer: a second one to the same message is an error."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.answers: dict[Append, Outcome] = {}
        self.submitted: list[Append] = []
        self._news = trio.Event()

    def submit(self, channel: str, payload: bytes, **fields: Any) -> Append:
        append = Append(channel, payload, self._settle, **fields)
        self.submitted.append(append)
        self.log.submit(append)
        return append

    def _settle(self, append: Append, outcome: Outcome) -> None:
        assert append not in self.answers, "answered twice"
        self.answers[append] = outcome
        self._news.set()
        self._news = trio.Event()

    async def wait(self, *appends: Append) -> list[Outcome]:
        """The answers to these, or to all so far, in the order of submission."""
        wanted = appends or tuple(self.submitted)
        with trio.fail_after(PATIENCE):
            while not all(append in self.answers for append in wanted):
                await self._news.wait()
        return [self.answers[append] for append in wanted]

    async def publish(self, channel: str, payload: bytes, **fields: Any) -> Outcome:
        (outcome,) = await self.wait(self.submit(channel, payload, **fields))
        return outcome

    async def publish_seq(self, channel: str, payload: bytes, **fields: Any) -> int:
        """Publish something that must succeed."""
        outcome = await self.publish(channel, payload, **fields)
        assert isinstance(outcome, Committed), outcome
        return outcome.seq


@asynccontextmanager
async def running(log: Log) -> AsyncIterator[tuple[Recorder, Publisher]]:
    """Run a log until the block ends."""
    recorder, publisher = Recorder(), Publisher(log)
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run, recorder)
        with trio.fail_after(PATIENCE):
            await log.wait_open()
        yield recorder, publisher
        nursery.cancel_scope.cancel()
    assert len(publisher.answers) == len(publisher.submitted), "a message was never answered"


async def read_all(log: Log, after: int = 0, **limits: int) -> list[Entry]:
    """Everything up to `applied`, page by page."""
    entries: list[Entry] = []
    while after < log.applied:
        page = await log.read(after, **limits)
        assert page.last > after, "no progress"
        assert page.after == after, "something is missing"
        assert [entry.seq for entry in page.entries] == list(range(after + 1, page.last + 1))
        entries.extend(page.entries)
        after = page.last
    return entries
