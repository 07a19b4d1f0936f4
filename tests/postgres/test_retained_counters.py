"""Counters that writers increment by compare-and-set, on two logs whose connections are cut and blocked."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import trio

from catbus.config import DatabaseSettings
from catbus.error_codes import ErrorCode
from catbus.log import Append, Committed, Log, Outcome
from catbus.postgres import PostgresLog
from tests.log.harness import TEST_TIMEOUT, RecordingFollower, running
from tests.postgres.proxy import open_proxy
from tests.postgres.sql import open_sql

WRITERS = 8
CHANNELS = ("counter.a", "counter.b", "counter.c")


class Increment(NamedTuple):
    """A publish to a counter. `name` is unique."""

    name: str
    channel: str
    value: int
    expect: int

    @property
    def payload(self) -> bytes:
        return json.dumps({"value": self.value, "name": self.name, "expect": self.expect}).encode()


class Acknowledged(NamedTuple):
    seq: int


class Conflicted(NamedTuple):
    seq: int
    """The seq of the retained message, 0 for none."""


class Refused(NamedTuple):
    """Any other final reply: the increment is not in the log."""

    code: str


Result = Acknowledged | Conflicted | Refused


class UnknownError(Exception):
    """It is not known yet whether the increment is in the log: send it again."""


@dataclass
class Counters:
    """What the writers sent, and the replies."""

    sent: dict[str, Increment] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    retries: int = 0
    acknowledged: int = 0
    _changed: trio.Event = field(default_factory=trio.Event)

    async def write(self, name: str, service: LogService, rng: random.Random, stopped: Callable[[], bool]) -> None:
        """One writer: increment counters until it is told to stop. Every increment gets its final reply."""
        for number in count(1):
            if stopped():
                return
            channel = rng.choice(CHANNELS)
            value, seq = await service.read(channel)
            increment = Increment(f"{name}-{number}", channel, value + 1, seq)
            self.sent[increment.name] = increment
            self.results[increment.name] = await self._publish(service, increment, number)
            self.acknowledged += isinstance(self.results[increment.name], Acknowledged)
            self._note_change()

    async def wait_for(self, *, acknowledged: int = 0, retries: int = 0) -> None:
        """Wait until so many increments are acknowledged, and so many were sent again."""
        while self.acknowledged < acknowledged or self.retries < retries:
            await self._changed.wait()

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _publish(self, service: LogService, increment: Increment, number: int) -> Result:
        retry = False
        while True:
            try:
                return await service.publish(increment, number, retry=retry)
            except UnknownError:
                retry = True
                self.retries += 1
                self._note_change()
                await trio.sleep(0.01)

    def check(self, log: list[tuple[int, str, dict[str, Any]]]) -> list[str]:
        """What is wrong with the log: its rows are the seq, the channel and the payload of each message, in order."""
        faults: list[str] = []
        newest = dict.fromkeys(CHANNELS, (0, 0))
        seqs: dict[str, int] = {}
        for seq, channel, message in log:
            value, before = newest[channel]
            if (message["value"], message["expect"]) != (value + 1, before):
                faults.append(f"{message} at {seq} follows on {value} at {before}")
            if message["name"] in seqs:
                faults.append(f"{message} at {seq} is in the log twice")
            newest[channel] = message["value"], seq
            seqs[message["name"]] = seq
        for name, result in self.results.items():
            match result:
                case Acknowledged(seq) if seqs.pop(name, None) != seq:
                    faults.append(f"{name} was acknowledged as {seq}, and is not there")
                case Conflicted(seq) if seq == self.sent[name].expect:
                    faults.append(f"{name} got a conflict with the message that it expected")
                case Conflicted() | Refused() if name in seqs:
                    faults.append(f"{name} got {result}, and is in the log at {seqs[name]}")
        faults += [f"{name} is in the log, and was not acknowledged" for name in seqs if name in self.sent]
        if len(self.results) != len(self.sent):
            faults.append("an increment has no final reply")
        return faults


class LogService:
    """Where a writer publishes: to each log in turn. So a retry goes to another one than the first try."""

    def __init__(self, places: Sequence[tuple[Log, RecordingFollower]], producer: bytes) -> None:
        self._places = list(places)
        self._producer = producer
        self._after = 0

    async def read(self, channel: str) -> tuple[int, int]:
        """The value and the seq of a counter as one replica knows it, perhaps late; 0 and 0 for none."""
        _, follower = self._places[0]
        for entry in reversed(follower.entries):
            if entry.channel == channel:
                return json.loads(entry.payload)["value"], entry.seq
        return 0, 0

    async def publish(self, increment: Increment, number: int, *, retry: bool) -> Result:
        """Publish under an id, and return the final reply. Raises `UnknownError`."""
        self._places.reverse()
        log, _ = self._places[0]
        self._after = self._after if retry else log.applied
        send, receive = trio.open_memory_channel[Outcome](1)
        log.submit(
            Append(
                increment.channel,
                increment.payload,
                lambda _, outcome: send.send_nowait(outcome),
                self._producer,
                number,
                after=self._after if retry else None,
                retain=True,
                expect=increment.expect,
            )
        )
        outcome = await receive.receive()
        if isinstance(outcome, Committed):
            return Acknowledged(outcome.seq)
        if outcome.code is ErrorCode.UNKNOWN:
            raise UnknownError
        if outcome.code is ErrorCode.CONFLICT:
            assert outcome.retained_seq is not None
            return Conflicted(outcome.retained_seq)
        return Refused(outcome.code)


async def test_acknowledged_increments_are_counted_once_and_losers_get_a_conflict(database_url: str) -> None:
    counters = Counters()
    async with open_proxy(database_url) as one, open_proxy(database_url) as other, open_sql(database_url) as sql:
        proxies = [one, other]
        logs = [PostgresLog(DatabaseSettings(url=proxy.url, publish_timeout=0.3)) for proxy in proxies]
        async with running(logs[0]) as (here, _), running(logs[1]) as (there, _), trio.open_nursery() as nursery:
            places = [(logs[0], here), (logs[1], there)]
            over = trio.Event()
            for n in range(WRITERS):
                rng = random.Random(n)
                nursery.start_soon(counters.write, f"w{n}", LogService(places, b"%d" % n), rng, over.is_set)
            with trio.fail_after(TEST_TIMEOUT):
                for step in range(6):
                    await counters.wait_for(acknowledged=counters.acknowledged + WRITERS)
                    disturbed = proxies[step % 2]
                    if step % 3 == 0:
                        disturbed.cut()
                        continue
                    (disturbed.block, disturbed.block_answers)[step % 2]()
                    await counters.wait_for(retries=counters.retries + 1)
                    disturbed.unblock()
                await counters.wait_for(acknowledged=counters.acknowledged + WRITERS)
            over.set()
        rows = await sql.fetch("SELECT seq, channel, payload FROM catbus.entries ORDER BY seq")
        retained = await sql.fetch("SELECT payload FROM catbus.retained('*')")
    assert counters.check([(seq, channel, json.loads(payload)) for seq, channel, payload in rows]) == []
    assert sum(json.loads(payload)["value"] for (payload,) in retained) == counters.acknowledged
    assert any(isinstance(result, Conflicted) for result in counters.results.values())
    assert counters.retries
