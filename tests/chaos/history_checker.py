"""Checks a recorded history against the promises. Pure: a history in, a report out."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator

from .history import (
    REMOVAL,
    Answered,
    AnyEvent,
    CaughtUp,
    DatabaseStatusLogged,
    GapAnnounced,
    Message,
    Received,
    RoleChanged,
    SubscriptionBegan,
)
from .log_views import RECOVERY_TIME, EventsByType, FaultTimes, LogViews
from .member_checks import check_members
from .report import MAX_EXAMPLES, Report
from .state_checks import check_counters, check_effects, check_maps

RETENTION = 30.0
"""Minimum time in seconds for which messages stay in the log of a chaos run."""

PROMPT_LIMIT = 5.0
"""Seconds within which a message arrives, and within which a dead database connection is detected."""

REVOCATION_LIMIT = 1.0
"""Seconds after which a withdrawn permission has no effect."""

FRESH_AGE = 0.25
"""Maximum age in seconds of a message that shows its receiver to have caught up."""


def check_history(events: Iterable[AnyEvent], *, database_only: Collection[str] = ()) -> Report:
    """Check a complete history in the order of time. `database_only`: faults that affect the database alone."""
    by_type: dict[type, list[AnyEvent]] = defaultdict(list)
    followed: dict[tuple[str, str], list[AnyEvent]] = defaultdict(list)
    for event in events:
        by_type[type(event)].append(event)
        if isinstance(event, SubscriptionBegan | Received | CaughtUp | GapAnnounced):
            followed[event.subscriber, event.pattern].append(event)
    report = Report()
    history = EventsByType(by_type)
    _count_events(history, report)
    log = LogViews(history, report)
    _check_publishes(history, log, report)
    for (subscriber, pattern), its in followed.items():
        _check_subscription(subscriber, pattern, its, history, log, report)
    times = FaultTimes(history)
    _check_promptness(history, times, report)
    _check_permissions(history, times, report)
    _check_connections(history, times, database_only, report)
    _check_notice(history, report)
    _check_ephemeral(history, report)
    check_counters(history, log, report)
    check_maps(history, log, report)
    check_members(history, times, report)
    check_effects(history, report)
    _measure_recovery(history, report)
    return report


def _count_events(history: EventsByType, report: Report) -> None:
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


# Publishing


def _check_publishes(history: EventsByType, log: LogViews, report: Report) -> None:
    acknowledged, refused = report.promises["acknowledged"], report.promises["refused"]
    latency = report.measurement("publish to acknowledgement")
    handed = {(event.publisher, event.number): event.at for event in history.published}
    for event in history.answered:
        message = event.publisher, event.number
        if event.refusal:
            # A log that was set back can have the expected message again while an attempt is on its way.
            open_again = event.refusal == "conflict" and log.changed_after(handed[message])
            if event.refusal != "unknown":
                refused.check(
                    open_again or message not in log.known, "in the log under {}: {}", log.places.get(message), event
                )
            continue
        latency.values.append(event.at - handed[message])
        held = log.holds(event.seq, message) if event.seq else message in log.places
        if not held and log.is_lost(event.seq, event.at):
            report.counts["acknowledged messages that were lost with their database"] += 1
        else:
            acknowledged.check(held, "in the log under {}: {}", log.places.get(message), event)
    once, ordered = report.promises["once"], report.promises["ordered"]
    for message, seqs in log.places.items():
        if message != REMOVAL:
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
    subscriber: str, pattern: str, events: list[AnyEvent], history: EventsByType, log: LogViews, report: Report
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


def _check_promptness(history: EventsByType, times: FaultTimes, report: Report) -> None:
    """Check latencies, except of slow subscribers and of subscribers whose permissions change."""
    is_calm, prompt = times.calm(), report.promises["prompt"]
    latency = report.measurement("commit to receipt, while nothing is wrong")
    for event in history.received:
        if event.seq and not event.subscriber.startswith("slow") and "/" not in event.subscriber and is_calm(event.at):
            took = event.at - event.sent
            prompt.check(took <= PROMPT_LIMIT, "{:.1f} s: {}", took, event)
            latency.values.append(took)


def _check_permissions(history: EventsByType, times: FaultTimes, report: Report) -> None:
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


def _check_connections(
    history: EventsByType, times: FaultTimes, database_only: Collection[str], report: Report
) -> None:
    connected = report.promises["connected"]
    connected.checked = sum(fault.kind in database_only for fault in history.faults)
    for event in history.connections_lost:
        guilty = times.under_way(event.at - RECOVERY_TIME, event.at)
        if all(fault.kind in database_only for fault in guilty):
            connected.broken += 1
            connected.examples.append(f"{event} while there was {[fault.kind for fault in guilty]}")
    del connected.examples[MAX_EXAMPLES:]


def _check_notice(history: EventsByType, report: Report) -> None:
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


def _check_ephemeral(history: EventsByType, report: Report) -> None:
    seen: set[tuple[str, int, str, Message]] = set()
    for event in history.received:
        if not event.seq and event.session:
            key = event.subscriber, event.session, event.pattern, event.message
            report.promises["ephemeral"].check(key not in seen, "again: {}", event)
            seen.add(key)


def _measure_recovery(history: EventsByType, report: Report) -> None:
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
