"""Ephemeral messages between replicas: put together into notifications, sealed, and read where they are believed.

A postcard is `epoch:incarnation:number seal [messages]`. The incarnation is that of the replica that wrote it, which
numbers its postcards. The seal is a MAC by the secret in the log's head row.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterator, Sequence
from itertools import count

import msgspec
from msgspec import Raw

from ..log import Entry

SIZE = 7999
"""How many bytes a notification may have."""
_FRAME = len(f":{'i' * 32}:{2**63} {'s' * 32} []")
"""What a postcard has beside its epoch and the messages, at the most."""
_INCARNATIONS = 1000
"""Replicas whose last number is remembered; of more, those not heard of for the longest are forgotten."""

_messages = msgspec.json.Decoder(list[tuple[int, str, str | None, str | None, Raw]])


def enclose(entry: Entry) -> bytes:
    """A message as it stands in a postcard: at most 62 bytes more than channel, payload and the sender as JSON."""
    return b'[%d,"%b",%b,%b,%b]' % (
        entry.at,
        entry.channel.encode(),
        msgspec.json.encode(entry.sender),
        b"null" if entry.origin is None else b'"%b"' % entry.origin.hex().encode(),
        entry.payload,
    )


class Post:
    """What one replica writes to the others, and what it has read of theirs."""

    def __init__(self) -> None:
        self.incarnation = secrets.token_hex(16)
        self._numbers = count(1)
        self._read: dict[str, int] = {}
        """The newest number of each incarnation, the one that was heard of last at the end."""

    def write(self, enclosed: Sequence[bytes], epoch: str, secret: str) -> tuple[list[str], int]:
        """As few postcards as hold these messages in their order, and how many of them: one too big is left out."""
        room = SIZE - _FRAME - len(epoch.encode())
        fitting = [message for message in enclosed if len(message) <= room]
        cards = []
        for pile in _piles(fitting, room):
            head = f"{epoch}:{self.incarnation}:{next(self._numbers)}"
            messages = "[" + b",".join(pile).decode() + "]"
            cards.append(f"{head} {sealed(head, messages, secret)} {messages}")
        return cards, len(fitting)

    def read(self, card: str, epoch: str, secret: str) -> list[Entry]:
        """The messages of another replica's postcard; none when it was read before, or is of another epoch.

        Raises `ValueError` or `msgspec.DecodeError` for what no replica has written.
        """
        head, _, rest = card.partition(" ")
        seal, _, messages = rest.partition(" ")
        written, incarnation, number = head.split(":")
        if written != epoch or incarnation == self.incarnation:
            return []
        if not hmac.compare_digest(seal.encode(), sealed(head, messages, secret).encode()):
            raise ValueError("the seal is not the log's")
        if int(number) <= self._read.get(incarnation, 0):
            return []
        entries = [
            Entry(0, at, channel, bytes(payload), sender, None if origin is None else bytes.fromhex(origin))
            for at, channel, sender, origin, payload in _messages.decode(messages)
        ]
        self._read.pop(incarnation, None)
        self._read[incarnation] = int(number)
        if len(self._read) > _INCARNATIONS:
            del self._read[next(iter(self._read))]
        return entries


def sealed(head: str, messages: str, secret: str) -> str:
    """The seal of a postcard."""
    return hmac.digest(secret.encode(), f"{head} {messages}".encode(), "sha256").hex()[:32]


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
