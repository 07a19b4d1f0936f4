"""What a mirror reads from the table of memberships, in which order, and what that means."""

from __future__ import annotations

from collections.abc import Generator, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from .mirror import Mirror, PatternReading
from .own_members import Membership

READINGS_AT_ONCE = 100
"""Patterns that are read before changes are read again."""


class ReadChanges(NamedTuple):
    """Read the state of the table, and the changes after a version in the channels of these patterns.

    Without a version no changes are needed.
    """

    after: int | None
    patterns: Sequence[str]


class ReadPattern(NamedTuple):
    """Read the present memberships in the channels of a pattern, in the order of their places, after this one."""

    pattern: str
    after: Membership | None


@dataclass(frozen=True, slots=True)
class ChangesPage:
    """The table as it was at one moment."""

    incarnation: str
    """Identifies the table; empty before anything was written into it."""
    purged: int
    """The greatest version of a membership that was deleted from the table."""
    newest: int
    """The greatest version in the table or of a deleted membership."""
    replicas: Set[str]
    """The replicas with a recent heartbeat."""
    changes: Sequence[Membership]
    """The changes in the order of versions, also in other channels."""
    full: bool
    """Whether there may be more."""


@dataclass(frozen=True, slots=True)
class PatternPage:
    """Present memberships, and the incarnation of the table at the same moment. `full`: there may be more."""

    incarnation: str
    memberships: Sequence[Membership]
    full: bool


ReadingSteps = Generator[ReadChanges | ReadPattern, ChangesPage | PatternPage, None]


class TableFollower:
    """Pure. Follows the table for a mirror."""

    def __init__(self, mirror: Mirror) -> None:
        self.version: int | None = None
        """The version up to which changes are known; None before the first reading."""
        self._mirror = mirror
        self._incarnation = ""

    def resume(self) -> None:
        """The next reading is the first one after an outage."""
        if self.version is not None:
            self._mirror.hold()

    def read(self, now: float) -> ReadingSteps:
        """Read what is new. The caller sends the page for each request.

        `now` is the present time. When the reading is complete, the caller calls `Mirror.advance` with the same time.
        """
        if not self._mirror:
            self.version = None
            return
        yield from self._read_changes(now)
        readings = self._mirror.begin_readings(READINGS_AT_ONCE)
        for reading in readings:
            yield from self._read_pattern(reading, now)
        if readings:
            # They show how what was not in the pages has ended.
            yield from self._read_changes(now)
            for reading in readings:
                self._mirror.finish_reading(reading)

    def _read_changes(self, now: float) -> ReadingSteps:
        full = True
        while full:
            page = yield ReadChanges(self.version, self._mirror.patterns)
            assert isinstance(page, ChangesPage)
            full = self._apply(page, now)

    def _apply(self, page: ChangesPage, now: float) -> bool:
        """Apply a page. Return whether there may be more changes."""
        mirror, version = self._mirror, self.version
        # Versions of another table mean nothing, and neither do those after a copy of the table was restored.
        lost = version is not None and (
            page.incarnation != self._incarnation or version < page.purged or page.newest < version
        )
        if lost:
            mirror.begin_again()
        self._incarnation = page.incarnation
        mirror.note_heartbeats(page.replicas)
        if lost or version is None:
            self.version = page.newest
            return False
        mirror.apply(page.changes, now)
        self.version = page.changes[-1].version if page.full else page.newest
        return page.full

    def _read_pattern(self, reading: PatternReading, now: float) -> ReadingSteps:
        """Read all memberships in a pattern, unless it is not watched any more, or the table is another one."""
        after: Membership | None = None
        while self._mirror.is_reading(reading):
            page = yield ReadPattern(reading.pattern, after)
            assert isinstance(page, PatternPage)
            if page.incarnation != self._incarnation:
                return
            self._mirror.apply(page.memberships, now)
            if not page.full:
                return
            after = page.memberships[-1]
