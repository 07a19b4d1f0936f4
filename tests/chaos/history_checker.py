"""Checks a recorded history against the promises. Pure: a history in, a report out."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field

from catbus.protocol.channels import matches

from .history import (
    Answered,
    AnyEvent,
    CaughtUp,
    Connected,
    ConnectionLost,
    DatabaseStatusLogged,
    FaultBegan,
    FaultEnded,
    GapAnnounced,
    LogEntry,
    LogEpoch,
    Message,
    Published,
    Received,
    RoleChanged,
    RunEnded,
    SubscriptionBegan,
    SubscriptionRevoked,
)

RETENTION = 30.0
"""Minimum time in seconds for which messages stay in the log of a chaos run."""

PROMPT_LIMIT = 5.0
"""Seconds within which a message arrives, and within which a dead database connection is detected."""

RECOVERY_TIME = 10.0
"""Seconds after a fault during which its effects may continue."""

REVOCATION_LIMIT = 1.0
"""Seconds after which a withdrawn permission has no effect."""

FRESH_AGE = 0.25
"""Maximum age in seconds of a message that shows its receiver to have caught up."""

MAX_EXAMPLES = 5
"""Maximum number of violations of a promise that are printed in full."""

PROMISES = {
    "acknowledged": "An acknowledged message is in the log under the acknowledged seq",
    "refused": "A publish that was rejected for good is not in the log",
    "once": "A publish is in the log at most once, however often it was sent",
    "ordered": "The messages of one publisher, except `unknown` ones, are in the log in the order of sending",
    "agreed": "A seq of an epoch is the same message for all clients",
    "increasing": "A subscription gets its messages in the order of their seqs, none of them twice",
    "whole": "A subscription gets every message that was not announced as a gap",
    "kept": "A message announced as deleted is older than the retention",
    "complete": "In the end every subscription has caught up with the log",
    "prompt": "Without a fault, a message arrives within 5 s",
    "readable": "A client without read permission gets nothing after 1 s",
    "writable": "A client without write permission publishes nothing after 1 s",
    "connected": "A fault of the database alone disconnects no client",
    "noticed": "A dead database connection is detected within 5 s",
    "ephemeral": "An ephemeral message reaches a session at most once",
}


@dataclass
class Promise:
    name: str
    checked: int = 0
    """How often the promise was checked."""
    broken: int = 0
    examples: list[str] = field(default_factory=list)

    def check(self, kept: object, text: str, *details: object) -> None:
        """Count a check, and record a violation, described by `text` and `details`, unless `kept`."""
        self.checked += 1
        if not kept:
            self.broken += 1
            if len(self.examples) < MAX_EXAMPLES:
                self.examples.append(text.format(*details))


@dataclass
class Measurement:
    """Durations in seconds of one kind."""

    name: str
    values: list[float] = field(default_factory=list)

    def at(self, part: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(int(len(ordered) * part), len(ordered) - 1)]


class Report:
    """The result of each promise, measurements, and the number of faults of each kind with the publishes in flight."""

    def __init__(self) -> None:
        self.promises = {name: Promise(name) for name in PROMISES}
        self.measurements: dict[str, Measurement] = {}
        self.faults: dict[str, list[int]] = {}
        self.counts: dict[str, int] = {}

    def measurement(self, name: str) -> Measurement:
        return self.measurements.setdefault(name, Measurement(name))

    @property
    def broken(self) -> list[str]:
        """The promises that were violated."""
        return [name for name, promise in self.promises.items() if promise.broken]

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield "| Promise | Checked | Broken |"
        yield "|---|---:|---:|"
        for name, promise in self.promises.items():
            yield f"| {PROMISES[name]} | {promise.checked:,} | {promise.broken:,} |"
        yield ""
        for name, count in self.counts.items():
            yield f"{name}: {count:,}"
        yield ""
        yield "| Fault | How often | Publishes in flight then |"
        yield "|---|---:|---:|"
        for kind, in_flight in sorted(self.faults.items()):
            yield f"| {kind} | {len(in_flight)} | {sum(in_flight)} |"
        yield ""
        yield "| Seconds | n | p50 | p99 | longest |"
        yield "|---|---:|---:|---:|---:|"
        for name, measurement in sorted(self.measurements.items()):
            if measurement.values:
                yield (
                    f"| {name} | {len(measurement.values):,} | {measurement.at(0.5):.3f} | {measurement.at(0.99):.3f} "
                    f"| {measurement.at(1):.3f} |"
                )
        for name in self.broken:
            yield ""
            yield f"BROKEN {self.promises[name].broken} times: {PROMISES[name]}"
            yield from self.promises[name].examples


def check_history(events: Iterable[AnyEvent], *, database_only: Collection[str] = ()) -> Report:
    """Check a complete history in the order of time. `database_only`: faults that affect the database alone."""
    by_type: dict[type, list[AnyEvent]] = defaultdict(list)
    followed: dict[tuple[str, str], list[AnyEvent]] = defaultdict(list)
    for event in events:
        by_type[type(event)].append(event)
        if isinstance(event, SubscriptionBegan | Received | CaughtUp | GapAnnounced):
            followed[event.subscriber, event.pattern].append(event)
    report = Report()
    history = _History(by_type)
    _count_events(history, report)
    log = _Log(history, report)
    _check_publishes(history, log, report)
    for (subscriber, pattern), its in followed.items():
        _check_subscription(subscriber, pattern, its, history, log, report)
    times = _Times(history)
    _check_promptness(history, times, report)
    _check_permissions(history, times, report)
    _check_connections(history, times, database_only, report)
    _check_notice(history, report)
    _check_ephemeral(history, report)
    _measure_recovery(history, report)
    return report


class _History:
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
        self.faults: list[FaultBegan] = of(FaultBegan)
        self.fault_ends: dict[int, float] = {event.number: event.at for event in of(FaultEnded)}
        self.database_status: list[DatabaseStatusLogged] = of(DatabaseStatusLogged)
        self.role_changes: list[RoleChanged] = of(RoleChanged)
        self.entries: list[LogEntry] = of(LogEntry)
        self.epochs: list[LogEpoch] = of(LogEpoch)
        self.run_ended: list[RunEnded] = of(RunEnded)

    def end(self, fault: FaultBegan) -> float:
        return self.fault_ends.get(fault.number, float("inf"))


def _count_events(history: _History, report: Report) -> None:
    for fault in history.faults:
        report.faults.setdefault(fault.kind, []).append(fault.in_flight)
    report.counts = {
        "faults": len(history.faults),
        "changes of roles": len(history.role_changes),
        "messages published": len(history.published),
        "messages in the log": len(history.entries),
        "messages received": len(history.received),
        "gaps announced": len(history.gaps),
        "connections lost": len(history.connections_lost),
        "epochs": len(history.epochs),
        "acknowledged messages that were lost with their database": 0,
    }


# The log


class _Log:
    """The content of the log in each epoch.

    The entries of the database survived every failover, so they are in the log of the epoch in which they were
    appended and of all later ones. A message that only subscribers have seen was in the log of the epoch in which they
    saw it, and of earlier epochs as far as those share the log.
    """

    def __init__(self, history: _History, report: Report) -> None:
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
        self._views: list[dict[int, tuple[str, Message]]] = [{} for _ in self.afters]
        self._matching: dict[tuple[int, str], array[int]] = {}
        for entry in history.entries:
            self.places.setdefault(entry.message, []).append(entry.seq)
            self.known.add(entry.message)
            for ordinal in range(self.ordinals[entry.epoch], len(self.afters)):
                self._views[ordinal][entry.seq] = entry.channel, entry.message
        agreed = report.promises["agreed"]
        for event in history.received:
            if event.seq:
                self._add_received(event, agreed)
        for gap in history.gaps:
            if gap.epoch in self.ordinals:
                ordinal = self.ordinals[gap.epoch]
                self.seen[ordinal] = min(self.seen[ordinal], gap.at)

    def _add_received(self, event: Received, agreed: Promise) -> None:
        seq, what = event.seq, (event.channel, event.message)
        ordinal = self.ordinals.get(event.epoch)
        if ordinal is None:
            agreed.check(False, "unknown epoch: {}", event)
            return
        self.seen[ordinal] = min(self.seen[ordinal], event.at)
        self.sent.setdefault((ordinal, seq), event.sent)
        known = self._views[ordinal].setdefault(seq, what)
        agreed.check(known == what, "other clients received {}: {}", known, event)
        while ordinal and seq <= self.afters[ordinal]:
            ordinal -= 1
            self._views[ordinal].setdefault(seq, what)

    def holds(self, seq: int, message: Message) -> bool:
        """Return whether the message had this seq in the log of any epoch."""
        if seq in self.places.get(message, ()):
            return True
        return any(view.get(seq, ("", None))[1] == message for view in self._views)

    def is_lost(self, seq: int, at: float) -> bool:
        """Return whether a message with this seq (0: unknown) may have been lost with the database at that time."""
        later = zip(self.afters[1:], self.seen[1:], strict=True)
        return any((not seq or seq > after) and at <= seen + RECOVERY_TIME for after, seen in later)

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
            for seq, (channel, _) in self._views[ordinal].items():
                if channel not in fits:
                    fits[channel] = any(matches(each, channel) for each in pattern.split())
                if fits[channel]:
                    found.append(seq)
            seqs = self._matching[ordinal, pattern] = array("q", sorted(found))
        return list(seqs[bisect_right(seqs, after) : bisect_right(seqs, last)])


# Publishing


def _check_publishes(history: _History, log: _Log, report: Report) -> None:
    acknowledged, refused = report.promises["acknowledged"], report.promises["refused"]
    latency = report.measurement("publish to acknowledgement")
    handed = {(event.publisher, event.number): event.at for event in history.published}
    for event in history.answered:
        message = event.publisher, event.number
        if event.refusal:
            if event.refusal != "unknown":
                refused.check(message not in log.known, "in the log under {}: {}", log.places.get(message), event)
            continue
        latency.values.append(event.at - handed[message])
        held = log.holds(event.seq, message) if event.seq else message in log.places
        if not held and log.is_lost(event.seq, event.at):
            report.counts["acknowledged messages that were lost with their database"] += 1
        else:
            acknowledged.check(held, "in the log under {}: {}", log.places.get(message), event)
    once, ordered = report.promises["once"], report.promises["ordered"]
    for message, seqs in log.places.items():
        once.check(len(seqs) == 1, "{} is in the log under {}", message, seqs)
    last: dict[str, int] = {}
    given_up = {(event.publisher, event.number) for event in history.answered if event.refusal == "unknown"}
    for seq in sorted(log.kept):
        publisher, number = log.kept[seq].message
        if (publisher, number) in given_up:
            # After `unknown` the publisher continued, so this message may follow later ones.
            continue
        before = last.get(publisher, 0)
        if number != before:
            ordered.check(number > before, "{}'s {} has seq {}, behind its {}", publisher, number, seq, before)
        last[publisher] = max(number, before)


# Subscriptions


def _check_subscription(
    subscriber: str, pattern: str, events: list[AnyEvent], history: _History, log: _Log, report: Report
) -> None:
    """Check what a subscription received. It is complete up to `position` in the epoch number `ordinal`."""
    promises = report.promises
    ordinal = position = -1
    who = f"{subscriber} to {pattern}"

    def enter_epoch(event: Received | CaughtUp | SubscriptionBegan | GapAnnounced) -> bool:
        """Continue in the event's epoch. Returns False, and records a violation, if that is not allowed."""
        nonlocal ordinal
        there = log.ordinals.get(event.epoch, -1)
        if there == ordinal:
            return True
        right = there > ordinal and position <= log.same_up_to(ordinal, there)
        promises["whole"].check(
            right, "{}: from {} of epoch {} to epoch {} without a gap: {}", who, position, ordinal, there, event
        )
        ordinal = there
        return right and there >= 0

    def check_nothing_missing(last: int, event: AnyEvent) -> None:
        lacks = log.missing(ordinal, pattern, position, last)
        promises["whole"].check(not lacks, "{}, complete up to {}, lacks {}: {}", who, position, lacks[:5], event)

    for event in events:
        if isinstance(event, Received):
            if not event.seq:
                continue
            if enter_epoch(event):
                promises["increasing"].check(event.seq > position, "{}, at {} already: {}", who, position, event)
                check_nothing_missing(event.seq - 1, event)
            position = event.seq
        elif isinstance(event, GapAnnounced):
            there = log.ordinals.get(event.epoch, -1)
            if event.reason == "retention" and enter_epoch(event):
                check_nothing_missing(event.first - 1, event)
                for seq in log.missing(ordinal, pattern, position, event.last):
                    sent = log.sent.get((ordinal, seq), 0.0)
                    promises["kept"].check(
                        event.at - sent > RETENTION, "{}: {} of {} is said to be gone: {}", who, seq, sent, event
                    )
            ordinal, position = there, event.last
        elif isinstance(event, SubscriptionBegan) and position < 0:
            ordinal, position = log.ordinals.get(event.epoch, -1), event.cursor
        elif isinstance(event, SubscriptionBegan | CaughtUp):
            seq = event.cursor if isinstance(event, SubscriptionBegan) else event.seq
            if enter_epoch(event):
                check_nothing_missing(seq, event)
            position = max(position, seq)
    for end in history.run_ended:
        if subscriber in end.stayed:
            there = log.ordinals.get(end.epoch, -1)
            arrived = position if there == ordinal else min(position, log.same_up_to(ordinal, there))
            lacks = log.missing(there, pattern, arrived, end.head)
            promises["complete"].check(
                not lacks, "{}, complete up to {}, lacks {} of {}: {}", who, position, len(lacks), end.head, lacks[:5]
            )


