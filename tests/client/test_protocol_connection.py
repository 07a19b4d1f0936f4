"""The client side of the protocol on one connection, without I/O."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.client import subscription_manager
from catbus.client.channel_memberships import ChannelMemberships
from catbus.client.in_flight_requests import InFlightRequests, PublishBatch
from catbus.client.message_queue import CursorUpdate, MessageQueue, QueuePhase
from catbus.client.protocol_connection import MAX_SEND_SIZE, ProtocolConnection
from catbus.client.server_messages import Message, Page, encode_payload
from catbus.client.subscription_manager import SubscriptionManager
from catbus.client.transport_interface import DATAGRAM
from catbus.close_codes import CloseCode
from catbus.error_codes import ErrorCode
from catbus.errors import Disconnected, PeerError, Refused
from catbus.protocol import wire_messages as wire
from tests.client.scripted_broker import AUTH_OK, EPOCH, message


def lines(*messages: dict[str, Any]) -> bytes:
    return b"".join(msgspec.json.encode(item) + b"\n" for item in messages)


def sent(protocol: ProtocolConnection) -> list[dict[str, Any]]:
    """Take everything that it wants to send."""
    data = b""
    while protocol.outgoing_bytes:
        data += protocol.data_to_send()
    return [msgspec.json.decode(line) for line in data.splitlines()]


class StandaloneConnection(ProtocolConnection):
    """A connection with its own tables of requests and subscriptions."""

    def __init__(self, on_event: Callable[[wire.GoAway | wire.Error], None] | None = None) -> None:
        self.in_flight = InFlightRequests()
        self.subscriptions = SubscriptionManager(self.in_flight.next_id)
        self.memberships = ChannelMemberships(self.in_flight.next_id)
        super().__init__(self.in_flight, self.subscriptions, self.memberships, on_event)

    def subscribe(self, pattern: str, since: int | None, epoch: str | None, limit: int, **options: Any) -> MessageQueue:
        return self.subscriptions.subscribe(pattern, since, epoch, limit, present=self.epoch, **options)


def begin() -> StandaloneConnection:
    protocol = StandaloneConnection()
    protocol.authenticate("t")
    sent(protocol)
    protocol.receive(lines(AUTH_OK))
    protocol.resume()
    return protocol


def publish(protocol: StandaloneConnection, *channels: str, payload: Any = 1) -> PublishBatch:
    batch = PublishBatch(len(channels))
    for place, channel in enumerate(channels):
        protocol.in_flight.publish(channel, encode_payload(payload), batch, place, ephemeral=False, echo=True)
    return batch


def subscribe(protocol: StandaloneConnection, pattern: str = "a.*", seq: int = 100, **options: Any) -> MessageQueue:
    queue = protocol.subscribe(pattern, options.get("since"), options.get("epoch"), options.get("limit", 1000))
    [*_, request] = sent(protocol)
    protocol.receive(lines(subscribed(seq, request["id"], pattern)))
    return queue


def subscribed(seq: int, number: int, pattern: str = "a.*") -> dict[str, Any]:
    return {"type": "subscribed", "pattern": pattern, "seq": seq, "id": number}


def unsubscribed(seq: int, number: int, pattern: str = "a.*") -> dict[str, Any]:
    return {"type": "unsubscribed", "pattern": pattern, "seq": seq, "id": number}


def seqs(queue: MessageQueue) -> list[int | None]:
    return [item.seq for item in queue.items if isinstance(item, Message)]


def phase(queue: MessageQueue) -> QueuePhase:
    return queue.phase


def marks(queue: MessageQueue) -> list[tuple[str, int, str]]:
    return [
        (type(item.event).__name__, item.cursor, item.epoch) for item in queue.items if isinstance(item, CursorUpdate)
    ]


# Authentication


def test_auth_names_the_protocol_version() -> None:
    protocol = StandaloneConnection()
    protocol.authenticate("secret")
    assert sent(protocol) == [{"type": "auth", "token": "secret", "protocol": 1}]


def test_auth_ok_sets_the_state_of_the_connection() -> None:
    protocol = StandaloneConnection()
    answer = protocol.authenticate("t")
    protocol.receive(lines(AUTH_OK))
    assert isinstance(answer.value, wire.AuthOk)
    assert (protocol.client_id, protocol.producer) == ("alice", "p1")
    assert (protocol.epoch, protocol.head, protocol.floor) == (EPOCH, 100, 1)
    assert protocol.limits["message_size"] == 65536


def test_auth_error_settles_the_reply_with_refused() -> None:
    protocol = StandaloneConnection()
    answer = protocol.authenticate("t")
    protocol.receive(lines({"type": "auth_error", "message": "expired", "code": "token_expired"}))
    assert isinstance(answer.value, Refused)
    assert answer.value.code is ErrorCode.TOKEN_EXPIRED


# Publishing


def test_ids_increase_and_replies_match_in_any_order() -> None:
    protocol = begin()
    batch = publish(protocol, "a", "b", "c")
    first, second, third = (request["id"] for request in sent(protocol))
    assert first < second < third
    protocol.receive(
        lines(
            {"type": "published", "channel": "c", "id": third, "seq": 103},
            {
                "type": "publish_error",
                "channel": "a",
                "id": first,
                "message": "no",
                "code": "rate_limited",
                "retry_after": 2,
            },
        )
    )
    assert batch.missing == 1
    protocol.receive(lines({"type": "published", "channel": "b", "id": second, "seq": 104, "duplicate": True}))
    refused, *rest = batch.results
    assert isinstance(refused, Refused)
    assert (refused.code, refused.retry_after) == (ErrorCode.RATE_LIMITED, 2)
    assert rest == [104, 103]
    assert protocol.in_flight.publishes_in_flight == 0
    assert protocol.head == 104


def test_batch_wakes_its_task_once_when_complete() -> None:
    protocol = begin()
    batch = publish(protocol, "a", "b")
    woken: list[int] = []
    batch.wake = lambda: woken.append(1)
    first, second = sent(protocol)
    protocol.receive(lines({"type": "published", "channel": "a", "id": first["id"], "seq": 1}))
    assert not woken
    protocol.receive(lines({"type": "published", "channel": "b", "id": second["id"], "seq": 2}))
    assert woken == [1]


def test_publish_omits_default_fields() -> None:
    protocol = begin()
    batch = PublishBatch(1)
    protocol.in_flight.publish("a", encode_payload([]), batch, 0, ephemeral=True, echo=False)
    [request] = sent(protocol)
    number = request.pop("id")
    assert request == {"type": "publish", "channel": "a", "payload": [], "ephemeral": True, "echo": False}
    protocol.receive(lines({"type": "published", "channel": "a", "id": number}))
    assert batch.results == [None]
    assert batch.missing == 0


def test_reply_without_a_request_is_ignored() -> None:
    protocol = begin()
    protocol.receive(
        lines(
            {"type": "published", "channel": "a", "id": 999, "seq": 1},
            {"type": "published", "channel": "a"},
            {"type": "publish_error", "channel": "a", "message": "no", "code": "internal"},
            {"type": "subscribed", "pattern": "x", "seq": 1},
            {"type": "unsubscribed", "pattern": "x", "seq": 1},
            {"type": "subscribe_error", "pattern": "x", "message": "no", "code": "internal"},
            {"type": "revoked", "pattern": "x", "seq": 1},
            {"type": "live", "pattern": "x", "seq": 1},
            {"type": "gap", "pattern": "x", "from": 1, "to": 2, "epoch": EPOCH, "reason": "retention"},
            {"type": "history", "messages": [], "more": False},
            {"type": "pong", "seq": 999},
            {"type": "auth_ok", "client_id": "alice"},
            {"type": "auth_error", "message": "no", "code": "internal"},
            {"type": "weather", "forecast": "rain"},
            message(101, pattern="x"),
            {"type": "message", "channel": "a", "payload": 1},
        )
    )
    assert protocol.lost is None


@pytest.mark.parametrize(
    ("payload", "code"),
    [("x" * 65536, ErrorCode.TOO_LARGE), ([[]] * 1, None), ("x" * 65400, None), ({"a": "[" * 100}, None)],
)
def test_oversized_publish_is_rejected_locally(payload: Any, code: ErrorCode | None) -> None:
    protocol = begin()
    batch = publish(protocol, "a", payload=payload)
    [result] = batch.results
    assert (result.code if isinstance(result, Refused) else result) == code
    assert len(sent(protocol)) == (code is None)


def test_deeply_nested_publish_is_rejected_locally() -> None:
    protocol = begin()
    deep: list[Any] = []
    for _ in range(62):
        deep = [deep]
    assert publish(protocol, "a", payload=deep).missing == 1
    [result] = publish(protocol, "a", payload=[deep]).results
    assert isinstance(result, Refused)
    assert result.code is ErrorCode.BAD_MESSAGE
    assert len(sent(protocol)) == 1


def test_lines_are_sent_together_up_to_a_size() -> None:
    protocol = begin()
    batch = publish(protocol, *["a"] * 1000, payload="x" * 100)
    sizes = []
    lines_sent = 0
    while protocol.outgoing_bytes:
        frame = protocol.data_to_send()
        sizes.append(len(frame))
        assert frame.endswith(b"}\n")
        lines_sent += frame.count(b"\n")
    assert lines_sent == 1000 == batch.missing
    assert max(sizes) <= MAX_SEND_SIZE
    assert min(sizes[:-1]) > MAX_SEND_SIZE - 200


def test_line_longer_than_that_size_is_sent_alone() -> None:
    protocol = begin()
    publish(protocol, "a")
    publish(protocol, "a", payload="x" * 50_000)
    publish(protocol, "a")
    counts = []
    while protocol.outgoing_bytes:
        counts.append(protocol.data_to_send().count(b"\n"))
    assert counts == [1, 1, 1]


# Subscribing


def test_new_subscription_is_complete_at_the_head() -> None:
    protocol = begin()
    queue = protocol.subscribe("a.*", None, None, 10)
    assert sent(protocol) == [{"type": "subscribe", "pattern": "a.*", "id": 1}]
    assert phase(queue) is QueuePhase.REQUESTED
    protocol.receive(lines(subscribed(120, 1), message(121), message(None)))
    assert phase(queue) is QueuePhase.ACTIVE
    assert (queue.cursor, queue.epoch) == (120, EPOCH)
    assert seqs(queue) == [121, None]


def test_since_and_epoch_are_sent_and_kept_until_an_event() -> None:
    protocol = begin()
    queue = protocol.subscribe("a.*", 50, "e0", 10)
    assert sent(protocol) == [{"type": "subscribe", "pattern": "a.*", "since": 50, "epoch": "e0", "id": 1}]
    protocol.receive(lines(subscribed(120, 1)))
    assert (queue.cursor, queue.epoch) == (50, "e0")
    assert not queue.items


def test_subscription_after_an_unnoticed_change_of_the_epoch_gets_a_gap() -> None:
    protocol = begin()
    first = protocol.subscribe("a.*", None, None, 10)
    second = protocol.subscribe("b", 50, EPOCH, 10)
    protocol.receive(
        lines(
            {**subscribed(120, 1), "epoch": "e2"},
            {**subscribed(120, 2, "b"), "epoch": "e2"},
            {**message(51), "channel": "b", "pattern": "b"},
        )
    )
    assert (first.cursor, first.epoch) == (120, "e2")
    assert (second.cursor, second.epoch) == (50, EPOCH)
    assert (second.received_seq, second.received_epoch) == (51, "e2")
    assert (protocol.epoch, protocol.head) == ("e2", 120)


def test_message_without_a_gap_keeps_the_cursor_in_the_new_epoch() -> None:
    protocol = begin()
    queue = subscribe(protocol, since=50, epoch="e0")
    protocol.receive(lines(message(60), message(61)))
    assert marks(queue) == [("NoneType", 50, EPOCH)]
    assert seqs(queue) == [60, 61]
    assert (queue.received_seq, queue.received_epoch) == (61, EPOCH)


def test_gap_into_another_epoch_may_lower_the_cursor() -> None:
    protocol = begin()
    queue = subscribe(protocol, since=150, epoch="e0")
    gap = {"type": "gap", "pattern": "a.*", "from": 91, "to": 90, "epoch": EPOCH, "reason": "epoch"}
    protocol.receive(lines(gap, message(91), message(92)))
    assert marks(queue) == [("Gap", 90, EPOCH)]
    assert seqs(queue) == [91, 92]


def test_gap_in_the_same_epoch_never_lowers_the_cursor() -> None:
    protocol = begin()
    queue = subscribe(protocol, since=50)
    for first, last in ((51, 80), (51, 70)):
        protocol.receive(
            lines({"type": "gap", "pattern": "a.*", "from": first, "to": last, "epoch": EPOCH, "reason": "retention"})
        )
    # Messages up to 80 have been accounted for: the second one announces nothing.
    assert marks(queue) == [("Gap", 80, EPOCH)]
    assert (queue.received_seq, queue.received_epoch) == (80, EPOCH)


def test_live_and_head_update_the_cursor_in_order_with_the_messages() -> None:
    protocol = begin()
    queue = subscribe(protocol, since=50)
    head = {"type": "head", "seq": 130, "epoch": EPOCH, "at": 1}
    protocol.receive(lines(head, message(60), {"type": "live", "pattern": "a.*", "seq": 120}, message(121)))
    assert marks(queue) == [("Live", 120, EPOCH)]
    protocol.receive(lines(head))
    assert marks(queue) == [("Live", 120, EPOCH), ("Head", 130, EPOCH)]
    assert protocol.head == 130


def test_consecutive_heads_are_merged() -> None:
    protocol = begin()
    queue = subscribe(protocol)
    for seq in (130, 140, 150):
        protocol.receive(lines({"type": "head", "seq": seq, "epoch": EPOCH, "at": 1}))
    assert marks(queue) == [("Head", 150, EPOCH)]


def test_gap_and_head_set_the_epoch_of_the_connection() -> None:
    protocol = begin()
    queue = subscribe(protocol)
    protocol.receive(lines({"type": "gap", "pattern": "a.*", "from": 91, "to": 90, "epoch": "e2", "reason": "epoch"}))
    assert (protocol.epoch, protocol.head) == ("e2", 90)
    protocol.receive(lines({"type": "head", "seq": 80, "epoch": "e3", "at": 1}))
    assert (protocol.epoch, protocol.head) == ("e3", 80)
    assert marks(queue)[-1] == ("Head", 80, "e3")


def test_message_below_the_cursor_is_dropped() -> None:
    protocol = begin()
    queue = subscribe(protocol)
    protocol.receive(lines(message(100), message(101), message(103), message(102), message(103), message(104)))
    assert seqs(queue) == [101, 103, 104]


def test_overlapping_patterns_have_separate_cursors() -> None:
    protocol = begin()
    one, other = subscribe(protocol, "a.*"), subscribe(protocol, "*", seq=110)
    protocol.receive(lines(message(111, pattern="a.*"), message(111, pattern="*"), message(112, pattern="*")))
    assert (seqs(one), seqs(other)) == ([111], [111, 112])
    assert (one.received_seq, other.received_seq) == (111, 112)


def test_rejected_subscription_ends_with_the_error() -> None:
    protocol = begin()
    queue = protocol.subscribe("a.*", None, None, 10)
    refusal = {"type": "subscribe_error", "pattern": "a.*", "message": "no", "code": "unauthorized", "id": 1}
    protocol.receive(lines(refusal))
    assert phase(queue) is QueuePhase.ENDED
    assert queue.error is not None
    assert queue.error.code is ErrorCode.UNAUTHORIZED
    sent(protocol)
    protocol.subscriptions.unsubscribe(queue)
    assert sent(protocol) == []
    protocol.subscribe("a.*", None, None, 10)


def test_revoked_subscription_ends_after_its_messages() -> None:
    protocol = begin()
    queue = subscribe(protocol)
    protocol.receive(lines(message(101), {"type": "revoked", "pattern": "a.*", "seq": 101}, message(102)))
    assert seqs(queue) == [101]
    assert queue.error is not None
    assert queue.error.code is ErrorCode.REVOKED


def test_subscription_after_an_unsubscribe_receives_only_its_own_messages() -> None:
    protocol = begin()
    old = subscribe(protocol)
    protocol.subscriptions.unsubscribe(old)
    new = protocol.subscribe("a.*", None, None, 10)
    first, second = sent(protocol)
    assert (first["type"], second["type"]) == ("unsubscribe", "subscribe")
    protocol.receive(lines(message(101), unsubscribed(101, first["id"])))
    assert phase(new) is QueuePhase.REQUESTED
    protocol.receive(lines(subscribed(101, second["id"]), message(102)))
    assert (seqs(old), seqs(new)) == ([], [102])


def test_unsubscribe_before_the_reply_leaves_no_state() -> None:
    protocol = begin()
    old = protocol.subscribe("a.*", None, None, 10)
    protocol.subscriptions.unsubscribe(old)
    new = protocol.subscribe("a.*", 50, None, 10)
    protocol.receive(
        lines(
            subscribed(100, 1),
            message(101),
            unsubscribed(101, 2),
            subscribed(101, 3),
            message(51),
        )
    )
    assert (seqs(old), seqs(new)) == ([], [51])
    assert not protocol.awaiting_reply


def test_rejected_unsubscribe_does_not_affect_the_next_subscription() -> None:
    protocol = begin()
    old = subscribe(protocol)
    protocol.subscriptions.unsubscribe(old)
    new = protocol.subscribe("a.*", None, None, 10)
    refusal = {"type": "subscribe_error", "pattern": "a.*", "message": "not held", "code": "invalid_pattern", "id": 2}
    protocol.receive(lines({"type": "revoked", "pattern": "a.*", "seq": 1}, refusal))
    assert phase(new) is QueuePhase.REQUESTED
    protocol.receive(lines(subscribed(100, 3)))
    assert phase(new) is QueuePhase.ACTIVE


def test_queue_wakes_its_task_for_the_first_item_only() -> None:
    protocol = begin()
    queue = subscribe(protocol)
    woken: list[int] = []
    queue.wake = lambda: woken.append(len(queue.items))
    protocol.receive(lines(message(101), message(102), {"type": "head", "seq": 102, "epoch": EPOCH, "at": 1}))
    assert woken == [1]


# Full queues


def test_full_queue_is_reported_until_it_is_drained() -> None:
    protocol = begin()
    queue = subscribe(protocol, limit=3)
    protocol.receive(lines(*[message(seq) for seq in range(101, 105)]))
    assert list(protocol.subscriptions.full_queues) == [queue]
    assert queue.notify_half_empty
    assert seqs(queue) == [101, 102, 103, 104]
    protocol.subscriptions.queue_drained(queue)
    assert not protocol.has_full_queue
    assert sent(protocol) == []


def test_paused_queue_resumes_at_its_cursor() -> None:
    protocol = begin()
    queue = subscribe(protocol, limit=2)
    protocol.receive(lines(message(101), message(102)))
    protocol.subscriptions.pause_queue(queue)
    assert sent(protocol) == [{"type": "unsubscribe", "pattern": "a.*", "id": 2}]
    assert phase(queue) is QueuePhase.PAUSED
    protocol.receive(lines(message(103), unsubscribed(103, 2)))
    assert seqs(queue) == [101, 102]
    protocol.subscriptions.queue_drained(queue)
    assert sent(protocol) == [{"type": "subscribe", "pattern": "a.*", "since": 102, "epoch": EPOCH, "id": 3}]
    protocol.receive(lines(subscribed(104, 3), message(103), message(104)))
    assert seqs(queue) == [101, 102, 103, 104]
    assert phase(queue) is QueuePhase.ACTIVE


def test_queue_resumed_before_the_unsubscribe_misses_nothing() -> None:
    protocol = begin()
    queue = subscribe(protocol, limit=2)
    protocol.receive(lines(message(101), message(102)))
    protocol.subscriptions.pause_queue(queue)
    protocol.subscriptions.queue_drained(queue)
    protocol.receive(
        lines(
            message(103),
            unsubscribed(104, 2),
            subscribed(104, 3),
            message(103),
            message(104),
            {"type": "live", "pattern": "a.*", "seq": 104},
        )
    )
    assert seqs(queue) == [101, 102, 103, 104]


def test_head_does_not_update_a_paused_queue() -> None:
    protocol = begin()
    queue = subscribe(protocol, limit=2)
    protocol.receive(lines(message(101), message(102)))
    protocol.subscriptions.pause_queue(queue)
    protocol.receive(lines({"type": "head", "seq": 110, "epoch": EPOCH, "at": 1}))
    assert queue.received_seq == 102
    protocol.subscriptions.queue_drained(queue)
    protocol.receive(lines(subscribed(110, 3)))
    protocol.receive(lines({"type": "head", "seq": 110, "epoch": EPOCH, "at": 1}))
    assert queue.received_seq == 102


def test_queue_with_too_many_excess_bytes_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription_manager, "MAX_EXCESS_BYTES", 5_000)
    protocol = begin()
    queue = subscribe(protocol, limit=2)
    protocol.receive(lines(*[message(seq, "x" * 100) for seq in range(101, 200)]))
    assert phase(queue) is QueuePhase.PAUSED
    assert len(queue.items) < 20
    assert not protocol.has_full_queue


def test_paused_subscription_ends_if_the_broker_rejects_it() -> None:
    protocol = begin()
    queue = subscribe(protocol, limit=1)
    protocol.receive(lines(message(101)))
    protocol.subscriptions.pause_queue(queue)
    protocol.subscriptions.queue_drained(queue)
    protocol.receive(
        lines(
            unsubscribed(1, 2),
            {"type": "subscribe_error", "pattern": "a.*", "message": "no", "code": "unauthorized", "id": 3},
        )
    )
    assert seqs(queue) == [101]
    assert queue.error is not None
    assert queue.error.code is ErrorCode.UNAUTHORIZED


def test_leaving_a_paused_subscription_sends_nothing() -> None:
    protocol = begin()
    queue = subscribe(protocol, limit=1)
    protocol.receive(lines(message(101)))
    protocol.subscriptions.pause_queue(queue)
    sent(protocol)
    protocol.subscriptions.unsubscribe(queue)
    protocol.subscriptions.queue_drained(queue)
    assert sent(protocol) == []


# More than one stream


def test_resumed_subscription_requests_its_stream_again() -> None:
    protocol = begin()
    queue = protocol.subscribe("a.*", None, None, 1, stream=True, datagrams=True)
    asked = {"type": "subscribe", "pattern": "a.*", "stream": True, "datagrams": True}
    assert sent(protocol) == [{**asked, "id": 1}]
    protocol.receive(lines(subscribed(100, 1), message(101)), 7)
    protocol.subscriptions.pause_queue(queue)
    protocol.subscriptions.queue_drained(queue)
    assert sent(protocol)[1] == {**asked, "since": 101, "epoch": EPOCH, "id": 3}


def test_head_applies_to_the_subscriptions_of_its_stream() -> None:
    protocol = begin()
    here = subscribe(protocol, "a.*")
    there = protocol.subscribe("b.*", None, None, 10, stream=True)
    protocol.receive(lines(subscribed(100, 2, "b.*")), 7)
    protocol.receive(lines({"type": "head", "seq": 110, "epoch": EPOCH, "at": 1}))
    assert (here.received_seq, there.received_seq) == (110, 100)
    protocol.receive(lines({"type": "head", "seq": 120, "epoch": EPOCH, "at": 1}), 7)
    assert (here.received_seq, there.received_seq) == (110, 120)


def test_stream_stays_in_its_epoch() -> None:
    protocol = begin()
    here = subscribe(protocol, "b.*", 150)
    news = protocol.subscribe("a.*", None, None, 10, stream=True)
    old = protocol.subscribe("c.*", 90, EPOCH, 10, stream=True)
    # The broker has said the rest in the old epoch, which was at 150; the new one began after 140.
    protocol.receive(lines({"type": "gap", "pattern": "b.*", "from": 141, "to": 140, "epoch": "e2", "reason": "epoch"}))
    protocol.receive(lines({**subscribed(150, 2), "epoch": EPOCH}), 3)
    protocol.receive(lines({**subscribed(150, 3, "c.*"), "epoch": EPOCH}, message(91, pattern="c.*")), 7)
    protocol.receive(lines({"type": "live", "pattern": "c.*", "seq": 150}), 7)
    protocol.receive(lines({"type": "head", "seq": 150, "epoch": EPOCH, "at": 1}), 3)
    assert [(one.received_seq, one.received_epoch) for one in (here, news, old)] == [
        (140, "e2"),
        (150, EPOCH),
        (150, EPOCH),
    ]
    assert (protocol.head, protocol.epoch) == (140, "e2")
    for queue, stream in ((news, 3), (old, 7)):
        gap = {"type": "gap", "pattern": queue.pattern, "from": 141, "to": 140, "epoch": "e2", "reason": "epoch"}
        protocol.receive(lines(gap, message(141, pattern=queue.pattern)), stream)
        assert (seqs(queue)[-1], queue.received_epoch) == (141, "e2")


def test_stream_that_begins_in_a_new_epoch_names_it() -> None:
    protocol = begin()
    queue = protocol.subscribe("a.*", None, None, 10, stream=True)
    protocol.receive(lines({**subscribed(40, 1), "epoch": "e2"}, message(41)), 3)
    assert (queue.epoch, queue.received_seq) == ("e2", 41)


def test_stream_that_ends_before_its_subscription_is_a_protocol_error() -> None:
    protocol = begin()
    protocol.subscribe("a.*", None, None, 10, stream=True)
    protocol.receive(lines(subscribed(100, 1)), 7)
    with pytest.raises(PeerError, match="ended before its subscription") as caught:
        protocol.receive(b"", 7, ended=True)
    assert caught.value.close is CloseCode.BAD_MESSAGE


GIVEN_UP = {"type": "unsubscribed", "pattern": "a.*", "seq": 110}


@pytest.mark.parametrize("told_first", [False, True])
def test_subscription_resumes_at_its_cursor_after_a_stream_reset(told_first: bool) -> None:
    protocol = begin()
    queue = protocol.subscribe("a.*", None, None, 10, stream=True)
    protocol.receive(lines(subscribed(100, 1), message(101)) + b'{"type": "mess', 7)
    sent(protocol)
    if told_first:
        protocol.receive(lines(GIVEN_UP))
        protocol.receive(b"", 7, reset=True)
    else:
        protocol.receive(b"", 7, reset=True)
        assert sent(protocol) == []
        protocol.receive(lines(GIVEN_UP))
    again = {"type": "subscribe", "pattern": "a.*", "since": 101, "epoch": EPOCH, "stream": True, "id": 2}
    assert sent(protocol) == [again]
    protocol.receive(lines(subscribed(110, 2), message(102)), 11)
    assert seqs(queue) == [101, 102]
    assert phase(queue) is QueuePhase.ACTIVE


def test_closed_subscription_is_not_resumed_after_a_stream_reset() -> None:
    protocol = begin()
    away = protocol.subscribe("a.*", None, None, 1, stream=True)
    protocol.receive(lines(subscribed(100, 1), message(101)), 7)
    protocol.subscriptions.pause_queue(away)
    sent(protocol)
    protocol.receive(lines(GIVEN_UP))
    protocol.receive(b"", 7, reset=True)
    protocol.receive(lines(GIVEN_UP | {"pattern": "nobodys.*"}))
    assert sent(protocol) == []
    assert phase(away) is QueuePhase.PAUSED


def test_reply_that_names_another_pattern_affects_only_its_request() -> None:
    protocol = begin()
    queue = protocol.subscribe("a.*", None, None, 10)
    protocol.receive(lines(subscribed(100, 1, "b.*")))
    protocol.subscriptions.unsubscribe(queue)
    protocol.receive(lines(message(101, pattern="b.*"), message(102)))
    assert not queue.items


def test_datagram_reaches_the_subscription_of_its_pattern() -> None:
    protocol = begin()
    queue = protocol.subscribe("a.*", None, None, 10, stream=True, datagrams=True)
    early = lines(message(None, "early"))
    protocol.receive(early, DATAGRAM)
    protocol.receive(lines(subscribed(100, 1)), 7)
    for data in (b"", b"{", b"\xff", lines(message(101)), lines(message(None, 1, "b.*")), lines({"type": "x"})):
        protocol.receive(data, DATAGRAM)
    assert not queue.items
    protocol.receive(lines(message(None, "now")), DATAGRAM)
    assert [item.payload for item in queue.items if isinstance(item, Message)] == ["now"]


# Whatever the network does to the order of different streams, each subscription gets what its own stream has.
@given(st.data())
def test_replies_on_several_streams_come_in_any_order(data: st.DataObject) -> None:
    protocol = begin()
    old = protocol.subscribe("a.*", None, None, 100, stream=True)
    other = protocol.subscribe("b.*", None, None, 100, stream=True)
    protocol.subscriptions.unsubscribe(old)
    new = protocol.subscribe("a.*", 100, EPOCH, 100, stream=True)
    refused = protocol.subscribe("c.*", None, None, 100, stream=True)
    refusal = {"type": "subscribe_error", "pattern": "c.*", "message": "no", "code": "unauthorized", "id": 5}
    streams = {
        0: [refusal],
        7: [subscribed(100, 1), message(101), message(102), unsubscribed(102, 3)],
        11: [subscribed(100, 2, "b.*"), message(103, pattern="b.*")],
        15: [
            subscribed(102, 4),
            message(101),
            message(102),
            {"type": "live", "pattern": "a.*", "seq": 102},
            message(104),
        ],
    }
    while streams:
        number = data.draw(st.sampled_from(sorted(streams)))
        rest = streams[number]
        protocol.receive(lines(rest.pop(0)), number, ended=number == 7 and not rest)
        if not rest:
            del streams[number]
    assert (seqs(old), seqs(other), seqs(new)) == ([], [103], [101, 102, 104])
    assert refused.error is not None
    assert not protocol.awaiting_reply


# History, ping, errors


def test_history_replies_match_by_id() -> None:
    protocol = begin()
    one, other = protocol.in_flight.history("a.*", 2, None), protocol.in_flight.history("b", 100, 90)
    first, second = sent(protocol)
    assert (first["limit"], second["before"]) == (2, 90)
    protocol.receive(lines({"type": "history", "id": second["id"], "messages": [], "more": False}))
    assert one.value is None
    assert isinstance(other.value, Page)
    page = {"type": "history", "id": first["id"], "messages": [message(7, {"n": 1})], "more": True}
    protocol.receive(lines(page))
    assert isinstance(one.value, Page)
    assert [item.payload for item in one.value.messages] == [{"n": 1}]
    assert one.value.more


def test_error_with_an_id_rejects_that_history_request() -> None:
    protocol = begin()
    one, other = protocol.in_flight.history("a.*", 2, None), protocol.in_flight.history("b", 100, 90)
    _, second = sent(protocol)
    protocol.receive(lines({"type": "error", "message": "no", "code": "unauthorized", "id": second["id"]}))
    assert one.value is None
    assert isinstance(other.value, Refused)


def test_error_without_an_id_rejects_the_oldest_history_request() -> None:
    protocol = begin()
    one, other = protocol.in_flight.history("a.*", 2, None), protocol.in_flight.history("b", 100, 90)
    protocol.receive(lines({"type": "error", "message": "no", "code": "unavailable"}))
    assert isinstance(one.value, Refused)
    assert other.value is None


def test_bad_message_error_without_a_request_is_a_protocol_error() -> None:
    protocol = begin()
    publish(protocol, "a")
    with pytest.raises(PeerError, match="what") as caught:
        protocol.receive(lines({"type": "error", "message": "what?", "code": "bad_message"}))
    assert caught.value.close is CloseCode.BAD_MESSAGE


def test_error_with_an_id_rejects_the_request_of_that_id() -> None:
    protocol = begin()
    batch = publish(protocol, "a", "b")
    queue = protocol.subscribe("a.*", None, None, 10)
    page = protocol.in_flight.history("a.*", 2, None)
    requests = sent(protocol)
    for request in requests[1:]:
        protocol.receive(lines({"type": "error", "message": "what?", "code": "bad_message", "id": request["id"]}))
    assert batch.results[0] is None
    for refused in (batch.results[1], queue.error, page.value):
        assert isinstance(refused, Refused)
        assert refused.code is ErrorCode.BAD_MESSAGE


def test_goaway_and_other_errors_are_reported_as_events() -> None:
    events: list[wire.GoAway | wire.Error] = []
    protocol = StandaloneConnection(events.append)
    protocol.receive(
        lines(
            {"type": "goaway", "reason": "stopping", "reconnect_in": 1.5},
            {"type": "error", "message": "the token has expired", "code": "token_expired"},
        )
    )
    assert events == [wire.GoAway("stopping", 1.5), wire.Error("the token has expired", ErrorCode.TOKEN_EXPIRED)]


def test_no_task_waits_for_a_keepalive_ping() -> None:
    protocol = begin()
    protocol.send_ping()
    assert not protocol.awaiting_reply
    answer = protocol.in_flight.ping()
    assert protocol.awaiting_reply
    unwaited, waited = (request["seq"] for request in sent(protocol))
    protocol.receive(lines({"type": "pong", "seq": unwaited}))
    assert answer.value is None
    protocol.receive(lines({"type": "pong", "seq": waited}))
    assert answer.value == wire.Pong(waited)


@pytest.mark.parametrize("line", [b'{"type":"pong"}\n', b"garbage", b'{"type":"published","channel":"a","id":"x"}'])
def test_invalid_data_is_a_peer_error(line: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        begin().receive(line)
    assert caught.value.close is CloseCode.BAD_MESSAGE


# The end


def test_all_tasks_are_woken_when_no_connection_follows() -> None:
    protocol = begin()
    woken: list[str] = []
    batch, history, ping = (
        publish(protocol, "a"),
        protocol.in_flight.history("a", 1, None),
        protocol.in_flight.ping(),
    )
    asked, held = protocol.subscribe("b", None, None, 1), subscribe(protocol)
    auth = protocol.authenticate("t2")
    waiting = {"batch": batch, "history": history, "ping": ping, "asked": asked, "held": held, "auth": auth}
    for name, waiter in waiting.items():
        waiter.wake = lambda name=name: woken.append(name)  # type: ignore[attr-defined]
    protocol.connection_lost("gone", 4503)
    protocol.connection_lost("again")
    assert woken == ["auth"]
    assert protocol.outgoing_bytes == 0
    assert protocol.lost == ("gone", 4503)
    protocol.in_flight.wake_all()
    protocol.subscriptions.wake_all()
    assert sorted(woken) == sorted(waiting)
    with pytest.raises(Disconnected, match="gone") as caught:
        protocol.authenticate("t3")
    assert caught.value.code == 4503
    protocol.subscriptions.unsubscribe(asked)
    protocol.subscriptions.unsubscribe(held)


STREAM = lines(
    subscribed(100, 1),
    *[message(seq, {"text": 'ü"}{\\"'}) for seq in range(101, 105)],
    {"type": "gap", "pattern": "a.*", "from": 105, "to": 110, "epoch": EPOCH, "reason": "retention"},
    message(111),
    {"type": "head", "seq": 120, "epoch": EPOCH, "at": 1},
    {"type": "revoked", "pattern": "a.*", "seq": 120},
)


# However the bytes are cut, the same arrives.
@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_split_of_the_received_bytes_does_not_matter(cuts: list[int]) -> None:
    protocol = begin()
    queue = protocol.subscribe("a.*", None, None, 1000)
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, stop in pairwise(edges):
        protocol.receive(STREAM[start:stop])
    assert seqs(queue) == [101, 102, 103, 104, 111]
    assert marks(queue) == [("Gap", 110, EPOCH), ("Head", 120, EPOCH)]
    assert phase(queue) is QueuePhase.ENDED
