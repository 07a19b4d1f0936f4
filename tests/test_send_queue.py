"""The send queue: its messages are bounded, and it always accepts replies."""

from __future__ import annotations

import tracemalloc

import pytest

from catbus.delivery.encoded_messages import EncodedMessages
from catbus.delivery.reply_lines import HeadLine, HistoryLine, SubscriptionLine
from catbus.delivery.send_queue import (
    LIST_SLOT_BYTES,
    MAX_JOINED,
    MAX_MEMORY_FACTOR,
    REPLY_BYTES,
    SUBSCRIPTION_LINE_BYTES,
    Budget,
    SendQueue,
    size_of_replies,
)
from catbus.log import Entry
from catbus.protocol import wire_messages as wire


class TransportWriter:
    def flush(self) -> None:
        """Do nothing: the tests take the items themselves."""


def encoded(*seqs: int, pattern: str = "a", size: int = 10) -> EncodedMessages:
    return EncodedMessages(pattern, [Entry(seq, 5, "a", b"1" * size, "me") for seq in seqs])


def test_items_are_taken_in_order_and_the_first_one_wakes_the_flusher() -> None:
    woken: list[SendQueue] = []
    send_queue = SendQueue(TransportWriter(), woken.append)
    first = encoded(1, 2)
    send_queue.put(b"reply")
    assert send_queue.offer(first)
    send_queue.put(b"live")
    assert woken == [send_queue]
    assert send_queue.take() == [b"reply", first, b"live"]
    assert (send_queue.size, bool(send_queue)) == (0, False)
    send_queue.put(b"again")
    assert woken == [send_queue, send_queue]


def test_full_send_queue_rejects_messages_and_accepts_replies() -> None:
    send_queue = SendQueue(TransportWriter(), lambda _: None, limit=300)
    assert send_queue.offer(encoded(1, 2))
    assert not send_queue.offer(encoded(3, 4))
    assert send_queue.rejected == 1
    send_queue.put(b"x" * 300)
    assert send_queue.full
    assert len(send_queue.take()) == 2


def test_empty_send_queue_takes_one_message_of_any_size_but_not_two() -> None:
    send_queue = SendQueue(TransportWriter(), lambda _: None, limit=300)
    assert not send_queue.offer(encoded(1, 2, size=200))
    assert send_queue.offer(encoded(1, size=1000))
    assert not send_queue.offer(encoded(2))


def test_offering_no_messages_queues_nothing() -> None:
    send_queue = SendQueue(TransportWriter(), lambda _: None)
    assert send_queue.offer(encoded())
    assert not send_queue


def test_half_of_a_send_queue_is_kept_free_for_live_messages() -> None:
    send_queue = SendQueue(TransportWriter(), lambda _: None, limit=1000)
    assert send_queue.room == 500
    send_queue.put(b"x" * 501)
    assert send_queue.room == 0
    assert send_queue.offer(encoded(1))


def test_callback_is_called_once_when_the_send_queue_is_emptied() -> None:
    calls: list[str] = []
    send_queue = SendQueue(TransportWriter(), lambda _: None)
    send_queue.put(b"x")
    send_queue.when_emptied(lambda: calls.append("one"))
    send_queue.when_emptied(lambda: calls.append("two"))
    send_queue.take()
    send_queue.take()
    assert calls == ["one", "two"]


def test_revoked_messages_are_dropped() -> None:
    send_queue = SendQueue(TransportWriter(), lambda _: None)
    kept = encoded(3, pattern="b")
    send_queue.offer(encoded(1, 2))
    send_queue.put(b"reply")
    send_queue.offer(kept)
    send_queue.revoke(["a"])
    assert send_queue.size == 5 + REPLY_BYTES + kept.size
    assert send_queue.take() == [b"reply", kept]


def test_revocation_drops_lines_that_count_revoked_messages_as_delivered() -> None:
    send_queue = SendQueue(TransportWriter(), lambda _: None)
    before, after, other = (
        SubscriptionLine(b"before", "a"),
        SubscriptionLine(b"after", "a"),
        SubscriptionLine(b"other", "b"),
    )
    send_queue.put(before)
    send_queue.put(HeadLine(b"head"))
    send_queue.offer(encoded(1, 2))
    for line in (after, other, HeadLine(b"another head"), b"reply"):
        send_queue.put(line)
    send_queue.revoke(["a"])
    assert send_queue.take() == [before, b"head", other, b"reply"]


