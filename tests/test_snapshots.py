"""Snapshots of retained messages: what a held subscription gets, in which order, and who waits for whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from catbus.delivery import snapshots
from catbus.delivery.encoded_messages import EncodedMessages
from catbus.delivery.fan_out import Delivery
from catbus.delivery.send_queue import Budget, SendQueue
from catbus.delivery.snapshot_page import SnapshotPage, begin_snapshot
from catbus.delivery.snapshots import SnapshotRequest
from catbus.delivery.subscription import HELD, LIVE, Subscription
from catbus.errors import Unavailable
from catbus.log import Entry, RetainedPage
from catbus.protocol import wire_messages as wire
from catbus.protocol.wire_messages import ProtocolVersion
from tests.server_sent_events import EventParser
from tests.test_delivery import ListLog, TransportWriter, catch_up, exhaust, retained_entry


class Watcher:
    """A subscriber to the retained messages of some patterns."""

    def __init__(
        self,
        delivery: Delivery,
        *patterns: str,
        since: int | None = None,
        limit: int = 10_000,
        client: object = None,
        send_queue: SendQueue | None = None,
        events: bool = False,
    ) -> None:
        if send_queue is None:
            send_queue = SendQueue(TransportWriter(), lambda _: None, limit, delivery.budget)
        self.send_queue = send_queue
        if events:
            self.send_queue.protocol = ProtocolVersion.EVENTS
        self.subscription = Subscription(self.send_queue, retained=True, client=client)
        delivery.subscribe_all(self.subscription, patterns, since)

    def received(self) -> list[object]:
        """Take the send queue: seqs for messages, the seqs of pages (the last one ends with "complete"), and lines."""
        received: list[object] = []
        for item in self.send_queue.take():
            if isinstance(item, SnapshotPage):
                received.append([*(entry.seq for entry in item.entries), *["complete"] * item.complete])
            elif isinstance(item, EncodedMessages):
                received += [entry.seq for entry in item.entries]
            else:
                received.append(wire.decode_server(item))
        return received


@pytest.fixture
def log() -> ListLog:
    return ListLog()


@pytest.fixture
def delivery(log: ListLog) -> Delivery:
    return Delivery(log)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 300)


def retain(log: ListLog, delivery: Delivery, *channels: str) -> None:
    """Publish retained messages, and remove those of the channels that begin with "-"."""
    head = len(log.entries)
    entries = [retained_entry(head + i, c.lstrip("-"), remove=c[0] == "-") for i, c in enumerate(channels, 1)]
    log.append(entries)
    delivery.apply(entries)


def read(log: ListLog, delivery: Delivery, rows: int = 100) -> SnapshotRequest | None:
    """Read and serve the next page of a snapshot."""
    request = delivery._snapshots.next_request()
    if request is not None:
        exhaust(delivery._snapshots.serve(request, log.retained_page(request, rows)))
    return request


def test_snapshot_is_in_the_order_of_channels_and_live_follows(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "b", "c", "a", "-c", "b")
    watcher = Watcher(delivery, "*")
    assert read(log, delivery) is not None
    assert watcher.received() == [[3, 5, "complete"], wire.Live("*", 5)]
    retain(log, delivery, "c")
    assert watcher.received() == [6]


def test_empty_snapshot_has_one_page(log: ListLog, delivery: Delivery) -> None:
    watcher = Watcher(delivery, "a.*")
    read(log, delivery)
    assert watcher.received() == [["complete"], wire.Live("a.*", 0)]


def test_message_that_changes_during_the_snapshot_comes_once_and_after_it(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a", "b", "c")
    watcher = Watcher(delivery, "*")
    read(log, delivery, rows=1)
    retain(log, delivery, "b", "-c", "a")
    while read(log, delivery, rows=1):
        pass
    catch_up(log, delivery)
    got = watcher.received()
    assert [page for page in got if isinstance(page, list)] == [[1], ["complete"]]
    assert got[2:] == [4, 5, 6, wire.Live("*", 6)]


def test_live_follows_what_the_log_has_and_the_replica_has_not_received_yet(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a", "b")
    newer = [retained_entry(3, "a"), retained_entry(4, "b")]
    log.append(newer)
    watcher = Watcher(delivery, "*")
    read(log, delivery)
    assert watcher.received() == [["complete"]]  # The messages before 3 and 4 are gone.
    delivery.apply(newer[:1])
    exhaust(delivery.serve(2, log.page(2, 1)))
    assert watcher.received() == [3]
    delivery.apply(newer[1:])
    catch_up(log, delivery)
    assert watcher.received() == [4, wire.Live("*", 4)]


def test_resumed_subscription_gets_no_snapshot(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a", "b")
    watcher = Watcher(delivery, "*", since=1)
    assert read(log, delivery) is None
    catch_up(log, delivery)
    assert watcher.received() == [2, wire.Live("*", 2)]


def test_gap_of_a_resumed_subscription_is_followed_by_a_snapshot(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a", "b", "-a", "c")
    watcher = Watcher(delivery, "*", since=1)
    log.floor = 4
    catch_up(log, delivery)
    read(log, delivery)
    assert watcher.received() == [wire.Gap("*", 2, 3, "e", "retention"), [2, "complete"]]
    catch_up(log, delivery)
    assert watcher.received() == [4, wire.Live("*", 4)]


def test_snapshot_begins_again_in_another_epoch(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a", "b", "c")
    watcher, live = Watcher(delivery, "*"), Watcher(delivery, "b")
    read(log, delivery, rows=1)
    read(log, delivery)
    assert live.received() == [[2, "complete"], wire.Live("b", 3)]
    request = delivery._snapshots.next_request()
    assert request is not None
    page = log.retained_page(request, 1)
    log.epoch = "f"
    del log.entries[2:], log.kept["c"]
    delivery.restart(2)
    exhaust(delivery._snapshots.serve(request, page))
    assert watcher.received() == [[1], wire.Gap("*", 3, 2, "f", "epoch")], "no page of the snapshot before follows"
    assert live.received() == [wire.Gap("b", 3, 2, "f", "epoch")]
    while read(log, delivery):
        pass
    assert watcher.received() == [[1, 2, "complete"], wire.Live("*", 2)]
    assert live.received() == [[2, "complete"], wire.Live("b", 2)]


@pytest.mark.parametrize("lost", ["epoch", "retention", "repair"])
def test_lost_messages_are_followed_by_a_snapshot_of_the_present_state(
    log: ListLog, delivery: Delivery, lost: str
) -> None:
    retain(log, delivery, "a")
    watchers = [Watcher(delivery, "*"), Watcher(delivery, "*", since=0), Watcher(delivery, "*", since=3)]
    read(log, delivery)
    first = watchers[0].received()
    assert first == [[1, "complete"], wire.Live("*", 1)]
    log.append([retained_entry(2, "b"), retained_entry(3, "a")])
    delivery.restart(3, lost)
    for _ in range(10):
        read(log, delivery)
        catch_up(log, delivery)
        for watcher in watchers:
            watcher.received()
    assert {watcher.subscription.state for watcher in watchers} == {LIVE}
    late = Watcher(delivery, "*", since=2)
    assert late.subscription.snapshot is None
    delivery.restart(3, lost)
    while read(log, delivery):
        pass
    assert [[3, 2, "complete"], wire.Live("*", 3)] == watchers[0].received()[1:]


# Room


def test_page_waits_until_the_send_queue_has_room(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, *(f"a.n{number:03}" for number in range(100)))
    watcher = Watcher(delivery, "a.*", limit=4000)
    requests = 0
    while read(log, delivery):
        requests += 1
    assert 0 < watcher.send_queue.size <= 4000
    waiting = [item for item in watcher.send_queue._items if isinstance(item, SnapshotPage)]
    assert requests == len(waiting), "no page is read for a client that does not read"
    pages: list[Any] = []
    while not pages or pages[-1][-1] != "complete":
        pages += [page for page in watcher.received() if isinstance(page, list)]
        read(log, delivery)
    assert [seq for page in pages for seq in page] == [*range(1, 101), "complete"]
    assert len(pages) > 5


def test_retained_message_larger_than_the_send_queue_is_delivered(log: ListLog, delivery: Delivery) -> None:
    large = [Entry(seq, 0, channel, b'"%b"' % (b"x" * 5000), retain=True) for seq, channel in [(1, "a"), (2, "b")]]
    log.append(large)
    delivery.apply(large)
    watcher = Watcher(delivery, "*", limit=1000)
    got = []
    for _ in range(4):
        read(log, delivery)
        got += watcher.received()
    assert got == [[1], [2, "complete"], wire.Live("*", 2)]


def test_message_that_does_not_fit_is_not_read_again_and_again(
    log: ListLog, delivery: Delivery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SNAPSHOT_BYTES", 100)
    large = Entry(1, 0, "a", b'"%b"' % (b"x" * 5000), retain=True)
    log.append([large])
    delivery.apply([large])
    watcher = Watcher(delivery, "a", limit=1000)
    watcher.send_queue.put(b"a reply\n")
    assert read(log, delivery) is not None
    assert read(log, delivery) is None
    watcher.send_queue.take()
    read(log, delivery)
    assert watcher.received() == [[1, "complete"], wire.Live("a", 1)]


@pytest.mark.parametrize("pattern", ["*", "a" * 200 + ".*"])
def test_size_of_a_page_is_about_that_of_its_line(pattern: str) -> None:
    entries = [retained_entry(seq, "a" * 200 + f".n{seq}") for seq in range(1, 300)]
    page = SnapshotPage(pattern, entries, begin_snapshot([pattern]), complete=True)
    assert 0.9 * len(page.lines) < page.size < 1.1 * len(page.lines)


def test_clients_take_turns(log: ListLog, delivery: Delivery) -> None:
    """A client with many subscriptions on streams of their own delays each page of others by one of its own."""
    groups = [f"g{number}" for number in range(20)]
    retain(log, delivery, *(f"{group}.n{number}" for group in [*groups, "modest"] for number in range(30)))
    greedy = [Watcher(delivery, f"{group}.*", client="greedy") for group in groups]
    modest = Watcher(delivery, "modest.*", client="modest")
    pages: list[object] = []
    requests = 0
    while modest.subscription.state is HELD:
        read(log, delivery, rows=5)
        requests += 1
        pages += modest.received()
        for watcher in greedy:
            watcher.received()
    assert len(pages) >= 6
    assert requests <= 2 * len(pages) + 1


def test_subscriptions_of_one_send_queue_get_one_snapshot_after_the_other(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, *(f"{group}.n{number}" for group in ("a", "b") for number in range(10)))
    first = Watcher(delivery, "a.*", limit=1000)
    Watcher(delivery, "b.*", send_queue=first.send_queue)
    got: list[object] = []
    for _ in range(40):
        read(log, delivery)
        got += first.received()
    live = [line.pattern for line in got if isinstance(line, wire.Live)]
    assert live == ["a.*", "b.*"]
    assert sum(isinstance(page, list) for page in got) > 4


def test_subscriptions_at_the_same_position_share_a_page(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a", "b")
    watchers = [Watcher(delivery, "*") for _ in range(100)]
    read(log, delivery)
    assert delivery._snapshots.next_request() is None
    pages = [watcher.send_queue.take()[0] for watcher in watchers]
    assert all(page is pages[0] for page in pages)


def test_subscription_with_a_later_cursor_does_not_use_an_earlier_page(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a")
    early = Watcher(delivery, "*")
    request = delivery._snapshots.next_request()
    assert request is not None
    retain(log, delivery, "b")
    late = Watcher(delivery, "*")
    exhaust(delivery._snapshots.serve(request, log.retained_page(request, 100)))
    assert (late.received(), late.subscription.state) == ([], HELD)
    read(log, delivery)
    assert late.received() == [[1, 2, "complete"], wire.Live("*", 2)]
    catch_up(log, delivery)
    assert early.received() == [[1, "complete"], 2, wire.Live("*", 2)]


def test_page_for_several_cursors_has_for_each_what_is_not_above_its_own(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a")
    early = Watcher(delivery, "*")
    retain(log, delivery, "b")
    late = Watcher(delivery, "*")
    read(log, delivery)
    assert late.received() == [[1, 2, "complete"], wire.Live("*", 2)]
    catch_up(log, delivery)
    assert early.received() == [[1, "complete"], 2, wire.Live("*", 2)]


def test_withdrawn_page_is_read_again(log: ListLog) -> None:
    """Also if the subscription has been live since."""
    delivery = Delivery(log, Budget(4000))  # type: ignore[arg-type]
    retain(log, delivery, "a", "b", "c")
    watcher = Watcher(delivery, "*")
    read(log, delivery)
    assert watcher.subscription.state is LIVE
    for _ in range(20):
        retain(log, delivery, "a")
    assert delivery.statistics().withdrawals > 0
    got = watcher.received()
    for _ in range(20):
        read(log, delivery)
        catch_up(log, delivery)
        got += watcher.received()
    pages = [page for page in got if isinstance(page, list)]
    assert pages == [[2, 3, "complete"]], "the message of `a` is newer than the cursor"
    assert got == [*pages, *range(4, 24), wire.Live("*", 23)]


# Erasure


def erase(log: ListLog, delivery: Delivery, channel: str) -> None:
    seqs = {entry.seq for entry in log.entries if entry.channel == channel}
    log.kept.pop(channel, None)
    delivery.begin_erasure()
    exhaust(delivery.erase(seqs))


def test_waiting_page_is_read_again_after_an_erasure(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a", "b")
    watcher = Watcher(delivery, "*")
    read(log, delivery)
    log.floor = 3
    erase(log, delivery, "a")
    assert watcher.received() == []
    read(log, delivery)
    assert watcher.received() == [[2, "complete"], wire.Live("*", 2)]


def test_page_that_is_pinned_is_replaced_by_another_snapshot_after_an_erasure(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a", "b")
    watcher = Watcher(delivery, "*")
    other = Subscription(watcher.send_queue)
    delivery.subscribe(other, "b")
    read(log, delivery)
    delivery.unsubscribe(other, "b")
    erase(log, delivery, "a")
    retain(log, delivery, "c")
    assert watcher.received() == [wire.Live("*", 2), wire.Gap("*", 3, 2, "e", "erasure")]
    read(log, delivery)
    catch_up(log, delivery)
    assert watcher.received() == [[2, "complete"], 3, wire.Live("*", 3)]


def test_page_of_an_ended_subscription_is_erased(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a")
    watcher = Watcher(delivery, "*")
    read(log, delivery)
    delivery.unsubscribe(watcher.subscription, "*")
    erase(log, delivery, "a")
    assert watcher.received() == [wire.Live("*", 1)]


def test_message_of_an_ended_subscription_is_erased(log: ListLog, delivery: Delivery) -> None:
    watcher = Watcher(delivery, "*")
    read(log, delivery)
    retain(log, delivery, "a", "b")
    delivery.unsubscribe(watcher.subscription, "*")
    erase(log, delivery, "a")
    assert watcher.received() == [["complete"], wire.Live("*", 0), 2]
    assert not delivery._with_history


# Event streams


def blocks(watcher: Watcher, parser: EventParser) -> list[tuple[str, Any, str]]:
    """Take the blocks of an event stream: the type, the data or the seqs of a page, and the last event id."""
    found = []
    for item in watcher.send_queue.take():
        for event in parser.feed(item if isinstance(item, bytes) else item.events):
            data = event.data["seq"] if event.type == "message" else event.data
            if event.type == "retained":
                assert all("pattern" not in message and message["retain"] for message in data["messages"])
                data = [*(message["seq"] for message in data["messages"]), *["complete"] * data["complete"]]
            found.append((event.type, data, event.last_id))
    return found


def test_event_stream_gets_one_snapshot_for_all_its_patterns(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a.b", "a", "b", "a.b.c", "c")
    watcher = Watcher(delivery, "a.b.*", "b", "a.*", "a.b", events=True)
    parser = EventParser()
    while read(log, delivery, rows=1):
        pass
    got = blocks(watcher, parser)
    assert [data for _, data, _ in got[:-1]] == [[3], [1], [4, "complete"]]
    assert [last_id for _, _, last_id in got] == ["", "", "", "5.e"], "no id before the snapshot is complete"
    assert got[-1][0] == "live"


def test_gap_of_an_event_stream_has_no_id_until_the_snapshot_is_complete(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a", "b")
    watcher, parser = Watcher(delivery, "*", events=True), EventParser()
    read(log, delivery)
    assert blocks(watcher, parser)[-1][2] == "2.e"
    log.append([retained_entry(3, "c")])
    delivery.restart(3, "retention")
    read(log, delivery)
    gap, page, live = blocks(watcher, parser)
    assert (gap[0], gap[1]["to"], gap[2]) == ("gap", 3, "2.e")
    assert (page, live[2]) == (("retained", [1, 2, 3, "complete"], "2.e"), "3.e")


def test_revoked_pattern_of_an_event_stream_begins_the_snapshot_of_the_others_again(
    log: ListLog, delivery: Delivery
) -> None:
    """The lost pattern covered another one, whose channels were to come with it."""
    retain(log, delivery, "a.a", "a.b.c", "a.b.d", "a.z", "b")
    watcher, parser = Watcher(delivery, "a.*", "a.b.*", "b", events=True), EventParser()
    read(log, delivery, rows=2)
    delivery.unsubscribe(watcher.subscription, "a.*")
    watcher.send_queue.revoke(["a.*"], watcher.subscription.patterns)
    got = blocks(watcher, parser)
    for _ in range(9):
        read(log, delivery, rows=1)
        got += blocks(watcher, parser)
    seqs = [seq for kind, data, _ in got if kind == "retained" for seq in data]
    assert seqs == [2, 2, 3, 5, "complete"]


def test_snapshot_of_patterns_that_cover_each_other_reads_each_channel_once() -> None:
    assert begin_snapshot(["a.b", "a.*", "*", "_x.*", "_x.y"]).patterns == ("*", "_x.*")
    assert begin_snapshot(["a.*", "a", "b.c.*"]).patterns == ("a.*", "a", "b.c.*")


def test_nothing_of_a_snapshot_follows_the_end_of_its_subscription(log: ListLog, delivery: Delivery) -> None:
    retain(log, delivery, "a", "b")
    watcher, other = Watcher(delivery, "*"), Watcher(delivery, "*")
    request = delivery._snapshots.next_request()
    assert request is not None
    steps = delivery._snapshots.serve(request, log.retained_page(request, 100))
    delivery.unsubscribe(watcher.subscription, "*")
    exhaust(steps)
    assert watcher.received() == []
    assert other.received() == [[1, 2, "complete"], wire.Live("*", 2)]
    assert delivery._snapshots.next_request() is None


# The reader


class PausedLog(ListLog):
    """A log whose pages are returned when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[str | None, int]] = []
        self.answers: Sequence[Exception | None] = []
        self.go = trio.Semaphore(0)

    async def retained(self, pattern: str, *, after: str | None, until: int, rows: int, size: int) -> RetainedPage:
        self.requests.append((after, until))
        page = self.retained_page(SnapshotRequest(begin_snapshot([pattern])._replace(after=after), until, size), rows)
        await self.go.acquire()
        if self.answers:
            error, *self.answers = self.answers
            if error is not None:
                raise error
        return page


