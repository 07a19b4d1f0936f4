"""The log in memory: the tests of all logs, and those of its own behaviour."""

from __future__ import annotations

import pytest
import trio
from hypothesis import given
from trio.testing import MockClock

from catbus.error_codes import ErrorCode
from catbus.log import Append, Committed, MemoryLog, Rejected
from catbus.log.in_memory import KEY_OVERHEAD
from catbus.log.recent_messages import ENTRY_OVERHEAD
from tests.log.conformance import ALICE, LogConformance, MakeLog
from tests.log.harness import Publisher, RecordingFollower, running
from tests.log.retained_conformance import RetainedConformance, Script, check_script, read_retained, scripts


class TestConformance(LogConformance):
    @pytest.fixture
    def make_log(self) -> MakeLog:
        def make(*, recent: int = 1 << 20, pending: int = 100_000) -> MemoryLog:
            return MemoryLog(recent, pending=pending)

        return make


class TestRetained(RetainedConformance):
    @pytest.fixture
    def make_log(self) -> MakeLog:
        return MemoryLog


@given(scripts)
def test_retained_messages_and_outcomes_agree_with_a_dict(script: Script) -> None:
    trio.run(check_script, MemoryLog(), script)


ROOM_FOR_TEN = 10 * (ENTRY_OVERHEAD + KEY_OVERHEAD + len("a") + 2)


async def test_log_appends_whatever_the_clock_says(autojump_clock: MockClock) -> None:
    log = MemoryLog(clock=lambda: 1.5)
    async with running(log) as (follower, publisher):
        for n in range(100):
            await publisher.publish_seq("a", b"%d" % n)
        assert trio.current_time() == 0
        assert {entry.at for entry in follower.entries} == {1500}


async def test_times_of_messages_never_decrease_when_the_clock_is_set_back() -> None:
    times = iter([5.0, 3.0, 6.0])
    async with running(MemoryLog(clock=lambda: next(times))) as (follower, publisher):
        for _ in range(3):
            await publisher.publish_seq("a", b"1")
        assert [entry.at for entry in follower.entries] == [5000, 5000, 6000]


async def test_withdrawn_messages_make_room_for_more() -> None:
    size = Append("a", b"1", lambda *_: None).size
    log = MemoryLog(pending_bytes=3 * size)  # One client may use half of it.
    publisher = Publisher(log)
    for _ in range(2):
        publisher.submit("a", b"1")
        publisher.submit("a", b"1")
        assert publisher.outcomes.keys() == set(publisher.submitted[:-2])
        log.withdraw(None, lambda _: True, Rejected(ErrorCode.UNAUTHORIZED, "not any more"))
        assert publisher.outcomes.keys() == set(publisher.submitted)


async def test_dropped_messages_are_below_the_floor() -> None:
    log = MemoryLog(ROOM_FOR_TEN)
    async with running(log) as (_, publisher):
        assert log.floor == 1
        for n in range(10, 40):
            await publisher.publish_seq("a", b"%d" % n)
        assert log.floor == 21
        page = await log.read(0)
        assert (page.after, page.last, len(page.entries)) == (20, 30, 10)
        assert len((await log.history("*", before=None, limit=100))[0]) == 10
        assert log.resume(25, "another").cursor == 0


async def test_unrecognisable_retry_is_not_appended() -> None:
    log = MemoryLog(ROOM_FOR_TEN)
    async with running(log) as (follower, publisher):
        await publisher.publish_seq("a", b"00", producer=ALICE, number=1)
        for n in range(10, 30):
            await publisher.publish_seq("a", b"%d" % n)
        retry = await publisher.publish("a", b"00", producer=ALICE, number=1, after=0)
        assert isinstance(retry, Rejected)
        assert retry.code == ErrorCode.UNKNOWN
        # The floor has not moved since the first attempt of this one, so it would still be in the log. It is new.
        fresh = await publisher.publish("a", b"01", producer=ALICE, number=2, after=log.floor - 1)
        assert isinstance(fresh, Committed)
        assert not fresh.duplicate
        assert len(follower.entries) == 22


