"""Ephemeral messages between replicas: put together into notifications, encrypted, and read where they are believed.

A postcard is `2::TOKEN`, where the token is what `Sealer.encrypt` makes of

    0x00 or 0x01, when the next postcard goes on where this one ends
    the database's time in milliseconds, 8 bytes
    [messages], or a part of them

Replicas of earlier releases take the `2` for an epoch that is not theirs, and read no further.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
from msgspec import Raw

from ...log import EPHEMERAL_SIZE, Entry
from ..notifications.encryption import (
    EPHEMERAL_CHANNEL,
    OVERHEAD,
    ForgedNotificationError,
    NotificationEncrypter,
    NotificationKeys,
    read_token_header,
)

SIZE = 7999
"""How many bytes a notification may have."""
_PREFIX = "2::"
_FRAME = 9
"""Bytes before the messages."""
ROOM = (SIZE - len(_PREFIX)) // 4 * 3 - OVERHEAD - _FRAME
"""Bytes of messages, with brackets and commas, in one postcard."""
_LARGEST = EPHEMERAL_SIZE + 62
"""Bytes of the largest message, as it is enclosed. It takes two postcards."""
FRESH = 5.0
"""Seconds after which a postcard is not read any more: somebody has recorded it and sends it again."""
_INCARNATIONS = 1000
"""Replicas whose last number is remembered; of more, those not heard of for the longest are forgotten."""

_messages = msgspec.json.Decoder(list[tuple[int, str, str | None, str | None, Raw]])


class _Read(NamedTuple):
    """What was read of one replica: the newest number, and the part of messages that goes on in the next postcard."""

    number: int
    part: bytes


def encode_message(entry: Entry) -> bytes:
    """A message as it stands in a postcard: at most 62 bytes more than channel, payload and the sender as JSON."""
    return b'[%d,"%b",%b,%b,%b]' % (
        entry.at,
        entry.channel.encode(),
        msgspec.json.encode(entry.sender),
        b"null" if entry.origin is None else b'"%b"' % entry.origin.hex().encode(),
        entry.payload,
    )


class EphemeralEncoder:
    """What one replica writes to the others, and what it has read of theirs.

    `now` is the database's time in seconds.
    """

    def __init__(self) -> None:
        self._sealer = NotificationEncrypter(EPHEMERAL_CHANNEL)
        self._began = 0.0
        self._read: dict[bytes, _Read] = {}
        """By incarnation; the one that was heard of last at the end."""

    def begin(self, now: float) -> None:
        """A connection begins to listen: what was written before is not for it, and may have been read elsewhere."""
        self._began = now

    def write(self, enclosed: Sequence[bytes], epoch: str, seal: NotificationKeys, now: float) -> tuple[list[str], int]:
        """As few postcards as hold these messages in their order, and how many of them: one too big is left out."""
        fitting = [message for message in enclosed if len(message) <= _LARGEST]
        stamp = int(now * 1000).to_bytes(8)
        cards = []
        for pile in _piles(fitting, ROOM - len(b"[]")):
            messages = b"[" + b",".join(pile) + b"]"
            for start in range(0, len(messages), ROOM):
                goes_on = start + ROOM < len(messages)
                text = bytes([goes_on]) + stamp + messages[start : start + ROOM]
                cards.append(_PREFIX + self._sealer.encrypt(seal, text, epoch))
        return cards, len(fitting)

    def read(self, card: str, epoch: str, seal: NotificationKeys, now: float) -> list[Entry]:
        """The messages of another replica's postcard; none in our own, and in one that goes on.

        Raises `ForgedError` for what no replica has just written: it is forged, or of another epoch, or it was
        recorded and is sent again. Raises `ValueError` or `msgspec.DecodeError` for what was written by mistake.
        """
        if not card.startswith(_PREFIX):
            raise ForgedNotificationError("no postcard")
        token = card[len(_PREFIX) :]
        incarnation, number = read_token_header(token)
        if incarnation == self._sealer.incarnation:
            return []
        before = self._read.get(incarnation, _Read(0, b""))
        if number <= before.number:
            raise ForgedNotificationError("a postcard that was read before")
        text = seal.decrypt(EPHEMERAL_CHANNEL, token, epoch)
        if not max(self._began, now - FRESH) <= int.from_bytes(text[1:_FRAME]) / 1000 <= now + FRESH:
            raise ForgedNotificationError("a postcard that is not fresh")
        messages = (before.part if number == before.number + 1 else b"") + text[_FRAME:]
        goes_on = bool(text[0])
        self._read.pop(incarnation, None)
        self._read[incarnation] = _Read(number, messages if goes_on else b"")
        if len(self._read) > _INCARNATIONS:
            del self._read[next(iter(self._read))]
        if goes_on or not messages.startswith(b"["):
            return []
        return [
            Entry(0, at, channel, bytes(payload), sender, None if origin is None else bytes.fromhex(origin))
            for at, channel, sender, origin, payload in _messages.decode(messages)
        ]


def _piles(enclosed: Sequence[bytes], room: int) -> Iterator[list[bytes]]:
    """What follows on one another and fits into `room` with commas in between, as much as goes into each."""
    pile: list[bytes] = []
    left = room
    for message in enclosed:
        if pile and len(message) > left:
            yield pile
            pile, left = [], room
        pile.append(message)
        left -= len(message) + 1
    if pile:
        yield pile
