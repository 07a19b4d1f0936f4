"""A batch of publishes: the arguments of one call of `catbus.append`, and the replies to its publishers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from msgspec import Raw, Struct

from ...log import Append, Entry, Outcome, Rejected
from ...log.interface import UNKNOWN

T = TypeVar("T")

MAX_BATCH_MESSAGES = 1000
"""Messages that one transaction appends at most."""
MAX_BATCH_COST = 4 << 20
"""The cost limit of one transaction while a single client publishes."""

_ARGUMENTS = ", ".join(f"${number}" for number in range(1, 15))
APPEND = f"CALL catbus.append_transaction({_ARGUMENTS}, false{', NULL' * 7})"
APPEND_AND_MOVE = f"CALL catbus.append_transaction({_ARGUMENTS}, true{', NULL' * 7})"
MOVE = "CALL catbus.move_outbox_transaction($1, $2, $3, NULL, NULL, NULL)"
_NULL = "\x01"
"""The line that stands for a sender that is null."""

_ENCLOSED_BYTES = 900
"""Bytes of text that a notification may enclose. Replicas need not read enclosed entries from the table."""
_ENCLOSED_ENTRIES = 28
"""No more entries fit: the smallest one takes 21 bytes of text."""


class EnclosedEntry(Struct, array_like=True, frozen=True):
    """An entry in a notification. `retain` is left out if it is false."""

    channel: str
    sender: str | None
    origin: str | None
    payload: Raw
    retain: bool = False


_entries = msgspec.json.Decoder(list[EnclosedEntry])

Encrypt = Callable[[bytes], str]


class AppendBatch:
    """Messages that were taken from the queue together. Every attempt to append them sends the same arguments.

    numbers   the numbers of their keys
    own       the producer of messages without one
    epoch     the epoch in which they were taken from the queue. In another epoch, the `after` of a retry means nothing
    after     a seq that was committed before they were first sent. Once retention has passed it, a late attempt cannot
              find out what an earlier attempt has appended, and appends nothing
    """

    __slots__ = ("_args", "after", "answered", "appends", "epoch", "numbers", "own")

    def __init__(
        self,
        appends: Sequence[Append],
        numbers: Sequence[int],
        own: bytes,
        epoch: str = "",
        after: int = 0,
        answered: int = 0,
    ) -> None:
        self.appends = appends
        self.numbers = numbers
        self.own = own
        self.epoch = epoch
        self.after = after
        self.answered = answered
        """How many messages, from the first one on, have their reply."""
        self._args: tuple[object, ...] | None = None

    def build_call(self, encrypt: Encrypt, *, move: bool = False) -> tuple[str, tuple[object, ...]]:
        """Return the statement that appends the messages, and its arguments from the third on.

        The statement returns `at`, `first`, `seqs` and `present` of `catbus.append`, and then the columns of `MOVE`:
        with `move`, it also moves messages from the outbox.

        Few small messages are also encrypted, for the notification: once, however often they are sent.

        Columns of text are sent as lines: asyncpg examines every element of an array several times, which took half of
        the time of an entry. Channels and payloads contain no line breaks. If one does, or anything else is unusual,
        the columns are sent as arrays.
        """
        if self._args is None:
            self._args = self._encode(encrypt)
        return (APPEND_AND_MOVE if move else APPEND), self._args

    def _encode(self, encrypt: Encrypt) -> tuple[object, ...]:
        appends, own, after = self.appends, self.own, self.after
        channels = [append.channel for append in appends]
        senders = [append.sender for append in appends]
        lines = (
            "\n".join(channels),
            b"\n".join([append.payload for append in appends]).decode(),
            "\n".join([_NULL if sender is None else sender for sender in senders]),
        )
        columns: tuple[object, ...]
        breaks = len(appends) - 1
        if breaks and all(text and text.count("\n") == breaks for text in lines) and _NULL not in senders:
            columns = tuple([text] for text in lines)
        else:
            columns = channels, [append.payload.decode() for append in appends], senders
        producers = [own if append.producer is None else append.producer for append in appends]
        origins = [append.origin for append in appends]
        afters = [after if append.after is None else append.after for append in appends]
        retains = [append.retain or None for append in appends]
        expects = [append.expect for append in appends]
        return (
            *columns,
            producers[:1] if producers.count(producers[0]) == len(producers) else producers,
            ",".join(map(str, self.numbers)),
            _none_if_empty(origins),
            afters[:1] if afters.count(after) == len(afters) else afters,
            _none_if_empty(retains),
            _none_if_empty(expects),
            _encode_enclosed(appends, encrypt),
            len(appends),
        )

    # Replies

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Reply to messages that have no reply yet. `outcomes` has one element for each message of the batch."""
        appends = self.appends
        for index in range(self.answered, len(appends)):
            self.answered = index + 1
            append = appends[index]
            append.settle(append, outcomes[index])

    def settle_all(self, outcome: Rejected) -> None:
        """Send the same reply to all messages that have no reply yet."""
        self.settle([outcome] * len(self.appends))

    def expire(self, now: float) -> float | None:
        """Reply to messages whose deadline has passed. Returns the next deadline."""
        appends = self.appends
        while self.answered < len(appends):
            append = appends[self.answered]
            if append.deadline > now:
                return append.deadline
            self.answered += 1
            append.settle(append, UNKNOWN)
        return None

    # Parts

    def split(self) -> tuple[AppendBatch, AppendBatch]:
        """Split into two batches, each of at least one message."""
        half = len(self.appends) // 2
        return (
            AppendBatch(
                self.appends[:half], self.numbers[:half], self.own, self.epoch, self.after, min(self.answered, half)
            ),
            AppendBatch(
                self.appends[half:], self.numbers[half:], self.own, self.epoch, self.after, max(self.answered - half, 0)
            ),
        )

    def select(self, wanted: Callable[[Append], bool]) -> AppendBatch | None:
        """The wanted messages that have no reply yet, as a batch; None if there are none."""
        kept = [i for i in range(self.answered, len(self.appends)) if wanted(self.appends[i])]
        if not kept:
            return None
        return AppendBatch(
            [self.appends[i] for i in kept], [self.numbers[i] for i in kept], self.own, self.epoch, self.after
        )


def _none_if_empty(column: list[T | None]) -> list[T | None] | None:
    """The column; None if all of its elements are None."""
    return None if column.count(None) == len(column) else column


# Entries in notifications


def _encode_enclosed(appends: Sequence[Append], encrypt: Encrypt) -> str | None:
    """The messages as encrypted text; None if they are too many or too large."""
    if len(appends) > _ENCLOSED_ENTRIES or sum([append.size for append in appends]) > _ENCLOSED_BYTES:
        return None
    text = msgspec.json.encode([_enclose(append) for append in appends])
    return encrypt(text) if len(text) <= _ENCLOSED_BYTES else None


def _enclose(append: Append) -> tuple[object, ...]:
    origin = None if append.origin is None else append.origin.hex()
    fields = append.channel, append.sender, origin, Raw(append.payload)
    return (*fields, True) if append.retain else fields


def decode_enclosed(text: bytes, first: int, at: int) -> list[Entry]:
    """Decode enclosed entries; the first one has the seq `first`. Raises `msgspec.DecodeError` or `ValueError`."""
    return [
        Entry(
            seq,
            at,
            entry.channel,
            bytes(entry.payload),
            entry.sender,
            None if entry.origin is None else bytes.fromhex(entry.origin),
            entry.retain,
        )
        for seq, entry in enumerate(_entries.decode(text), first)
    ]
