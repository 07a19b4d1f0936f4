"""Retained messages of a client, without I/O: its state is that of a map fed with all messages of the log in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from catbus.client.live_state import Change, ChangeQueue, LiveState
from catbus.client.message_queue import MessageQueue, QueuePhase
from catbus.client.protocol_connection import ProtocolConnection
from catbus.client.retained_queue import RetainedQueue
from catbus.client.server_messages import Gap, Message, SnapshotPage
from catbus.client.shared_subscription import SharedSubscription
from catbus.client.subscription_manager import SubscriptionManager
from catbus.error_codes import ErrorCode
from catbus.protocol.channels import matches
from tests.client.scripted_broker import EPOCH, message
from tests.client.test_lost_connections import Client, Connections, Replica
from tests.client.test_protocol_connection import lines, sent, seqs, subscribed
from tests.mistakes import MistakePlanter

LIVE = {"type": "live", "pattern": "a.*", "seq": 120}


def do_nothing() -> None:
    pass


def keep(client: Client, pattern: str = "a.*") -> RetainedQueue:
    queue = RetainedQueue(pattern, do_nothing)
    client.subscriptions.add(queue)
    return queue


def written(seq: int, payload: Any, channel: str = "a.b", pattern: str = "a.*") -> dict[str, Any]:
    return {**message(seq, payload, pattern, channel), "retain": True}


def page(*messages: dict[str, Any], complete: bool = True, pattern: str = "a.*") -> dict[str, Any]:
    without = [{name: value for name, value in each.items() if name != "pattern"} for each in messages]
    return {"type": "retained", "pattern": pattern, "messages": without, "complete": complete}


def live(seq: int, pattern: str = "a.*") -> dict[str, Any]:
    return {"type": "live", "pattern": pattern, "seq": seq}


def gap(first: int, last: int, epoch: str = EPOCH) -> dict[str, Any]:
    return {"type": "gap", "pattern": "a.*", "from": first, "to": last, "epoch": epoch, "reason": "resume"}


def state(queue: RetainedQueue) -> dict[str, Any]:
    return {channel: found.payload for channel, found in queue.state.entries.items()}


def requests(protocol: ProtocolConnection) -> list[tuple[Any, ...]]:
    return [(r["type"], r.get("since"), r.get("retained", False)) for r in sent(protocol)]


def begin(client: Client) -> tuple[ProtocolConnection, RetainedQueue]:
    """A connection with a live map that has a.b (1) and a.c (2), and is live at 120."""
    protocol = client.go_on()
    queue = keep(client)
    [request] = sent(protocol)
    assert (request["retained"], "since" in request) == (True, False)
    snapshot = page(written(101, 1), written(102, 2, "a.c"))
    protocol.receive(lines(subscribed(110, request["id"]), snapshot, live(120)))
    assert queue.ready
    assert state(queue) == {"a.b": 1, "a.c": 2}
    return protocol, queue


def test_map_is_ready_when_its_subscription_has_caught_up_with_the_snapshot() -> None:
    client = Client()
    protocol = client.go_on()
    queue = keep(client)
    [request] = sent(protocol)
    protocol.receive(lines(subscribed(110, request["id"]), page(written(101, 1), complete=False)))
    protocol.receive(lines(page(written(102, 2, "a.c"))))
    # The newest message of a.d is above the snapshot, so only what follows shows it.
    assert not queue.ready
    protocol.receive(lines(written(111, 3, "a.d")))
    assert (queue.ready, state(queue)) == (False, {})
    protocol.receive(lines(live(111)))
    assert (queue.ready, state(queue)) == (True, {"a.b": 1, "a.c": 2, "a.d": 3})


def test_retained_messages_replace_and_null_removes() -> None:
    client = Client()
    protocol, queue = begin(client)
    protocol.receive(lines(written(121, 7), message(122, 8, channel="a.c"), written(123, None, "a.c")))
    assert state(queue) == {"a.b": 7}
    entry = queue.state.entries["a.b"]
    assert (entry.seq, entry.at, entry.sender, entry.cursor) == (121, 1_700_000_000_000, None, f"121.{EPOCH}")
    protocol.receive(lines({**message(None, 9), "retain": False}))
    assert state(queue) == {"a.b": 7}
    assert not queue.items


def test_connection_lost_before_the_end_of_the_snapshot_begins_again_without_a_cursor() -> None:
    client = Client()
    old = client.go_on()
    queue = keep(client)
    [request] = sent(old)
    old.receive(lines(subscribed(110, request["id"]), page(written(101, 1), complete=False)))
    old.connection_lost("gone")
    new = client.go_on()
    [request] = sent(new)
    assert "since" not in request
    new.receive(lines(subscribed(130, request["id"]), page(written(129, 5, "a.c")), live(130)))
    assert state(queue) == {"a.c": 5}


def test_connection_lost_after_the_snapshot_resumes_at_the_cursor() -> None:
    client = Client()
    old = client.go_on()
    queue = keep(client)
    [request] = sent(old)
    old.receive(lines(subscribed(110, request["id"]), page(written(101, 1)), written(111, 2, "a.c")))
    old.connection_lost("gone")
    new = client.go_on()
    [request] = sent(new)
    assert (request["since"], request["epoch"], request["retained"]) == (111, EPOCH, True)
    new.receive(lines(subscribed(120, request["id"]), written(112, 3, "a.c"), live(120)))
    assert (queue.ready, state(queue)) == (True, {"a.b": 1, "a.c": 3})


def test_snapshot_after_a_gap_replaces_the_state_and_reports_only_differences() -> None:
    client = Client()
    protocol, queue = begin(client)
    changes: list[Change[str, Message]] = []
    queue.state.callbacks[0] = changes.append
    protocol.receive(lines(gap(121, 150), page(written(101, 1), complete=False)))
    assert state(queue) == {"a.b": 1, "a.c": 2}
    protocol.receive(lines(page(written(140, 4, "a.e")), live(150)))
    assert state(queue) == {"a.b": 1, "a.e": 4}
    assert sorted((c.key, c.value and c.value.payload, c.previous and c.previous.payload) for c in changes) == [
        ("a.c", None, 2),
        ("a.e", 4, None),
    ]


def test_connection_lost_after_a_gap_begins_again_without_a_cursor() -> None:
    client = Client()
    old, queue = begin(client)
    old.receive(lines(gap(121, 150), page(complete=False)))
    old.connection_lost("gone")
    new = client.go_on()
    [request] = sent(new)
    assert "since" not in request
    assert state(queue) == {"a.b": 1, "a.c": 2}
    new.receive(lines(subscribed(150, request["id"]), page(written(101, 1)), live(150)))
    assert state(queue) == {"a.b": 1}


def test_snapshot_of_a_replica_that_lags_is_shown_when_it_is_as_new_as_the_state() -> None:
    client = Client()
    old, queue = begin(client)
    old.receive(lines(written(130, 30), gap(131, 150)))
    old.connection_lost("gone")
    new = client.go_on()
    [request] = sent(new)
    new.receive(lines(subscribed(125, request["id"]), page(written(101, 1)), live(125)))
    assert state(queue) == {"a.b": 30, "a.c": 2}
    new.receive(lines(written(130, 30)))
    assert state(queue) == {"a.b": 30}


def test_gap_of_another_queue_does_not_concern_the_map() -> None:
    client = Client()
    protocol, queue = begin(client)
    protocol.receive(lines(written(125, 3)))
    other = client.subscribe(since=50, epoch=EPOCH)
    [request] = sent(protocol)
    assert (request["since"], request["retained"]) == (50, True)
    again = written(101, 1), written(102, 2, "a.c")
    protocol.receive(lines(subscribed(125, request["id"]), gap(51, 110), page(*again), written(125, 3), live(125)))
    assert state(queue) == {"a.b": 3, "a.c": 2}
    assert seqs(other) == [125]


def test_map_beside_a_subscription_gets_its_snapshot_and_the_other_resumes() -> None:
    client = Client()
    protocol = client.go_on()
    reader = client.subscribe()
    protocol.receive(lines(subscribed(120, sent(protocol)[0]["id"]), message(121)))
    queue = keep(client)
    [request] = sent(protocol)
    assert ("since" in request, request["retained"]) == (False, True)
    protocol.receive(lines(message(122)))
    protocol.receive(lines(subscribed(122, request["id"]), page(written(101, 1)), message(123), live(123)))
    assert (queue.ready, state(queue)) == (True, {"a.b": 1})
    [request] = sent(protocol)
    assert (request["since"], request["retained"]) == (122, True)
    protocol.receive(lines(subscribed(123, request["id"]), message(123), live(123), written(124, 2)))
    assert seqs(reader) == [121, 122, 123, 124]
    assert state(queue) == {"a.b": 2}


def test_rejected_map_leaves_the_subscription_beside_it() -> None:
    client = Client()
    protocol = client.go_on()
    reader = client.subscribe()
    protocol.receive(lines(subscribed(120, sent(protocol)[0]["id"])))
    queue = keep(client)
    [request] = sent(protocol)
    error = {"type": "subscribe_error", "pattern": "a.*", "message": "no", "code": "unavailable", "id": request["id"]}
    protocol.receive(lines(error, message(121)))
    assert queue.error is not None
    assert queue.error.code is ErrorCode.UNAVAILABLE
    assert (reader.phase, seqs(reader)) == (QueuePhase.ACTIVE, [121])


def test_revoked_map_ends() -> None:
    client = Client()
    protocol, queue = begin(client)
    protocol.receive(lines({"type": "revoked", "pattern": "a.*", "seq": 120}))
    assert queue.error is not None
    assert queue.error.code is ErrorCode.REVOKED


def test_head_of_a_subscription_that_reads_its_snapshot_says_nothing() -> None:
    client = Client()
    protocol = client.go_on()
    queue = keep(client)
    [request] = sent(protocol)
    head = {"type": "head", "seq": 130, "epoch": EPOCH, "at": 1}
    protocol.receive(lines(subscribed(110, request["id"]), head, page(written(101, 1)), head, written(120, 2)))
    assert not queue.ready
    protocol.receive(lines(live(130)))
    assert state(queue) == {"a.b": 2}


def test_move_before_the_end_of_the_snapshot_begins_again() -> None:
    client = Client()
    old = client.go_on()
    queue = keep(client)
    [first] = sent(old)
    old.receive(lines(subscribed(110, first["id"]), page(written(101, 1), complete=False)))
    new = client.connect()
    new.resume_subscriptions()
    [second] = sent(new)
    assert "since" not in second
    # The old connection is still open, and what it sends belongs to the snapshot that ends.
    old.receive(lines(page(written(102, 2, "a.c")), written(111, 3), live(111)))
    assert not queue.ready
    new.receive(lines(subscribed(105, second["id"]), page(written(101, 1), written(102, 2, "a.c")), live(105)))
    assert state(queue) == {"a.b": 1, "a.c": 2}
    new.receive(lines(written(111, 3)))
    assert state(queue) == {"a.b": 3, "a.c": 2}


def test_new_epoch_in_a_snapshot_begins_it_again() -> None:
    client = Client()
    protocol = client.go_on()
    queue = keep(client)
    [request] = sent(protocol)
    protocol.receive(lines(subscribed(110, request["id"]), page(written(101, 1), complete=False)))
    protocol.receive(lines(gap(81, 80, "e2"), page(written(70, 2, "a.c")), live(80)))
    assert state(queue) == {"a.c": 2}
    assert queue.state.entries["a.c"].cursor == "70.e2"


def test_erasure_in_a_snapshot_begins_it_again() -> None:
    for complete in (False, True):
        client = Client()
        protocol = client.go_on()
        queue = keep(client)
        [request] = sent(protocol)
        erasure = {**gap(111, 110), "reason": "erasure"}
        protocol.receive(lines(subscribed(110, request["id"]), page(written(101, 1), complete=complete), erasure))
        protocol.receive(lines(page(written(102, 2, "a.c")), live(110)))
        assert state(queue) == {"a.c": 2}


def test_state_of_another_epoch_may_be_older() -> None:
    client = Client()
    protocol, queue = begin(client)
    changes: list[Change[str, Message]] = []
    queue.state.callbacks[0] = changes.append
    protocol.receive(lines(gap(81, 80, "e2"), page(written(101, 1)), live(80)))
    assert state(queue) == {"a.b": 1}
    # The message of a.b is the same one.
    assert [change.key for change in changes] == ["a.c"]


# The model


class Write:
    """The payload of a retained message."""

    def __init__(self, value: int | None) -> None:
        self.value = value


Log = list[tuple[str, Any]]


def fold(log: Log, pattern: str) -> dict[str, tuple[int, Any]]:
    """The retained messages after a log, with their seqs."""
    retained: dict[str, tuple[int, Any]] = {}
    for seq, (channel, payload) in enumerate(log, 1):
        if isinstance(payload, Write) and matches(pattern, channel):
            retained.pop(channel, None)
            if payload.value is not None:
                retained[channel] = seq, payload.value
    return retained


class RetainingReplica(Replica):
    """A replica that reads snapshots in pages of two rows, from a database that may be newer than the replica."""

    def __init__(self, log: Log, keys: dict[int, int], client: Client, lag: int = 0) -> None:
        super().__init__(log, keys, client, lag)
        self.retained: set[str] = set()
        """The patterns whose subscription is `retained`."""
        self.snapshots: dict[str, tuple[int, str]] = {}
        """The position of each snapshot that is not complete, and the last channel that was read."""
        self.lagging: dict[str, int] = {}
        """The patterns to be told that they have caught up, with the newest seq that their snapshots have seen."""

    def encode(self, seq: int, pattern: str) -> dict[str, Any]:
        channel, payload = self.log[seq - 1]
        if isinstance(payload, Write):
            return written(seq, payload.value, channel, pattern)
        return super().encode(seq, pattern)

    def answer(self, request: dict[str, Any]) -> None:
        match request:
            case {"type": "subscribe", "pattern": pattern, "id": number} if self.refusing is None:
                self.forget(pattern)
                if request.get("retained"):
                    self.retained.add(pattern)
                since = request.get("since")
                if since is not None or pattern not in self.retained:
                    super().answer(request)
                    if since is not None and since > self.applied:
                        self.lagging[pattern] = since
                    return
                # It goes on where the subscription is that it replaces, which may be ahead of this replica.
                position = self.held[pattern] = min(self.held.get(pattern, self.applied), self.applied)
                self.snapshots[pattern] = position, ""
                self.say(subscribed(position, number, pattern))
            case {"type": "unsubscribe", "pattern": pattern}:
                self.forget(pattern)
                super().answer(request)
            case _:
                super().answer(request)

    def forget(self, pattern: str) -> None:
        self.snapshots.pop(pattern, None)
        self.retained.discard(pattern)
        self.lagging.pop(pattern, None)

    def deliver(self, upto: int) -> None:
        """Read the next pages, or if there are none, apply the log."""
        waiting = {pattern: self.held.pop(pattern) for pattern in self.snapshots}
        super().deliver(self.applied if waiting else upto)
        self.held |= waiting
        for pattern in waiting:
            self.read_page(pattern)
        for pattern, newest in list(self.lagging.items()):
            # A channel that has changed since the position of the snapshot is missing in it until its message comes.
            if self.held[pattern] == self.applied >= newest:
                del self.lagging[pattern]
                self.say(live(self.applied, pattern))

    def read_page(self, pattern: str) -> None:
        position, after = self.snapshots[pattern]
        rows = sorted((channel, *found) for channel, found in fold(self.log, pattern).items() if channel > after)
        messages = [written(seq, value, channel) for channel, seq, value in rows[:2] if seq <= position]
        self.say(page(*messages, complete=len(rows) <= 2, pattern=pattern))
        if len(rows) > 2:
            self.snapshots[pattern] = position, rows[1][0]
        else:
            del self.snapshots[pattern]
            self.lagging[pattern] = len(self.log)

    def skip(self, pattern: str, count: int) -> None:
        """Lose the next messages of a subscription, and say so."""
        self.deliver(self.applied)
        first = self.held[pattern] + 1
        last = min(len(self.log), self.held[pattern] + count)
        self.say({**gap(first, last), "pattern": pattern})
        self.held[pattern] = last
        if pattern in self.retained:
            self.snapshots[pattern] = last, ""
            self.lagging.pop(pattern, None)


class Watch:
    """The application side of a live map: by callback, and by an iteration that takes changes now and then."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.queue = RetainedQueue(pattern, do_nothing)
        self.called: dict[str, Message] = {}
        self.known: dict[str, Message] = {}
        self.oldest = 0
        """The oldest position at which the state was as it is."""
        self.queue.state.callbacks[self] = self.note
        self.iteration = ChangeQueue(self.queue.state, do_nothing)

    def note(self, change: Change[str, Message]) -> None:
        self.apply(change, self.called)
        assert self.queue.state.entries.get(change.key) is change.value

    def take(self, count: int) -> None:
        for _ in range(count):
            change = self.iteration.take()
            if change is None:
                assert content(self.known) == content(self.queue.state.entries)
                return
            self.apply(change, self.known)

    def apply(self, change: Change[str, Message], entries: dict[str, Message]) -> None:
        value, known = change.value, entries.get(change.key)
        # After a snapshot the same message is another object.
        assert (change.previous and change.previous.seq) == (known and known.seq)
        assert (change.previous and change.previous.seq) != (value and value.seq)
        entries.pop(change.key, None)
        if value is not None:
            entries[change.key] = value

    def check(self, log: Log) -> None:
        """The state is that of the log at some position, which never goes back."""
        assert self.queue.error is None
        assert not self.queue.items
        shown = content(self.queue.state.entries)
        assert content(self.called) == shown
        if self.queue.ready:
            positions = range(self.oldest, len(log) + 1)
            found = next((each for each in positions if fold(log[:each], self.pattern) == shown), None)
            assert found is not None, (shown, self.oldest)
            self.oldest = found
        else:
            assert not shown


