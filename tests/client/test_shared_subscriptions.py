"""Several queues of one pattern share one subscription at the broker, and each receives what it is owed."""

from __future__ import annotations

from typing import Any

import pytest

from catbus.client.message_queue import CursorUpdate, MessageQueue, QueuePhase
from catbus.client.protocol_connection import ProtocolConnection
from catbus.client.server_messages import Gap
from catbus.error_codes import ErrorCode
from catbus.errors import Refused
from tests.client.scripted_broker import EPOCH, message
from tests.client.test_lost_connections import Client
from tests.client.test_protocol_connection import lines, sent, seqs, subscribed

LIVE = {"type": "live", "pattern": "a.*", "seq": 120}


def begin(client: Client, since: int | None = None) -> tuple[ProtocolConnection, MessageQueue]:
    """A connection with one subscription, which is live at 120."""
    protocol = client.go_on()
    queue = client.subscribe(since=since)
    [request] = sent(protocol)
    protocol.receive(lines(subscribed(120, request["id"]), *([LIVE] if since is not None else [])))
    return protocol, queue


def gaps(queue: MessageQueue) -> list[tuple[int, int]]:
    return [
        (i.event.first, i.event.last) for i in queue.items if isinstance(i, CursorUpdate) and isinstance(i.event, Gap)
    ]


def test_second_queue_at_the_head_needs_no_request() -> None:
    client = Client()
    protocol, first = begin(client)
    protocol.receive(lines(message(121)))
    second = client.subscribe()
    assert sent(protocol) == []
    assert (second.started, second.cursor, second.epoch) == (True, 121, EPOCH)
    protocol.receive(lines(message(122), message(None, "psst")))
    assert seqs(first) == [121, 122, None]
    assert seqs(second) == [122, None]


def test_queues_that_begin_together_share_one_request() -> None:
    client = Client()
    protocol = client.go_on()
    both = [client.subscribe(), client.subscribe()]
    [request] = sent(protocol)
    protocol.receive(lines(subscribed(120, request["id"]), message(121)))
    assert [seqs(queue) for queue in both] == [[121], [121]]


def test_queue_with_a_lower_cursor_catches_up_without_repeats_for_the_other() -> None:
    client = Client()
    protocol, first = begin(client)
    protocol.receive(lines(message(121)))
    second = client.subscribe(since=110, epoch=EPOCH)
    [request] = sent(protocol)
    assert (request["since"], request["epoch"]) == (110, EPOCH)
    protocol.receive(lines(message(122)))
    again = [message(seq) for seq in (111, 121, 122, 123)]
    protocol.receive(lines(subscribed(122, request["id"]), *again, {**LIVE, "seq": 123}))
    assert seqs(first) == [121, 122, 123]
    assert seqs(second) == [111, 121, 122, 123]


def test_gap_reaches_only_the_queues_that_miss_messages() -> None:
    client = Client()
    protocol, first = begin(client)
    second, third = client.subscribe(since=50, epoch=EPOCH), client.subscribe(since=80, epoch=EPOCH)
    number = sent(protocol)[-1]["id"]
    gap = {"type": "gap", "pattern": "a.*", "from": 51, "to": 90, "epoch": EPOCH, "reason": "retention"}
    protocol.receive(lines(subscribed(120, number), gap, message(91)))
    assert (gaps(first), gaps(second), gaps(third)) == ([], [(51, 90)], [(81, 90)])
    assert (seqs(first), seqs(second), seqs(third)) == ([], [91], [91])


def test_queue_of_another_epoch_is_requested_alone_and_then_with_the_others() -> None:
    client = Client()
    protocol, first = begin(client)
    second = client.subscribe(since=200, epoch="e0")
    [request] = sent(protocol)
    assert (request["since"], request["epoch"]) == (200, "e0")
    gap = {"type": "gap", "pattern": "a.*", "from": 151, "to": 150, "epoch": EPOCH, "reason": "epoch"}
    protocol.receive(lines(subscribed(160, request["id"]), gap, message(151), {**LIVE, "seq": 160}))
    [request] = sent(protocol)
    assert (request["since"], request["epoch"]) == (120, EPOCH)
    protocol.receive(lines(subscribed(160, request["id"]), message(130), message(151), {**LIVE, "seq": 160}))
    assert sent(protocol) == []
    assert (seqs(first), gaps(first)) == ([130, 151], [])
    assert (seqs(second), gaps(second)) == ([151], [(151, 150)])


def test_queue_without_a_cursor_does_not_begin_on_a_subscription_from_another_epoch() -> None:
    client = Client()
    protocol = client.go_on()
    first, second = client.subscribe(), client.subscribe(since=130, epoch="e0")
    request = sent(protocol)[-1]
    assert (request["since"], request["epoch"]) == (130, "e0")
    # The replica is at 120, but delivers what follows 130: a queue that began at 120 would miss what is between.
    protocol.receive(lines(subscribed(120, request["id"]), message(131), {**LIVE, "seq": 131}))
    assert (first.started, seqs(first), seqs(second)) == (False, [], [131])
    [request] = sent(protocol)
    protocol.receive(lines(subscribed(131, request["id"]), message(132)))
    assert (first.started, seqs(first), seqs(second)) == (True, [132], [131, 132])


