"""Checks of counters, of live maps and of the consumer's effects. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

from tests.consumers.exactly_once import compare

from .history import REMOVAL, MapShown, Message
from .log_views import EventsByType, LogViews
from .report import Report

COUNTERS = "counters."
"""What the names of channels begin with whose messages are all retained."""
CONSUMED = "orders."
"""What the names of channels begin with whose messages the consumer processes."""
EPOCH_LAG = 5.0
"""Seconds for which a map may show a new epoch before any subscription was told of it."""

State = tuple[tuple[str, int], ...]
"""The channels that have a retained message, in order, each with its seq."""


def check_counters(history: EventsByType, log: LogViews, report: Report) -> None:
    """Check that each increment follows on the message that it expects, and that others got `conflict`."""
    counted, conflicts = report.promises["counted"], report.promises["conflicts"]
    increments = {(event.publisher, event.number): event for event in history.published if event.expect is not None}
    for view in log.views:
        newest: dict[str, tuple[int, Message | None, int]] = {}
        last, whole = 0, True
        for seq in sorted(view):
            channel, message = view[seq]
            if seq != last + 1:
                # Messages that nobody has seen were lost here.
                newest, whole = {}, False
            last = seq
            if not channel.startswith(COUNTERS):
                continue
            if message == REMOVAL:
                newest[channel] = 0, None, 0
                continue
            increment = increments[message]
            if whole or channel in newest:
                before, read, value = newest.get(channel, (0, None, 0))
                follows = increment.expect == before
                if increment.read == read:
                    follows = follows and increment.value == value + 1
                else:
                    # In a new epoch, another message may have the seq that a writer has read.
                    follows = follows and log.changed_after(increment.at)
                counted.check(follows, "{} at {} follows {} at {} with {}", increment, seq, read, before, value)
            newest[channel] = seq, message, increment.value
    for event in history.answered:
        if event.refusal == "conflict":
            increment = increments[event.publisher, event.number]
            conflicts.check(event.seq != increment.expect, "{} got {}", increment, event)
            exists = not event.seq or any(view.get(event.seq, ("",))[0] == increment.channel for view in log.views)
            conflicts.check(exists or log.is_lost(event.seq, event.at), "no such message: {}", event)


class _Folds:
    """The states of a map that is fed with the retained messages of one epoch, in order."""

    def __init__(self, view: dict[int, tuple[str, Message]]) -> None:
        self.begins: dict[State, list[int]] = {(): [0]}
        """The seqs at which each state begins."""
        self.last: State = ()
        newest: dict[str, int] = {}
        for seq in sorted(view):
            channel, message = view[seq]
            if channel.startswith(COUNTERS):
                newest.pop(channel, None)
                if message != REMOVAL:
                    newest[channel] = seq
                self.last = tuple(sorted(newest.items()))
                self.begins.setdefault(self.last, []).append(seq)

    def find(self, state: State, position: int) -> int | None:
        """Return the first seq at which a state begins, at `position` or after it."""
        seqs = self.begins.get(state, [])
        index = bisect_left(seqs, position)
        return seqs[index] if index < len(seqs) else None


def check_maps(history: EventsByType, log: LogViews, report: Report) -> None:
    """Check that each map always shows a state of the log, in order, and in the end the newest one."""
    promise = report.promises["mapped"]
    folds = [_Folds(view) for view in log.views]
    shown: dict[str, list[MapShown]] = defaultdict(list)
    for event in history.maps:
        shown[event.watcher].append(event)
    for watcher, its in shown.items():
        ordinal = position = 0
        for event in its:
            state = _state(event)
            found = None
            for epoch in range(ordinal, len(folds)):
                if epoch == ordinal or log.seen[epoch] <= event.at + EPOCH_LAG:
                    found = folds[epoch].find(state, position if epoch == ordinal else 0)
                    if found is not None:
                        ordinal, position = epoch, found
                        break
            promise.check(found is not None, "no state after {} of epoch {}: {}", position, ordinal, event)
        for end in history.run_ended:
            if watcher in end.stayed:
                newest = folds[log.ordinals[end.epoch]].last
                promise.check(_state(its[-1]) == newest, "{} shows {} in the end, not {}", watcher, its[-1], newest)


def _state(event: MapShown) -> State:
    return tuple(sorted((channel, seq) for channel, (seq, *_) in event.shown.items()))


def check_effects(history: EventsByType, report: Report) -> None:
    """Check that each message of the consumer has one effect, and that those of a channel are in its order."""
    processed = report.promises["processed"]
    published = sorted(
        ((entry.seq, entry.channel, str(entry.message)) for entry in history.entries),
        key=lambda entry: (entry[1], entry[0]),
    )
    published = [entry for entry in published if entry[1].startswith(CONSUMED)]
    effects = sorted(
        ((effect.seq, effect.channel, str(effect.message)) for effect in history.effects), key=lambda effect: effect[1]
    )
    processed.checked += len(published)
    for error in compare(published, effects):
        processed.check(False, error.replace("{", "{{").replace("}", "}}"))