def content(entries: dict[str, Message]) -> dict[str, tuple[int, Any]]:
    assert all(channel == found.channel for channel, found in entries.items())
    return {channel: (found.seq or 0, found.payload) for channel, found in entries.items()}


# Live maps and subscriptions of the same patterns come and go, channels change between the pages of a snapshot,
# messages are lost, and connections are lost anywhere: each map shows the log at some position, and at the end all of
# it.
class LiveMaps(Connections):
    patterns = ("a.*", "*")

    def __init__(self) -> None:
        super().__init__()
        self.watches: list[Watch] = []
        self.log += [("a.x", Write(1)), ("a.y", Write(2)), ("a.z", Write(3))]
        self.connect()
        self.add_watch("a.*")
        self.everything_arrives()

    def new(self) -> Replica:
        return RetainingReplica(self.log, self.keys, self.client, lag=4)

    @rule(channel=st.sampled_from(["a.x", "a.y", "a.z", "b"]), value=st.none() | st.integers(0, 9))
    def write(self, channel: str, value: int | None) -> None:
        self.log.append((channel, Write(value)))

    @rule(data=st.data())
    def watch(self, data: st.DataObject) -> None:
        pattern = data.draw(st.sampled_from(self.patterns))
        if sum(watch.pattern == pattern for watch in self.watches) < 2:
            self.add_watch(pattern)

    def add_watch(self, pattern: str) -> None:
        self.watches.append(Watch(pattern))
        self.client.subscriptions.add(self.watches[-1].queue)

    @precondition(lambda self: self.replicas)
    @rule()
    def everything_arrives(self) -> None:
        for replica in self.replicas:
            for _ in range(3):
                replica.process_requests(10_000)
                replica.deliver(len(self.log))
                self.bring(replica, 10_000_000)

    @precondition(lambda self: self.watches)
    @rule(data=st.data())
    def stop_watching(self, data: st.DataObject) -> None:
        watch = data.draw(st.sampled_from(self.watches))
        self.client.subscriptions.unsubscribe(watch.queue)
        self.watches.remove(watch)

    @precondition(lambda self: self.watches)
    @rule(data=st.data(), count=st.integers(1, 3))
    def take_changes(self, data: st.DataObject, count: int) -> None:
        data.draw(st.sampled_from(self.watches)).take(count)

    @precondition(lambda self: any(replica.held for replica in self.replicas))
    @rule(data=st.data(), count=st.integers(1, 3))
    def lose_messages(self, data: st.DataObject, count: int) -> None:
        replica = data.draw(st.sampled_from([replica for replica in self.replicas if replica.held]))
        assert isinstance(replica, RetainingReplica)
        replica.skip(data.draw(st.sampled_from(sorted(replica.held))), count)

    @precondition(lambda self: self.present and not self.next)
    @rule(value=st.none() | st.integers(0, 9))
    def lose_a_message_and_the_connection(self, value: int | None) -> None:
        """The snapshot after it comes from a replica that lags behind the map."""
        self.everything_arrives()
        self.write("a.y", value)
        assert isinstance(self.present, RetainingReplica)
        if "a.*" in self.present.held:
            self.present.skip("a.*", 1)
        self.bring(self.present, 10_000_000)
        self.lose()
        self.connect()

    @invariant()
    def each_map_shows_the_log_at_some_position(self) -> None:
        for watch in self.watches:
            watch.check(self.log)

    @property
    def wanted(self) -> set[str]:
        return super().wanted | {watch.pattern for watch in self.watches}

    def settle(self, replica: Replica) -> None:
        for _ in range(8):
            replica.process_requests(10_000)
            replica.deliver(len(self.log))
            self.bring(replica, 10_000_000)
        super().settle(replica)
        for watch in self.watches:
            watch.check(self.log)
            assert watch.queue.ready
            assert content(watch.queue.state.entries) == fold(self.log, watch.pattern)
            watch.take(10_000)
            assert content(watch.known) == content(watch.queue.state.entries)