def test_subscription_that_a_newer_request_was_to_replace_ends_with_its_last_queue() -> None:
    client = Client()
    protocol = client.go_on()
    first, second = client.subscribe(), client.subscribe(since=10, epoch=EPOCH)
    older, newer = (request["id"] for request in sent(protocol))
    busy = {"type": "subscribe_error", "pattern": "a.*", "message": "not now", "code": "unavailable", "id": newer}
    protocol.receive(lines(subscribed(120, older), busy))
    assert [queue.phase for queue in (first, second)] == [QueuePhase.ENDED] * 2
    assert [request["type"] for request in sent(protocol)] == ["unsubscribe"]


def test_cursor_above_the_head_withholds_nothing_from_another_queue() -> None:
    client = Client()
    protocol, ahead = begin(client, since=1000)
    sent(protocol)
    second = client.subscribe()
    [request] = sent(protocol)
    assert request["since"] == protocol.head == 100
    protocol.receive(lines(subscribed(120, request["id"]), message(120), LIVE, message(121), message(1001)))
    assert seqs(second) == [121, 1001]
    assert seqs(ahead) == [1001]


def test_lagging_replica_starts_no_queue_below_its_cursor() -> None:
    client = Client()
    protocol = client.go_on(head=130)
    client.subscribe(since=125, epoch=EPOCH)
    second = client.subscribe()
    number = sent(protocol)[-1]["id"]
    protocol.receive(lines(subscribed(120, number), message(126), {**LIVE, "seq": 126}))
    assert (second.cursor, seqs(second)) == (125, [126])


def test_last_queue_unsubscribes() -> None:
    client = Client()
    protocol, first = begin(client)
    second = client.subscribe()
    client.subscriptions.unsubscribe(first)
    assert sent(protocol) == []
    protocol.receive(lines(message(121)))
    assert (seqs(first), seqs(second)) == ([], [121])
    client.subscriptions.unsubscribe(second)
    assert [request["type"] for request in sent(protocol)] == ["unsubscribe"]


def test_queue_closed_before_the_reply_receives_nothing() -> None:
    client = Client()
    protocol = client.go_on()
    first, second = client.subscribe(), client.subscribe()
    [request] = sent(protocol)
    client.subscriptions.unsubscribe(first)
    protocol.receive(lines(subscribed(120, request["id"]), message(121)))
    assert (first.phase, seqs(first)) == (QueuePhase.ENDED, [])
    assert seqs(second) == [121]


def test_full_queue_is_paused_alone_and_resumes_at_its_cursor() -> None:
    client = Client()
    protocol, slow = begin(client)
    fast = client.subscribe()
    protocol.receive(lines(message(121)))
    client.subscriptions.pause_queue(slow)
    assert sent(protocol) == []
    protocol.receive(lines(message(122)))
    client.subscriptions.queue_drained(slow)
    [request] = sent(protocol)
    assert request["since"] == 121
    protocol.receive(lines(subscribed(122, request["id"]), message(122), {**LIVE, "seq": 122}, message(123)))
    assert seqs(slow) == seqs(fast) == [121, 122, 123]


def test_subscription_is_paused_at_the_broker_when_all_queues_are_full() -> None:
    client = Client()
    protocol, first = begin(client)
    second = client.subscribe()
    for queue in (first, second):
        client.subscriptions.pause_queue(queue)
    assert [request["type"] for request in sent(protocol)] == ["unsubscribe"]


@pytest.mark.parametrize("code", [ErrorCode.UNAVAILABLE, ErrorCode.UNAUTHORIZED])
def test_rejection_of_a_later_queue_leaves_the_first_one_active(code: ErrorCode) -> None:
    client = Client()
    protocol, first = begin(client)
    second = client.subscribe(since=110, epoch=EPOCH)
    [request] = sent(protocol)
    refusal = {"type": "subscribe_error", "pattern": "a.*", "message": "no", "code": code, "id": request["id"]}
    protocol.receive(lines(refusal, message(121)))
    assert isinstance(second.error, Refused)
    assert (first.phase, seqs(first)) == (QueuePhase.ACTIVE, [121])
    client.subscriptions.unsubscribe(first)
    assert [request["type"] for request in sent(protocol)] == ["unsubscribe"]


def test_revocation_ends_all_queues() -> None:
    client = Client()
    protocol, first = begin(client)
    second = client.subscribe()
    protocol.receive(lines({"type": "revoked", "pattern": "a.*", "seq": 120}))
    assert {queue.error.code for queue in (first, second) if queue.error} == {ErrorCode.REVOKED}
    assert sent(protocol) == []


