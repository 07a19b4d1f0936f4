"""catbus.delivery.message_pages: pages of the log compared with a model, and the wait for the next message"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.delivery.fan_out import Delivery
from catbus.delivery.message_pages import (
    MAX_READS,
    MAX_ROWS,
    MessagePage,
    MessagePages,
    MissingRange,
    PageReader,
)
from catbus.delivery.page_size import MAX_PAGE_BYTES
from catbus.delivery.send_queue import Budget
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError, Unavailable
from catbus.limits.client_usage import ClientUsages
from catbus.limits.cpu_scheduler import CpuScheduler
from catbus.log import Entry, LogPage, MemoryLog, Resumption
from catbus.protocol.channels import matches
from tests.log.harness import Publisher
from tests.test_delivery import CHANNELS, PATTERNS, ListLog, entry


class ScriptedLog(ListLog):
    """A log in a list, whose reads do what a test says."""

    def __init__(self, number: int = 0, channel: str = "a") -> None:
        super().__init__()
        self.entries = [entry(seq, channel) for seq in range(1, number + 1)]
        self.memory_floor = 1
        self.reads: list[tuple[int, int]] = []
        self.before_read: Callable[[], Any] = lambda: None
        self.most = 1_000_000
        """Messages that a history has at most, because they are large."""

    @property
    def applied(self) -> int:
        return len(self.entries)

    def resume(self, since: int, epoch: str | None) -> Resumption:
        return Resumption(since) if epoch in (None, self.epoch) else Resumption(min(since, 2), "epoch")

    async def read(self, after: int, *, rows: int = 1000, size: int = 1 << 20) -> LogPage:
        await trio.lowlevel.checkpoint()
        self.reads.append((after, rows))
        self.before_read()
        page = self.page(after, rows)
        return LogPage(page.after, page.last, [each for each in page.entries if not self.is_gone(each.seq)], page.lost)

    async def history(self, pattern: str, *, before: int | None, limit: int) -> tuple[Sequence[Entry], bool]:
        await trio.lowlevel.checkpoint()
        self.before_read()
        end = self.applied + 1 if before is None else before
        found = [each for each in self.entries if self.floor <= each.seq < end and matches(pattern, each.channel)]
        number = min(limit, self.most)
        return found[-number:], len(found) > number


def pages_of(log: Any, delivery: Delivery | None = None, **limits: int) -> MessagePages:
    usages = ClientUsages(limits.get("sessions", 10), limits.get("subscriptions", 100))
    return MessagePages(log, delivery or Delivery(log, Budget()), CpuScheduler(), usages, 100_000)


def reader(log: Any, *patterns: str, limit: int = 1000) -> PageReader:
    return PageReader(pages_of(log), patterns, limit, "client")


def seqs(page: MessagePage) -> list[int]:
    return [each.seq for each in page.entries]


# Forward


@settings(max_examples=settings().max_examples * 3 // 2)
@given(data=st.data())
def test_pages_read_to_the_end_have_every_message_once_and_in_order(data: st.DataObject) -> None:
    """Between any two reads, messages are published, dropped by retention, deleted and repaired."""
    log = ScriptedLog()
    patterns = data.draw(st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3, unique=True))
    limit = data.draw(st.integers(1, 4))
    found: list[int] = []
    missing: set[int] = set()

    def publish(most: int = 6) -> None:
        for channel in data.draw(st.lists(st.sampled_from(CHANNELS), max_size=most)):
            log.entries.append(entry(log.applied + 1, channel))

    def interfere() -> None:
        match data.draw(st.sampled_from(["nothing", "publish", "drop", "delete"])):
            case "publish":
                publish()
            case "drop":
                log.floor = data.draw(st.integers(log.floor, log.applied + 1))
            case "delete" if log.floor < log.applied:
                log.holes.add(data.draw(st.integers(log.floor, log.applied - 1)))

    async def read() -> None:
        nonlocal cursor
        page = await reader(log, *patterns, limit=limit).read_after(cursor)
        assert len(page.entries) <= limit
        gap, first = page.gap, cursor + 1
        if gap is not None:
            assert first <= gap.first <= gap.last <= page.seq
            missing.update(range(gap.first, gap.last + 1))
            first = gap.last + 1
        assert all(first <= seq <= page.seq for seq in seqs(page))
        assert page.seq > cursor or not page.more, "a page made no progress"
        found.extend(seqs(page))
        cursor = page.seq

    publish(30)
    log.before_read = interfere
    cursor = 0
    for _ in range(data.draw(st.integers(1, 8))):
        trio.run(read)
    log.before_read = lambda: None
    while cursor < log.applied:
        trio.run(read)
    wanted = [each.seq for each in log.entries if any(matches(pattern, each.channel) for pattern in patterns)]
    assert found == sorted(set(found))
    assert set(found) <= set(wanted)
    assert set(wanted) - set(found) <= missing
    assert all(log.is_gone(seq) for seq in missing), "a gap contains messages that exist"


async def test_page_has_a_message_once_however_many_patterns_match() -> None:
    log = ScriptedLog(3, "a.b")
    assert seqs(await reader(log, "*", "a.*", "a.b").read_after(0)) == [1, 2, 3]


async def test_page_without_a_match_is_bounded_and_advances() -> None:
    log = ScriptedLog(MAX_READS * MAX_ROWS + 5000)
    page = await reader(log, "b").read_after(0)
    assert (page.entries, page.more, len(log.reads)) == ([], True, MAX_READS)
    assert page.seq == sum(rows for _, rows in log.reads) < log.applied
    assert max(rows for _, rows in log.reads) == MAX_ROWS
    page = await reader(log, "b").read_after(page.seq)
    assert (page.seq, page.more) == (log.applied, False)


async def test_other_tasks_run_between_the_reads_of_a_page() -> None:
    log, turns = ScriptedLog(5000), 0
    pages = pages_of(log)

    async def count() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        with pages.cpu_scheduler.serve("here"):
            nursery.start_soon(pages.cpu_scheduler.run)
            await PageReader(pages, ["b"], 1, "client").read_after(0)
        nursery.cancel_scope.cancel()
    assert turns >= len(log.reads)


async def test_page_reads_no_more_than_it_needs() -> None:
    log = ScriptedLog(5000)
    assert seqs(await reader(log, "*", limit=2).read_after(0)) == [1, 2]
    assert log.reads == [(0, 100)]


async def test_size_of_a_page_is_limited_but_for_one_message() -> None:
    log = ScriptedLog()
    log.entries = [Entry(seq, 1, "a", b"x" * size) for seq, size in enumerate((MAX_PAGE_BYTES, 9, 700_000, 700_000), 1)]
    read = reader(log, "*").read_after
    first = await read(0)
    assert (seqs(first), first.seq, first.more) == ([1], 1, True)
    second = await read(first.seq)
    assert (seqs(second), second.seq, second.more) == ([2, 3], 3, True)
    third = await read(second.seq)
    assert (seqs(third), third.seq, third.more) == ([4], 4, False)


async def test_page_ends_before_a_gap_and_the_next_one_announces_it() -> None:
    log = ScriptedLog(6)
    log.holes = {3, 4}
    read = reader(log, "*").read_after
    page = await read(0)
    assert (seqs(page), page.seq, page.gap, page.more) == ([1, 2], 2, None, True)
    page = await read(page.seq)
    assert (seqs(page), page.seq, page.gap, page.more) == ([5, 6], 6, MissingRange(3, 4, "repair"), False)


async def test_gap_of_another_epoch_comes_before_that_of_retention() -> None:
    log = ScriptedLog(9)
    log.floor = 5
    read = reader(log, "*").read_after
    page = await read(7, "earlier")
    assert (page.entries, page.seq, page.gap, page.more) == ([], 2, MissingRange(3, 2, "epoch"), True)
    page = await read(page.seq, page.epoch)
    assert (seqs(page), page.gap) == ([5, 6, 7, 8, 9], MissingRange(3, 4, "retention"))


async def test_page_ends_where_the_log_changes_its_epoch() -> None:
    log = ScriptedLog(3000)

    def change() -> None:
        if len(log.reads) == 2:
            log.epoch = "f"
            log.entries = [entry(seq, "a") for seq in range(1, 4000)]

    log.before_read = change
    page = await reader(log, "*", limit=1500).read_after(0)
    assert (page.seq, page.epoch, page.more) == (1000, "e", True)
    log.before_read = lambda: None
    page = await reader(log, "*").read_after(page.seq, page.epoch)
    assert (page.epoch, page.gap) == ("f", MissingRange(3, 2, "epoch"))


async def test_messages_that_were_read_before_an_outage_are_returned() -> None:
    log = ScriptedLog(3000)

    def fail() -> None:
        if len(log.reads) == outage:
            raise Unavailable("later")

    log.before_read = fail
    outage = 1
    with pytest.raises(Unavailable):
        await reader(log, "*").read_after(0)
    log.reads.clear()
    outage = 2
    page = await reader(log, "*", limit=1500).read_after(0)
    assert (page.seq, page.more, len(page.entries)) == (1000, True, 1000)


async def test_log_that_was_never_read_has_no_pages() -> None:
    log = ScriptedLog()
    log.epoch = ""
    for read in (reader(log, "*").read_after(0), reader(log, "*").read_before(None)):
        with pytest.raises(Unavailable):
            await read


async def test_page_after_the_newest_message_is_empty() -> None:
    for since in (3, 4, 2**63 - 1, None):
        page = await reader(ScriptedLog(3), "*").read_after(since)
        assert (page.entries, page.seq, page.more) == ([], 3 if since is None else since, False)


# Backward


@settings(max_examples=settings().max_examples * 3 // 2)
@given(data=st.data())
def test_backward_pages_have_the_newest_messages_of_all_patterns(data: st.DataObject) -> None:
    log = ScriptedLog()
    channels = data.draw(st.lists(st.sampled_from(CHANNELS), max_size=30))
    log.entries = [entry(seq, channel) for seq, channel in enumerate(channels, 1)]
    log.floor = data.draw(st.integers(1, log.applied + 1))
    patterns = data.draw(st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=4, unique=True))
    limit, log.most = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    wanted = [e.seq for e in log.entries[log.floor - 1 :] if any(matches(pattern, e.channel) for pattern in patterns)]
    before, found = data.draw(st.none() | st.integers(0, 40)), list[int]()
    end = log.applied if before is None else min(max(before - 1, 0), log.applied)
    while True:
        page = trio.run(partial(reader(log, *patterns, limit=limit).read_before, before))
        assert page.seq == (log.applied if before is None else min(max(before - 1, 0), log.applied))
        assert len(page.entries) <= limit
        found = seqs(page) + found
        if not page.more:
            break
        assert page.entries, "a page made no progress"
        before = page.entries[0].seq
    assert found == [seq for seq in wanted if seq <= end]


async def test_backward_page_ends_where_the_messages_of_one_pattern_are_incomplete() -> None:
    """Otherwise the next page would begin below messages that were never read."""
    log = ScriptedLog()
    log.most = 1
    log.entries = [entry(1, "b"), entry(2, "a"), entry(3, "a")]
    page = await reader(log, "a", "b").read_before(None)
    assert (seqs(page), page.more) == ([3], True)
    assert seqs(await reader(log, "a", "b").read_before(3)) == [1, 2]


async def test_size_of_a_backward_page_is_limited_but_for_one_message() -> None:
    log = ScriptedLog()
    log.entries = [Entry(seq, 1, "a", b"x" * size) for seq, size in enumerate((700_000, 700_000, 9, MAX_PAGE_BYTES), 1)]
    read = reader(log, "*", "a").read_before
    page = await read(None)
    assert (seqs(page), page.seq, page.more) == ([4], 4, True)
    page = await read(4)
    assert (seqs(page), page.seq, page.more) == ([2, 3], 3, True)
    assert (await read(2)).more is False


async def test_reading_forward_from_a_backward_page_misses_nothing() -> None:
    """Messages that are committed during the read are in the next page, and not in both."""
    log = ScriptedLog(3)
    log.before_read = lambda: log.entries.append(entry(log.applied + 1, "a"))
    page = await reader(log, "*").read_before(None)
    log.before_read = lambda: None
    assert (seqs(page), page.seq) == ([1, 2, 3], 3)
    assert seqs(await reader(log, "*").read_after(page.seq, page.epoch)) == [4]


async def test_backward_page_is_of_one_epoch() -> None:
    log = ScriptedLog(3)
    log.before_read = lambda: setattr(log, "epoch", "f")
    with pytest.raises(Unavailable):
        await reader(log, "*").read_before(None)


# Limits


async def test_clients_take_turns_at_the_database() -> None:
    """A page of a client that has made one request waits for one read of a client that has made a hundred."""
    log = ScriptedLog(10)
    log.memory_floor = 11
    pages, order = pages_of(log), list[str]()

    async def read(client: str) -> None:
        await PageReader(pages, ["*"], 10, client).read_after(0)
        order.append(client)

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(read, "greedy")
        nursery.start_soon(read, "modest")
    assert order.index("modest") < 3


async def test_pages_wait_until_clients_have_read_their_responses() -> None:
    log = ScriptedLog(10)
    pages = pages_of(log)
    pages.delivery.budget.replies = pages.delivery.budget.for_replies + 1
    for read in ("read_after", "read_before"):
        with pytest.raises(PeerError) as caught:
            await getattr(PageReader(pages, ["*"], 10, "client"), read)(0)
        assert (caught.value.code, caught.value.retry_after) == (ErrorCode.OVERLOADED, 1)
    assert log.reads == []


def test_waiting_request_counts_as_a_session_with_subscriptions() -> None:
    pages = pages_of(ScriptedLog(), sessions=2, subscriptions=10)
    usages = pages.client_usages
    wide, narrow = PageReader(pages, ["a", "b", "c"], 10, "client"), PageReader(pages, ["a"], 10, "client")
    with wide.counted():
        assert usages.subscriptions == 3
        with narrow.counted(), pytest.raises(PeerError, match="too many sessions"), narrow.counted():
            pass
        with pytest.raises(PeerError, match="no room"), wide.counted():
            pass
        assert usages.subscriptions == 3
    assert (usages.subscriptions, len(usages)) == (0, 0)


# Waiting


class Following:
    """A log in memory, the delivery that follows it, and pages of it."""

    def __init__(self) -> None:
        self.log = MemoryLog()
        self.delivery = Delivery(self.log)
        self.pages = pages_of(self.log, self.delivery)
        self.publisher = Publisher(self.log)
        self.results: list[int] = []

    async def publish(self, channel: str, number: int = 1) -> None:
        for _ in range(number):
            self.publisher.submit(channel, b"1")
        await self.publisher.wait()

    async def wait(self, *patterns: str, seq: int | None = None, epoch: str = "", seconds: float = 30) -> None:
        page = MessagePage((), self.log.applied if seq is None else seq, epoch or self.log.epoch, more=False)
        read = PageReader(self.pages, patterns, 10, "client")
        self.results.append(await read.wait(page, trio.current_time() + seconds))

    @property
    def clean(self) -> bool:
        statistics = self.delivery.statistics()
        return (statistics.live, statistics.lagging, statistics.held, self.pages.wake_ups) == (0, 0, 0, set())


@asynccontextmanager
async def following() -> AsyncIterator[tuple[Following, trio.Nursery]]:
    it = Following()
    async with trio.open_nursery() as nursery:
        await nursery.start(it.log.run, it.delivery)
        nursery.start_soon(it.delivery.run)
        yield it, nursery
        nursery.cancel_scope.cancel()
    assert it.clean


@pytest.mark.parametrize("patterns", [["a.b"], ["a.*"], ["*", "a.b", "c"]])
async def test_message_ends_the_wait_at_its_seq(patterns: list[str], autojump_clock: MockClock) -> None:
    async with following() as (it, nursery):
        await it.publish("a.b", 3)
        nursery.start_soon(partial(it.wait, *patterns, seconds=1000))
        await wait_all_tasks_blocked()
        if "*" not in patterns:
            await it.publish("x", 5)
        await it.publish("a.b", 2)
        await wait_all_tasks_blocked()
        assert it.results == [it.log.applied - 2]
        assert trio.current_time() == 0
        assert it.clean


async def test_wait_that_ends_without_a_message_skips_what_does_not_match(autojump_clock: MockClock) -> None:
    async with following() as (it, nursery):
        nursery.start_soon(partial(it.wait, "a", seconds=10))
        await wait_all_tasks_blocked()
        await it.publish("x", 500)
        await trio.sleep(11)
        assert it.results == [500]
        assert it.delivery.statistics().delivered == 0


async def test_ephemeral_message_does_not_end_the_wait(autojump_clock: MockClock) -> None:
    async with following() as (it, nursery):
        nursery.start_soon(partial(it.wait, "a", seconds=10))
        await wait_all_tasks_blocked()
        it.delivery.broadcast(Entry(0, 1, "a", b"1"))
        await trio.sleep(9)
        assert it.results == []
        await trio.sleep(2)
        assert it.results == [0]


async def test_message_that_was_committed_after_the_page_is_not_waited_for(autojump_clock: MockClock) -> None:
    async with following() as (it, _):
        await it.publish("x")
        await it.publish("a")
        await it.wait("a", seq=0, seconds=1000)
        assert (it.results, trio.current_time()) == ([1], 0)


async def test_gap_during_the_wait_is_not_skipped(autojump_clock: MockClock) -> None:
    async with following() as (it, nursery):
        await it.publish("x", 5)
        nursery.start_soon(partial(it.wait, "a", seconds=1000))
        await wait_all_tasks_blocked()
        it.delivery.restart(9, "retention")
        await wait_all_tasks_blocked()
        assert it.results == [5]
        it.delivery.restart(5)


async def test_cursor_ahead_of_the_replica_waits_for_it(autojump_clock: MockClock) -> None:
    """Another replica has delivered messages that this one does not have yet."""
    async with following() as (it, nursery):
        nursery.start_soon(partial(it.wait, "a", seq=3, seconds=1000))
        await wait_all_tasks_blocked()
        await it.publish("a", 2)
        await wait_all_tasks_blocked()
        assert it.results == []
        await it.publish("a", 2)
        await wait_all_tasks_blocked()
        assert it.results == [3]


async def test_change_of_the_epoch_ends_the_wait(autojump_clock: MockClock) -> None:
    async with following() as (it, nursery):
        await it.publish("x", 5)
        nursery.start_soon(partial(it.wait, "a", seconds=1000))
        await wait_all_tasks_blocked()
        it.delivery.restart(3)
        await wait_all_tasks_blocked()
        await it.wait("a", epoch="another")
        assert it.results == [5, 5]
        it.delivery.restart(5)


async def test_woken_request_waits_for_its_share_of_the_cpu(autojump_clock: MockClock) -> None:
    """One message wakes all requests that wait for it, and other clients must have their turn."""
    turn = trio.Event()

    class BusyScheduler(CpuScheduler):
        async def acquire(self) -> None:
            await turn.wait()

    async with following() as (it, nursery):
        it.pages.cpu_scheduler = BusyScheduler()
        nursery.start_soon(partial(it.wait, "a", seconds=1000))
        await wait_all_tasks_blocked()
        await it.publish("a")
        await wait_all_tasks_blocked()
        assert it.results == []
        turn.set()
        await wait_all_tasks_blocked()
        assert it.results == [0]


async def test_stopping_replica_ends_every_wait(autojump_clock: MockClock) -> None:
    async with following() as (it, nursery):
        for _ in range(3):
            nursery.start_soon(partial(it.wait, "a", seconds=1000))
        await wait_all_tasks_blocked()
        it.pages.stop_waiting()
        await wait_all_tasks_blocked()
        await it.wait("a")
        assert (it.results, trio.current_time()) == ([0] * 4, 0)


async def test_messages_that_were_withdrawn_from_memory_are_not_skipped(autojump_clock: MockClock) -> None:
    """The budget of all send queues is exceeded between the wake-up and the task that was woken."""
    async with following() as (it, nursery):
        nursery.start_soon(partial(it.wait, "a", seconds=1000))
        await wait_all_tasks_blocked()
        it.delivery.budget.messages += it.delivery.budget.for_messages * 2
        await it.publish("a", 2)
        it.delivery.budget.messages -= it.delivery.budget.for_messages * 2
        await wait_all_tasks_blocked()
        assert it.results == [0]


async def test_cancelled_wait_leaves_nothing_behind() -> None:
    async with following() as (it, nursery):
        with trio.CancelScope() as scope:
            nursery.start_soon(partial(it.wait, "a", "*"))
            async with trio.open_nursery() as inner:
                inner.start_soon(partial(it.wait, "a", "*"))
                await wait_all_tasks_blocked()
                assert it.delivery.statistics().live == 4
                scope.cancel()
        assert it.delivery.statistics().live == 2
