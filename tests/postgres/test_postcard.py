"""Postcards: what is written comes to be read, once and in order, and nothing else does."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from catbus.log import EPHEMERAL_SIZE, Entry
from catbus.postgres.postcard import SIZE, Post, enclose, sealed

EPOCH = "123e4567-e89b-12d3-a456-426614174000"
SECRET = "known to the owner of the log"
ALICE = b"alice-----------"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(texts, parts, max_size=4),
    max_leaves=8,
)
long_values = st.builds(lambda text, times: text * times, texts, st.integers(0, 150))
payloads = st.builds(
    lambda value, ascii_only: json.dumps(value, ensure_ascii=ascii_only).encode(), values | long_values, st.booleans()
)
channels = st.from_regex(r"[A-Za-z0-9_-]{1,20}(\.[A-Za-z0-9_-]{1,20}){0,4}", fullmatch=True)


def size_of(entry: Entry) -> int:
    """What counts against `EPHEMERAL_SIZE`."""
    return len(entry.channel) + len(entry.payload) + len(msgspec.json.encode(entry.sender))


entries = st.builds(
    Entry,
    seq=st.just(0),
    at=st.integers(0, 2**43),
    channel=channels,
    payload=payloads,
    sender=st.none() | texts,
    origin=st.none() | st.binary(min_size=16, max_size=16),
).filter(lambda entry: size_of(entry) <= EPHEMERAL_SIZE)


def full(channel: str = "a.b", sender: str | None = None) -> Entry:
    """The biggest message that there may be."""
    bare = Entry(0, 2**63 - 1, channel, b'""', sender, ALICE)
    payload = b'"' + b"x" * (EPHEMERAL_SIZE - size_of(bare)) + b'"'
    entry = Entry(0, bare.at, channel, payload, sender, ALICE)
    assert size_of(entry) == EPHEMERAL_SIZE
    return entry


def write(post: Post, *messages: Entry) -> list[str]:
    cards, number = post.write([enclose(message) for message in messages], EPOCH, SECRET)
    assert number == len(messages)
    return cards


@given(st.lists(entries, max_size=30))
@example([full(), full(sender="\x00" * 1000), full("c" * 255, "é☃𝄞" * 500)])
def test_what_is_written_is_read_in_order_and_once(messages: list[Entry]) -> None:
    """Any messages of a size that is allowed make postcards that fit into notifications, and come out as they were."""
    sender, receiver = Post(), Post()
    cards = write(sender, *messages)
    assert all(len(card.encode()) <= SIZE < 8000 for card in cards)
    assert [entry for card in cards for entry in receiver.read(card, EPOCH, SECRET)] == messages
    assert [entry for card in cards for entry in receiver.read(card, EPOCH, SECRET)] == []
    assert [entry for card in cards for entry in sender.read(card, EPOCH, SECRET)] == []


def test_as_much_goes_into_a_postcard_as_fits() -> None:
    small = Entry(0, 1_763_912_345_678, "a", b"1")
    *whole, rest = write(Post(), *[small] * 1000)
    assert len(whole) == 4
    slack = len(enclose(small)) + len(",") + len(str(2**63))
    assert all(SIZE - slack <= len(card) <= SIZE for card in whole)
    assert len(rest) < SIZE // 2
    assert len(write(Post(), full(), full())) == 2


def test_a_message_that_no_postcard_holds_is_left_out() -> None:
    small, big = Entry(0, 1, "a", b"1"), Entry(0, 1, "a", b'"%b"' % (b"x" * SIZE))
    cards, number = Post().write([enclose(small), enclose(big), enclose(small)], EPOCH, SECRET)
    assert (len(cards), number) == (1, 2)
    assert Post().read(cards[0], EPOCH, SECRET) == [small, small]
    assert Post().write([], EPOCH, SECRET) == ([], 0)


def resealed(secret: str) -> Callable[[str], str]:
    def change(card: str) -> str:
        head, _, messages = card.split(" ", 2)
        return f"{head} {sealed(head, messages, secret)} {messages}"

    return change


FORGERIES: dict[str, Callable[[str], str]] = {
    "nothing": lambda _: "",
    "nonsense": lambda _: "nonsense",
    "no seal": lambda card: card.split(" ")[0],
    "no messages": lambda card: card[: card.index("[")],
    "cut short": lambda card: card[:-1],
    "one more": lambda card: card + " ",
    "another message": lambda card: card.replace('"true"', '"lies"'),
    "another number": lambda card: card.replace(":1 ", ":2 "),
    "another incarnation": lambda card: card.replace(card[37:69], "0" * 32),
    "another seal": lambda card: card.replace(card[72:104], "0" * 32),
    "a seal that is not ASCII": lambda card: card.replace(card[72:104], "é" * 32),
    "another secret": resealed("guessed"),
    "no secret": resealed(""),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_what_no_replica_has_written_is_not_believed(name: str) -> None:
    [card] = write(Post(), Entry(0, 1, "a", b'"true"'))
    forged = FORGERIES[name](card)
    receiver = Post()
    assert forged != card
    with pytest.raises((ValueError, msgspec.DecodeError)):
        receiver.read(forged, EPOCH, SECRET)
    assert receiver.read(card, EPOCH, SECRET), "and the true one still is"


@given(st.text())
def test_anything_else_is_nonsense(text: str) -> None:
    """Whatever a stranger notifies, it is refused by one of the two errors, or is empty."""
    for forged in (text, f"{EPOCH}:{text}", f"{EPOCH}:x:1 {text}"):
        with suppress(ValueError, msgspec.DecodeError):
            assert Post().read(forged, EPOCH, SECRET) == []


def test_a_postcard_of_another_epoch_is_not_read() -> None:
    [card] = write(Post(), Entry(0, 1, "a", b"1"))
    assert Post().read(card, "another", SECRET) == []
    assert Post().read(card.replace(EPOCH, "another"), EPOCH, SECRET) == []
    with pytest.raises(ValueError, match="seal"):
        Post().read(card.replace(EPOCH, "another"), "another", SECRET)


def test_an_older_postcard_is_not_read_after_a_newer_one() -> None:
    sender, other, receiver = Post(), Post(), Post()
    first, second, third = (write(sender, Entry(0, n, "a", b"1"))[0] for n in range(3))
    assert receiver.read(second, EPOCH, SECRET)
    assert not receiver.read(first, EPOCH, SECRET)
    assert receiver.read(write(other, Entry(0, 9, "a", b"1"))[0], EPOCH, SECRET), "each replica counts for itself"
    assert receiver.read(third, EPOCH, SECRET)
    assert not receiver.read(second, EPOCH, SECRET)


def test_replicas_that_are_no_more_are_forgotten_those_first_that_were_silent_longest() -> None:
    receiver = Post()
    message = Entry(0, 1, "a", b"1")
    old, faithful = Post(), Post()
    [from_old], [from_faithful] = write(old, message), write(faithful, message)
    for card in (from_old, from_faithful):
        assert receiver.read(card, EPOCH, SECRET)
    for _ in range(998):
        assert receiver.read(write(Post(), message)[0], EPOCH, SECRET)
    assert receiver.read(write(faithful, message)[0], EPOCH, SECRET)
    assert not receiver.read(from_old, EPOCH, SECRET)
    for _ in range(2):
        assert receiver.read(write(Post(), message)[0], EPOCH, SECRET)
    assert not receiver.read(from_faithful, EPOCH, SECRET)
    assert receiver.read(from_old, EPOCH, SECRET), "a thousand are remembered, and it was the first to go"
