"""A recorded history, prepared for its checks: events by type, the log in each epoch, and the times of faults."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from catbus.protocol.channels import matches

from .history import (
    Answered,
    AnyEvent,
    Connected,
    ConnectionLost,
    DatabaseStatusLogged,
    Effect,
    FaultBegan,
    FaultEnded,
    GapAnnounced,
    LogEntry,
    LogEpoch,
    MapShown,
    MemberAnnounced,
    MemberJoined,
    MemberLeft,
    MembersListed,
    MembersShown,
    Message,
    Published,
    Received,
    RoleChanged,
    RunEnded,
    SubscriptionRevoked,
)
from .report import Promise, Report

RECOVERY_TIME = 10.0
"""Seconds after a fault during which its effects may continue."""


class EventsByType:
    """The events by type, each type in the order of time."""

    def __init__(self, by_type: dict[type, list[AnyEvent]]) -> None:
        def of(kind: type) -> list:  # type: ignore[type-arg]
            return by_type.get(kind, [])

        self.published: list[Published] = of(Published)
        self.answered: list[Answered] = of(Answered)
        self.received: list[Received] = of(Received)
        self.gaps: list[GapAnnounced] = of(GapAnnounced)
        self.revocations: list[SubscriptionRevoked] = of(SubscriptionRevoked)
        self.connected: list[Connected] = of(Connected)
        self.connections_lost: list[ConnectionLost] = of(ConnectionLost)
        self.maps: list[MapShown] = of(MapShown)
        self.lives: list[MemberJoined | MemberLeft | ConnectionLost] = _by_time(
            [*of(MemberJoined), *of(MemberLeft), *self.connections_lost]
        )
        watchers = {event.watcher for event in of(MembersShown)}
        self.presence: list[MembersShown | MemberAnnounced | ConnectionLost] = _by_time(
            [*of(MembersShown), *of(MemberAnnounced), *(e for e in self.connections_lost if e.client in watchers)]
        )
        self.listed: list[MembersListed] = of(MembersListed)
        self.effects: list[Effect] = of(Effect)
        self.faults: list[FaultBegan] = of(FaultBegan)
        self.fault_ends: dict[int, float] = {event.number: event.at for event in of(FaultEnded)}
        self.database_status: list[DatabaseStatusLogged] = of(DatabaseStatusLogged)
        self.role_changes: list[RoleChanged] = of(RoleChanged)
        self.entries: list[LogEntry] = of(LogEntry)
        self.epochs: list[LogEpoch] = of(LogEpoch)
        self.run_ended: list[RunEnded] = of(RunEnded)

    def end(self, fault: FaultBegan) -> float:
        return self.fault_ends.get(fault.number, float("inf"))


def _by_time(events: list[Any]) -> list[Any]:
    return sorted(events, key=lambda event: float(event.at))


class LogViews:
    """The content of the log in each epoch.

    The entries of the database survived every failover, so they are in the log of the epoch in which they were
    appended and of all later ones. A message that only subscribers have seen was in the log of the epoch in which they
    saw it, and of earlier epochs as far as those share the log.
    """

    def __init__(self, history: EventsByType, report: Report) -> None:
        self.ordinals = {epoch.epoch: ordinal for ordinal, epoch in enumerate(history.epochs)}
        self.afters = [epoch.after for epoch in history.epochs]
        self.seen = [float("inf")] * len(self.afters)
        """When a subscriber first learned of each epoch."""
        self.sent: dict[tuple[int, int], float] = {}
        """When a message of an epoch was committed, if any subscriber received it."""
        self.kept = {entry.seq: entry for entry in history.entries}
        self.places: dict[Message, list[int]] = {}
        """The seqs of each message in the surviving log."""
        self.known: set[Message] = {event.message for event in history.received}
        """Messages that were in the log of any epoch."""
        self.views: list[dict[int, tuple[str, Message]]] = [{} for _ in self.afters]
        """For each epoch, the channel and the message of each seq."""
        self._matching: dict[tuple[int, str], array[int]] = {}
        for entry in history.entries:
            self.places.setdefault(entry.message, []).append(entry.seq)
            self.known.add(entry.message)
            for ordinal in range(self.ordinals[entry.epoch], len(self.afters)):
                self.views[ordinal][entry.seq] = entry.channel, entry.message
        agreed = report.promises["agreed"]
        for event in history.received:
            if event.seq:
                self.sent.setdefault((self.ordinals.get(event.epoch, -1), event.seq), event.sent)
                self._add_seen(event.epoch, event.seq, event.channel, event.message, event.at, agreed)
        for shown in history.maps:
            for channel, (seq, epoch, publisher, number) in shown.shown.items():
                self._add_seen(epoch, seq, channel, (publisher, number), shown.at, agreed)
        for gap in history.gaps:
            if gap.epoch in self.ordinals:
                ordinal = self.ordinals[gap.epoch]
                self.seen[ordinal] = min(self.seen[ordinal], gap.at)

    def _add_seen(self, epoch: str, seq: int, channel: str, message: Message, at: float, agreed: Promise) -> None:
        """A client has seen a message in an epoch."""
        what = channel, message
        ordinal = self.ordinals.get(epoch)
        if ordinal is None:
            agreed.check(False, "unknown epoch {}: {} of {}", epoch, seq, what)
            return
        self.seen[ordinal] = min(self.seen[ordinal], at)
        known = self.views[ordinal].setdefault(seq, what)
        agreed.check(known == what, "other clients have {} as {}, one has {} at {}", known, seq, what, at)
        while ordinal and seq <= self.afters[ordinal]:
            ordinal -= 1
            self.views[ordinal].setdefault(seq, what)

    def holds(self, seq: int, message: Message) -> bool:
        """Return whether the message had this seq in the log of any epoch."""
        if seq in self.places.get(message, ()):
            return True
        return any(view.get(seq, ("", None))[1] == message for view in self.views)

    def is_lost(self, seq: int, at: float) -> bool:
        """Return whether a message with this seq (0: unknown) may have been lost with the database at that time."""
        later = zip(self.afters[1:], self.seen[1:], strict=True)
        return any((not seq or seq > after) and at <= seen + RECOVERY_TIME for after, seen in later)

    def changed_after(self, at: float) -> bool:
        """Return whether an epoch may have begun after that time."""
        return any(at <= seen + RECOVERY_TIME for seen in self.seen[1:])

    def same_up_to(self, earlier: int, later: int) -> int:
        """Return the seq up to which the logs of two epochs are the same."""
        return min(self.afters[earlier + 1 : later + 1])

    def missing(self, ordinal: int, pattern: str, after: int, last: int) -> list[int]:
        """Return the matching seqs with `after < seq <= last`. A subscription to several patterns has them all."""
        if last <= after:
            return []
        seqs = self._matching.get((ordinal, pattern))
        if seqs is None:
            fits: dict[str, bool] = {}
            found = []
            for seq, (channel, _) in self.views[ordinal].items():
                if channel not in fits:
                    fits[channel] = any(matches(each, channel) for each in pattern.split())
                if fits[channel]:
                    found.append(seq)
            seqs = self._matching[ordinal, pattern] = array("q", sorted(found))
        return list(seqs[bisect_right(seqs, after) : bisect_right(seqs, last)])


class FaultTimes:
    """The times at which faults were active."""

    def __init__(self, history: EventsByType) -> None:
        self.faults = [(fault.at, history.end(fault), fault) for fault in history.faults]

    def under_way(self, begin: float, end: float) -> list[FaultBegan]:
        """Return the faults that were active at any time between the two."""
        return [fault for began, ended, fault in self.faults if began <= end and ended >= begin]

    def after_outages(self, begin: float, seconds: float, delay: float) -> float:
        """Return the time so many seconds after `begin`, of which the outages of databases do not count.

        `delay`: seconds after each fault during which it still has effects.
        """
        limit = begin + seconds
        for began, ended, fault in sorted(self.faults, key=lambda each: each[:2]):
            if ended + delay > begin and began < limit and fault.kind != "replica killed":
                limit += ended + delay - max(began, begin)
        return limit

    def calm(self) -> Callable[[float], bool]:
        """Return a function that says whether no fault was active or recent. Call it in the order of time."""
        busy: list[tuple[float, float]] = []
        for began, ended, _ in sorted(self.faults, key=lambda each: each[:2]):
            until = ended + RECOVERY_TIME
            if busy and began <= busy[-1][1]:
                busy[-1] = busy[-1][0], max(busy[-1][1], until)
            else:
                busy.append((began, until))
        begins = [began for began, _ in busy]

        def is_calm(at: float) -> bool:
            index = bisect_right(begins, at) - 1
            return index < 0 or at > busy[index][1]

        return is_calm
