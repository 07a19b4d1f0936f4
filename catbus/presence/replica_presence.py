"""What all implementations of `Presence` have in common: the own members of the replica, and its mirror."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from .interface import MAX_MEMBERS, Member, PresenceStatistics, Watcher
from .mirror import Mirror
from .own_members import OwnMembers


class ReplicaPresence(ABC):
    """The synchronous part of a `Presence`.

    `clock` is used for the age of info only; its unit is seconds since 1970.
    """

    def __init__(self, own: OwnMembers, mirror: Mirror, clock: Callable[[], float] = time.time) -> None:
        self._own = own
        self._mirror = mirror
        self._clock = clock

    @abstractmethod
    def _note_change(self) -> None:
        """The own members have changed."""

    @abstractmethod
    def _note_watched(self) -> None:
        """The watched patterns may have changed."""

    def join(self, session: int, channel: str, client_id: str | None, info: bytes | None) -> None:
        self._own.join(session, channel, client_id, info, int(self._clock() * 1000))
        self._note_change()

    def leave(self, session: int, channel: str, *, explicit: bool) -> None:
        self._own.leave(session, channel, explicit=explicit)
        self._note_change()

    def leave_all(self, session: int) -> None:
        self._own.leave_all(session)
        self._note_change()

    def channels(self, session: int) -> Sequence[str]:
        return self._own.channels(session)

    def watch(self, pattern: str, watcher: Watcher) -> None:
        self._mirror.watch(pattern, watcher)
        self._note_watched()

    def unwatch(self, pattern: str, watcher: Watcher) -> None:
        self._mirror.unwatch(pattern, watcher)
        self._note_watched()

    def present(
        self, pattern: str, after: tuple[str, str] | None = None, limit: int = MAX_MEMBERS
    ) -> tuple[Sequence[Member], bool]:
        return self._mirror.present(pattern, after, limit)

    def _statistics(self, *, writes: int, written: int, reads: int) -> PresenceStatistics:
        return PresenceStatistics(
            memberships=len(self._own),
            patterns=len(self._mirror.patterns),
            members=self._mirror.members,
            events=self._mirror.events,
            writes=writes,
            written=written,
            reads=reads,
        )