def test_copy_for_several_patterns_keeps_the_messages_that_other_patterns_match() -> None:
    budget = Budget()
    send_queue, other = (
        SendQueue(TransportWriter(), lambda _: None, budget=budget),
        SendQueue(TransportWriter(), lambda _: None, budget=budget),
    )
    mixed = EncodedMessages("", [Entry(seq, 5, channel, b"1") for seq, channel in ((1, "x"), (2, "y"), (3, "x"))])
    alone = encoded(4, pattern="")
    for item in (mixed, alone):
        send_queue.offer(item)
        other.offer(item)
    send_queue.revoke(["a"], ["x"])
    size = send_queue.size
    [kept] = send_queue.take()
    assert isinstance(kept, EncodedMessages)
    assert size == kept.size
    assert [(entry.seq, entry.channel) for entry in kept.entries] == [(1, "x"), (3, "x")]
    assert (send_queue.size, send_queue.withdraw()) == (0, {})
    assert budget.held == mixed.charge + alone.charge + 2 * LIST_SLOT_BYTES
    assert other.take() == [mixed, alone]
    assert budget.held == 0


def test_erased_messages_are_dropped_and_send_queues_go_on_sharing_the_others() -> None:
    budget = Budget()
    one, other = (SendQueue(TransportWriter(), lambda _: None, budget=budget) for _ in range(2))
    shared, whole = encoded(1, 2, 3), encoded(4, 5)
    page = HistoryLine(b"page", [2, 9], b"error")
    for send_queue in (one, other):
        for item in (shared, whole, encoded(7)):
            send_queue.offer(item)
    one.pin()
    for line in (page, HistoryLine(b"page", [8], b"error"), HeadLine(b"head")):
        one.put(line)
    assert one.lowest_seq() == other.lowest_seq() == 1
    remainders: dict[EncodedMessages, EncodedMessages | None] = {}
    for send_queue in (one, other):
        send_queue.erase({2, 7}, remainders)
    assert one._pinned == 2
    rest, same, *lines = one.take()
    assert isinstance(rest, EncodedMessages)
    assert [entry.seq for entry in rest.entries] == [1, 3]
    assert same is whole
    assert lines == [b"error", b"page", b"head"]
    assert other.take() == [rest, whole]
    assert (budget.messages, budget.pinned, budget.replies, one.size, other.size) == (0, 0, 0, 0, 0)


def test_withdrawing_returns_the_first_seqs_and_keeps_pinned_messages() -> None:
    budget = Budget()
    send_queue = SendQueue(TransportWriter(), lambda _: None, budget=budget)
    pinned = encoded(1, 2)
    send_queue.offer(pinned)
    send_queue.put(SubscriptionLine(b"gap", "a"))
    send_queue.pin()
    for item in (encoded(5), encoded(7, pattern="b"), EncodedMessages("b", [Entry(0, 5, "a", b"1", None)])):
        send_queue.offer(item)
    send_queue.put(SubscriptionLine(b"live", "b"))
    send_queue.put(b"reply")
    assert {pattern: first.first_seq for pattern, first in send_queue.withdraw().items()} == {"a": 5, "b": 7}
    assert (budget.messages, budget.replies) == (pinned.charge + LIST_SLOT_BYTES, send_queue.size - pinned.size)
    assert send_queue.withdraw() == {}
    assert send_queue.take() == [pinned, b"gap", b"reply"]
    assert budget.held == 0


def test_messages_in_several_send_queues_are_counted_once() -> None:
    budget = Budget(1000)
    one, other = (SendQueue(TransportWriter(), lambda _: None, budget=budget) for _ in range(2))
    shared = encoded(1, 2, 3)
    for send_queue in (one, other):
        send_queue.offer(shared)
        send_queue.put(b"reply")
    assert budget.held == shared.charge + 2 * (LIST_SLOT_BYTES + REPLY_BYTES + 5)
    one.take()
    assert budget.held == shared.charge + LIST_SLOT_BYTES + REPLY_BYTES + 5
    other.close()
    assert budget.held == 0
    other.put(b"after the end")
    assert budget.held == 0


def test_send_queue_that_is_not_empty_is_full_while_all_hold_too_many_replies() -> None:
    budget = Budget(400)
    one, other, empty = (SendQueue(TransportWriter(), lambda _: None, budget=budget) for _ in range(3))
    one.put(b"x" * 100)
    other.put(b"x")
    assert (one.full, other.full, empty.full) == (True, True, False)
    one.take()
    assert not other.full


def test_replies_count_until_they_are_sent() -> None:
    budget = Budget(400)
    one, other = (SendQueue(TransportWriter(), lambda _: None, budget=budget) for _ in range(2))
    one.put(b"x" * 100)
    one.count_unsent(size_of_replies(one.take()))
    other.put(b"x")
    assert budget.replies > 100
    assert (one.full, other.full) == (True, True)
    one.count_unsent(0)
    assert (one.full, other.full) == (False, False)
    one.count_unsent(1000)
    one.close()
    other.close()
    assert budget.held == 0


