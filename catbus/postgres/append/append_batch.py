"""What one call of `catbus.append` carries, and the answers that are owed for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
from msgspec import Raw

from ...log import Append, Entry, Outcome, Rejected
from ...log.interface import UNKNOWN

_ARGUMENTS = ", ".join(f"${number}" for number in range(1, 13))
APPEND = f"CALL catbus.append_transaction({_ARGUMENTS}, false, NULL, NULL, NULL, NULL, NULL, NULL)"
APPEND_AND_MOVE = f"CALL catbus.append_transaction({_ARGUMENTS}, true, NULL, NULL, NULL, NULL, NULL, NULL)"
MOVE = "CALL catbus.move_outbox_transaction($1, $2, $3, NULL, NULL, NULL)"
_NULL = "\x01"
"""What stands for a sender that is null, among lines."""

_ENCLOSED = 900
"""Bytes of text that travel with a notification, so that nobody has to read these entries."""
_ENCLOSED_ENTRIES = 28
"""More do not fit: the smallest entry takes 21 bytes of text."""

_entries = msgspec.json.Decoder(list[tuple[str, str | None, str | None, Raw]])

Encrypt = Callable[[bytes], str]


class AppendBatch:
    """Messages that were taken out of the queue together: the same is sent for them however often it is sent.

    `numbers` are those of their keys; where a message has no producer, the key's is `own`. `epoch` is the one in which
    they were taken out: what a retry among them knows of its first sending means nothing in another. `after` is a seq
    that was committed before they were first sent. When retention has passed it, a call that comes late cannot know
    what a call before it has brought, and appends nothing.
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
        """So many from the beginning have had their answer."""
        self._args: tuple[object, ...] | None = None

    def call(self, encrypt: Encrypt, *, move: bool = False) -> tuple[str, tuple[object, ...]]:
        """The statement that appends them, and its arguments from the third on.

        Few small messages are also encrypted, to travel with the notification: once, however often they are sent.

        It returns `at`, `first` and `seqs` of `catbus.append`, and then what `MOVE` returns: with `move` it also moves
        messages from the outbox.

        Columns of text go over as lines: asyncpg looks at every element of an array several times, which took half of
        all the time that an entry cost. No channel or payload has a line break in it, and where one does, or something
        else is out of the ordinary, they go as arrays.
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
        return (
            *columns,
            producers[:1] if producers.count(producers[0]) == len(producers) else producers,
            ",".join(map(str, self.numbers)),
            None if origins.count(None) == len(origins) else origins,
            afters[:1] if afters.count(after) == len(afters) else afters,
            _enclose(appends, encrypt),
            len(appends),
        )

    # The answers

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Answer those who have no answer yet; `outcomes` are those of all."""
        appends = self.appends
        for index in range(self.answered, len(appends)):
            self.answered = index + 1
            append = appends[index]
            append.settle(append, outcomes[index])

    def settle_all(self, outcome: Rejected) -> None:
        """Answer those who have no answer yet with the same."""
        self.settle([outcome] * len(self.appends))

    def expire(self, now: float) -> float | None:
        """Answer those whose time has passed; returns when the next one's will have."""
        appends = self.appends
        while self.answered < len(appends):
            append = appends[self.answered]
            if append.deadline > now:
                return append.deadline
            self.answered += 1
            append.settle(append, UNKNOWN)
        return None

    # Its parts

    def halves(self) -> tuple[AppendBatch, AppendBatch]:
        """The same in two batches of at least one."""
        half = len(self.appends) // 2
        return (
            AppendBatch(
                self.appends[:half], self.numbers[:half], self.own, self.epoch, self.after, min(self.answered, half)
            ),
            AppendBatch(
                self.appends[half:], self.numbers[half:], self.own, self.epoch, self.after, max(self.answered - half, 0)
            ),
        )

    def part(self, wanted: Callable[[Append], bool]) -> AppendBatch | None:
        """Those who have no answer yet and are wanted; None where nobody is."""
        kept = [i for i in range(self.answered, len(self.appends)) if wanted(self.appends[i])]
        if not kept:
            return None
        return AppendBatch(
            [self.appends[i] for i in kept], [self.numbers[i] for i in kept], self.own, self.epoch, self.after
        )


# What travels with a notification


def _enclose(appends: Sequence[Append], encrypt: Encrypt) -> str | None:
    """Messages that are few and small, encrypted."""
    if len(appends) > _ENCLOSED_ENTRIES or sum([append.size for append in appends]) > _ENCLOSED:
        return None
    text = msgspec.json.encode(
        [
            (append.channel, append.sender, None if append.origin is None else append.origin.hex(), Raw(append.payload))
            for append in appends
        ]
    )
    return encrypt(text) if len(text) <= _ENCLOSED else None


def decode_enclosed(text: bytes, first: int, at: int) -> list[Entry]:
    """The entries that were enclosed, of which the first has this seq. Raises `msgspec.DecodeError` or `ValueError`."""
    return [
        Entry(seq, at, channel, bytes(payload), sender, None if origin is None else bytes.fromhex(origin))
        for seq, (channel, sender, origin, payload) in enumerate(_entries.decode(text), first)
    ]
