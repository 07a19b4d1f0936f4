"""What the log is and what has been said of it, by which everything else is judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from catbus.protocol.channels import matches


class Row(NamedTuple):
    seq: int
    channel: str
    text: str


class Gap(NamedTuple):
    first: int
    last: int
    reason: str


@dataclass
class LogModel:
    """The log as it was committed, and the promises. Every message has a text of its own."""

    log: list[Row] = field(default_factory=list)
    """From seq 1 on, with what retention has taken away since."""
    acknowledged: dict[str, int] = field(default_factory=dict)
    """Texts of which a client was told that they are in the log, and under which seq."""
    refused: set[str] = field(default_factory=set)
    """Texts of which a client was told that they are not, and never will be."""
    published_by_sql: set[str] = field(default_factory=set)
    """Texts that a transaction has published which has committed."""
    committed_rows: set[Row] = field(default_factory=set)
    lost_texts: set[str] = field(default_factory=set)
    """Texts that the database has lost when it was set back."""
    follows: bool = True
    """Whether commits are told of as they happen. Otherwise that is when somebody looks, and before any is lost."""
    applied: set[Row] = field(default_factory=set)
    """What replicas have handed on."""
    broken: list[str] = field(default_factory=list)
    """What was not as promised. Services would only be started again over an exception."""

    def expect(self, holds: object, promise: str) -> None:
        if not holds:
            self.broken.append(promise)

    # What happens

    def commit(self, rows: Sequence[Row]) -> None:
        for row in rows:
            # There is one order: each entry has the seq after that of the one committed before it.
            self.expect(row.seq == len(self.log) + 1, f"{row} is committed behind {self.log[-1:]}")
            # A message is in the log once, however often and wherever it was sent.
            self.expect(all(row.text != other.text for other in self.log), f"{row} is there twice")
            # Of what was refused for good nothing is ever seen.
            self.expect(row.text not in self.refused, f"{row} had been refused")
            self.log.append(row)
        self.committed_rows.update(rows)

    def set_back(self, head: int, waiting: Sequence[str] = ()) -> None:
        """The database has lost what was behind `head`; of what was published from SQL, this waits still or again."""
        self.lost_texts.update(row.text for row in self.log[head:])
        del self.log[head:]
        self.lost_texts |= self.published_by_sql - {row.text for row in self.log} - set(waiting)

    def acknowledge(self, text: str, seq: int) -> None:
        """A client is told that its message is in the log."""
        # Acknowledged means committed, under that seq.
        there = any(row.seq == seq and row.text == text for row in self.log) or text in self.lost_texts
        self.expect(there or not self.follows, f"{text!r} is acknowledged as {seq} and is not in the log")
        self.acknowledged[text] = seq

    def refuse(self, text: str) -> None:
        """A client is told that its message is not in the log and never will be."""
        # Whoever is refused for good may send the same again as something new, so it must not be there already.
        self.expect(all(row.text != text for row in self.log), f"{text!r} is refused and is in the log")
        self.refused.add(text)

    def apply(self, applied: int, rows: Sequence[Row]) -> None:
        """A replica hands entries on, after `applied`."""
        # A replica hands on what was committed, each entry behind the one before it.
        self.expect(
            [row.seq for row in rows] == list(range(applied + 1, applied + 1 + len(rows))), f"{rows} after {applied}"
        )
        self.expect(self.committed_rows.issuperset(rows) or not self.follows, f"{rows} was never committed")
        self.applied.update(rows)

    # What has to hold when everything has calmed down

    def check(self) -> None:
        self.expect(self.applied <= self.committed_rows, f"{self.applied - self.committed_rows} was never committed")
        texts = {row.text: row.seq for row in self.log}
        for text, seq in self.acknowledged.items():
            # What was acknowledged stays in the log, unless the database has lost it.
            self.expect(texts.get(text) == seq or text in self.lost_texts, f"{text!r} was acknowledged as {seq}")
        # What a transaction has published comes into the log.
        self.expect(
            self.published_by_sql <= texts.keys() | self.lost_texts,
            f"{self.published_by_sql - texts.keys()} never came",
        )

    def check_subscription(
        self, pattern: str, start: int, received: Mapping[int, str], gaps: Sequence[Gap], retention_end: int
    ) -> None:
        """`known` is what a client has that has subscribed after `start`, `gaps` what it was told may be missing.

        `gone` is the newest seq that retention has ever taken away.
        """
        for seq, text in received.items():
            # What a client believes to stand in the log stands there.
            there = seq <= len(self.log) and self.log[seq - 1].text == text
            self.expect(there, f"{text!r} is believed to be {seq}: {self.log[seq - 1 : seq]}")
        for row in self.log[start:]:
            # A subscription gets all that it matches, or is told that it may be missing.
            told = any(gap.first <= row.seq <= gap.last for gap in gaps)
            self.expect(told or row.seq in received or not matches(pattern, row.channel), f"{row} is missing in {gaps}")
        for gap in gaps:
            # It is told that retention has taken something only where that is so.
            self.expect(
                gap.reason != "retention" or gap.last <= retention_end,
                f"{gap} while all after {retention_end} is there",
            )
