"""The state that outlives a connection, without I/O: connections are lost at any byte, messages and replies are not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from catbus.client.channel_memberships import ChannelMemberships
from catbus.client.in_flight_requests import (
    MAX_LOST_CONNECTIONS,
    MAX_TRIES,
    InFlightRequests,
    PendingReply,
    PublishBatch,
)
from catbus.client.message_queue import CursorUpdate, InitialHistory, MessageQueue, QueuePhase
from catbus.client.protocol_connection import ProtocolConnection
from catbus.client.server_messages import Message, Page, encode_payload
from catbus.client.subscription_manager import SubscriptionManager
from catbus.error_codes import ErrorCode
from catbus.errors import Refused
from catbus.protocol import wire_messages as wire
from catbus.protocol.channels import matches
from tests.client.scripted_broker import AUTH_OK, EPOCH, message
from tests.client.test_protocol_connection import lines, sent, seqs, subscribed


class Client:
    """The state of one client, and its connections."""

    def __init__(self, *, reconnects: bool = True) -> None:
        self.in_flight = InFlightRequests(reconnects=reconnects)
        self.subscriptions = SubscriptionManager(self.in_flight.next_id)
        self.memberships = ChannelMemberships(self.in_flight.next_id)

    def open(self) -> ProtocolConnection:
        return ProtocolConnection(self.in_flight, self.subscriptions, self.memberships)

    def connect(self, **fields: Any) -> ProtocolConnection:
        """An authenticated connection that has not resumed anything."""
        protocol = self.open()
        protocol.authenticate("t")
        protocol.receive(lines({**AUTH_OK, **fields}))
        sent(protocol)
        return protocol

    def go_on(self, **fields: Any) -> ProtocolConnection:
        protocol = self.connect(**fields)
        protocol.resume()
        return protocol

    def publish(self, *payloads: Any, **options: Any) -> PublishBatch:
        batch = PublishBatch(len(payloads))
        for place, payload in enumerate(payloads):
            given = {"ephemeral": False, "echo": True, **options}
            self.in_flight.publish("a.b", encode_payload(payload), batch, place, **given)
        return batch

    def subscribe(self, pattern: str = "a.*", since: int | None = None, epoch: str | None = None) -> MessageQueue:
        return self.subscriptions.subscribe(pattern, since, epoch, 1000, present=EPOCH)


def published(number: int, seq: int) -> dict[str, Any]:
    return {"type": "published", "channel": "a.b", "id": number, "seq": seq}


def refused(number: int, code: ErrorCode) -> dict[str, Any]:
    return {"type": "publish_error", "channel": "a.b", "id": number, "message": "no", "code": code}


def stopping(number: int) -> dict[str, Any]:
    return refused(number, ErrorCode.SHUTTING_DOWN)


def codes(batch: PublishBatch) -> list[Any]:
    return [result.code if isinstance(result, Refused) else result for result in batch.results]


# Publishing


def test_publish_without_a_reply_is_retried_before_newer_publishes() -> None:
    client = Client()
    first = client.go_on(head=100)
    early = client.publish("one", "two")
    sent(first)
    first.receive(lines(published(1, 101)))
    first.connection_lost("gone")
    late = client.publish("three")
    second = client.go_on(head=120)
    publish = {"type": "publish", "channel": "a.b"}
    assert sent(second) == [{**publish, "payload": "two", "id": 2, "retry": True, "after": 100, "epoch": EPOCH}]
    second.receive(lines(published(2, 121)))
    assert sent(second) == [{**publish, "payload": "three", "id": 3}]
    second.receive(lines(published(3, 122)))
    assert (codes(early), codes(late)) == ([101, 121], [122])
    assert not client.in_flight.publishes_in_flight


def test_next_connection_sends_the_producer_id() -> None:
    client = Client()
    client.go_on().connection_lost("gone")
    second = client.open()
    second.authenticate("t")
    assert sent(second)[0]["producer"] == "p1"


@pytest.mark.parametrize(
    ("next_time", "sure"),
    [
        ({}, True),
        ({"floor": 101}, True),
        ({"floor": 102}, False),
        ({"epoch": "e2"}, False),
        ({"producer": "p2"}, False),
        ({"producer": ""}, False),
    ],
)
def test_publish_with_an_unknowable_outcome_is_not_retried(next_time: dict[str, Any], sure: bool) -> None:
    client = Client()
    first = client.go_on(head=100)
    batch = client.publish("x")
    first.connection_lost("gone")
    again = sent(client.go_on(**next_time))
    assert [request["id"] for request in again] == ([1] if sure else [])
    assert codes(batch) == ([None] if sure else [ErrorCode.UNKNOWN])
    assert bool(batch.missing) is sure


def test_publish_too_large_for_a_retry_ends_as_unknown() -> None:
    client = Client()
    first = client.go_on(limits={"message_size": 100})
    batch = client.publish("x" * 40)
    first.connection_lost("gone")
    assert sent(client.go_on(limits={"message_size": 100})) == []
    assert codes(batch) == [ErrorCode.UNKNOWN]


def test_ephemeral_message_is_never_retried() -> None:
    client = Client()
    first = client.go_on()
    batch = client.publish("now", ephemeral=True)
    first.connection_lost("gone")
    assert codes(batch) == [ErrorCode.UNKNOWN]
    waiting = client.publish("later", ephemeral=True)
    assert [request["payload"] for request in sent(client.go_on())] == ["later"]
    assert waiting.missing


def test_publish_rejected_by_a_draining_replica_goes_to_the_next_with_a_new_id() -> None:
    client = Client()
    first = client.go_on()
    batch = client.publish("one", "two")
    sent(first)
    first.receive(lines(stopping(1)))
    later = client.publish("three")
    first.receive(lines(stopping(2)))
    assert sent(first) == []
    assert client.in_flight.publishes_in_flight == 3
    first.connection_lost("gone", 4504)
    again = sent(client.go_on())
    assert [(request["payload"], request["id"], "retry" in request) for request in again] == [
        ("one", 3, False),
        ("two", 4, False),
        ("three", 5, False),
    ]
    assert batch.missing == 2
    assert later.missing == 1


@pytest.mark.parametrize("answered", [True, False])
def test_rejected_publish_is_not_sent_behind_a_newer_one(answered: bool) -> None:
    client = Client()
    first = client.go_on()
    batch = client.publish("one", "two")
    sent(first)
    first.receive(lines(stopping(1), *([published(2, 101)] if answered else [])))
    first.connection_lost("gone", 4504)
    assert codes(batch)[0] is ErrorCode.SHUTTING_DOWN
    assert [request["id"] for request in sent(client.go_on())] == ([] if answered else [2])


IN_PASSING = [ErrorCode.UNKNOWN, ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED, ErrorCode.RATE_LIMITED]


def test_publish_of_unknown_outcome_is_retried_before_newer_publishes() -> None:
    client = Client()
    only = client.go_on(head=100)
    batch = client.publish("one", "two", "three")
    sent(only)
    only.receive(lines(refused(1, ErrorCode.UNKNOWN), published(2, 101), refused(3, ErrorCode.UNKNOWN)))
    later = client.publish("four")
    assert sent(only) == []
    assert not client.in_flight.awaiting_acknowledgement
    client.in_flight.retry()
    again = sent(only)
    assert [(r["payload"], r["id"], r.get("retry"), r.get("after")) for r in again] == [
        ("one", 1, True, 100),
        ("three", 3, True, 100),
    ]
    only.receive(lines(published(1, 100)))
    assert sent(only) == []
    only.receive(lines(published(3, 102)))
    assert [(r["payload"], r["id"], r.get("retry")) for r in sent(only)] == [("four", 4, None)]
    only.receive(lines(published(4, 103)))
    assert (codes(batch), codes(later)) == ([100, 101, 102], [103])


@pytest.mark.parametrize("code", sorted(set(ErrorCode) - {ErrorCode.SHUTTING_DOWN, ErrorCode.UNKNOWN}))
def test_rejection_of_a_retry_does_not_settle_the_publish(code: ErrorCode) -> None:
    client = Client()
    only = client.go_on()
    certain, doubtful = client.publish("one"), client.publish("two")
    sent(only)
    only.receive(lines(refused(1, code), refused(2, ErrorCode.UNKNOWN)))
    assert codes(certain) == [code]
    client.in_flight.retry()
    only.receive(lines(refused(2, code)))
    assert client.in_flight.retry_pending == (code in IN_PASSING)
    assert codes(doubtful) == [None if code in IN_PASSING else ErrorCode.UNKNOWN]


@pytest.mark.parametrize("code", IN_PASSING)
def test_retries_are_bounded(code: ErrorCode) -> None:
    client = Client()
    only = client.go_on()
    batch = client.publish("one")
    sent(only)
    only.receive(lines(refused(1, ErrorCode.UNKNOWN)))
    tries = 1
    while client.in_flight.retry_pending:
        client.in_flight.retry()
        tries += len(sent(only))
        only.receive(lines(refused(1, code)))
    assert codes(batch) == [ErrorCode.UNKNOWN]
    assert tries == MAX_TRIES


def test_publish_that_ends_every_connection_does_not_block_newer_ones_for_ever() -> None:
    client = Client()
    poison, newer = client.publish("poison"), client.publish("newer")
    later: list[PublishBatch] = []
    for _ in range(MAX_LOST_CONNECTIONS):
        later.append(client.publish("later"))
        client.go_on().connection_lost("gone", 4500)
    assert codes(poison) == [ErrorCode.UNKNOWN]
    assert newer.missing
    last = client.go_on()
    for number in range(2, 20):
        last.receive(lines(published(number, 100 + number)))
    assert newer.results == [102]
    assert not any(batch.missing for batch in later)


@pytest.mark.parametrize("how", ["lost", "unknown"])
def test_draining_replica_cannot_settle_an_earlier_try(how: str) -> None:
    client = Client()
    first = client.go_on()
    batch = client.publish("one")
    sent(first)
    if how == "unknown":
        first.receive(lines(refused(1, ErrorCode.UNKNOWN)))
    first.connection_lost("gone")
    second = client.go_on()
    second.receive(lines(stopping(1)))
    later = client.publish("two")
    sent(second)
    second.connection_lost("gone", 4504)
    third = client.go_on()
    assert [(r["payload"], r["id"], "retry" in r) for r in sent(third)] == [("one", 1, True)]
    third.receive(lines({**published(1, 90), "duplicate": True}))
    assert [(r["payload"], r["id"], "retry" in r) for r in sent(third)] == [("two", 2, False)]
    third.receive(lines(published(2, 101)))
    assert (codes(batch), codes(later)) == ([90], [101])


@pytest.mark.parametrize(("expect", "outcome"), [(7, ErrorCode.CONFLICT), (0, ErrorCode.UNKNOWN)])
def test_conflict_of_a_retry_is_final_unless_none_was_expected(expect: int, outcome: ErrorCode) -> None:
    client = Client()
    old = client.go_on()
    batch = client.publish("one", retain=True, expect=expect)
    old.connection_lost("gone")
    later = client.publish("two")
    new = client.go_on()
    [again] = sent(new)
    assert (again["id"], again["retry"], again["retain"], again["expect"]) == (1, True, True, expect)
    # With 0 the earlier try may still succeed, when the retained message has been removed.
    new.receive(lines({**refused(1, ErrorCode.CONFLICT), "seq": 9}))
    assert codes(batch) == [outcome]
    assert [request["payload"] for request in sent(new)] == ["two"]
    assert later.missing


def test_success_of_a_conditional_publish_is_never_reported_as_a_conflict() -> None:
    client = Client()
    old = client.go_on()
    batch = client.publish("one", retain=True, expect=7)
    old.connection_lost("gone")
    new = client.go_on()
    [again] = sent(new)
    assert (again["id"], again["retry"]) == (1, True)
    new.receive(lines({**published(1, 101), "duplicate": True}))
    assert codes(batch) == [101]


def test_uncertain_publish_is_retried_on_the_next_connection() -> None:
    client = Client()
    first = client.go_on(head=100)
    batch = client.publish("one")
    sent(first)
    first.receive(lines(refused(1, ErrorCode.UNKNOWN)))
    first.connection_lost("gone")
    second = client.go_on(head=130)
    assert [(r["id"], r["after"]) for r in sent(second)] == [(1, 100)]
    client.in_flight.retry()
    assert sent(second) == []
    second.receive(lines(published(1, 101)))
    assert codes(batch) == [101]


def test_old_connection_gets_no_retry_during_a_move() -> None:
    client = Client()
    old = client.go_on()
    batch = client.publish("one")
    sent(old)
    old.receive(lines(refused(1, ErrorCode.UNKNOWN)))
    client.in_flight.pause()
    client.in_flight.retry()
    assert sent(old) == []
    new = client.connect()
    old.connection_lost("closed")
    new.resume_requests()
    assert [r["id"] for r in sent(new)] == [1]
    assert batch.missing


def test_new_epoch_makes_an_uncertain_publish_unknown() -> None:
    client = Client()
    only = client.go_on()
    client.subscribe()
    only.receive(lines(subscribed(100, 1)))
    batch = client.publish("one")
    gap = {"type": "gap", "pattern": "a.*", "from": 81, "to": 80, "epoch": "e2", "reason": "epoch"}
    only.receive(lines(gap, refused(2, ErrorCode.UNKNOWN)))
    sent(only)
    client.in_flight.retry()
    assert sent(only) == []
    assert codes(batch) == [ErrorCode.UNKNOWN]


def test_uncertain_ephemeral_message_ends_as_unknown() -> None:
    client = Client()
    only = client.go_on()
    batch = client.publish("now", ephemeral=True)
    only.receive(lines(refused(1, ErrorCode.UNKNOWN)))
    assert codes(batch) == [ErrorCode.UNKNOWN]
    assert not client.in_flight.retry_pending


def test_rejected_publish_is_dropped_if_its_task_was_cancelled() -> None:
    client = Client()
    first = client.go_on()
    batch = client.publish("one")
    sent(first)
    first.receive(lines(stopping(1)))
    client.in_flight.cancel_batch(batch)
    first.connection_lost("gone")
    assert sent(client.go_on()) == []


def test_reply_after_the_loss_of_the_connection_is_ignored() -> None:
    client = Client()
    old = client.go_on()
    batch, queue = client.publish("one"), client.subscribe()
    old.connection_lost("closed")
    new = client.go_on()
    old.receive(lines(refused(1, ErrorCode.UNAVAILABLE), subscribed(100, 2), message(101)))
    assert codes(batch) == [None]
    assert not client.in_flight.retry_pending
    assert queue.phase is QueuePhase.REQUESTED
    new.receive(lines(published(1, 101)))
    assert codes(batch) == [101]


def test_rejection_by_a_draining_replica_is_final_without_reconnect() -> None:
    client = Client(reconnects=False)
    first = client.go_on()
    batch = client.publish("one")
    first.receive(lines(stopping(1)))
    assert codes(batch) == [ErrorCode.SHUTTING_DOWN]


def test_cancelled_publish_is_not_sent_unless_it_already_was() -> None:
    client = Client()
    first = client.go_on()
    gone = client.publish("sent")
    first.connection_lost("gone")
    unsent, kept = client.publish("unsent", "unsent"), client.publish("kept")
    client.in_flight.cancel_batch(gone)
    client.in_flight.cancel_batch(unsent)
    second = client.go_on()
    second.receive(lines(published(1, 101)))
    assert [request["payload"] for request in sent(second)] == ["sent", "kept"]
    assert kept.missing
    assert client.in_flight.unsent_bytes == 0


def test_history_and_ping_are_requested_again_unless_cancelled() -> None:
    client = Client()
    first = client.go_on()
    history, ping, unwanted = client.in_flight.history("a", 7, None), client.in_flight.ping(), client.in_flight.ping()
    first_time = sent(first)
    client.in_flight.cancel_request(unwanted)
    first.connection_lost("gone")
    late, never = client.in_flight.history("b", 1, 5), client.in_flight.ping()
    client.in_flight.cancel_request(never)
    second = client.go_on()
    assert sent(second) == [*first_time[:2], {"type": "history", "pattern": "b", "limit": 1, "before": 5, "id": 4}]
    second.receive(
        lines(
            {"type": "history", "id": 1, "messages": [], "more": False},
            {"type": "pong", "seq": 2},
            {"type": "error", "message": "no", "code": "unauthorized", "id": 4},
        )
    )
    assert history.value == Page([], False, 1)
    assert ping.value == wire.Pong(2)
    assert isinstance(late.value, Refused)
    assert not client.in_flight.awaiting_reply


# Subscribing


def test_each_subscription_resumes_at_its_cursor() -> None:
    client = Client()
    first = client.go_on()
    seen, fresh, asked = client.subscribe("a.*"), client.subscribe("b"), client.subscribe("c", 50, "e0")
    first.receive(lines(subscribed(100, 1), subscribed(100, 2, "b"), message(101), message(104)))
    first.connection_lost("gone")
    unsaid = client.subscribe("d")
    second = client.go_on()
    assert [(r["pattern"], r.get("since"), r.get("epoch")) for r in sent(second)] == [
        ("a.*", 104, EPOCH),
        ("b", 100, EPOCH),
        ("c", 50, "e0"),
        ("d", None, None),
    ]
    second.receive(lines(subscribed(110, 4), message(104), message(105)))
    assert seqs(seen) == [101, 104, 105]
    assert not fresh.items
    assert not unsaid.started
    assert asked.phase is QueuePhase.REQUESTED


def test_rejected_resume_ends_only_that_subscription() -> None:
    client = Client()
    first = client.go_on()
    one, other = client.subscribe("a.*"), client.subscribe("b")
    first.receive(lines(subscribed(100, 1), subscribed(100, 2, "b")))
    first.connection_lost("gone")
    second = client.go_on()
    refusal = {"type": "subscribe_error", "pattern": "a.*", "message": "no", "code": "unauthorized", "id": 3}
    second.receive(lines(refusal, subscribed(100, 4, "b"), message(101, pattern="b", channel="b")))
    assert one.error is not None
    assert one.error.code is ErrorCode.UNAUTHORIZED
    assert seqs(other) == [101]


def test_gap_after_a_reconnect_reaches_the_application() -> None:
    client = Client()
    first = client.go_on()
    queue = client.subscribe()
    first.receive(lines(subscribed(100, 1), message(101)))
    first.connection_lost("gone")
    second = client.go_on(epoch="e2", head=90)
    gap = {"type": "gap", "pattern": "a.*", "from": 81, "to": 80, "epoch": "e2", "reason": "epoch"}
    second.receive(lines(subscribed(90, 2), gap, message(81)))
    assert [
        item.event.reason for item in queue.items if isinstance(item, CursorUpdate) and isinstance(item.event, wire.Gap)
    ]
    assert seqs(queue) == [101, 81]


def test_paused_subscription_resumes_on_the_next_connection_when_it_has_room() -> None:
    client = Client()
    first = client.go_on()
    queue = client.subscribe()
    first.receive(lines(subscribed(100, 1), message(101)))
    client.subscriptions.pause_queue(queue)
    first.connection_lost("gone")
    second = client.go_on()
    assert sent(second) == []
    client.subscriptions.queue_drained(queue)
    assert sent(second)[0]["since"] == 101


def test_paused_queue_may_be_drained_and_closed_without_a_connection() -> None:
    client = Client()
    first = client.go_on()
    queue, other = client.subscribe(), client.subscribe("b")
    first.receive(lines(subscribed(100, 1), subscribed(100, 2, "b"), message(101)))
    client.subscriptions.pause_queue(queue)
    first.connection_lost("gone")
    client.subscriptions.queue_drained(queue)
    client.subscriptions.unsubscribe(other)
    assert [(r["pattern"], r["since"]) for r in sent(client.go_on())] == [("a.*", 101)]


# Moving


def test_subscription_receives_from_the_old_connection_until_the_new_one_replies() -> None:
    client = Client()
    old = client.go_on()
    queue = client.subscribe()
    old.receive(lines(subscribed(100, 1), message(101)))
    new = client.connect()
    new.resume_subscriptions()
    assert sent(new)[0]["since"] == 101
    old.receive(lines(message(102)))
    new.receive(lines(subscribed(103, 2)))
    old.receive(lines(message(103), {"type": "head", "seq": 140, "epoch": EPOCH, "at": 1}))
    new.receive(lines(message(102), message(103)))
    assert seqs(queue) == [101, 102, 103]
    old.connection_lost("closed")
    new.receive(lines(message(104)))
    assert seqs(queue) == [101, 102, 103, 104]


def test_publishes_wait_during_a_move_and_unanswered_ones_are_retried() -> None:
    client = Client()
    old = client.go_on()
    batch = client.publish("one", "two")
    sent(old)
    client.in_flight.pause()
    new = client.connect()
    later = client.publish("three")
    old.receive(lines(published(1, 101)))
    old.connection_lost("closed")
    new.resume_requests()
    assert [(r["payload"], "retry" in r) for r in sent(new)] == [("two", True)]
    new.receive(lines(published(2, 102)))
    assert [(r["payload"], "retry" in r) for r in sent(new)] == [("three", False)]
    assert codes(batch) == [101, 102]
    assert later.missing


def test_next_connection_resumes_after_a_failed_move() -> None:
    client = Client()
    old = client.go_on()
    queue, batch = client.subscribe(), client.publish("one")
    old.receive(lines(subscribed(100, 1)))
    client.in_flight.pause()
    new = client.connect()
    new.resume_subscriptions()
    new.receive(lines(subscribed(100, 3), message(101)))
    new.connection_lost("gone")
    old.receive(lines(message(102)))
    old.connection_lost("closed")
    third = client.go_on()
    assert [(r["type"], r.get("since"), r.get("retry")) for r in sent(third)] == [
        ("subscribe", 101, None),
        ("publish", None, True),
    ]
    assert seqs(queue) == [101]
    assert batch.missing


def test_revocation_by_the_old_connection_counts_during_a_move() -> None:
    client = Client()
    old = client.go_on()
    queue = client.subscribe()
    old.receive(lines(subscribed(100, 1)))
    new = client.connect()
    new.resume_subscriptions()
    sent(new)
    old.receive(lines({"type": "revoked", "pattern": "a.*", "seq": 100}))
    assert queue.error is not None
    assert sent(new) == [{"type": "unsubscribe", "pattern": "a.*", "id": 3}]
    new.receive(lines(subscribed(100, 2), message(101)))
    assert not queue.items


def test_queue_paused_during_a_move_waits_for_the_new_connection() -> None:
    client = Client()
    old = client.go_on()
    queue = client.subscribe()
    old.receive(lines(subscribed(100, 1), message(101)))
    new = client.connect()
    new.resume_subscriptions()
    client.subscriptions.pause_queue(queue)
    old.receive(lines(message(102)))
    assert seqs(queue) == [101]
    new.receive(lines(subscribed(102, 2), message(102)))
    assert seqs(queue) == [101, 102]


# The model


class Replica:
    """A replica of a shared log, at the other end of one connection. Its lag is random."""

    def __init__(self, log: list[tuple[str, Any]], keys: dict[int, int], client: Client, lag: int = 0) -> None:
        self.log, self.keys = log, keys
        self.applied = max(0, len(log) - lag)
        self.stopping = self.stuck = False
        self.refusing: ErrorCode | None = None
        """The error for the next subscription."""
        self.flight: list[dict[str, Any]] = []
        """Publishes at the database, which has not replied. It may commit them later."""
        self.queue: list[dict[str, Any]] = []
        """Publishes that wait behind them."""
        self.held: dict[str, int] = {}
        self.requests: list[dict[str, Any]] = []
        self.replies = bytearray()
        self.protocol = client.connect(head=self.applied)

    def say(self, *replies: dict[str, Any]) -> None:
        self.replies += lines(*replies)

    def process_requests(self, count: int) -> None:
        """Receive the requests of the client, and reply to the given number of them."""
        while self.protocol.outgoing_bytes:
            self.requests += map(msgspec.json.decode, self.protocol.data_to_send().splitlines())
        for request in self.requests[:count]:
            self.answer(request)
        del self.requests[:count]

    def answer(self, request: dict[str, Any]) -> None:
        match request:
            case {"type": "publish", "id": number}:
                if self.stopping:
                    self.say(stopping(number))
                elif self.stuck:
                    self.queue.append(request)
                else:
                    self.commit(request)
            case {"type": "subscribe", "pattern": pattern, "id": number} if self.refusing is not None:
                # The previous subscription stays active.
                error = {"type": "subscribe_error", "pattern": pattern, "id": number, "message": "no"}
                self.say({**error, "code": self.refusing})
                self.refusing = None
            case {"type": "subscribe", "pattern": pattern, "id": number}:
                since = request.get("since")
                self.held[pattern] = self.applied if since is None else since
                self.say(subscribed(self.applied, number, pattern))
                self.deliver(self.applied)
                if since is not None and since <= self.applied:
                    self.say({"type": "live", "pattern": pattern, "seq": self.applied})
            case {"type": "unsubscribe", "pattern": pattern, "id": number}:
                self.held.pop(pattern, None)
                self.say({"type": "unsubscribed", "pattern": pattern, "seq": self.applied, "id": number})
            case {"type": "history", "pattern": pattern, "id": number, "limit": limit, "before": before}:
                found = [
                    seq for seq in range(1, min(before, len(self.log) + 1)) if matches(pattern, self.log[seq - 1][0])
                ]
                # A page may be shorter than requested.
                page = found[-min(limit, 2) :]
                messages = [self.encode(seq, pattern) for seq in page]
                self.say({"type": "history", "id": number, "messages": messages, "more": len(found) > len(page)})
            case {"type": "ping", "seq": number}:
                self.say({"type": "pong", "seq": number})
                if all(cursor <= self.applied for cursor in self.held.values()):
                    self.say({"type": "head", "seq": self.applied, "epoch": EPOCH, "at": 1})
            case _:
                raise AssertionError(request)

    def commit(self, request: dict[str, Any]) -> None:
        """Append the message unless its key is in the log."""
        number = request["id"]
        if number not in self.keys:
            self.log.append((request["channel"], request["payload"]))
            self.keys[number] = len(self.log)
        self.say({**published(number, self.keys[number]), "channel": request["channel"]})

    def hand_over(self) -> None:
        if not self.flight:
            self.flight, self.queue = self.queue, []

    def give_up(self) -> None:
        """Reject the publishes that have waited too long."""
        for request in self.flight:
            self.say(refused(request["id"], ErrorCode.UNKNOWN))
        for request in self.queue:
            self.say(refused(request["id"], ErrorCode.UNAVAILABLE))
        self.queue.clear()

    def database_replies(self) -> None:
        """The database replies, whether the client is connected or not."""
        self.stuck = False
        for request in self.flight:
            self.commit(request)
        self.flight.clear()
        self.queue, waiting = [], self.queue
        for request in waiting:
            self.answer(request)

    def deliver(self, upto: int) -> None:
        """Apply the log up to the given seq, and send the messages."""
        self.applied = max(self.applied, min(upto, len(self.log)))
        for pattern, cursor in self.held.items():
            for seq in range(cursor + 1, self.applied + 1):
                if matches(pattern, self.log[seq - 1][0]):
                    self.say(self.encode(seq, pattern))
            self.held[pattern] = max(cursor, self.applied)

    def encode(self, seq: int, pattern: str) -> dict[str, Any]:
        channel, payload = self.log[seq - 1]
        return message(seq, payload, pattern, channel)

    def revoke(self, pattern: str) -> None:
        del self.held[pattern]
        self.say({"type": "revoked", "pattern": pattern, "seq": self.applied})

    def bring(self, size: int) -> None:
        """Deliver the given number of bytes to the client."""
        data = bytes(self.replies[:size])
        del self.replies[:size]
        self.protocol.receive(data)


class Reader:
    """The application side of a subscription."""

    def __init__(
        self,
        pattern: str,
        queue: MessageQueue,
        since: int | None,
        last: int,
        log: list[tuple[str, Any]],
        in_flight: InFlightRequests,
    ) -> None:
        self.pattern, self.queue = pattern, queue
        self.start = since
        self.last = last
        """The number of messages before `start` that it is owed."""
        self.taken: list[int] = []
        self.gaps: list[wire.Gap] = []
        self._log, self._in_flight = log, in_flight
        self._recent: InitialHistory | None = None
        self._answer: PendingReply[Page] | None = None
        queue.wake = self.note
        self.note()

    @property
    def fetching(self) -> bool:
        """Whether it waits for history, and takes nothing before that."""
        return self.queue.started and self.last > 0 and (self._recent is None or self._recent.next_request is not None)

    def note(self) -> None:
        if self.queue.started and self.start is None:
            self.start = self.queue.cursor
            assert self.start <= len(self._log)
            if self.last:
                self._recent = InitialHistory(self.queue, self.last)
                self.fetch()

    def fetch(self) -> None:
        """Take the page that has arrived, and request the next."""
        assert self._recent is not None
        if self._answer is not None and isinstance(self._answer.value, Page):
            self._recent.add_page(self._answer.value)
            self._answer = None
        if self._answer is None and self._recent.next_request is not None:
            self._answer = self._in_flight.history(self.pattern, *self._recent.next_request)

    def take(self, count: int) -> None:
        if self.fetching:
            self.fetch()
        if self.fetching:
            return
        for _ in range(min(count, len(self.queue.items))):
            item = self.queue.items.popleft()
            if isinstance(item, Message):
                assert item.seq is not None
                assert item.seq > self.queue.cursor
                self.taken.append(item.seq)
                self.queue.cursor = item.seq
            else:
                assert item.cursor >= self.queue.cursor
                self.queue.cursor, self.queue.epoch = item.cursor, item.epoch
                if isinstance(item.event, wire.Gap):
                    self.gaps.append(item.event)

    def missing(self, seq: int) -> bool:
        """Whether the broker has said that this message may be missing."""
        events = [item.event for item in self.queue.items if isinstance(item, CursorUpdate)]
        gaps = [*self.gaps, *(event for event in events if isinstance(event, wire.Gap))]
        return any(gap.first <= seq <= gap.last for gap in gaps)


class Connections(RuleBasedStateMachine):
    """Subscriptions of one client, and its connections, each of which can be lost at any byte."""

    patterns = ("a.*", "b", "*")

    def __init__(self) -> None:
        super().__init__()
        self.client = Client()
        self.log: list[tuple[str, Any]] = [("a.x", None), ("b", None)]
        self.keys: dict[int, int] = {}
        self.readers: list[Reader] = []
        self.present: Replica | None = None
        self.next: Replica | None = None
        self.dead: list[Replica] = []

    def new(self) -> Replica:
        return Replica(self.log, self.keys, self.client)

    @property
    def replicas(self) -> list[Replica]:
        return [replica for replica in (self.present, self.next) if replica is not None]

    @rule(channel=st.sampled_from(["a.x", "b"]))
    def somebody_else_publishes(self, channel: str) -> None:
        self.log.append((channel, None))

    @rule(data=st.data(), back=st.none() | st.integers(-3, 6))
    def subscribe(self, data: st.DataObject, back: int | None) -> None:
        self.add(data, None if back is None else max(0, len(self.log) - back), 0)

    @rule(data=st.data(), last=st.integers(1, 4))
    def subscribe_to_the_last(self, data: st.DataObject, last: int) -> None:
        self.add(data, None, last)

    def add(self, data: st.DataObject, since: int | None, last: int) -> None:
        pattern = data.draw(st.sampled_from(self.patterns))
        if sum(reader.pattern == pattern for reader in self.readers) < 3:
            epoch = EPOCH if since is not None else None
            queue = self.client.subscriptions.subscribe(pattern, since, epoch, 3, present=EPOCH)
            self.readers.append(Reader(pattern, queue, since, last, self.log, self.client.in_flight))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.drop(data.draw(st.sampled_from(self.readers)))

    def drop(self, reader: Reader) -> None:
        self.client.subscriptions.unsubscribe(reader.queue)
        self.readers.remove(reader)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), count=st.integers(1, 5))
    def take(self, data: st.DataObject, count: int) -> None:
        reader = data.draw(st.sampled_from(self.readers))
        reader.take(count)
        if reader.queue.notify_half_empty and len(reader.queue.items) <= 1:
            self.client.subscriptions.queue_drained(reader.queue)

    @precondition(lambda self: self.client.subscriptions.full_queues)
    @rule(data=st.data())
    def suspend(self, data: st.DataObject) -> None:
        self.client.subscriptions.pause_queue(data.draw(st.sampled_from(list(self.client.subscriptions.full_queues))))

    @precondition(lambda self: self.replicas)
    @rule(data=st.data(), count=st.integers(1, 5), size=st.integers(1, 400))
    def go_on(self, data: st.DataObject, count: int, size: int) -> None:
        replica = data.draw(st.sampled_from(self.replicas))
        replica.process_requests(count)
        replica.deliver(replica.applied + count)
        self.bring(replica, size)

    def bring(self, replica: Replica, size: int) -> None:
        replica.bring(size)

    @precondition(lambda self: self.present is None)
    @rule()
    def connect(self) -> None:
        self.present = self.new()
        self.present.protocol.resume()

    @precondition(lambda self: self.present)
    @rule()
    def lose(self) -> None:
        assert self.present is not None
        self.present.protocol.connection_lost("gone")
        self.bury(self.present)
        if self.next is not None:
            self.next.protocol.resume_requests()
        self.present, self.next = self.next, None

    @precondition(lambda self: self.present and not self.next)
    @rule()
    def begin_to_move(self) -> None:
        self.client.in_flight.pause()
        self.next = self.new()
        self.next.protocol.resume_subscriptions()

    @precondition(lambda self: self.next)
    @rule()
    def lose_all(self) -> None:
        for replica in reversed(self.replicas):
            replica.protocol.connection_lost("gone")
            self.bury(replica)
        self.present = self.next = None

    def bury(self, replica: Replica) -> None:
        """Disconnect a replica. Publishes at its database may still be committed; queued ones never are."""
        replica.queue.clear()
        self.dead.append(replica)

    @invariant()
    def each_is_owed_what_it_has(self) -> None:
        for reader in self.readers:
            assert reader.queue.error is None
            had = reader.taken + [s for s in seqs(reader.queue) if s is not None]
            owed = self.owed(reader)
            if reader.fetching:
                owed = [seq for seq in owed if seq > (reader.start or 0)]
            assert had == owed[: len(had)]

    def owed(self, reader: Reader) -> list[int]:
        if reader.start is None:
            return []
        found = [
            seq
            for seq, (name, _) in enumerate(self.log, 1)
            if matches(reader.pattern, name) and not reader.missing(seq)
        ]
        past = [seq for seq in found if seq <= reader.start]
        return past[len(past) - min(reader.last, len(past)) :] + [seq for seq in found if seq > reader.start]

    @property
    def wanted(self) -> set[str]:
        """The patterns to which the client subscribes."""
        return {reader.pattern for reader in self.readers}

    def settle(self, replica: Replica) -> None:
        """Deliver everything: then each reader has what it is owed, and the replica has no other subscription."""
        for _ in range(6):
            replica.process_requests(10_000)
            replica.deliver(len(self.log))
            self.bring(replica, 10_000_000)
            for reader in self.readers:
                reader.take(10_000)
                self.client.subscriptions.queue_drained(reader.queue)
        self.each_is_owed_what_it_has()
        for reader in self.readers:
            assert reader.queue.started
            assert reader.taken == self.owed(reader)
        assert replica.held.keys() == self.wanted

    def teardown(self) -> None:
        if self.present is not None and self.next is None:
            for _ in range(2):
                self.present.process_requests(10_000)
                self.bring(self.present, 10_000_000)
            assert self.present.held.keys() <= self.wanted
        for replica in self.replicas:
            replica.protocol.connection_lost("gone")
            self.bury(replica)
        for replica in self.dead:
            replica.database_replies()
        self.present, self.next = self.new(), None
        self.present.protocol.resume()
        self.settle(self.present)


# Connections are lost anywhere and follow each other in any order: each publish is in the log once and in its
# order, what is answered is true, and each subscription gets exactly what it is owed.
class Lives(Connections):
    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.published: list[tuple[PublishBatch, int]] = []
        self.pings: list[PendingReply[wire.Pong]] = []

    @rule(channel=st.sampled_from(["a.x", "b"]), count=st.integers(1, 3))
    def publish(self, channel: str, count: int) -> None:
        for _ in range(count):
            batch = PublishBatch(1)
            self.number += 1
            self.client.in_flight.publish(channel, encode_payload(self.number), batch, 0, ephemeral=False, echo=True)
            self.published.append((batch, self.number))

    @rule()
    def ping(self) -> None:
        self.pings.append(self.client.in_flight.ping())

    @precondition(lambda self: self.present)
    @rule()
    def stop(self) -> None:
        self.present.stopping = True  # type: ignore[union-attr]

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def the_database_hangs(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from(self.replicas))
        replica.stuck = True
        replica.hand_over()

    @precondition(lambda self: self.replicas)
    @rule(data=st.data())
    def the_time_is_up(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.replicas)).give_up()

    @precondition(lambda self: self.replicas or self.dead)
    @rule(data=st.data())
    def the_database_answers(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from([*self.replicas, *self.dead])).database_replies()

    @precondition(lambda self: self.client.in_flight.retry_pending)
    @rule()
    def retry(self) -> None:
        self.client.in_flight.retry()

    @invariant()
    def each_publish_is_there_once_and_what_is_said_of_it_is_true(self) -> None:
        ours = [payload for _, payload in self.log if payload is not None]
        assert len(ours) == len(set(ours))
        unknown = set()
        for batch, number in self.published:
            [result] = batch.results
            if isinstance(result, int):
                assert self.log[result - 1][1] == number
            elif isinstance(result, Refused) and result.code is ErrorCode.UNKNOWN:
                # It may still be published later.
                unknown.add(number)
            elif isinstance(result, Refused):
                assert result.code in (ErrorCode.SHUTTING_DOWN, ErrorCode.UNAVAILABLE)
                assert number not in ours
        known = [number for number in ours if number not in unknown]
        assert known == sorted(known)

    def teardown(self) -> None:
        super().teardown()
        self.each_publish_is_there_once_and_what_is_said_of_it_is_true()
        assert not self.client.in_flight.publishes_in_flight
        assert all(answer.value is not None for answer in self.pings)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=2 * settings().max_examples, stateful_step_count=40)


# Readers of one pattern come and go, the broker rejects or revokes, and connections are lost anywhere:
# each gets exactly what it is owed, or ends with what the broker has said. One that has left gets nothing more.
class Sharers(Connections):
    patterns = ("a.*",)

    def __init__(self) -> None:
        super().__init__()
        self.said: set[ErrorCode] = set()
        self.gone: list[tuple[MessageQueue, int]] = []
        """The ended queues, and their number of items."""
        self.connect()

    @precondition(lambda self: self.replicas)
    @rule(data=st.data(), code=st.sampled_from([ErrorCode.UNAVAILABLE, ErrorCode.UNAUTHORIZED]))
    def refuse(self, data: st.DataObject, code: ErrorCode) -> None:
        data.draw(st.sampled_from(self.replicas)).refusing = code
        self.said.add(code)

    @precondition(lambda self: any(replica.held for replica in self.replicas))
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        replica = data.draw(st.sampled_from([replica for replica in self.replicas if replica.held]))
        replica.revoke("a.*")
        self.said.add(ErrorCode.REVOKED)

    @rule(count=st.integers(2, 6))
    def somebody_publishes_many(self, count: int) -> None:
        self.log += [("a.x", None)] * count

    @precondition(lambda self: self.client.subscriptions.retry_pending)
    @rule()
    def retry(self) -> None:
        self.client.subscriptions.retry()

    def drop(self, reader: Reader) -> None:
        super().drop(reader)
        self.gone.append((reader.queue, len(reader.queue.items)))

    def bring(self, replica: Replica, size: int) -> None:
        super().bring(replica, size)
        ended = {reader: reader.queue.error for reader in self.readers if reader.queue.error is not None}
        codes = {ending.code for ending in ended.values()}
        assert codes <= self.said
        if ErrorCode.REVOKED in codes:
            assert len(ended) == len(self.readers)
        for reader in ended:
            self.drop(reader)

    @invariant()
    def nothing_comes_to_those_that_are_gone(self) -> None:
        for queue, had in self.gone:
            assert queue.phase is QueuePhase.ENDED
            assert len(queue.items) == had

    def settle(self, replica: Replica) -> None:
        replica.refusing = None
        for _ in range(3):
            replica.process_requests(10_000)
            self.bring(replica, 10_000_000)
        self.client.subscriptions.retry()
        super().settle(replica)

    def teardown(self) -> None:
        if self.present is not None and self.next is None:
            self.settle(self.present)
        super().teardown()
        # The subscription ends with its last queue.
        while self.readers:
            self.drop(self.readers[0])
            assert self.present is not None
            self.settle(self.present)


TestSharers = Sharers.TestCase
TestSharers.settings = settings(max_examples=2 * settings().max_examples, stateful_step_count=30)
