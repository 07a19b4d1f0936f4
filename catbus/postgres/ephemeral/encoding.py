"""The encoding of ephemeral messages in notifications: packed, encrypted, and protected against replay.

A notification is `2::TOKEN`. The token is the result of `NotificationEncrypter.encrypt` for

    0x00, or 0x01 if the next notification continues this one
    the database's time in milliseconds, 8 bytes
    [messages], or a part of them

The `2` stands where notifications of the log have their epoch, and equals none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
from msgspec import Raw

from ...log import EPHEMERAL_SIZE, Entry
from ..notifications.encryption import (
    ENCRYPTION_OVERHEAD,
    EPHEMERAL_CHANNEL,
    ForgedNotificationError,
    NotificationEncrypter,
    NotificationKeys,
    read_token_header,
)

NOTIFICATION_SIZE = 7999
"""Bytes that a notification may have."""
_PREFIX = "2::"
_HEADER_SIZE = 9
"""Bytes in front of the messages."""
MESSAGES_SIZE = (NOTIFICATION_SIZE - len(_PREFIX)) // 4 * 3 - ENCRYPTION_OVERHEAD - _HEADER_SIZE
"""Bytes of messages, with brackets and commas, that fit into one notification."""
_MAX_MESSAGE = EPHEMERAL_SIZE + 62
"""Bytes of the largest encoded message. It takes two notifications."""
MAX_AGE = 5.0
"""Seconds after which a notification is rejected, as somebody may have recorded it and sent it again."""
_MAX_REPLICAS = 1000
"""Replicas whose last number is kept. If there are more, the one heard of least recently is dropped."""

_messages = msgspec.json.Decoder(list[tuple[int, str, str | None, str | None, Raw]])


class _ReadState(NamedTuple):
    """The newest number of one replica, and the part of messages that its next notification continues."""

    number: int
    part: bytes


def encode_message(entry: Entry) -> bytes:
    """Encode one message. Takes at most 62 bytes more than channel, payload and the sender as JSON."""
    return b'[%d,"%b",%b,%b,%b]' % (
        entry.at,
        entry.channel.encode(),
        msgspec.json.encode(entry.sender),
        b"null" if entry.origin is None else b'"%b"' % entry.origin.hex().encode(),
        entry.payload,
    )


class EphemeralEncoder:
    """Encodes the messages of one replica, and decodes those of others.

    `now` is the database's time in seconds.
    """

    def __init__(self) -> None:
        self._encrypter = NotificationEncrypter(EPHEMERAL_CHANNEL)
        self._began = 0.0
        self._replicas: dict[bytes, _ReadState] = {}
        """By incarnation; the one heard of most recently is the last."""

    def begin(self, now: float) -> None:
        """A connection begins to listen. Earlier messages are not for it: another connection may have received them."""
        self._began = now

    def encode(
        self, enclosed: Sequence[bytes], epoch: str, keys: NotificationKeys, now: float
    ) -> tuple[list[str], int]:
        """Pack messages, in order, into as few notifications as possible. Returns those and the number of messages.

        Messages that are too large are left out.
        """
        fitting = [message for message in enclosed if len(message) <= _MAX_MESSAGE]
        stamp = int(now * 1000).to_bytes(8)
        notifications = []
        for group in _groups(fitting, MESSAGES_SIZE - len(b"[]")):
            messages = b"[" + b",".join(group) + b"]"
            for start in range(0, len(messages), MESSAGES_SIZE):
                goes_on = start + MESSAGES_SIZE < len(messages)
                text = bytes([goes_on]) + stamp + messages[start : start + MESSAGES_SIZE]
                notifications.append(_PREFIX + self._encrypter.encrypt(keys, text, epoch))
        return notifications, len(fitting)

    def decode(self, notification: str, epoch: str, keys: NotificationKeys, now: float) -> list[Entry]:
        """The messages in another replica's notification; none in our own, and in one that the next one continues.

        Raises `ForgedNotificationError` for a notification that no replica has just sent: it is forged, of another
        epoch, or recorded and sent again. Raises `ValueError` or `msgspec.DecodeError` for a malformed one.
        """
        if not notification.startswith(_PREFIX):
            raise ForgedNotificationError("not a notification of ephemeral messages")
        token = notification[len(_PREFIX) :]
        incarnation, number = read_token_header(token)
        if incarnation == self._encrypter.incarnation:
            return []
        before = self._replicas.get(incarnation, _ReadState(0, b""))
        if number <= before.number:
            raise ForgedNotificationError("a notification that was received before")
        text = keys.decrypt(EPHEMERAL_CHANNEL, token, epoch)
        if not max(self._began, now - MAX_AGE) <= int.from_bytes(text[1:_HEADER_SIZE]) / 1000 <= now + MAX_AGE:
            raise ForgedNotificationError("a notification that is not fresh")
        messages = (before.part if number == before.number + 1 else b"") + text[_HEADER_SIZE:]
        goes_on = bool(text[0])
        self._replicas.pop(incarnation, None)
        self._replicas[incarnation] = _ReadState(number, messages if goes_on else b"")
        if len(self._replicas) > _MAX_REPLICAS:
            del self._replicas[next(iter(self._replicas))]
        if goes_on or not messages.startswith(b"["):
            return []
        return [
            Entry(0, at, channel, bytes(payload), sender, None if origin is None else bytes.fromhex(origin))
            for at, channel, sender, origin, payload in _messages.decode(messages)
        ]


def _groups(enclosed: Sequence[bytes], room: int) -> Iterator[list[bytes]]:
    """Split messages, in order, into groups that fit into `room` bytes with commas in between."""
    group: list[bytes] = []
    space = room
    for message in enclosed:
        if group and len(message) > space:
            yield group
            group, space = [], room
        group.append(message)
        space -= len(message) + 1
    if group:
        yield group