async def test_page_that_was_read_before_an_erasure_is_not_used(autojump_clock: MockClock) -> None:
    log = PausedLog()
    delivery = Delivery(log)  # type: ignore[arg-type]
    retain(log, delivery, "a", "b")
    watcher = Watcher(delivery, "*")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(delivery.run)
        await wait_all_tasks_blocked()
        erase(log, delivery, "a")
        log.go.release()
        await wait_all_tasks_blocked()
        assert watcher.received() == []
        log.go.release()
        await wait_all_tasks_blocked()
        assert watcher.received() == [[2, "complete"], wire.Live("*", 2)]
        nursery.cancel_scope.cancel()
    assert log.requests == [(None, 2), (None, 2)]


async def test_unavailable_log_is_read_again(autojump_clock: MockClock) -> None:
    log = PausedLog()
    log.answers = [Unavailable("no"), Unavailable("no"), None]
    delivery = Delivery(log)  # type: ignore[arg-type]
    retain(log, delivery, "a")
    watcher = Watcher(delivery, "*")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(delivery.run)
        for _ in range(3):
            log.go.release()
        await trio.sleep(10)
        assert watcher.received() == [[1, "complete"], wire.Live("*", 1)]
        nursery.cancel_scope.cancel()
    assert len(log.requests) == 3
