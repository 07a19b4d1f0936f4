"""Consumers as administrators see and change them: the interface, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ConsumerPartition:
    """The position of a partition.

    `lag` counts the messages of all channels between the cursor and the head, and `lag_seconds` is the age of the
    oldest of them. With `gap`, messages behind the cursor were removed, and receiving is an error until the consumer is
    reset.
    """

    partition: int
    cursor: int
    lag: int
    lag_seconds: float
    moved: datetime
    gap: bool
    dead_letters: int


@dataclass(frozen=True, slots=True)
class ConsumerReport:
    """A consumer, with the position of each partition."""

    name: str
    owner: str
    pattern: str
    hold: bool
    partitions: tuple[ConsumerPartition, ...]

    @property
    def lag(self) -> int:
        """The greatest lag of a partition."""
        return max(partition.lag for partition in self.partitions)

    @property
    def lag_seconds(self) -> float:
        """The greatest of those of its partitions."""
        return max(partition.lag_seconds for partition in self.partitions)

    @property
    def gap(self) -> bool:
        return any(partition.gap for partition in self.partitions)

    @property
    def dead_letters(self) -> int:
        return sum(partition.dead_letters for partition in self.partitions)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was rejected. `payload` is its JSON text."""

    seq: int
    at: datetime
    channel: str
    payload: str
    sender: str | None
    reason: str | None
    rejected: datetime


@dataclass(frozen=True, slots=True)
class SkippedRange:
    """Messages, from the first to the last, that a partition never receives."""

    partition: int
    first: int
    last: int


class Consumers(Protocol):
    """The consumers of a broker whose log is in a database.

    All methods raise `PeerError` if a call is rejected: `not_found` for an unknown consumer, `unavailable` if workers
    use it for more than two seconds, and `conflict` for anything else that does not fit. They raise `Unavailable` if
    the database cannot be used. Cancelling one leaves open whether something has changed.
    """

    async def reports(self, *, after: str = "", most: int | None = None) -> list[ConsumerReport]:
        """Consumers in the order of their names, from the first one above `after` on, at most so many."""

    async def report(self, name: str) -> ConsumerReport:
        """One consumer."""

    async def drop(self, name: str) -> None:
        """Drop a consumer with its dead letters."""

    async def reset(self, name: str, start: str) -> None:
        """Move all partitions to `head`, to `floor`, or behind a seq."""

    async def skip_gap(self, name: str) -> list[SkippedRange]:
        """Go on behind removed messages. Returns them; nothing if there is no gap."""

    async def dead_letters(self, name: str, *, after: int = 0, rows: int, size: int) -> tuple[list[DeadLetter], bool]:
        """Dead letters above the seq `after`, in order: at most `rows`, and (but for the first) at most `size` bytes.

        Also returns whether there are more.
        """

    async def delete_dead_letters(self, name: str, seqs: Sequence[int]) -> list[int]:
        """Delete dead letters, and return the seqs of those that existed."""

    async def publish_dead_letters(self, name: str, seqs: Sequence[int]) -> list[int]:
        """Publish dead letters again, in order, and delete them, all in one transaction. Return the seqs of those that
        existed.

        Each is a new message of its channel, without a sender, for all subscribers and consumers.
        """
