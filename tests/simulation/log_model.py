"""The model: what was committed, what clients were told, and the promises between them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from catbus.protocol.channels import ERASED, matches


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
    """The log as committed, and the promises. Every message has a unique text."""

    log: list[Row] = field(default_factory=list)
    """From seq 1 on, including what retention has deleted since."""
    acknowledged: dict[str, int] = field(default_factory=dict)
    """Texts that were acknowledged, and their seqs."""
    refused: set[str] = field(default_factory=set)
    """Texts that were rejected for good."""
    conditions: dict[str, int | None] = field(default_factory=dict)
    """Texts published with `retain`, and the seq that each expects."""
    published_by_sql: set[str] = field(default_factory=set)
    """Texts published by committed transactions."""
    committed_rows: set[Row] = field(default_factory=set)
    lost_texts: set[str] = field(default_factory=set)
    """Texts that the database lost when it was set back."""
    erased: set[str] = field(default_factory=set)
    """Texts that were ever erased. Nobody has to receive them."""
    erased_seqs: set[int] = field(default_factory=set)
    """Their seqs."""
    erasures: dict[str, int] = field(default_factory=dict)
    """Texts that are erased, and the number of the erasure."""
    unretained: dict[str, int] = field(default_factory=dict)
    """Texts of retained messages that were erased, in the log or below its floor, and the number of the erasure."""
    follows: bool = True
    """Whether commits are reported at once. Otherwise the model looks for them, also before any is lost."""
    applied: set[Row] = field(default_factory=set)
    """What replicas have applied."""
    broken: list[str] = field(default_factory=list)
    """Violated promises. An exception would only restart the service that raised it."""

    def expect(self, holds: object, promise: str) -> None:
        if not holds:
            self.broken.append(promise)

    # What happens

    def commit(self, rows: Sequence[Row]) -> None:
        for row in rows:
            # There is one order: each message has the seq after the one committed before it.
            self.expect(row.seq == len(self.log) + 1, f"{row} is committed behind {self.log[-1:]}")
            # A message is in the log once, however often and wherever it was sent.
            self.expect(all(row.text != other.text for other in self.log), f"{row} is there twice")
            # A message that was rejected for good is never committed.
            self.expect(row.text not in self.refused, f"{row} had been refused")
            # A conditional publish replaces the retained message that it expects, and no other.
            held = self.retained_seq(row.channel)
            self.expect(self.conditions.get(row.text) in (None, held), f"{row} replaces the one at {held}")
            self.log.append(row)
        self.committed_rows.update(rows)

    def retained_seq(self, channel: str) -> int:
        """The seq of the retained message of a channel; 0 for none."""
        for row in reversed(self.log):
            if row.channel == channel and row.text in self.conditions:
                return 0 if row.text in self.unretained else row.seq
        return 0

    def set_back(self, head: int, waiting: Sequence[str] = (), erasure: int | None = None) -> None:
        """The database has lost everything after `head`. `waiting`: texts that are in the outbox, still or again.

        `erasure`: the number of the newest erasure that it has not lost; None if it has lost none.
        """
        self.erasures = {t: n for t, n in self.erasures.items() if erasure is None or n <= erasure}
        self.unretained = {t: n for t, n in self.unretained.items() if erasure is None or n <= erasure}
        self.lost_texts.update(row.text for row in self.log[head:])
        del self.log[head:]
        self.lost_texts |= self.published_by_sql - {row.text for row in self.log} - set(waiting)

    def erase(self, seqs: Collection[int], number: int) -> None:
        """The contents of messages were erased, by the erasure with this number."""
        texts = [self.log[seq - 1].text for seq in seqs]
        self.erased.update(texts)
        self.erased_seqs.update(seqs)
        self.erasures.update(dict.fromkeys(texts, number))

    def erase_retained(self, channels: Collection[str], number: int) -> None:
        """The retained messages of these channels were erased, by the erasure with this number."""
        for seq in filter(None, map(self.retained_seq, channels)):
            self.unretained[self.log[seq - 1].text] = number

    def deliver(self, text: str, known: int) -> None:
        """A replica that has applied all erasures up to `known` delivers a message, or has it in memory."""
        self.expect(self.erasures.get(text, known + 1) > known, f"{text!r} was erased, and the replica knows it")

    def acknowledge(self, text: str, seq: int) -> None:
        """A client is told that its message is in the log."""
        # Acknowledged means committed, under that seq.
        there = any(row.seq == seq and row.text == text for row in self.log) or text in self.lost_texts
        self.expect(there or not self.follows, f"{text!r} is acknowledged as {seq} and is not in the log")
        self.acknowledged[text] = seq

    def refuse(self, text: str) -> None:
        """A client is told that its message is not in the log and never will be."""
        # The client may publish the same again as a new message, so it must not be in the log already.
        self.expect(all(row.text != text for row in self.log), f"{text!r} is refused and is in the log")
        self.refused.add(text)

    def conflict(self, text: str) -> None:
        """A client is told that its message expects another retained message than there is."""
        # A publish that has succeeded never gets a conflict when it is sent again.
        self.expect(all(row.text != text for row in self.log), f"{text!r} got a conflict and is in the log")

    def apply(self, applied: int, rows: Sequence[Row]) -> None:
        """A replica applies rows after `applied`."""
        # A replica applies what was committed, in order and without a hole.
        self.expect(
            [row.seq for row in rows] == list(range(applied + 1, applied + 1 + len(rows))), f"{rows} after {applied}"
        )
        whole = [row for row in rows if row.channel != ERASED]
        self.expect(self.committed_rows.issuperset(whole) or not self.follows, f"{whole} was never committed")
        self.applied.update(whole)

    # What must hold after recovery

    def check(self) -> None:
        self.expect(self.applied <= self.committed_rows, f"{self.applied - self.committed_rows} was never committed")
        texts = {row.text: row.seq for row in self.log}
        for text, seq in self.acknowledged.items():
            # An acknowledged message stays in the log, unless the database has lost it.
            self.expect(texts.get(text) == seq or text in self.lost_texts, f"{text!r} was acknowledged as {seq}")
        # A message published by a committed transaction gets into the log.
        self.expect(
            self.published_by_sql <= texts.keys() | self.lost_texts,
            f"{self.published_by_sql - texts.keys()} never came",
        )

    def check_subscription(
        self, pattern: str, start: int, received: Mapping[int, str], gaps: Sequence[Gap], retention_end: int
    ) -> None:
        """Check a subscription that began after `start`: what it `received`, and its `gaps`.

        `retention_end` is the newest seq that retention has ever deleted.
        """
        for seq, text in received.items():
            # A received message is in the log under its seq.
            there = seq <= len(self.log) and self.log[seq - 1].text == text
            self.expect(there, f"{text!r} is believed to be {seq}: {self.log[seq - 1 : seq]}")
        for row in self.log[start:]:
            # A subscription receives every matching message, or a gap that covers it.
            told = any(gap.first <= row.seq <= gap.last for gap in gaps)
            needed = row.text not in self.erased and matches(pattern, row.channel)
            self.expect(told or row.seq in received or not needed, f"{row} is missing in {gaps}")
        for gap in gaps:
            # A gap with the reason `retention` covers only what retention has deleted.
            self.expect(
                gap.reason != "retention" or gap.last <= retention_end,
                f"{gap} while all after {retention_end} is there",
            )
