"""The mailbox: one queue, bounded for messages, open for replies."""

from __future__ import annotations

from catbus.log import Entry
from catbus.mailbox import Mailbox, Run


class Outlet:
    def flush(self) -> None:
        """The tests take the mail themselves."""


def run(*seqs: int, pattern: str = "a", size: int = 10) -> Run:
    return Run(pattern, [Entry(seq, 5, "a", b"1" * size, "me") for seq in seqs])


def test_what_is_put_in_comes_out_in_order_and_wakes_once() -> None:
    woken: list[Mailbox] = []
    mailbox = Mailbox(Outlet(), woken.append)
    first = run(1, 2)
    mailbox.put(b"reply")
    assert mailbox.offer(first)
    mailbox.put(b"mark")
    assert woken == [mailbox]
    assert mailbox.take() == [b"reply", first, b"mark"]
    assert (mailbox.size, bool(mailbox)) == (0, False)
    mailbox.put(b"again")
    assert woken == [mailbox, mailbox]


def test_messages_are_turned_away_when_there_is_no_room_and_replies_are_not() -> None:
    mailbox = Mailbox(Outlet(), lambda _: None, limit=300)
    assert mailbox.offer(run(1, 2))
    assert not mailbox.offer(run(3, 4))
    assert mailbox.turned_away == 1
    mailbox.put(b"x" * 300)
    assert mailbox.full
    assert len(mailbox.take()) == 2


def test_an_empty_mailbox_takes_one_message_of_any_size_but_not_two() -> None:
    mailbox = Mailbox(Outlet(), lambda _: None, limit=300)
    assert not mailbox.offer(run(1, 2, size=200))
    assert mailbox.offer(run(1, size=1000))
    assert not mailbox.offer(run(2))


def test_no_messages_are_no_mail() -> None:
    mailbox = Mailbox(Outlet(), lambda _: None)
    assert mailbox.offer(run())
    assert not mailbox


def test_half_of_it_is_kept_free_for_what_is_new() -> None:
    mailbox = Mailbox(Outlet(), lambda _: None, limit=1000)
    assert mailbox.room == 500
    mailbox.put(b"x" * 501)
    assert mailbox.room == 0
    assert mailbox.offer(run(1))


def test_whoever_waits_is_called_once_when_it_is_emptied() -> None:
    calls: list[str] = []
    mailbox = Mailbox(Outlet(), lambda _: None)
    mailbox.put(b"x")
    mailbox.when_emptied(lambda: calls.append("one"))
    mailbox.when_emptied(lambda: calls.append("two"))
    mailbox.take()
    mailbox.take()
    assert calls == ["one", "two"]


def test_what_has_been_revoked_is_taken_back() -> None:
    mailbox = Mailbox(Outlet(), lambda _: None)
    kept = run(3, pattern="b")
    mailbox.offer(run(1, 2))
    mailbox.put(b"reply")
    mailbox.offer(kept)
    mailbox.withdraw("a")
    assert mailbox.size == 5 + kept.size
    assert mailbox.take() == [b"reply", kept]


def test_a_run_is_encoded_once_and_its_size_is_near_the_truth() -> None:
    messages = run(1, 2, 3, size=100)
    assert messages.lines is messages.lines
    assert messages.first_version_lines is messages.first_version_lines
    assert messages.lines.count(b"\n") == 3
    assert len(messages.lines) <= messages.size <= 2 * len(messages.lines)
