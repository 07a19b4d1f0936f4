"""`catbus.append` and `catbus.position` on a real server: against a list, and in the interleavings that went wrong once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import asyncpg  # type: ignore[import-untyped]
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

T = TypeVar("T")
Connection = Any


class Sent(NamedTuple):
    """An entry as a replica hands it over."""

    producer: bytes
    number: int
    channel: str = "a.b"
    payload: str = "1"
    sender: str | None = None
    origin: bytes | None = None
    after: int | None = None

    @property
    def key(self) -> tuple[bytes, int]:
        return self.producer, self.number


class Answer(NamedTuple):
    at: int
    first: int
    seqs: list[int]


async def append(connection: Connection, epoch: str, batch: Sequence[Sent], commit: str = "on") -> Answer:
    columns = [
        [getattr(entry, name) for entry in batch]
        for name in ("channel", "payload", "producer", "number", "sender", "origin", "after")
    ]
    row = await connection.fetchrow(
        "SELECT * FROM catbus.append($1, $2, $3, $4, $5, $6, $7, $8, $9)", commit, epoch, *columns
    )
    return Answer(*row)


async def position(connection: Connection) -> tuple[str, int, int]:
    """Epoch, head, floor."""
    return tuple(await connection.fetchrow("SELECT epoch, head, floor FROM catbus.position()"))  # type: ignore[return-value]


async def seqs(connection: Connection) -> list[int]:
    return [seq for (seq,) in await connection.fetch("SELECT seq FROM catbus.entries ORDER BY seq")]


@asynccontextmanager
async def connected(url: str, number: int = 1) -> AsyncIterator[list[Connection]]:
    connections = [await asyncpg.connect(url) for _ in range(number)]
    try:
        yield connections
    finally:
        for connection in connections:
            connection.terminate()


async def wait_blocked(observer: Connection, blocked: Connection) -> None:
    """Wait until a connection waits for a lock."""
    query = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1"
    async with asyncio.timeout(10):
        while not await observer.fetchval(query, blocked.get_server_pid()):
            await asyncio.sleep(0.005)


# Against a list

channels = st.sampled_from(["a", "a.b", "a.b.c", "a.b-c", "a_b", "Z"])
texts = st.text(max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
payloads = st.builds(lambda value, ascii: json.dumps(value, ensure_ascii=ascii), values, st.booleans()) | st.integers(
    0, 1000
).map(lambda length: '"' + "é" * length + '"')
senders = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
origins = st.none() | st.binary(min_size=1, max_size=16)


class Row(NamedTuple):
    seq: int
    producer: bytes
    number: int
    channel: str
    payload: str
    sender: str | None
    origin: bytes | None

    @property
    def key(self) -> tuple[bytes, int]:
        return self.producer, self.number


class AppendMachine(RuleBasedStateMachine):
    """The model is `log`: every entry that was ever appended, of which those below `floor` are gone.

    All examples use one database, each with producers of its own, above what the examples before have left.
    """

    examples = 0

    def __init__(self, url: str) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.connection = self.run(asyncpg.connect(url))
        self.heard: list[str] = []
        self.run(self.connection.add_listener("catbus", lambda *arguments: self.heard.append(arguments[-1])))
        self.epoch, self.base, self.floor = self.run(position(self.connection))
        self.log: list[Row] = []
        self.at = 0
        AppendMachine.examples += 1
        self.producers = [b"%d-%d" % (AppendMachine.examples, index) for index in range(3)]
        self.numbers = dict.fromkeys(self.producers, 0)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.connection.terminate()
        self.runner.close()

    sent = Bundle("sent")

    @property
    def head(self) -> int:
        return self.log[-1].seq if self.log else self.base

    def make(self, data: st.DataObject, least: int) -> list[Sent]:
        """New entries. Their numbers increase within a producer."""
        entries = []
        for _ in range(data.draw(st.integers(least, 4))):
            producer = data.draw(st.sampled_from(self.producers))
            self.numbers[producer] += data.draw(st.integers(1, 3))
            entries.append(
                Sent(
                    producer,
                    self.numbers[producer],
                    data.draw(channels),
                    data.draw(payloads),
                    data.draw(senders),
                    data.draw(origins),
                    self.head,
                )
            )
        return entries

    def check(self, batch: Sequence[Sent]) -> None:
        """Append, and compare with what the list says."""
        known = {row.key: row for row in self.log if row.seq >= self.floor}
        first = self.head + 1
        new: list[Row] = []
        expected = []
        for entry in batch:
            if row := known.get(entry.key):
                same = (row.channel, row.payload) == (entry.channel, entry.payload)
                expected.append(row.seq if same else 0)
            elif entry.after is not None and entry.after < self.floor - 1:
                expected.append(-1)
            else:
                expected.append(first + len(new))
                new.append(Row(first + len(new), *entry[:6]))

        answer = self.run(append(self.connection, self.epoch, batch))
        assert (answer.first, answer.seqs) == (first, expected)
        assert answer.at >= self.at
        self.at = answer.at
        self.log += new

        self.run(asyncio.sleep(0))
        assert self.heard == ([announcement(self.epoch, answer.at, new)] if new else [])
        self.heard.clear()

    @rule(target=sent, data=st.data())
    def publish(self, data: st.DataObject) -> Any:
        batch = self.make(data, least=1)
        # The first try is no retry: nobody says what was known before.
        self.check([entry._replace(after=None) for entry in batch])
        return multiple(*batch)

    @rule(old=st.lists(sent, min_size=1, max_size=5, unique_by=lambda entry: entry.key), late=st.booleans())
    def repeat(self, old: list[Sent], late: bool) -> None:
        """The answer was lost, or bytes arrive after their sender has died and was replaced."""
        self.check([entry._replace(after=None) if late else entry for entry in old])

    @rule(
        target=sent,
        data=st.data(),
        old=st.lists(sent, min_size=1, max_size=3, unique_by=lambda entry: entry.key),
    )
    def repeat_among_new(self, data: st.DataObject, old: list[Sent]) -> Any:
        new = self.make(data, least=1)
        self.check(data.draw(st.permutations([*old, *(entry._replace(after=None) for entry in new)])))
        return multiple(*new)

    @rule(old=sent, channel=channels, payload=payloads)
    def reuse_a_key(self, old: Sent, channel: str, payload: str) -> None:
        self.check([old._replace(channel=channel, payload=payload)])

    @rule(target=sent, data=st.data())
    def lose_before_it_arrives(self, data: st.DataObject) -> Any:
        """What the database never saw is sent again later, as a retry."""
        return multiple(*self.make(data, least=1))

    @rule(data=st.data())
    def use_another_epoch(self, data: st.DataObject) -> None:
        with pytest.raises(asyncpg.PostgresError) as refused:
            self.run(append(self.connection, "another", self.make(data, least=0)))
        assert refused.value.sqlstate == "CB001"

    @rule()
    def close_the_slot(self) -> None:
        self.run(self.connection.execute("UPDATE catbus.head SET slot = (slot + 1) % 8"))

    @rule(data=st.data())
    def retain(self, data: st.DataObject) -> None:
        self.floor = data.draw(st.integers(self.floor, self.head + 1))
        self.run(self.connection.execute(f"DELETE FROM catbus.entries WHERE seq < {self.floor}"))
        self.run(self.connection.execute(f"UPDATE catbus.head SET floor = {self.floor}"))

    @invariant()
    def the_table_is_the_list(self) -> None:
        rows = self.run(
            self.connection.fetch(
                "SELECT seq, producer, number, channel, payload, sender, origin, at FROM catbus.entries"
                " WHERE seq > $1 ORDER BY seq",
                self.base,
            )
        )
        assert [tuple(row)[:7] for row in rows] == [row for row in self.log if row.seq >= self.floor]
        times = [row["at"] for row in rows]
        assert times == sorted(times)

    @invariant()
    def the_position_is_that_of_the_list(self) -> None:
        assert self.run(position(self.connection)) == (self.epoch, self.head, self.floor)


def announcement(epoch: str, at: int, rows: Sequence[Row]) -> str:
    """The notification that tells of these entries."""
    range_ = f"{epoch}:{rows[0].seq}:{rows[-1].seq}"
    entries = ",".join(
        "[{},{},{},{},{},{}]".format(
            row.seq,
            at,
            json.dumps(row.channel),
            json.dumps(row.sender, ensure_ascii=False),
            json.dumps(row.origin and row.origin.hex()),
            row.payload,
        )
        for row in rows
    )
    whole = f"{range_} [{entries}]"
    return whole if len(whole.encode()) <= 1000 else range_


def test_append_does_what_a_list_would(database_url: str) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: AppendMachine(database_url), settings=settings(max_examples=30, stateful_step_count=20)
    )


# Interleavings, and what they must not do


def scenario(url: str, play: Callable[..., Coroutine[Any, Any, None]], connections: int) -> None:
    """Play a scene that takes the epoch and so many connections."""

    async def go() -> None:
        async with connected(url, connections) as actors:
            epoch, _, _ = await position(actors[0])
            await play(epoch, *actors)

    asyncio.run(go())
