"""The members in watched channels: memberships and heartbeats go in, snapshots and events come out."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from heapq import heappop, heappush
from itertools import count, islice
from typing import NamedTuple

from msgspec import structs

from ..delivery.topic_tree import TopicTree
from ..protocol.channels import is_reserved, prefix_range, selectors
from .interface import Member, PresenceAction, Watcher
from .member_state import MemberState, SessionState
from .own_members import Membership, MembershipState, Place

LOST_GRACE = 10.0
"""Seconds for which members are kept that are lost without an end: their replica sends no heartbeats, or the table is
another one. A longer grace takes its place."""

_LAST_CHANNEL = "\x7f"
"""Greater than all channels."""

STEPS = 500
"""Changes that `advance` processes in one call."""


class PatternReading(NamedTuple):
    """A pattern whose memberships have to be read, and the number of this reading."""

    pattern: str
    number: int


class _Channel:
    """The members of a channel by their keys, the keys of those that are announced, and all sessions."""

    __slots__ = ("keys", "members", "sessions")

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.members: dict[str, MemberState] = {}
        self.sessions: dict[Place, SessionState] = {}


class Mirror:
    """Pure. Times are in seconds, and those of a reading are the times at which it began.

    After it has applied what it knows, the caller calls `advance` until that returns a later time: so nobody is
    announced as gone who had come back before. `grace` is the time within which a session that ended is expected back.

    A `complete` mirror gets the memberships of all channels; another one gets those of watched channels, and
    `begin_readings` says which of them have to be read.

    While the mirror is *holding*, after an outage or in another table, only explicit leaves are announced: the replicas
    have time to write their members again.
    """

    def __init__(self, grace: float, *, complete: bool = False) -> None:
        self.events = 0
        """Joins, updates and leaves so far."""
        self.members = 0
        """Members that are announced."""
        self._grace = grace
        self._lost_grace = max(grace, LOST_GRACE)
        self._complete = complete
        self._watchers: TopicTree[Watcher] = TopicTree()
        self._unread: dict[str, int] = {}
        """Watched patterns whose memberships have to be read, with the number of the reading in progress, or 0."""
        self._known: set[str] = set()
        """Watched patterns whose watchers get events."""
        self._read: deque[str] = deque()
        """Patterns that have been read. They are known when the changes before are processed."""
        self._channels: dict[str, _Channel] = {}
        self._order: list[str] = []
        """The channels in order."""
        self._stamp = 0
        """The number of the newest reading."""
        self._confirmed_from = 0
        """Memberships with a lower stamp are not confirmed since the table is another one."""
        self._fresh: Set[str] = frozenset()
        """The replicas whose memberships count."""
        self._reported: Set[str] = frozenset()
        """The replicas with a recent heartbeat."""
        self._holding = False
        self._unconfirmed: set[str] = set()
        """Patterns that have to be read before anything counts as missing."""
        self._hold_until: float | None = None
        self._unchecked: dict[str, None] = {}
        """Channels whose sessions may count or not count any more."""
        self._changed: dict[MemberState, None] = {}
        self._schedule: list[tuple[float, int, MemberState]] = []
        """Members without sessions, with the time at which their leave may be due."""
        self._held: dict[MemberState, None] = {}
        """Members without sessions that may still turn out to have one."""
        self._numbers = count()

    # Watchers

    @property
    def patterns(self) -> Sequence[str]:
        """The watched patterns."""
        return [group.pattern for group in self._watchers.groups()]

    def __bool__(self) -> bool:
        """Return whether a pattern is watched."""
        return bool(self._watchers)

    @property
    def unread(self) -> int:
        """Number of patterns that have to be read."""
        return len(self._unread)

    def watch(self, pattern: str, watcher: Watcher) -> None:
        """Add a watcher of a valid pattern."""
        if pattern not in self._watchers:
            if self._complete:
                self._known.add(pattern)
            elif self._holding:
                self._unread[pattern] = 0
                self._unconfirmed.add(pattern)
            elif any(wider in self._known for wider in selectors(pattern)):
                self._known.add(pattern)
            else:
                self._unread[pattern] = 0
        before = self._watchers.members(pattern)
        self._watchers.add(pattern, watcher)
        if self._watchers.members(pattern) > before and pattern in self._known:
            watcher.begin_members(pattern)

    def unwatch(self, pattern: str, watcher: Watcher) -> None:
        """Remove a watcher, if it is there. Channels that nobody watches any more are forgotten."""
        if not self._watchers.remove(pattern, watcher) or pattern in self._watchers:
            return
        self._unread.pop(pattern, None)
        self._known.discard(pattern)
        self._unconfirmed.discard(pattern)
        if not self._complete:
            self._unchecked.update(dict.fromkeys(self._matching(pattern)))

    def present(
        self, pattern: str, after: tuple[str, str] | None, limit: int, *, counted: bool = False
    ) -> tuple[Sequence[Member], bool]:
        """Return announced members, as `Presence.present` does. `counted`: only those with sessions."""
        found: list[Member] = []
        if not (self._complete or pattern in self._known):
            return found, False
        for state in self._announced(pattern, after):
            if state.announced is not None and (state.sessions or not counted):
                if len(found) == limit:
                    return found, True
                found.append(state.announced)
        return found, False

    # Memberships

    def begin_readings(self, limit: int) -> Sequence[PatternReading]:
        """The next patterns that have to be read.

        The caller applies all their memberships, then all changes, and calls `finish_reading` for each. If it cannot,
        the patterns are returned again.
        """
        readings = []
        for pattern in islice(self._unread, limit):
            self._stamp += 1
            self._unread[pattern] = self._stamp
            readings.append(PatternReading(pattern, self._stamp))
        return readings

    def is_reading(self, reading: PatternReading) -> bool:
        """Whether the reading still serves: the pattern is watched, and the table is the same."""
        return self._unread.get(reading.pattern) == reading.number

    def finish_reading(self, reading: PatternReading) -> None:
        """All memberships in the pattern were applied. Those that were not read have ended unseen."""
        if not self.is_reading(reading):
            return
        pattern = reading.pattern
        del self._unread[pattern]
        self._unconfirmed.discard(pattern)
        for channel in self._matching(pattern):
            for session in list(self._channels[channel].sessions.values()):
                if self._confirmed_from <= session.stamp < reading.number:
                    self._drop(session, None, 0.0)
        self._read.append(pattern)

    def apply(self, memberships: Iterable[Membership], now: float) -> None:
        """Take memberships, in the order of their versions."""
        for membership in memberships:
            self._apply(membership, now)

    def note_heartbeats(self, replicas: Set[str]) -> None:
        """The replicas with a recent heartbeat. The memberships of others do not count."""
        if replicas == self._reported:
            return
        self._reported = frozenset(replicas)
        self._count_replicas()

    def hold(self) -> None:
        """The database was unreachable. Replicas may not have sent their heartbeats for that reason."""
        self._holding = True
        self._hold_until = None

    def begin_again(self) -> None:
        """The table is another one. Replicas write their members again, and all watched patterns have to be read."""
        self.hold()
        self._stamp += 1
        self._confirmed_from = self._stamp
        self._unread = dict.fromkeys(self.patterns, 0)
        self._unconfirmed = set(self._unread)

    def advance(self, now: float) -> float | None:
        """Announce what is due. Return the time of the next call; None if nothing is left to do."""
        if self._holding and not self._unconfirmed and self._hold_until is None:
            self._hold_until = now + self._lost_grace
        if self._hold_until is not None and now >= self._hold_until:
            self._holding, self._hold_until = False, None
            self._count_replicas()
            self._unchecked.update(dict.fromkeys(self._order))
            self._changed.update(self._held)
            self._held = {}
        for _ in range(STEPS):
            if not self._step(now):
                times = [self._schedule[0][0]] if self._schedule else []
                return min(times if self._hold_until is None else [*times, self._hold_until], default=None)
        return now

    def _step(self, now: float) -> bool:
        """Process one change. Return whether there was one."""
        if self._unchecked:
            channel = next(iter(self._unchecked))
            del self._unchecked[channel]
            self._check(channel, now)
        elif self._changed:
            member = next(iter(self._changed))
            del self._changed[member]
            self._announce_changes(member, now)
        elif self._schedule and self._schedule[0][0] <= now:
            _, _, member = heappop(self._schedule)
            member.scheduled = False
            self._announce_changes(member, now)
        elif self._read:
            self._begin(self._read.popleft())
        else:
            return False
        return True

    def _begin(self, pattern: str) -> None:
        """Tell the watchers of a pattern that it is known, unless they have been told already."""
        if pattern in self._known or pattern not in self._watchers or pattern in self._unread:
            return
        self._known.add(pattern)
        for watcher in self._watchers.listed(pattern):
            watcher.begin_members(pattern)

    # Sessions

    def _apply(self, membership: Membership, now: float) -> None:
        channel, place = membership.channel, membership.place
        if not (self._complete or self._watchers.match(channel)):
            return
        members = self._channels.get(channel)
        session = None if members is None else members.sessions.get(place)
        if session is not None:
            if membership.version < session.membership.version and session.stamp >= self._confirmed_from:
                return
            if membership.state is not MembershipState.PRESENT:
                ended = membership.state is MembershipState.ENDED
                self._drop(session, now + self._grace if ended else None, now)
                return
            session.stamp = self._stamp
            session.membership = membership
            self._changed[session.member] = None
            return
        if membership.state is not MembershipState.PRESENT:
            member = None if members is None else members.members.get(membership.key)
            if member is not None and membership.state is MembershipState.ENDED:
                # It came and ended between two readings. So the client was back.
                member.expect_again(now + self._grace)
            return
        if members is None:
            members = self._channels[channel] = _Channel()
            insort(self._order, channel)
        key = membership.key
        member = members.members.get(key)
        if member is None:
            member = members.members[key] = MemberState(membership)
        session = members.sessions[place] = SessionState(membership, member, self._stamp)
        if membership.replica in self._fresh or self._complete:
            member.add(session)
        self._changed[member] = None

    def _drop(self, session: SessionState, expected: float | None, now: float) -> None:
        """Forget a session that has ended."""
        member = session.member
        del self._channels[member.channel].sessions[session.membership.place]
        member.known -= 1
        if session.counted:
            member.remove(session, expected, now)
        self._changed[member] = None

    def _count_replicas(self) -> None:
        """Decide whose memberships count. While members are held, those of lost replicas do."""
        fresh = self._fresh | self._reported if self._holding else self._reported
        if fresh != self._fresh:
            self._fresh = fresh
            self._unchecked.update(dict.fromkeys(self._order))

    def _check(self, channel: str, now: float) -> None:
        """Look at the sessions of a channel again: whether they count, and whether the channel is watched."""
        members = self._channels.get(channel)
        if members is None:
            return
        if not (self._complete or self._watchers.match(channel)):
            self._forget(channel, members)
            return
        for session in list(members.sessions.values()):
            counted = session.membership.replica in self._fresh or self._complete
            if session.stamp < self._confirmed_from and not self._holding:
                self._drop(session, None, now)
            elif counted and not session.counted:
                session.member.add(session)
                self._changed[session.member] = None
            elif session.counted and not counted:
                session.member.remove(session, now + self._lost_grace, now)
                self._changed[session.member] = None

    def _forget(self, channel: str, members: _Channel) -> None:
        self.members -= len(members.keys)
        del self._channels[channel]
        del self._order[bisect_left(self._order, channel)]

    # Announcements

    def _announce_changes(self, member: MemberState, now: float) -> None:
        """Announce how a member differs from what was announced of it."""
        channel = self._channels.get(member.channel)
        if channel is None or channel.members.get(member.key) is not member:
            return
        before = member.announced
        if member.sessions:
            present = member.present()
            if before is None:
                self.members += 1
                insort(channel.keys, member.key)
                self._announce(member, "join", present)
            elif present != before:
                self._announce(member, "update", present)
            return
        if before is not None:
            if member.expected and self._holding:
                self._held[member] = None
                return
            if member.leaves_at > now:
                self._schedule_leave(member)
                return
            self.members -= 1
            del channel.keys[bisect_left(channel.keys, member.key)]
            self._announce(member, "leave", structs.replace(before, sessions=0))
        if not member.known:
            del channel.members[member.key]
            if not channel.members:
                self._forget(member.channel, channel)

    def _schedule_leave(self, member: MemberState) -> None:
        if not member.scheduled:
            member.scheduled = True
            heappush(self._schedule, (member.leaves_at, next(self._numbers), member))

    def _announce(self, member: MemberState, action: PresenceAction, shown: Member) -> None:
        self.events += 1
        member.announced = None if action == "leave" else shown
        for group in self._watchers.match(member.channel):
            if group.pattern in self._known:
                for watcher in list(group.members):
                    watcher.note_member(group.pattern, action, shown)

    # Order

    def _matching(self, pattern: str, start: str = "") -> Iterator[str]:
        """The channels that match, in order, from `start` on. They must not change meanwhile."""
        order = self._order
        first, end = prefix_range(pattern) or (("", _LAST_CHANNEL) if pattern == "*" else (pattern, f"{pattern}\0"))
        for index in range(bisect_left(order, max(first, start)), bisect_left(order, end)):
            if pattern != "*" or not is_reserved(order[index]):
                yield order[index]

    def _announced(self, pattern: str, after: tuple[str, str] | None) -> Iterator[MemberState]:
        """The members with a position above `after` that may be announced, in order."""
        for channel in self._matching(pattern, "" if after is None else after[0]):
            members = self._channels[channel]
            start = bisect_right(members.keys, after[1]) if after is not None and channel == after[0] else 0
            for index in range(start, len(members.keys)):
                yield members.members[members.keys[index]]
