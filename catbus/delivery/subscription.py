"""A subscription: which entries it wants, and how they get into its send queue. Pure: the log is read elsewhere."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import attrgetter

from ..log import Entry
from ..protocol.wire_messages import Gap, Live, encode
from .send_queue import OVERHEAD, EncodedMessages, SendQueue, SubscriptionLine
from .topic_tree import Group, TopicTree

PAGE_ROWS = 4000
"""Entries of the log that are read at once."""

_seq = attrgetter("seq")


class Subscription:
    """What one session wants to hear of, and how far it has heard it.

    A session of `catbus.v1` has one for each pattern. A first-version session has a single one for all its patterns,
    which is why it gets one copy of a message however many of them match.
    """

    __slots__ = (
        "cursor",
        "lagging",
        "live_line_due",
        "marked",
        "overlapping",
        "patterns",
        "producer",
        "rows",
        "send_datagram",
        "send_queue",
        "stalled",
    )

    def __init__(
        self, send_queue: SendQueue, producer: bytes = b"", send_datagram: Callable[[bytes], bool] | None = None
    ) -> None:
        self.send_queue = send_queue
        self.producer = producer
        self.send_datagram = send_datagram
        """How ephemeral messages go that fit into a datagram, past the send queue; False for one that does not fit."""
        self.patterns: dict[str, int] = {}
        """Each pattern, and the seq after which its messages are wanted."""
        self.overlapping = False
        """Whether there are several of them."""
        self.lagging = False
        self.cursor = 0
        """Complete up to here; kept only while late."""
        self.stalled = False
        """Late, and waiting for its send queue to be emptied."""
        self.rows = PAGE_ROWS
        """How many entries of the log it is worth reading for it at a time."""
        self.live_line_due = False
        self.marked = 0
        """The newest seq up to which a `head` has called it complete."""

    def say(self, mark: Gap | Live) -> None:
        line = encode(mark, self.send_queue.protocol)
        if line is not None:
            self.send_queue.put(SubscriptionLine(line, mark.pattern))


class PatternMatches:
    """What one pattern matched in a page; every stretch of it that somebody needs is encoded once."""

    def __init__(self, pattern: str, entries: Sequence[Entry]) -> None:
        self.pattern = pattern
        self.entries = entries
        self.origins = {entry.origin for entry in entries}
        self._ends = list(accumulate(entry.size + OVERHEAD + len(pattern) for entry in entries))
        self._runs: dict[tuple[int, int], EncodedMessages] = {}

    def cut(self, cursor: int, send_queue: SendQueue, last: int) -> tuple[EncodedMessages | None, int]:
        """What goes into the send queue of what stands after `cursor`, and up to where that is complete.

        An empty send queue gets one message at least, whatever its size.
        """
        entries, ends = self.entries, self._ends
        start = bisect_right(entries, cursor, key=_seq)
        if start == len(entries):
            return None, last
        stop = bisect_right(ends, (ends[start - 1] if start else 0) + send_queue.room, lo=start)
        if stop == start and not send_queue:
            stop += 1
        complete = last if stop == len(entries) else entries[stop].seq - 1
        if stop == start:
            return None, complete
        run = self._runs.get((start, stop))
        if run is None:
            run = self._runs[start, stop] = EncodedMessages(self.pattern, entries[start:stop])
        return run, complete


def find_hits(tree: TopicTree[Subscription], entries: Sequence[Entry]) -> dict[Group[Subscription], list[Entry]]:
    """Which groups want which of the entries, in order."""
    matches: dict[Group[Subscription], list[Entry]] = {}
    match = tree.match
    for entry in entries:
        for group in match(entry.channel):
            if group in matches:
                matches[group].append(entry)
            else:
                matches[group] = [entry]
    return matches


def offer(tree: TopicTree[Subscription], entries: Sequence[Entry]) -> list[Subscription]:
    """Offer entries to all who want them: each gets all of its own or none. Returns those who had no room."""
    turned_away: list[Subscription] = []
    overlapping: dict[Subscription, list[tuple[str, Sequence[Entry]]]] = {}
    for group, hits in find_hits(tree, entries).items():
        shared = run = EncodedMessages(group.pattern, hits)
        origins = {entry.origin for entry in hits if entry.origin is not None}
        for subscription in group.members:
            if subscription.overlapping:
                overlapping.setdefault(subscription, []).append((group.pattern, hits))
                continue
            if origins:
                mine = subscription.producer in origins
                run = EncodedMessages(group.pattern, without(hits, subscription.producer)) if mine else shared
            if not subscription.send_queue.offer(run):
                turned_away.append(subscription)
    for subscription, found in overlapping.items():
        wanted = without(merge(subscription, found), subscription.producer)
        if not subscription.send_queue.offer(EncodedMessages("", wanted)):
            turned_away.append(subscription)
    return turned_away


def merge(subscription: Subscription, found: Sequence[tuple[str, Sequence[Entry]]]) -> list[Entry]:
    """What several patterns of one subscription matched, in order and once."""
    starts = subscription.patterns
    wanted = {e.seq: e for pattern, hits in found for e in hits if e.seq > starts[pattern]}
    return sorted(wanted.values(), key=_seq)


def without(entries: Sequence[Entry], producer: bytes) -> list[Entry]:
    """The entries but for those that this producer asked not to get back."""
    return [entry for entry in entries if entry.origin != producer]