TestLiveMaps = LiveMaps.TestCase
TestLiveMaps.settings = settings(max_examples=2 * settings().max_examples, stateful_step_count=40)


# Planted mistakes


def ignore_removal(planter: MistakePlanter) -> None:
    def set_entry(self: LiveState[str, Message], key: str, value: Message | None) -> None:
        if value is not None:
            right(self, key, value)

    right = LiveState.set
    planter.replace(LiveState, "set", set_entry)


def keep_what_the_snapshot_had_not(planter: MistakePlanter) -> None:
    right = LiveState.replace
    planter.replace(LiveState, "replace", lambda self, entries: right(self, {**self.entries, **entries}))


def report_the_whole_snapshot(planter: MistakePlanter) -> None:
    planter.replace(LiveState, "are_equal", lambda self, one, other: one is None and other is None)


def show_the_snapshot_when_it_is_complete(planter: MistakePlanter) -> None:
    def add_page(self: RetainedQueue, page: SnapshotPage) -> None:
        right(self, page)
        if page.complete and self._snapshot is not None:
            self._caught_up = True
            self._show_snapshot()

    right = RetainedQueue.add_page
    planter.replace(RetainedQueue, "add_page", add_page)


def go_back_to_an_older_snapshot(planter: MistakePlanter) -> None:
    def show_snapshot(self: RetainedQueue) -> None:
        self._shown_epoch = ""
        right(self)

    right = RetainedQueue._show_snapshot
    planter.replace(RetainedQueue, "_show_snapshot", show_snapshot)