def test_half_of_the_budget_is_kept_free_for_live_messages() -> None:
    budget = Budget(4000)
    one, other = (SendQueue(TransportWriter(), lambda _: None, budget=budget) for _ in range(2))
    one.put(b"x" * 10_000)
    assert other.room == 1500 // MAX_MEMORY_FACTOR
    one.offer(encoded(1, size=1500))
    assert other.room == 0


def test_send_queue_can_be_taken_in_parts() -> None:
    budget = Budget()
    send_queue = SendQueue(TransportWriter(), lambda _: None, budget=budget)
    calls: list[str] = []
    send_queue.when_emptied(lambda: calls.append("empty"))
    first, second = encoded(1), encoded(2)
    for item in (first, b"x" * 40, second):
        send_queue.put(item) if isinstance(item, bytes) else send_queue.offer(item)
    send_queue.pin()
    assert send_queue.take(first.size + 1) == [first, b"x" * 40]
    assert (send_queue.size, budget.held) == (second.size, second.charge + LIST_SLOT_BYTES)
    assert send_queue.withdraw() == {}
    assert not calls
    assert send_queue.take(1) == [second]
    assert calls == ["empty"]


def test_newer_head_replaces_one_that_only_replies_follow() -> None:
    budget = Budget()
    send_queue = SendQueue(TransportWriter(), lambda _: None, budget=budget)
    for item in (HeadLine(b"1"), b"pong", HeadLine(b"2"), b"pong", HeadLine(b"3")):
        send_queue.put(item)
    assert send_queue.offer(encoded(1))
    for item in (HeadLine(b"4"), SubscriptionLine(b"live", "a"), HeadLine(b"5"), HeadLine(b"6"), b"pong"):
        send_queue.put(item)
    send_queue.pin()
    send_queue.put(HeadLine(b"7"))
    assert send_queue.withdraw() == {}
    size, reply_bytes = send_queue.size, budget.replies
    assert [item for item in send_queue.take() if isinstance(item, bytes)] == [
        *(b"pong", b"pong", b"3"),
        *(b"4", b"live", b"pong", b"7"),
    ]
    assert size == reply_bytes + encoded(1).size
    assert reply_bytes == 6 * REPLY_BYTES + SUBSCRIPTION_LINE_BYTES + 3 * 4 + 3 + 4
    assert (send_queue.size, budget.held) == (0, 0)


@pytest.mark.parametrize("protocol", wire.ProtocolVersion)
def test_many_replies_are_joined_except_for_the_first_version(protocol: wire.ProtocolVersion) -> None:
    budget = Budget()
    send_queue = SendQueue(TransportWriter(), lambda _: None, budget=budget)
    send_queue.protocol = protocol
    lines = [b"%d\n" % number for number in range(2000)]
    for number, line in enumerate(lines):
        send_queue.put(line)
        send_queue.put(HeadLine(b"head\n"))
        if number == 1000:
            send_queue.pin()
            send_queue.put(SubscriptionLine(b"live\n", "a"))
    assert send_queue.size == budget.replies
    items = send_queue.take()
    assert b"".join([item for item in items if type(item) is bytes]) == b"".join(lines)
    assert (len(items) < 400) == (protocol is not wire.ProtocolVersion.FIRST)
    assert max(map(len, items)) < MAX_JOINED + 10
    assert budget.replies == 0


@pytest.mark.parametrize("size", [1, 100, 10_000])
@pytest.mark.parametrize("together", [1, 50])
def test_send_queue_takes_no_more_memory_than_is_counted(size: int, together: int) -> None:
    budget = Budget()
    send_queues = [SendQueue(TransportWriter(), lambda _: None, 1 << 30, budget) for _ in range(5)]
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(0, 500, together):
            entries = [Entry(10**6 + number + n, 10**12 + n, f"room.{n}", b"1" * size) for n in range(together)]
            messages = EncodedMessages("room.*", entries)
            for each in send_queues:
                assert each.offer(messages)
            assert messages.lines
            for _ in range(together):
                send_queues[0].put(wire.encode(wire.Pong(10**6 + number)) or b"")
            send_queues[0].put(SubscriptionLine(wire.encode(wire.Live("room.*", 10**6 + number)) or b"", "room.*"))
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert budget.held / 2 < taken < budget.held


def test_encoded_messages_take_no_more_memory_than_the_budget_assumes() -> None:
    """Otherwise a page read for a lagging subscription would be withdrawn at once, again and again."""
    messages = EncodedMessages("a", [Entry(seq, 5, "a", b"1") for seq in range(20)])
    assert messages.charge <= MAX_MEMORY_FACTOR * messages.size


def test_messages_are_encoded_once_and_their_size_is_estimated_closely() -> None:
    messages = encoded(1, 2, 3, size=100)
    assert messages.lines is messages.lines
    assert messages.first_version_lines is messages.first_version_lines
    assert messages.lines.count(b"\n") == 3
    assert len(messages.lines) <= messages.size <= 2 * len(messages.lines)
