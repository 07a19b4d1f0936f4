"""The client's side of the protocol, without any I/O."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from catbus.client import subscription_manager
from catbus.client.in_flight_requests import Batch, Ledger
from catbus.client.message_queue import Inbox, Mark, Phase
from catbus.client.protocol_connection import FRAME, Conversation
from catbus.client.server_messages import Message, Page, encode_payload
from catbus.client.subscription_manager import Switchboard
from catbus.client.transport_interface import DATAGRAM
from catbus.errors import CloseCode, Disconnected, ErrorCode, PeerError, Refused
from catbus.protocol import wire_messages as wire
from tests.client.fake import AUTH_OK, EPOCH, message


def lines(*messages: dict[str, Any]) -> bytes:
    return b"".join(msgspec.json.encode(item) + b"\n" for item in messages)


def sent(conversation: Conversation) -> list[dict[str, Any]]:
    """All that it wants to send, and forget it."""
    data = b""
    while conversation.outgoing:
        data += conversation.take()
    return [msgspec.json.decode(line) for line in data.splitlines()]


class Talk(Conversation):
    """A conversation, with what it is about."""

    def __init__(self, on_event: Callable[[wire.GoAway | wire.Error], None] | None = None) -> None:
        self.ledger = Ledger()
        self.subscriptions = Switchboard(self.ledger.number)
        super().__init__(self.ledger, self.subscriptions, on_event)

    def subscribe(self, pattern: str, since: int | None, epoch: str | None, limit: int, **options: bool) -> Inbox:
        return self.subscriptions.subscribe(pattern, since, epoch, limit, present=self.epoch, **options)


def begin() -> Talk:
    conversation = Talk()
    conversation.authenticate("t")
    sent(conversation)
    conversation.receive(lines(AUTH_OK))
    conversation.take_over()
    return conversation


def publish(conversation: Talk, *channels: str, payload: Any = 1) -> Batch:
    batch = Batch(len(channels))
    for place, channel in enumerate(channels):
        conversation.ledger.publish(channel, encode_payload(payload), batch, place, ephemeral=False, echo=True)
    return batch


def subscribe(conversation: Talk, pattern: str = "a.*", seq: int = 100, **options: Any) -> Inbox:
    inbox = conversation.subscribe(pattern, options.get("since"), options.get("epoch"), options.get("limit", 1000))
    [*_, request] = sent(conversation)
    conversation.receive(lines(subscribed(seq, request["id"], pattern)))
    return inbox


def subscribed(seq: int, number: int, pattern: str = "a.*") -> dict[str, Any]:
    return {"type": "subscribed", "pattern": pattern, "seq": seq, "id": number}


def unsubscribed(seq: int, number: int, pattern: str = "a.*") -> dict[str, Any]:
    return {"type": "unsubscribed", "pattern": pattern, "seq": seq, "id": number}


def seqs(inbox: Inbox) -> list[int | None]:
    return [item.seq for item in inbox.items if isinstance(item, Message)]


def phase(inbox: Inbox) -> Phase:
    return inbox.phase


def marks(inbox: Inbox) -> list[tuple[str, int, str]]:
    return [(type(item.event).__name__, item.cursor, item.epoch) for item in inbox.items if isinstance(item, Mark)]


# Authentication


def test_it_says_that_it_knows_this_specification() -> None:
    conversation = Talk()
    conversation.authenticate("secret")
    assert sent(conversation) == [{"type": "auth", "token": "secret", "protocol": 1}]


def test_auth_ok_tells_who_and_where() -> None:
    conversation = Talk()
    answer = conversation.authenticate("t")
    conversation.receive(lines(AUTH_OK))
    assert isinstance(answer.value, wire.AuthOk)
    assert (conversation.client_id, conversation.producer) == ("alice", "p1")
    assert (conversation.epoch, conversation.head, conversation.floor) == (EPOCH, 100, 1)
    assert conversation.limits["message_size"] == 65536


def test_auth_error_is_a_refusal() -> None:
    conversation = Talk()
    answer = conversation.authenticate("t")
    conversation.receive(lines({"type": "auth_error", "message": "expired", "code": "token_expired"}))
    assert isinstance(answer.value, Refused)
    assert answer.value.code is ErrorCode.TOKEN_EXPIRED


# Publishing


def test_ids_increase_and_answers_find_their_request_in_any_order() -> None:
    conversation = begin()
    batch = publish(conversation, "a", "b", "c")
    first, second, third = (request["id"] for request in sent(conversation))
    assert first < second < third
    conversation.receive(
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
    conversation.receive(lines({"type": "published", "channel": "b", "id": second, "seq": 104, "duplicate": True}))
    refused, *rest = batch.results
    assert isinstance(refused, Refused)
    assert (refused.code, refused.retry_after) == (ErrorCode.RATE_LIMITED, 2)
    assert rest == [104, 103]
    assert conversation.ledger.unanswered == 0
    assert conversation.head == 104


def test_who_waits_for_a_batch_is_woken_once_at_its_end() -> None:
    conversation = begin()
    batch = publish(conversation, "a", "b")
    woken: list[int] = []
    batch.wake = lambda: woken.append(1)
    first, second = sent(conversation)
    conversation.receive(lines({"type": "published", "channel": "a", "id": first["id"], "seq": 1}))
    assert not woken
    conversation.receive(lines({"type": "published", "channel": "b", "id": second["id"], "seq": 2}))
    assert woken == [1]


def test_a_publish_says_only_what_is_not_usual() -> None:
    conversation = begin()
    batch = Batch(1)
    conversation.ledger.publish("a", encode_payload([]), batch, 0, ephemeral=True, echo=False)
    [request] = sent(conversation)
    number = request.pop("id")
    assert request == {"type": "publish", "channel": "a", "payload": [], "ephemeral": True, "echo": False}
    conversation.receive(lines({"type": "published", "channel": "a", "id": number}))
    assert batch.results == [None]
    assert batch.missing == 0


def test_answers_that_nobody_asked_for_are_ignored() -> None:
    conversation = begin()
    conversation.receive(
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
    assert conversation.lost is None


@pytest.mark.parametrize(
    ("payload", "code"),
    [("x" * 65536, ErrorCode.TOO_LARGE), ([[]] * 1, None), ("x" * 65400, None), ({"a": "[" * 100}, None)],
)
def test_what_the_broker_would_not_understand_is_refused_here(payload: Any, code: ErrorCode | None) -> None:
    conversation = begin()
    batch = publish(conversation, "a", payload=payload)
    [result] = batch.results
    assert (result.code if isinstance(result, Refused) else result) == code
    assert len(sent(conversation)) == (code is None)


def test_what_is_nested_too_deep_is_refused_here() -> None:
    conversation = begin()
    deep: list[Any] = []
    for _ in range(62):
        deep = [deep]
    assert publish(conversation, "a", payload=deep).missing == 1
    [result] = publish(conversation, "a", payload=[deep]).results
    assert isinstance(result, Refused)
    assert result.code is ErrorCode.BAD_MESSAGE
    assert len(sent(conversation)) == 1


def test_lines_go_together_in_frames_of_limited_size() -> None:
    conversation = begin()
    batch = publish(conversation, *["a"] * 1000, payload="x" * 100)
    sizes = []
    lines_sent = 0
    while conversation.outgoing:
        frame = conversation.take()
        sizes.append(len(frame))
        assert frame.endswith(b"}\n")
        lines_sent += frame.count(b"\n")
    assert lines_sent == 1000 == batch.missing
    assert max(sizes) <= FRAME
    assert min(sizes[:-1]) > FRAME - 200


def test_a_line_longer_than_a_frame_goes_alone() -> None:
    conversation = begin()
    publish(conversation, "a")
    publish(conversation, "a", payload="x" * 50_000)
    publish(conversation, "a")
    counts = []
    while conversation.outgoing:
        counts.append(conversation.take().count(b"\n"))
    assert counts == [1, 1, 1]


# Subscribing


def test_a_subscription_from_now_on_is_complete_where_it_begins() -> None:
    conversation = begin()
    inbox = conversation.subscribe("a.*", None, None, 10)
    assert sent(conversation) == [{"type": "subscribe", "pattern": "a.*", "id": 1}]
    assert phase(inbox) is Phase.ASKED
    conversation.receive(lines(subscribed(120, 1), message(121), message(None)))
    assert phase(inbox) is Phase.HELD
    assert (inbox.cursor, inbox.epoch) == (120, EPOCH)
    assert seqs(inbox) == [121, None]


def test_since_and_epoch_are_passed_on_and_stand_until_something_is_heard() -> None:
    conversation = begin()
    inbox = conversation.subscribe("a.*", 50, "e0", 10)
    assert sent(conversation) == [{"type": "subscribe", "pattern": "a.*", "since": 50, "epoch": "e0", "id": 1}]
    conversation.receive(lines(subscribed(120, 1)))
    assert (inbox.cursor, inbox.epoch) == (50, "e0")
    assert not inbox.items


def test_who_subscribes_after_the_epoch_has_changed_in_silence_is_told_of_it() -> None:
    conversation = begin()
    first = conversation.subscribe("a.*", None, None, 10)
    second = conversation.subscribe("b", 50, EPOCH, 10)
    conversation.receive(
        lines(
            {**subscribed(120, 1), "epoch": "e2"},
            {**subscribed(120, 2, "b"), "epoch": "e2"},
            {**message(51), "channel": "b", "pattern": "b"},
        )
    )
    assert (first.cursor, first.epoch) == (120, "e2")
    assert (second.cursor, second.epoch) == (50, EPOCH)
    assert (second.arrived, second.arrived_epoch) == (51, "e2")
    assert (conversation.epoch, conversation.head) == ("e2", 120)


def test_a_message_without_a_gap_before_it_shows_that_the_cursor_holds_in_the_new_epoch() -> None:
    conversation = begin()
    inbox = subscribe(conversation, since=50, epoch="e0")
    conversation.receive(lines(message(60), message(61)))
    assert marks(inbox) == [("NoneType", 50, EPOCH)]
    assert seqs(inbox) == [60, 61]
    assert (inbox.arrived, inbox.arrived_epoch) == (61, EPOCH)


def test_a_gap_moves_the_cursor_and_into_another_epoch_even_back() -> None:
    conversation = begin()
    inbox = subscribe(conversation, since=150, epoch="e0")
    gap = {"type": "gap", "pattern": "a.*", "from": 91, "to": 90, "epoch": EPOCH, "reason": "epoch"}
    conversation.receive(lines(gap, message(91), message(92)))
    assert marks(inbox) == [("Gap", 90, EPOCH)]
    assert seqs(inbox) == [91, 92]


def test_a_gap_in_the_same_epoch_only_moves_on() -> None:
    conversation = begin()
    inbox = subscribe(conversation, since=50)
    for first, last in ((51, 80), (51, 70)):
        conversation.receive(
            lines({"type": "gap", "pattern": "a.*", "from": first, "to": last, "epoch": EPOCH, "reason": "retention"})
        )
    # Messages up to 80 have been accounted for: the second one announces nothing.
    assert marks(inbox) == [("Gap", 80, EPOCH)]
    assert (inbox.arrived, inbox.arrived_epoch) == (80, EPOCH)


def test_live_and_head_move_the_cursor_in_their_place_among_the_messages() -> None:
    conversation = begin()
    inbox = subscribe(conversation, since=50)
    head = {"type": "head", "seq": 130, "epoch": EPOCH, "at": 1}
    conversation.receive(lines(head, message(60), {"type": "live", "pattern": "a.*", "seq": 120}, message(121)))
    assert marks(inbox) == [("Live", 120, EPOCH)]
    conversation.receive(lines(head))
    assert marks(inbox) == [("Live", 120, EPOCH), ("Head", 130, EPOCH)]
    assert conversation.head == 130


def test_heads_in_a_row_are_one() -> None:
    conversation = begin()
    inbox = subscribe(conversation)
    for seq in (130, 140, 150):
        conversation.receive(lines({"type": "head", "seq": seq, "epoch": EPOCH, "at": 1}))
    assert marks(inbox) == [("Head", 150, EPOCH)]


def test_a_new_epoch_reaches_the_conversation_by_gap_and_by_head() -> None:
    conversation = begin()
    inbox = subscribe(conversation)
    conversation.receive(
        lines({"type": "gap", "pattern": "a.*", "from": 91, "to": 90, "epoch": "e2", "reason": "epoch"})
    )
    assert (conversation.epoch, conversation.head) == ("e2", 90)
    conversation.receive(lines({"type": "head", "seq": 80, "epoch": "e3", "at": 1}))
    assert (conversation.epoch, conversation.head) == ("e3", 80)
    assert marks(inbox)[-1] == ("Head", 80, "e3")


def test_what_has_arrived_already_does_not_arrive_again() -> None:
    conversation = begin()
    inbox = subscribe(conversation)
    conversation.receive(lines(message(100), message(101), message(103), message(102), message(103), message(104)))
    assert seqs(inbox) == [101, 103, 104]


def test_overlapping_patterns_keep_their_own_cursors() -> None:
    conversation = begin()
    one, other = subscribe(conversation, "a.*"), subscribe(conversation, "*", seq=110)
    conversation.receive(lines(message(111, pattern="a.*"), message(111, pattern="*"), message(112, pattern="*")))
    assert (seqs(one), seqs(other)) == ([111], [111, 112])
    assert (one.arrived, other.arrived) == (111, 112)


def test_a_refused_subscription_ends_with_the_reason() -> None:
    conversation = begin()
    inbox = conversation.subscribe("a.*", None, None, 10)
    refusal = {"type": "subscribe_error", "pattern": "a.*", "message": "no", "code": "unauthorized", "id": 1}
    conversation.receive(lines(refusal))
    assert phase(inbox) is Phase.ENDED
    assert inbox.ending is not None
    assert inbox.ending.code is ErrorCode.UNAUTHORIZED
    sent(conversation)
    conversation.subscriptions.leave(inbox)
    assert sent(conversation) == []
    conversation.subscribe("a.*", None, None, 10)


def test_a_revoked_subscription_ends_after_its_messages() -> None:
    conversation = begin()
    inbox = subscribe(conversation)
    conversation.receive(lines(message(101), {"type": "revoked", "pattern": "a.*", "seq": 101}, message(102)))
    assert seqs(inbox) == [101]
    assert inbox.ending is not None
    assert inbox.ending.code is ErrorCode.REVOKED


def test_after_leaving_nothing_arrives_and_the_next_subscription_hears_only_its_own() -> None:
    conversation = begin()
    old = subscribe(conversation)
    conversation.subscriptions.leave(old)
    new = conversation.subscribe("a.*", None, None, 10)
    first, second = sent(conversation)
    assert (first["type"], second["type"]) == ("unsubscribe", "subscribe")
    conversation.receive(lines(message(101), unsubscribed(101, first["id"])))
    assert phase(new) is Phase.ASKED
    conversation.receive(lines(subscribed(101, second["id"]), message(102)))
    assert (seqs(old), seqs(new)) == ([], [102])


def test_leaving_before_the_answer_leaves_nothing_behind() -> None:
    conversation = begin()
    old = conversation.subscribe("a.*", None, None, 10)
    conversation.subscriptions.leave(old)
    new = conversation.subscribe("a.*", 50, None, 10)
    conversation.receive(
        lines(
            subscribed(100, 1),
            message(101),
            unsubscribed(101, 2),
            subscribed(101, 3),
            message(51),
        )
    )
    assert (seqs(old), seqs(new)) == ([], [51])
    assert not conversation.waiting


def test_an_unsubscribe_that_is_refused_is_not_taken_for_the_next_subscription() -> None:
    conversation = begin()
    old = subscribe(conversation)
    conversation.subscriptions.leave(old)
    new = conversation.subscribe("a.*", None, None, 10)
    refusal = {"type": "subscribe_error", "pattern": "a.*", "message": "not held", "code": "invalid_pattern", "id": 2}
    conversation.receive(lines({"type": "revoked", "pattern": "a.*", "seq": 1}, refusal))
    assert phase(new) is Phase.ASKED
    conversation.receive(lines(subscribed(100, 3)))
    assert phase(new) is Phase.HELD


def test_who_waits_is_woken_when_the_first_thing_arrives_only() -> None:
    conversation = begin()
    inbox = subscribe(conversation)
    woken: list[int] = []
    inbox.wake = lambda: woken.append(len(inbox.items))
    conversation.receive(lines(message(101), message(102), {"type": "head", "seq": 102, "epoch": EPOCH, "at": 1}))
    assert woken == [1]


# Full inboxes


def test_a_full_inbox_is_crowded_until_it_is_relieved() -> None:
    conversation = begin()
    inbox = subscribe(conversation, limit=3)
    conversation.receive(lines(*[message(seq) for seq in range(101, 105)]))
    assert list(conversation.subscriptions.crowded) == [inbox]
    assert inbox.pressed
    assert seqs(inbox) == [101, 102, 103, 104]
    conversation.subscriptions.relieve(inbox)
    assert not conversation.crowded
    assert sent(conversation) == []


def test_a_suspended_inbox_is_taken_up_from_where_it_stopped() -> None:
    conversation = begin()
    inbox = subscribe(conversation, limit=2)
    conversation.receive(lines(message(101), message(102)))
    conversation.subscriptions.suspend(inbox)
    assert sent(conversation) == [{"type": "unsubscribe", "pattern": "a.*", "id": 2}]
    assert phase(inbox) is Phase.AWAY
    conversation.receive(lines(message(103), unsubscribed(103, 2)))
    assert seqs(inbox) == [101, 102]
    conversation.subscriptions.relieve(inbox)
    assert sent(conversation) == [{"type": "subscribe", "pattern": "a.*", "since": 102, "epoch": EPOCH, "id": 3}]
    conversation.receive(lines(subscribed(104, 3), message(103), message(104)))
    assert seqs(inbox) == [101, 102, 103, 104]
    assert phase(inbox) is Phase.HELD


def test_relieved_before_the_broker_has_stopped_it_still_misses_nothing() -> None:
    conversation = begin()
    inbox = subscribe(conversation, limit=2)
    conversation.receive(lines(message(101), message(102)))
    conversation.subscriptions.suspend(inbox)
    conversation.subscriptions.relieve(inbox)
    conversation.receive(
        lines(
            message(103),
            unsubscribed(104, 2),
            subscribed(104, 3),
            message(103),
            message(104),
            {"type": "live", "pattern": "a.*", "seq": 104},
        )
    )
    assert seqs(inbox) == [101, 102, 103, 104]


def test_a_head_while_it_is_away_does_not_move_its_cursor() -> None:
    conversation = begin()
    inbox = subscribe(conversation, limit=2)
    conversation.receive(lines(message(101), message(102)))
    conversation.subscriptions.suspend(inbox)
    conversation.receive(lines({"type": "head", "seq": 110, "epoch": EPOCH, "at": 1}))
    assert inbox.arrived == 102
    conversation.subscriptions.relieve(inbox)
    conversation.receive(lines(subscribed(110, 3)))
    conversation.receive(lines({"type": "head", "seq": 110, "epoch": EPOCH, "at": 1}))
    assert inbox.arrived == 102


def test_an_inbox_that_takes_on_too_much_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription_manager, "SPILL", 5_000)
    conversation = begin()
    inbox = subscribe(conversation, limit=2)
    conversation.receive(lines(*[message(seq, "x" * 100) for seq in range(101, 200)]))
    assert phase(inbox) is Phase.AWAY
    assert len(inbox.items) < 20
    assert not conversation.crowded


def test_a_subscription_that_may_not_come_back_ends() -> None:
    conversation = begin()
    inbox = subscribe(conversation, limit=1)
    conversation.receive(lines(message(101)))
    conversation.subscriptions.suspend(inbox)
    conversation.subscriptions.relieve(inbox)
    conversation.receive(
        lines(
            unsubscribed(1, 2),
            {"type": "subscribe_error", "pattern": "a.*", "message": "no", "code": "unauthorized", "id": 3},
        )
    )
    assert seqs(inbox) == [101]
    assert inbox.ending is not None
    assert inbox.ending.code is ErrorCode.UNAUTHORIZED


def test_leaving_while_away_says_nothing_more() -> None:
    conversation = begin()
    inbox = subscribe(conversation, limit=1)
    conversation.receive(lines(message(101)))
    conversation.subscriptions.suspend(inbox)
    sent(conversation)
    conversation.subscriptions.leave(inbox)
    conversation.subscriptions.relieve(inbox)
    assert sent(conversation) == []


# More than one stream


def test_a_subscription_asks_for_its_stream_again_when_it_is_taken_up() -> None:
    conversation = begin()
    inbox = conversation.subscribe("a.*", None, None, 1, stream=True, datagrams=True)
    asked = {"type": "subscribe", "pattern": "a.*", "stream": True, "datagrams": True}
    assert sent(conversation) == [{**asked, "id": 1}]
    conversation.receive(lines(subscribed(100, 1), message(101)), 7)
    conversation.subscriptions.suspend(inbox)
    conversation.subscriptions.relieve(inbox)
    assert sent(conversation)[1] == {**asked, "since": 101, "epoch": EPOCH, "id": 3}


def test_a_head_speaks_of_the_subscriptions_on_its_stream() -> None:
    conversation = begin()
    here = subscribe(conversation, "a.*")
    there = conversation.subscribe("b.*", None, None, 10, stream=True)
    conversation.receive(lines(subscribed(100, 2, "b.*")), 7)
    conversation.receive(lines({"type": "head", "seq": 110, "epoch": EPOCH, "at": 1}))
    assert (here.arrived, there.arrived) == (110, 100)
    conversation.receive(lines({"type": "head", "seq": 120, "epoch": EPOCH, "at": 1}), 7)
    assert (here.arrived, there.arrived) == (110, 120)


def test_a_stream_stays_in_its_epoch_whatever_another_has_said() -> None:
    conversation = begin()
    here = subscribe(conversation, "b.*", 150)
    news = conversation.subscribe("a.*", None, None, 10, stream=True)
    old = conversation.subscribe("c.*", 90, EPOCH, 10, stream=True)
    # The broker has said the rest in the old epoch, which was at 150; the new one began after 140.
    conversation.receive(
        lines({"type": "gap", "pattern": "b.*", "from": 141, "to": 140, "epoch": "e2", "reason": "epoch"})
    )
    conversation.receive(lines({**subscribed(150, 2), "epoch": EPOCH}), 3)
    conversation.receive(lines({**subscribed(150, 3, "c.*"), "epoch": EPOCH}, message(91, pattern="c.*")), 7)
    conversation.receive(lines({"type": "live", "pattern": "c.*", "seq": 150}), 7)
    conversation.receive(lines({"type": "head", "seq": 150, "epoch": EPOCH, "at": 1}), 3)
    assert [(one.arrived, one.arrived_epoch) for one in (here, news, old)] == [
        (140, "e2"),
        (150, EPOCH),
        (150, EPOCH),
    ]
    assert (conversation.head, conversation.epoch) == (140, "e2")
    for inbox, stream in ((news, 3), (old, 7)):
        gap = {"type": "gap", "pattern": inbox.pattern, "from": 141, "to": 140, "epoch": "e2", "reason": "epoch"}
        conversation.receive(lines(gap, message(141, pattern=inbox.pattern)), stream)
        assert (seqs(inbox)[-1], inbox.arrived_epoch) == (141, "e2")


def test_a_stream_that_begins_in_a_new_epoch_says_so() -> None:
    conversation = begin()
    inbox = conversation.subscribe("a.*", None, None, 10, stream=True)
    conversation.receive(lines({**subscribed(40, 1), "epoch": "e2"}, message(41)), 3)
    assert (inbox.epoch, inbox.arrived) == ("e2", 41)


def test_a_stream_that_ends_before_its_subscription_ends_the_conversation() -> None:
    conversation = begin()
    conversation.subscribe("a.*", None, None, 10, stream=True)
    conversation.receive(lines(subscribed(100, 1)), 7)
    with pytest.raises(PeerError, match="ended before it") as caught:
        conversation.receive(b"", 7, ended=True)
    assert caught.value.close is CloseCode.BAD_MESSAGE


GIVEN_UP = {"type": "unsubscribed", "pattern": "a.*", "seq": 110}


@pytest.mark.parametrize("told_first", [False, True])
def test_a_subscription_whose_stream_was_given_up_goes_on_where_it_stood(told_first: bool) -> None:
    conversation = begin()
    inbox = conversation.subscribe("a.*", None, None, 10, stream=True)
    conversation.receive(lines(subscribed(100, 1), message(101)) + b'{"type": "mess', 7)
    sent(conversation)
    if told_first:
        conversation.receive(lines(GIVEN_UP))
        conversation.receive(b"", 7, reset=True)
    else:
        conversation.receive(b"", 7, reset=True)
        assert sent(conversation) == []
        conversation.receive(lines(GIVEN_UP))
    again = {"type": "subscribe", "pattern": "a.*", "since": 101, "epoch": EPOCH, "stream": True, "id": 2}
    assert sent(conversation) == [again]
    conversation.receive(lines(subscribed(110, 2), message(102)), 11)
    assert seqs(inbox) == [101, 102]
    assert phase(inbox) is Phase.HELD


def test_a_subscription_that_is_not_wanted_any_more_is_not_asked_for_when_its_stream_is_given_up() -> None:
    conversation = begin()
    away = conversation.subscribe("a.*", None, None, 1, stream=True)
    conversation.receive(lines(subscribed(100, 1), message(101)), 7)
    conversation.subscriptions.suspend(away)
    sent(conversation)
    conversation.receive(lines(GIVEN_UP))
    conversation.receive(b"", 7, reset=True)
    conversation.receive(lines(GIVEN_UP | {"pattern": "nobodys.*"}))
    assert sent(conversation) == []
    assert phase(away) is Phase.AWAY


def test_an_answer_that_names_another_pattern_leads_nowhere_else() -> None:
    conversation = begin()
    inbox = conversation.subscribe("a.*", None, None, 10)
    conversation.receive(lines(subscribed(100, 1, "b.*")))
    conversation.subscriptions.leave(inbox)
    conversation.receive(lines(message(101, pattern="b.*"), message(102)))
    assert not inbox.items


def test_a_datagram_is_for_whoever_has_the_pattern() -> None:
    conversation = begin()
    inbox = conversation.subscribe("a.*", None, None, 10, stream=True, datagrams=True)
    early = lines(message(None, "early"))
    conversation.receive(early, DATAGRAM)
    conversation.receive(lines(subscribed(100, 1)), 7)
    for data in (b"", b"{", b"\xff", lines(message(101)), lines(message(None, 1, "b.*")), lines({"type": "x"})):
        conversation.receive(data, DATAGRAM)
    assert not inbox.items
    conversation.receive(lines(message(None, "now")), DATAGRAM)
    assert [item.payload for item in inbox.items if isinstance(item, Message)] == ["now"]


# Whatever the network does to the order of different streams, each subscription gets what its own stream has.
@given(st.data())
def test_answers_on_different_streams_come_in_any_order(data: st.DataObject) -> None:
    conversation = begin()
    old = conversation.subscribe("a.*", None, None, 100, stream=True)
    other = conversation.subscribe("b.*", None, None, 100, stream=True)
    conversation.subscriptions.leave(old)
    new = conversation.subscribe("a.*", 100, EPOCH, 100, stream=True)
    refused = conversation.subscribe("c.*", None, None, 100, stream=True)
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
        conversation.receive(lines(rest.pop(0)), number, ended=number == 7 and not rest)
        if not rest:
            del streams[number]
    assert (seqs(old), seqs(other), seqs(new)) == ([], [103], [101, 102, 104])
    assert refused.ending is not None
    assert not conversation.waiting


# History, ping, errors


def test_histories_are_told_apart_by_their_ids() -> None:
    conversation = begin()
    one, other = conversation.ledger.history("a.*", 2, None), conversation.ledger.history("b", 100, 90)
    first, second = sent(conversation)
    assert (first["limit"], second["before"]) == (2, 90)
    conversation.receive(lines({"type": "history", "id": second["id"], "messages": [], "more": False}))
    assert one.value is None
    assert isinstance(other.value, Page)
    page = {"type": "history", "id": first["id"], "messages": [message(7, {"n": 1})], "more": True}
    conversation.receive(lines(page))
    assert isinstance(one.value, Page)
    assert [item.payload for item in one.value.messages] == [{"n": 1}]
    assert one.value.more


def test_an_error_with_an_id_refuses_that_history() -> None:
    conversation = begin()
    one, other = conversation.ledger.history("a.*", 2, None), conversation.ledger.history("b", 100, 90)
    _, second = sent(conversation)
    conversation.receive(lines({"type": "error", "message": "no", "code": "unauthorized", "id": second["id"]}))
    assert one.value is None
    assert isinstance(other.value, Refused)


def test_an_error_without_an_id_refuses_the_oldest_history() -> None:
    conversation = begin()
    one, other = conversation.ledger.history("a.*", 2, None), conversation.ledger.history("b", 100, 90)
    conversation.receive(lines({"type": "error", "message": "no", "code": "unavailable"}))
    assert isinstance(one.value, Refused)
    assert other.value is None


def test_a_complaint_that_belongs_to_nothing_ends_the_conversation() -> None:
    conversation = begin()
    publish(conversation, "a")
    with pytest.raises(PeerError, match="what") as caught:
        conversation.receive(lines({"type": "error", "message": "what?", "code": "bad_message"}))
    assert caught.value.close is CloseCode.BAD_MESSAGE


def test_an_object_that_the_broker_does_not_understand_is_refused_by_its_id() -> None:
    conversation = begin()
    batch = publish(conversation, "a", "b")
    inbox = conversation.subscribe("a.*", None, None, 10)
    page = conversation.ledger.history("a.*", 2, None)
    requests = sent(conversation)
    for request in requests[1:]:
        conversation.receive(lines({"type": "error", "message": "what?", "code": "bad_message", "id": request["id"]}))
    assert batch.results[0] is None
    for refused in (batch.results[1], inbox.ending, page.value):
        assert isinstance(refused, Refused)
        assert refused.code is ErrorCode.BAD_MESSAGE


def test_goaway_and_other_errors_are_events() -> None:
    events: list[wire.GoAway | wire.Error] = []
    conversation = Talk(events.append)
    conversation.receive(
        lines(
            {"type": "goaway", "reason": "stopping", "reconnect_in": 1.5},
            {"type": "error", "message": "the token has expired", "code": "token_expired"},
        )
    )
    assert events == [wire.GoAway("stopping", 1.5), wire.Error("the token has expired", ErrorCode.TOKEN_EXPIRED)]


def test_a_keepalive_ping_is_waited_for_by_nobody() -> None:
    conversation = begin()
    conversation.keep_alive()
    assert not conversation.waiting
    answer = conversation.ledger.ping()
    assert conversation.waiting
    unwaited, waited = (request["seq"] for request in sent(conversation))
    conversation.receive(lines({"type": "pong", "seq": unwaited}))
    assert answer.value is None
    conversation.receive(lines({"type": "pong", "seq": waited}))
    assert answer.value == wire.Pong(waited)


@pytest.mark.parametrize("line", [b'{"type":"pong"}\n', b"garbage", b'{"type":"published","channel":"a","id":"x"}'])
def test_nonsense_is_the_peers_mistake(line: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        begin().receive(line)
    assert caught.value.close is CloseCode.BAD_MESSAGE


# The end


def test_when_there_is_no_other_connection_everyone_is_woken() -> None:
    conversation = begin()
    woken: list[str] = []
    batch, history, ping = (
        publish(conversation, "a"),
        conversation.ledger.history("a", 1, None),
        conversation.ledger.ping(),
    )
    asked, held = conversation.subscribe("b", None, None, 1), subscribe(conversation)
    auth = conversation.authenticate("t2")
    waiting = {"batch": batch, "history": history, "ping": ping, "asked": asked, "held": held, "auth": auth}
    for name, waiter in waiting.items():
        waiter.wake = lambda name=name: woken.append(name)  # type: ignore[attr-defined]
    conversation.lose("gone", 4503)
    conversation.lose("again")
    assert woken == ["auth"]
    assert conversation.outgoing == 0
    assert conversation.lost == ("gone", 4503)
    conversation.ledger.wake()
    conversation.subscriptions.wake()
    assert sorted(woken) == sorted(waiting)
    with pytest.raises(Disconnected, match="gone") as caught:
        conversation.authenticate("t3")
    assert caught.value.code == 4503
    conversation.subscriptions.leave(asked)
    conversation.subscriptions.leave(held)


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
def test_it_does_not_matter_where_the_bytes_are_cut(cuts: list[int]) -> None:
    conversation = begin()
    inbox = conversation.subscribe("a.*", None, None, 1000)
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, stop in pairwise(edges):
        conversation.receive(STREAM[start:stop])
    assert seqs(inbox) == [101, 102, 103, 104, 111]
    assert marks(inbox) == [("Gap", 110, EPOCH), ("Head", 120, EPOCH)]
    assert phase(inbox) is Phase.ENDED
