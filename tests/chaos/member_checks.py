"""Checks of what watchers are told of members. Pure.

A member is *away* while it has no connection, or while its replica may not reach the database because of a fault.
"""

from __future__ import annotations

from collections import defaultdict
from math import inf

from .history import (
    ConnectionLost,
    MemberAnnounced,
    MemberJoined,
    MemberLeft,
    MembersShown,
)
from .log_views import EventsByType, FaultTimes
from .report import Report

GRACE = 10.0
"""Seconds for which a member may be away, in a chaos run."""
LOST_LIMIT = 30.0
"""Seconds within which a member of a killed replica is announced as gone."""
NOTICE_TIME = 2.5
"""Seconds that a client may take to see that its connection is lost."""
WRITE_TIME = 5.0
"""Seconds that a replica may take to write that a client is back."""
OUTAGE_TIME = 15.0
"""Seconds by which a fault of the database may delay an announcement, beside its own duration."""
CLIENT_FAULTS = frozenset({"network cut", "answers to clients lost", "network lossy", "connections reset"})
"""Faults between clients and replica, which still reaches the database."""
CAUSE_AGE = 45.0
"""Seconds after an absence within which it may still be announced."""

Interval = tuple[float, float]


def check_members(history: EventsByType, times: FaultTimes, report: Report) -> None:
    stays, gone, agreed = report.promises["stays"], report.promises["gone"], report.promises["same members"]
    lives = _Lives(history, times)
    watches: dict[str, _Watch] = defaultdict(_Watch)
    for event in history.presence:
        watch = watches[event.client if isinstance(event, ConnectionLost) else event.watcher]
        if isinstance(event, MemberAnnounced) and not event.joined:
            if event.member in lives.joined:
                stays.check(
                    lives.was_away(event.member, event.at, GRACE, watch.since(event)), "was not away: {}", event
                )
            gone.check(event.member in watch.present, "again: {}", event)
        elif isinstance(event, MembersShown):
            for member in watch.present & lives.joined.keys() - set(event.members):
                stays.check(
                    lives.was_away(member, event.at, 0.0, event.at),
                    "{} is missing, and was not away: {}",
                    member,
                    event,
                )
        watch.take(event)
    for fault in history.faults:
        if fault.kind != "replica killed":
            continue
        for member in lives.lost_with(fault.replica, fault.at):
            limit = times.after_outages(fault.at, LOST_LIMIT, OUTAGE_TIME)
            for name, watch in watches.items():
                until = watch.shown_until(member)
                if until >= 0.0:
                    gone.check(until <= limit, "{} is still there for {} at {}: {}", member, name, until, fault)
    for listed in history.listed:
        agreed.check(listed.members == listed.expected, "{}", listed)
        for name, watch in watches.items():
            agreed.check(watch.present == set(listed.expected), "{} knows {}: {}", name, watch.present, listed)


class _Watch:
    """What one watcher knows, and until when its connections have shown each member."""

    def __init__(self) -> None:
        self.present: set[str] = set()
        self._connected = False
        self._shown: dict[str, float] = {}
        self._since: dict[str, float] = {}

    def take(self, event: MembersShown | MemberAnnounced | ConnectionLost) -> None:
        before = self.present
        if isinstance(event, MembersShown):
            self.present = set(event.members)
        elif isinstance(event, MemberAnnounced):
            self.present = before | {event.member} if event.joined else before - {event.member}
        self._since.update(dict.fromkeys(self.present - before, event.at))
        seen = before if self._connected else set()
        self._connected = not isinstance(event, ConnectionLost)
        for member in seen | self.present if self._connected else seen:
            self._shown[member] = event.at

    def since(self, event: MemberAnnounced) -> float:
        """Return the time after which the absence ended that the announcement of a leave is about.

        It is not that after which the watcher was told that the member is back.
        """
        return max(event.at - CAUSE_AGE, self._since.get(event.member, -inf) + WRITE_TIME)

    def shown_until(self, member: str) -> float:
        """Return the time until which the member was shown; -1 if it never was."""
        return inf if self._connected and member in self.present else self._shown.get(member, -1.0)


class _Lives:
    """The connections of each member, and when it was away."""

    def __init__(self, history: EventsByType, times: FaultTimes) -> None:
        self.joined: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
        """By member that comes back: from when to when it surely had a connection, and to which replica."""
        self._mortals: dict[str, tuple[float, float, str]] = {}
        last = {event.member: event for event in history.lives if not isinstance(event, ConnectionLost)}
        mortal = {member for member, event in last.items() if isinstance(event, MemberLeft)}
        begun: dict[str, tuple[float, str]] = {}
        for event in history.lives:
            name = event.client if isinstance(event, ConnectionLost) else event.member
            if isinstance(event, MemberJoined):
                begun[name] = event.at, event.replica
            elif name in begun:
                noticed = NOTICE_TIME if isinstance(event, ConnectionLost) else 0.0
                self._add(name, *begun.pop(name), event.at - noticed, mortal=name in mortal)
        for name, (at, replica) in begun.items():
            self._add(name, at, replica, inf, mortal=name in mortal)
        self._away = {name: _absences(connected, times) for name, connected in self.joined.items()}

    def _add(self, name: str, since: float, replica: str, until: float, *, mortal: bool) -> None:
        if mortal:
            self._mortals[name] = since, until, replica
        else:
            self.joined[name].append((since, until, replica))

    def was_away(self, member: str, at: float, least: float, since: float) -> bool:
        """Return whether a member had been away for that long by the time `at`, and not only before `since`."""
        return any(begin + least <= min(at, end) and end >= since for begin, end in self._away[member])

    def lost_with(self, replica: str, at: float) -> list[str]:
        """Return the members that never came back after this replica was killed."""
        return [
            name
            for name, (since, until, where) in self._mortals.items()
            if where == replica and since + WRITE_TIME <= at <= until + NOTICE_TIME
        ]


def _absences(connected: list[tuple[float, float, str]], times: FaultTimes) -> list[Interval]:
    """Return when a member was away, in order."""
    away: list[Interval] = []
    left = -inf
    for since, until, replica in connected:
        away.append((left, since + WRITE_TIME))
        left = until
        away += [
            (began, ended + WRITE_TIME)
            for began, ended, fault in times.faults
            if fault.kind not in CLIENT_FAULTS
            and fault.replica in ("", replica)
            and began <= until
            and ended + WRITE_TIME >= since
        ]
    away.append((left, inf))
    merged: list[Interval] = []
    for begin, end in sorted(away):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    return merged
