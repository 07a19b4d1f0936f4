"""Which memberships of a replica are written to the table, in which order, and when all of them are written again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .own_members import Membership, OwnMembers

BATCH_SIZE = 2000
"""Memberships that are written at once."""


@dataclass(frozen=True, slots=True)
class PresenceBatch:
    """Memberships to write. The table rejects a batch that is not newer than those it has taken from the replica."""

    number: int
    memberships: Sequence[Membership]
    begins: bool
    """Whether the replica begins to write all its memberships. Otherwise the table takes nothing of it if it has
    forgotten the replica."""
    ends_below: int | None
    """Memberships of the replica with a lower version have ended; 0: with a lower version than this batch."""


class PresenceBatches:
    """Pure. The caller calls `take`, and then exactly one of `note_written`, `note_rejected` and `give_back`."""

    def __init__(self, own: OwnMembers, size: int = BATCH_SIZE) -> None:
        self._own = own
        self._size = size
        self._number = 0
        self._taken: int | None = None
        """The number of the rewriting of all memberships to which the batch that was taken belongs."""
        self._begun: int | None = None
        """That of the newest one that has begun in the table."""
        self._ends_below: int | None = 0
        """The version below which memberships are to be ended; 0: that of the batch that begins. None: they are."""

    @property
    def unfinished(self) -> bool:
        """Whether memberships of before have to be ended."""
        return self._begun == self._own.rewrites and self._ends_below is not None

    def take(self) -> PresenceBatch:
        """The next batch. Without anything to write it is a heartbeat."""
        own = self._own
        self._number += 1
        self._taken = own.rewrites
        begins = self._begun != own.rewrites
        if begins:
            self._ends_below = 0
        memberships = own.take(self._size)
        return PresenceBatch(self._number, memberships, begins, None if own.unwritten else self._ends_below)

    def note_written(self, batch: PresenceBatch, version: int, *, complete: bool) -> None:
        """The table has taken the batch. `version` is lower than those of its memberships. `complete`: nothing is left
        to be ended."""
        if batch.begins:
            self._begun = self._taken
            self._ends_below = version
        if batch.ends_below is not None and complete:
            self._ends_below = None

    def note_rejected(self, batch: PresenceBatch) -> None:
        """The table has forgotten the replica: another table, or no heartbeat for a long time."""
        self._own.give_back(batch.memberships)
        self._own.rewrite()

    def give_back(self, batch: PresenceBatch) -> None:
        """It is not known whether the table has taken the batch."""
        self._own.give_back(batch.memberships)