# Time


class _Times:
    """The times at which faults were active."""

    def __init__(self, history: _History) -> None:
        self.faults = [(fault.at, history.end(fault), fault) for fault in history.faults]

    def under_way(self, begin: float, end: float) -> list[FaultBegan]:
        """Return the faults that were active at any time between the two."""
        return [fault for began, ended, fault in self.faults if began <= end and ended >= begin]

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


def _check_promptness(history: _History, times: _Times, report: Report) -> None:
    """Check latencies, except of slow subscribers and of subscribers whose permissions change."""
    is_calm, prompt = times.calm(), report.promises["prompt"]
    latency = report.measurement("commit to receipt, while nothing is wrong")
    for event in history.received:
        if event.seq and not event.subscriber.startswith("slow") and "/" not in event.subscriber and is_calm(event.at):
            took = event.at - event.sent
            prompt.check(took <= PROMPT_LIMIT, "{:.1f} s: {}", took, event)
            latency.values.append(took)


def _check_permissions(history: _History, times: _Times, report: Report) -> None:
    """Check clients named "role/...", which have that role's permissions."""
    readable, writable = report.promises["readable"], report.promises["writable"]
    gotten: dict[str, list[Received]] = defaultdict(list)
    for received in history.received:
        role, slash, _ = received.subscriber.partition("/")
        if slash:
            gotten[role].append(received)
    handed = {(event.publisher, event.number): event.at for event in history.published}
    taken: dict[str, list[tuple[float, Answered]]] = defaultdict(list)
    for answer in history.answered:
        role, slash, _ = answer.publisher.partition("/")
        if slash and answer.seq:
            taken[role].append((handed[answer.publisher, answer.number], answer))
    changes: dict[str, list[RoleChanged]] = defaultdict(list)
    for change in history.role_changes:
        changes[change.role].append(change)
    for role, its in changes.items():
        for before, change, after in _withdrawals(its, lambda grant: grant.read):
            del before
            if times.under_way(change.began - PROMPT_LIMIT, change.at + REVOCATION_LIMIT):
                continue
            reads = [event for event in gotten[role] if change.at < event.at < after]
            late = [event for event in reads if event.at > change.at + REVOCATION_LIMIT]
            readable.check(not late, "withdrawn at {}: {}", change.at, late[:1])
            report.measurement("permission withdrawn to the last message").values.append(
                max((event.at for event in reads), default=change.at) - change.at
            )
            announced = [
                e.at for e in history.revocations if e.subscriber.startswith(f"{role}/") and change.began < e.at < after
            ]
            report.measurement("permission withdrawn to `revoked`").values.extend(
                max(at - change.at, 0) for at in announced
            )
        for _, change, after in _withdrawals(its, lambda grant: grant.write):
            if times.under_way(change.began - PROMPT_LIMIT, change.at + REVOCATION_LIMIT):
                continue
            wrong = [answer for at, answer in taken[role] if change.at + REVOCATION_LIMIT < at and answer.at < after]
            writable.check(not wrong, "withdrawn at {}: {}", change.at, wrong[:1])