def test_old_stream_may_end_before_the_reply_to_a_new_subscribe() -> None:
    client = Client()
    protocol = client.go_on()
    first = client.subscriptions.subscribe("a.*", None, None, 10, present=EPOCH, stream=True)
    protocol.receive(lines({**subscribed(120, sent(protocol)[0]["id"]), "stream": True, "epoch": EPOCH}), 7)
    second = client.subscribe(since=110, epoch=EPOCH)
    [request] = sent(protocol)
    assert request["stream"] is True
    protocol.receive(b"", 7, ended=True)
    agreed = {**subscribed(120, request["id"]), "stream": True, "epoch": EPOCH}
    protocol.receive(lines(agreed, message(111), LIVE, message(121)), 11)
    assert (seqs(first), seqs(second)) == ([121], [111, 121])


def test_next_connection_gets_one_request_with_the_lowest_cursor() -> None:
    client = Client()
    old, first = begin(client)
    second = client.subscribe()
    old.receive(lines(message(121)))
    client.subscriptions.pause_queue(second)
    old.receive(lines(message(122)))
    client.subscriptions.queue_drained(second)
    old.connection_lost("gone")
    new = client.go_on()
    [request] = sent(new)
    assert request["since"] == 121
    new.receive(lines(subscribed(122, request["id"]), message(122), {**LIVE, "seq": 122}))
    assert seqs(first) == seqs(second) == [121, 122]


# Answers that come late while a client moves from A to B, and to C


LATE: dict[str, dict[str, Any]] = {
    "subscribed": subscribed(120, 0),
    "subscribe_error": {"type": "subscribe_error", "pattern": "a.*", "message": "no", "code": "unauthorized"},
    "unsubscribed": {"type": "unsubscribed", "pattern": "a.*", "seq": 120},
    "error": {"type": "error", "message": "no", "code": "bad_message"},
}


@pytest.mark.parametrize("moment", ["while", "after"])
@pytest.mark.parametrize("kind", LATE)
def test_reply_of_the_old_connection_does_not_affect_the_new_one(kind: str, moment: str) -> None:
    client = Client()
    old = client.go_on()
    queue = client.subscribe()
    [request] = sent(old)
    new = client.connect()
    new.resume_subscriptions()
    late = lines({**LATE[kind], "id": request["id"]})
    [asked] = sent(new)
    if moment == "while":
        old.receive(late)
        new.receive(lines(subscribed(120, asked["id"])))
    else:
        new.receive(lines(subscribed(120, asked["id"])))
        old.receive(late)
    old.connection_lost("closed")
    new.resume_requests()
    new.receive(lines(message(121)))
    assert (queue.phase, seqs(queue)) == (QueuePhase.ACTIVE, [121])


def test_queue_requested_before_a_move_is_requested_on_the_new_connection() -> None:
    client = Client()
    old = client.go_on()
    queue = client.subscribe()
    old.receive(lines(subscribed(120, sent(old)[0]["id"])))
    new = client.go_on()
    [asked] = sent(new)
    assert asked["since"] == 120
    old.connection_lost("closed")
    new.receive(lines(subscribed(125, asked["id"]), message(121)))
    assert seqs(queue) == [121]


def test_loss_of_a_superseded_connection_affects_no_subscription() -> None:
    client = Client()
    old = client.go_on()
    queue = client.subscribe()
    first = sent(old)[0]["id"]
    second = client.connect()
    second.resume_subscriptions()
    middle = sent(second)[0]["id"]
    third = client.connect()
    third.resume_subscriptions()
    last = sent(third)[0]["id"]
    third.receive(lines(subscribed(120, last)))
    second.receive(lines(subscribed(119, middle), message(120)))
    old.receive(lines(subscribed(118, first)))
    second.connection_lost("overtaken")
    old.connection_lost("closed")
    third.receive(lines(message(121)))
    assert (queue.cursor, seqs(queue)) == (120, [121])


def test_subscription_closed_during_a_move_ends_on_the_new_connection() -> None:
    client = Client()
    old, queue = begin(client)
    old.connection_lost("gone")
    new = client.go_on()
    client.subscriptions.unsubscribe(queue)
    assert [request["type"] for request in sent(new)] == ["subscribe", "unsubscribe"]


def test_publish_with_a_late_reply_is_settled_once() -> None:
    client = Client()
    old = client.go_on()
    batch = client.publish("one")
    [request] = sent(old)
    client.in_flight.pause()
    new = client.connect()
    answer = lines({"type": "published", "channel": "a.b", "id": request["id"], "seq": 101})
    old.connection_lost("closed")
    new.resume_requests()
    old.receive(answer)
    assert batch.missing
    new.receive(answer)
    new.receive(answer)
    assert batch.results == [101]
    assert not client.in_flight.publishes_in_flight