def resume_an_incomplete_snapshot(planter: MistakePlanter) -> None:
    def start(self: RetainedQueue, seq: int, epoch: str) -> None:
        right(self, seq, epoch)
        self.has_cursor = True

    right = RetainedQueue.start
    planter.replace(RetainedQueue, "start", start)


def ignore_a_gap(planter: MistakePlanter) -> None:
    planter.replace(RetainedQueue, "add_gap", MessageQueue.add_gap)


def ignore_an_erasure(planter: MistakePlanter) -> None:
    def add_gap(self: RetainedQueue, gap: Gap) -> None:
        if gap.first <= gap.last:
            right(self, gap)

    right = RetainedQueue.add_gap
    planter.replace(RetainedQueue, "add_gap", add_gap)


def take_pages_that_are_for_another_queue(planter: MistakePlanter) -> None:
    def add_page(self: RetainedQueue, page: SnapshotPage) -> None:
        if self._snapshot is None:
            self._begin_snapshot()
        right(self, page)

    right = RetainedQueue.add_page
    planter.replace(RetainedQueue, "add_page", add_page)


def continue_the_snapshot_of_the_connection_before(planter: MistakePlanter) -> None:
    def begin_snapshot(self: RetainedQueue) -> None:
        before = self._snapshot
        right(self)
        self._snapshot = before or {}

    right = RetainedQueue._begin_snapshot
    planter.replace(RetainedQueue, "_begin_snapshot", begin_snapshot)


