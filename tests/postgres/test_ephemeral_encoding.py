"""The encoding of ephemeral messages: they are decoded once and in order, and forgeries are rejected."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from catbus.log import EPHEMERAL_SIZE, Entry
from catbus.postgres.ephemeral.encoding import MAX_AGE, NOTIFICATION_SIZE, EphemeralEncoder, encode_message
from catbus.postgres.notifications.encryption import (
    EPHEMERAL_CHANNEL,
    LOG_CHANNEL,
    ForgedNotificationError,
    NotificationEncrypter,
    NotificationKeys,
)

EPOCH = "123e4567-e89b-12d3-a456-426614174000"
SEAL = NotificationKeys("known to the owner of the log")
NOW = 1_763_912_345.678
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
    """The size that `EPHEMERAL_SIZE` limits."""
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
    """The largest message that is allowed."""
    bare = Entry(0, 2**63 - 1, channel, b'""', sender, ALICE)
    payload = b'"' + b"x" * (EPHEMERAL_SIZE - size_of(bare)) + b'"'
    entry = Entry(0, bare.at, channel, payload, sender, ALICE)
    assert size_of(entry) == EPHEMERAL_SIZE
    return entry


def refused(post: EphemeralEncoder, card: str) -> None:
    with pytest.raises(ForgedNotificationError, match="before"):
        post.decode(card, EPOCH, SEAL, NOW)


def write(post: EphemeralEncoder, *messages: Entry) -> list[str]:
    cards, number = post.encode([encode_message(message) for message in messages], EPOCH, SEAL, NOW)
    assert number == len(messages)
    return cards


@given(st.lists(entries, max_size=30))
@example([full(), full(sender="\x00" * 1000), full("c" * 255, "é☃𝄞" * 500)])
def test_encoded_messages_are_decoded_in_order_and_once(messages: list[Entry]) -> None:
    """Messages of any allowed size fit into notifications, and are decoded unchanged."""
    sender, receiver = EphemeralEncoder(), EphemeralEncoder()
    cards = write(sender, *messages)
    assert all(len(card.encode()) <= NOTIFICATION_SIZE < 8000 for card in cards)
    assert [entry for card in cards for entry in receiver.decode(card, EPOCH, SEAL, NOW)] == messages
    for card in cards:
        refused(receiver, card)
    assert [entry for card in cards for entry in sender.decode(card, EPOCH, SEAL, NOW)] == []


def test_notification_contains_as_many_messages_as_fit() -> None:
    small = Entry(0, 1_763_912_345_678, "a", b"1")
    *whole, rest = write(EphemeralEncoder(), *[small] * 1000)
    assert len(whole) == 5
    slack = (len(encode_message(small)) + len(",")) * 4 / 3 + 4
    assert all(NOTIFICATION_SIZE - slack <= len(card) <= NOTIFICATION_SIZE for card in whole)
    assert len(rest) < NOTIFICATION_SIZE
    assert len(write(EphemeralEncoder(), full(), full())) == 4


def test_message_that_fits_into_no_notification_is_left_out() -> None:
    small, big = Entry(0, 1, "a", b"1"), Entry(0, 1, "a", b'"%b"' % (b"x" * NOTIFICATION_SIZE))
    cards, number = EphemeralEncoder().encode(
        [encode_message(small), encode_message(big), encode_message(small)], EPOCH, SEAL, NOW
    )
    assert (len(cards), number) == (1, 2)
    assert EphemeralEncoder().decode(cards[0], EPOCH, SEAL, NOW) == [small, small]
    assert EphemeralEncoder().encode([], EPOCH, SEAL, NOW) == ([], 0)


def test_message_in_two_notifications_is_decoded_when_both_have_arrived() -> None:
    """If either notification is missing, only that message is lost."""
    small = Entry(0, 1, "a", b"1")
    for lost in (0, 1, None):
        receiver = EphemeralEncoder()
        cards = write(EphemeralEncoder(), full(), small)
        assert len(cards) == 3
        read = [receiver.decode(card, EPOCH, SEAL, NOW) for index, card in enumerate(cards) if index != lost]
        assert [entry for entries in read for entry in entries] == ([full(), small] if lost is None else [small])


def test_notifications_show_nothing_and_no_two_are_encrypted_alike() -> None:
    message = Entry(0, 1, "channel", b'"payload"', "sender", ALICE)
    post = EphemeralEncoder()
    cards = write(post, message) + write(post, message)
    for card in cards:
        shown = card.encode() + b64decode(card.removeprefix("2::"))
        assert not any(text in shown for text in (b"channel", b"payload", b"sender", ALICE, EPOCH.encode()))
    assert b64decode(cards[0][3:])[24:] != b64decode(cards[1][3:])[24:]


def with_token(change: Callable[[bytes], bytes]) -> Callable[[str], str]:
    return lambda card: "2::" + b64encode(change(b64decode(card[3:]))).decode()


def made_with(seal: NotificationKeys, channel: str) -> Callable[[str], str]:
    return lambda _: "2::" + NotificationEncrypter(channel).encrypt(seal, bytes(9) + b"[]", EPOCH)


FORGERIES: dict[str, Callable[[str], str]] = {
    "nothing": lambda _: "",
    "nonsense": lambda _: "nonsense",
    "no token": lambda _: "2::",
    "cut short": lambda card: card[:-4],
    "one more": lambda card: card + " ",
    "not ASCII": lambda card: card[:20] + "é" + card[21:],
    "another text": with_token(lambda raw: raw[:30] + bytes([raw[30] ^ 1]) + raw[31:]),
    "another tag": with_token(lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
    "another number": with_token(lambda raw: raw[:23] + b"\x02" + raw[24:]),
    "another incarnation": with_token(lambda raw: bytes(16) + raw[16:]),
    "another secret": made_with(NotificationKeys("guessed"), EPHEMERAL_CHANNEL),
    "no secret": made_with(NotificationKeys(""), EPHEMERAL_CHANNEL),
    "another purpose": made_with(SEAL, LOG_CHANNEL),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_notification_that_no_replica_sent_is_rejected(name: str) -> None:
    [card] = write(EphemeralEncoder(), Entry(0, 1, "a", b'"true"'))
    forged = FORGERIES[name](card)
    receiver = EphemeralEncoder()
    assert forged != card
    with pytest.raises(ForgedNotificationError):
        receiver.decode(forged, EPOCH, SEAL, NOW)
    assert receiver.decode(card, EPOCH, SEAL, NOW), "and the true one still is"


@given(st.text() | st.binary(max_size=60).map(lambda raw: "2::" + b64encode(raw).decode()))
def test_text_that_is_no_notification_is_forged(text: str) -> None:
    for forged in (text, f"2::{text}", f"{EPOCH}:x:1 {text}"):
        with pytest.raises(ForgedNotificationError):
            EphemeralEncoder().decode(forged, EPOCH, SEAL, NOW)


@given(st.data())
def test_changed_notification_is_forged(data: st.DataObject) -> None:
    [card] = write(EphemeralEncoder(), Entry(0, 1, "a", b'"true"'))
    raw = bytearray(b64decode(card[3:]))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = "2::" + b64encode(raw[: data.draw(st.integers(1, len(raw)))]).decode()
    with pytest.raises(ForgedNotificationError):
        EphemeralEncoder().decode(changed, EPOCH, SEAL, NOW)


def test_notification_of_another_epoch_is_rejected() -> None:
    [card] = write(EphemeralEncoder(), Entry(0, 1, "a", b"1"))
    with pytest.raises(ForgedNotificationError):
        EphemeralEncoder().decode(card, "another", SEAL, NOW)


def test_recorded_notification_is_rejected_later() -> None:
    """A replica that started later rejects it, and so does every replica after a time."""
    [card] = write(EphemeralEncoder(), Entry(0, 1, "a", b"1"))
    for late in (MAX_AGE + 0.1, 86400.0, -MAX_AGE - 0.1):
        with pytest.raises(ForgedNotificationError, match="fresh"):
            EphemeralEncoder().decode(card, EPOCH, SEAL, NOW + late)
    newcomer = EphemeralEncoder()
    newcomer.begin(NOW + 0.1)
    with pytest.raises(ForgedNotificationError, match="fresh"):
        newcomer.decode(card, EPOCH, SEAL, NOW + 0.2)
    assert EphemeralEncoder().decode(card, EPOCH, SEAL, NOW + MAX_AGE - 0.1)


def test_older_notification_is_rejected_after_a_newer_one() -> None:
    sender, other, receiver = EphemeralEncoder(), EphemeralEncoder(), EphemeralEncoder()
    first, second, third = (write(sender, Entry(0, n, "a", b"1"))[0] for n in range(3))
    assert receiver.decode(second, EPOCH, SEAL, NOW)
    refused(receiver, first)
    assert receiver.decode(write(other, Entry(0, 9, "a", b"1"))[0], EPOCH, SEAL, NOW), "each replica counts for itself"
    assert receiver.decode(third, EPOCH, SEAL, NOW)
    refused(receiver, second)


def test_least_recently_heard_replica_is_forgotten_first() -> None:
    receiver = EphemeralEncoder()
    message = Entry(0, 1, "a", b"1")
    old, faithful = EphemeralEncoder(), EphemeralEncoder()
    [from_old], [from_faithful] = write(old, message), write(faithful, message)
    for card in (from_old, from_faithful):
        assert receiver.decode(card, EPOCH, SEAL, NOW)
    for _ in range(998):
        assert receiver.decode(write(EphemeralEncoder(), message)[0], EPOCH, SEAL, NOW)
    assert receiver.decode(write(faithful, message)[0], EPOCH, SEAL, NOW)
    refused(receiver, from_old)
    for _ in range(2):
        assert receiver.decode(write(EphemeralEncoder(), message)[0], EPOCH, SEAL, NOW)
    refused(receiver, from_faithful)
    assert receiver.decode(from_old, EPOCH, SEAL, NOW), "a thousand are remembered, and it was the first to go"