def _withdrawals(
    changes: list[RoleChanged], of: Callable[[RoleChanged], tuple[str, ...]]
) -> Iterator[tuple[RoleChanged | None, RoleChanged, float]]:
    """Yield each withdrawal with the change before it and the time at which the permission may have returned."""
    before: RoleChanged | None = None
    for index, change in enumerate(changes):
        if (before is None or of(before)) and not of(change):
            after = next((later.began for later in changes[index:] if of(later)), float("inf"))
            yield before, change, after
        before = change


def _check_connections(history: _History, times: _Times, database_only: Collection[str], report: Report) -> None:
    connected = report.promises["connected"]
    connected.checked = sum(fault.kind in database_only for fault in history.faults)
    for event in history.connections_lost:
        guilty = times.under_way(event.at - RECOVERY_TIME, event.at)
        if all(fault.kind in database_only for fault in guilty):
            connected.broken += 1
            connected.examples.append(f"{event} while there was {[fault.kind for fault in guilty]}")
    del connected.examples[MAX_EXAMPLES:]


def _check_notice(history: _History, report: Report) -> None:
    noticed = report.promises["noticed"]
    said: dict[str, list[DatabaseStatusLogged]] = defaultdict(list)
    for event in history.database_status:
        said[event.replica].append(event)
    for fault in history.faults:
        if fault.kind in ("listener cut", "listener silent", "database cut off"):
            end = history.end(fault)
            before = [event for event in said[fault.replica] if event.at <= fault.at][-1:]
            during = [
                event for event in said[fault.replica] if fault.at < event.at <= max(end, fault.at + REVOCATION_LIMIT)
            ]
            away = [event.at - fault.at for event in during if not event.available]
            if before and before[0].available and away:
                report.measurement(f"{fault.kind} to noticed").values.append(away[0])
            if end - fault.at > PROMPT_LIMIT:
                # If another fault was noticed before, the replica only has to remain in that state.
                in_time = [event for event in (*before, *during) if event.at <= fault.at + PROMPT_LIMIT][-1:]
                noticed.check(in_time and not in_time[0].available, "{}, at first, and then: {}", fault, during[:3])


def _check_ephemeral(history: _History, report: Report) -> None:
    seen: set[tuple[str, int, str, Message]] = set()
    for event in history.received:
        if not event.seq and event.session:
            key = event.subscriber, event.session, event.pattern, event.message
            report.promises["ephemeral"].check(key not in seen, "again: {}", event)
            seen.add(key)


def _measure_recovery(history: _History, report: Report) -> None:
    """Measure from a fault to the first current message of clients that lost their connection and may always read."""
    fresh: dict[str, list[float]] = defaultdict(list)
    for event in history.received:
        if event.seq and "/" not in event.subscriber and event.at - event.sent <= FRESH_AGE:
            fresh[event.subscriber].append(event.at)
    for fault in history.faults:
        if fault.kind not in ("replica killed", "network cut"):
            continue
        end = history.end(fault)
        for lost in history.connections_lost:
            if lost.replica == fault.replica and fault.at <= lost.at <= end and lost.client in fresh:
                index = bisect_right(fresh[lost.client], lost.at)
                if index < len(fresh[lost.client]):
                    took = fresh[lost.client][index] - fault.at
                    report.measurement(f"{fault.kind} to caught up").values.append(took)