def resume_everything_at_once(planter: MistakePlanter) -> None:
    def handle_subscribed(self: SubscriptionManager, reply: Any, incoming: Any) -> None:
        subscription = self._requests.get(reply.id)
        if subscription is not None and subscription.has_snapshot:
            subscription.covered = tuple(subscription.queues)
        right(self, reply, incoming)

    right = SubscriptionManager.handle_subscribed
    planter.replace(SubscriptionManager, "handle_subscribed", handle_subscribed)


def take_the_snapshot_of_the_connection_before(planter: MistakePlanter) -> None:
    def make_subscribe(self: SharedSubscription, number: int, head: int, epoch: str) -> Any:
        receivers = self.receivers
        request = right(self, number, head, epoch)
        self.receivers = receivers
        return request

    right = SharedSubscription.make_subscribe
    planter.replace(SharedSubscription, "make_subscribe", make_subscribe)


def merge_changes_without_cancelling(planter: MistakePlanter) -> None:
    def add(self: ChangeQueue[str, Message], change: Change[str, Message]) -> None:
        self._previous.setdefault(change.key, change.previous)

    planter.replace(ChangeQueue, "add", add)


def report_what_the_iteration_does_not_know(planter: MistakePlanter) -> None:
    def add(self: ChangeQueue[str, Message], change: Change[str, Message]) -> None:
        self._previous[change.key] = change.previous

    planter.replace(ChangeQueue, "add", add)


