"""What one call of `catbus.append` carries, and the answers that are owed for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..log import Append, Outcome, Rejected
from ..log.base import UNKNOWN

_APPEND = """
SELECT at, first, seqs FROM catbus.append($1, $2, {texts},
    CASE cardinality($6::bytea[]) WHEN 1 THEN array_fill(($6::bytea[])[1], ARRAY[$10::integer]) ELSE $6::bytea[] END,
    string_to_array($7, ',')::bigint[], {senders},
    coalesce($8::bytea[], array_fill(NULL::bytea, ARRAY[$10::integer])),
    CASE cardinality($9::bigint[]) WHEN 1 THEN array_fill(($9::bigint[])[1], ARRAY[$10::integer]) ELSE $9::bigint[] END)
WHERE pg_postmaster_start_time() = $11
"""
_APPEND_LINES = _APPEND.format(
    texts=r"string_to_array($3, E'\n'), string_to_array($4, E'\n')", senders=r"string_to_array($5, E'\n', E'\x01')"
)
_APPEND_ARRAYS = _APPEND.format(texts="$3::text[], $4::text[]", senders="$5::text[]")
_NULL = "\x01"

MOVE = "SELECT moved, last, more FROM catbus.move_outbox($1, $2, NULL) WHERE pg_postmaster_start_time() = $3"
# The time that the append returns is what makes the database call it first.
_BEHIND = "SELECT a.at, a.first, a.seqs, m.moved, m.last, m.more FROM ({}) AS a, catbus.move_outbox($1, $2, a.at) AS m"
_APPEND_AND_MOVE = {statement: _BEHIND.format(statement) for statement in (_APPEND_LINES, _APPEND_ARRAYS)}


class Batch:
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
        self._args: tuple[str, tuple[object, ...]] | None = None

    def call(self, *, move: bool = False) -> tuple[str, tuple[object, ...]]:
        """The statement that appends them, and its arguments from the third on.

        With `move` it then moves messages from the outbox too, and returns three columns more: those of `MOVE`.

        Columns of text go over as lines: asyncpg looks at every element of an array several times, which took half of
        all the time that an entry cost. No channel or payload has a line break in it, and where one does, or something
        else is out of the ordinary, they go as arrays.
        """
        if self._args is None:
            self._args = self._encode()
        statement, args = self._args
        return (_APPEND_AND_MOVE[statement] if move else statement), args

    def _encode(self) -> tuple[str, tuple[object, ...]]:
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
        if all(text and text.count("\n") == breaks for text in lines) and _NULL not in senders:
            statement, columns = _APPEND_LINES, lines
        else:
            statement, columns = _APPEND_ARRAYS, (channels, [append.payload.decode() for append in appends], senders)
        producers = [own if append.producer is None else append.producer for append in appends]
        origins = [append.origin for append in appends]
        afters = [after if append.after is None else append.after for append in appends]
        return statement, (
            *columns,
            producers[:1] if producers.count(producers[0]) == len(producers) else producers,
            ",".join(map(str, self.numbers)),
            None if origins.count(None) == len(origins) else origins,
            afters[:1] if afters.count(after) == len(afters) else afters,
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

    def halves(self) -> tuple[Batch, Batch]:
        """The same in two batches of at least one."""
        half = len(self.appends) // 2
        return (
            Batch(self.appends[:half], self.numbers[:half], self.own, self.epoch, self.after, min(self.answered, half)),
            Batch(
                self.appends[half:], self.numbers[half:], self.own, self.epoch, self.after, max(self.answered - half, 0)
            ),
        )

    def part(self, wanted: Callable[[Append], bool]) -> Batch | None:
        """Those who have no answer yet and are wanted; None where nobody is."""
        kept = [i for i in range(self.answered, len(self.appends)) if wanted(self.appends[i])]
        if not kept:
            return None
        return Batch([self.appends[i] for i in kept], [self.numbers[i] for i in kept], self.own, self.epoch, self.after)