async def test_retained_message_outlives_retention_and_so_does_its_key() -> None:
    log = MemoryLog(ROOM_FOR_TEN)
    async with running(log) as (_, publisher):
        await publisher.publish_seq("b", b"11", producer=ALICE, number=1, retain=True)
        await publisher.publish_seq("a", b"22", producer=ALICE, number=2, retain=True)
        for n in range(10, 30):
            await publisher.publish_seq("a", b"%d" % n)
        assert log.floor == 13
        assert [entry.seq for entry in await read_retained(log, "*")] == [2, 1]
        retry = await publisher.publish("b", b"11", producer=ALICE, number=1, retain=True, expect=0, after=0)
        assert retry == Committed(1, duplicate=True)
        other = await publisher.publish("b", b"12", producer=ALICE, number=1, retain=True, expect=0, after=0)
        assert isinstance(other, Rejected)
        assert other.code is ErrorCode.BAD_MESSAGE
        await publisher.publish_seq("b", b"null", retain=True)
        lost = await publisher.publish("b", b"11", producer=ALICE, number=1, retain=True, expect=0, after=0)
        assert isinstance(lost, Rejected)
        assert lost.code is ErrorCode.UNKNOWN
        entries, _ = await log.history("a", before=None, limit=100)
        assert await log.erase("a") == len(entries) + 1
        assert await read_retained(log, "*") == []


async def test_retained_messages_have_a_budget_and_removing_is_always_allowed() -> None:
    log = MemoryLog(retained_bytes=10)
    async with running(log) as (follower, publisher):
        assert await publisher.publish("a", b"12345", retain=True) == Committed(1)
        full = await publisher.publish("b", b"12345", retain=True)
        assert isinstance(full, Rejected)
        assert full.code is ErrorCode.LIMIT
        assert await publisher.publish("b", b"12345") == Committed(2)
        assert await publisher.publish("a", b"null", retain=True) == Committed(3)
        assert await publisher.publish("b", b"12345", retain=True) == Committed(4)
        assert log.report()["retained"] == {"messages": 1, "bytes": 6}
        assert len(follower.entries) == 4


async def test_message_larger_than_the_ring_is_delivered() -> None:
    log = MemoryLog(100)
    async with running(log) as (follower, publisher):
        assert await publisher.publish_seq("a", b"1", producer=ALICE, number=1) == 1
        assert follower.texts == ["1"]
        assert (log.floor, log.applied) == (2, 1)
        page = await log.read(0)
        assert (page.after, page.last, list(page.entries)) == (1, 1, [])


async def test_each_log_keeps_an_epoch_of_its_own() -> None:
    one, other = MemoryLog(), MemoryLog()
    async with running(one) as (_, publisher), running(other):
        await publisher.publish_seq("a", b"1")
        assert one.epoch != other.epoch
        epoch = one.epoch
    recorder = RecordingFollower()
    async with trio.open_nursery() as nursery:
        await nursery.start(one.run, recorder)
        assert one.epoch == epoch
        assert recorder.restarts == [1]
        assert (await one.read(0)).last == 1
        nursery.cancel_scope.cancel()


async def test_messages_that_gather_while_other_tasks_run_are_committed_together() -> None:
    batches: list[int] = []

    class Follower(RecordingFollower):
        def apply(self, entries: object) -> None:
            super().apply(entries)  # type: ignore[arg-type]
            batches.append(len(entries))  # type: ignore[arg-type]

    follower, log = Follower(), MemoryLog()
    async with trio.open_nursery() as nursery:
        await nursery.start(log.run, follower)
        publisher = Publisher(log)
        for n in range(1500):
            publisher.submit("a", b"%d" % n)
        await publisher.wait()
        nursery.cancel_scope.cancel()
    assert batches == [1000, 500]