MISTAKES: dict[Callable[[MistakePlanter], None], Callable[[], None] | None] = {
    ignore_removal: None,
    keep_what_the_snapshot_had_not: test_snapshot_after_a_gap_replaces_the_state_and_reports_only_differences,
    report_the_whole_snapshot: None,
    show_the_snapshot_when_it_is_complete: test_map_is_ready_when_its_subscription_has_caught_up_with_the_snapshot,
    go_back_to_an_older_snapshot: test_snapshot_of_a_replica_that_lags_is_shown_when_it_is_as_new_as_the_state,
    resume_an_incomplete_snapshot: None,
    ignore_a_gap: test_snapshot_after_a_gap_replaces_the_state_and_reports_only_differences,
    ignore_an_erasure: test_erasure_in_a_snapshot_begins_it_again,
    take_pages_that_are_for_another_queue: test_gap_of_another_queue_does_not_concern_the_map,
    continue_the_snapshot_of_the_connection_before: (
        test_connection_lost_before_the_end_of_the_snapshot_begins_again_without_a_cursor
    ),
    resume_everything_at_once: test_map_beside_a_subscription_gets_its_snapshot_and_the_other_resumes,
    take_the_snapshot_of_the_connection_before: test_move_before_the_end_of_the_snapshot_begins_again,
    merge_changes_without_cancelling: None,
    report_what_the_iteration_does_not_know: None,
}
"""Mistakes, and the test that finds each of them. None: the model does."""


@pytest.mark.parametrize("plant", MISTAKES, ids=lambda plant: plant.__name__)
def test_planted_mistake_is_found(plant: Callable[[MistakePlanter], None], monkeypatch: pytest.MonkeyPatch) -> None:
    planter = MistakePlanter(monkeypatch)
    plant(planter)
    # The tests also unpack what the client has sent.
    with pytest.raises((AssertionError, ValueError)):
        (MISTAKES[plant] or run_model)()
    planter.check()


def run_model() -> None:
    """Run the model, without searching for the smallest example of a failure."""
    profile = settings(
        max_examples=100,
        stateful_step_count=40,
        phases=[Phase.generate],
        database=None,
        derandomize=True,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(LiveMaps, settings=profile)
