"""Subscriptions: their patterns, cursor and state, and how entries get into their send queues. Pure: no I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from operator import attrgetter

from ..log import Entry
from ..protocol.wire_messages import Gap, Live, encode
from .send_queue import EncodedMessages, SendQueue, SubscriptionLine
from .topic_tree import Group, TopicTree

PAGE_ROWS = 4000
"""Entries of the log that are read at once at most."""

_seq = attrgetter("seq")


class SubscriptionState(Enum):
    """How a subscription gets its messages. Only `Delivery` changes it. In all states but the first two it lags."""

    CLOSED = auto()
    """Not at all: it has no patterns."""
    LIVE = auto()
    """As they are committed. It is complete up to `Delivery.position`."""
    READING = auto()
    """From the log, in pages that all lagging subscriptions share."""
    WAITING = auto()
    """From the log, as soon as its send queue has been emptied."""
    AHEAD = auto()
    """Its cursor is above `Delivery.position`: another replica has delivered more than this one knows."""


CLOSED, LIVE, READING, WAITING, AHEAD = SubscriptionState


class Subscription:
    """One session's interest in one or more patterns, with one cursor.

    A session of `catbus.v1` has a subscription for each pattern. A first-version session has one for all its patterns,
    so it gets one copy of a message, however many of its patterns match.
    """

    __slots__ = (
        "cursor",
        "head_sent",
        "live_line_due",
        "overlapping",
        "patterns",
        "producer",
        "rows",
        "send_datagram",
        "send_queue",
        "state",
    )

    def __init__(
        self, send_queue: SendQueue, producer: bytes = b"", send_datagram: Callable[[bytes], bool] | None = None
    ) -> None:
        self.send_queue = send_queue
        self.producer = producer
        self.send_datagram = send_datagram
        """Sends an ephemeral message as a datagram, past the send queue. Returns False for one that does not fit."""
        self.state = CLOSED
        self.patterns: dict[str, int] = {}
        """Each pattern, and the seq after which its messages are wanted."""
        self.overlapping = False
        """Whether it has several patterns."""
        self.cursor = 0
        """The seq up to which it is complete; valid only while it lags."""
        self.rows = PAGE_ROWS
        """Entries to read from the log for it at a time: not many more than its send queue has room for."""
        self.live_line_due = False
        """Whether its client is told when it is live again."""
        self.head_sent = 0
        """The seq of the last `head` that was sent on its own stream."""

    @property
    def lagging(self) -> bool:
        """Whether it catches up from the log."""
        return self.state is not LIVE and self.state is not CLOSED

    def add_pattern(self, pattern: str, after: int) -> None:
        """Want the messages of a pattern after a seq."""
        self.patterns[pattern] = after
        self.overlapping = len(self.patterns) > 1

    def remove_pattern(self, pattern: str) -> None:
        """Want nothing more of a pattern, if it is here."""
        self.patterns.pop(pattern, None)
        self.overlapping = len(self.patterns) > 1

    def put(self, reply: Gap | Live) -> None:
        """Put a line about its position into its send queue. The first version of the protocol has no such lines."""
        line = encode(reply, self.send_queue.protocol)
        if line is not None:
            self.send_queue.put(SubscriptionLine(line, reply.pattern))


def find_hits(tree: TopicTree[Subscription], entries: Sequence[Entry]) -> dict[Group[Subscription], list[Entry]]:
    """Return the groups that match, each with its entries in order."""
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
    """Offer entries to the subscriptions that match: all or none to each. Return those without room."""
    rejected: list[Subscription] = []
    overlapping: dict[Subscription, list[tuple[str, Sequence[Entry]]]] = {}
    for group, hits in find_hits(tree, entries).items():
        shared = encoded = EncodedMessages(group.pattern, hits)
        origins = {entry.origin for entry in hits if entry.origin is not None}
        for subscription in group.members:
            if subscription.overlapping:
                overlapping.setdefault(subscription, []).append((group.pattern, hits))
                continue
            if origins:
                mine = subscription.producer in origins
                encoded = EncodedMessages(group.pattern, without(hits, subscription.producer)) if mine else shared
            if not subscription.send_queue.offer(encoded):
                rejected.append(subscription)
    for subscription, found in overlapping.items():
        wanted = without(merge(subscription, found), subscription.producer)
        if not subscription.send_queue.offer(EncodedMessages("", wanted)):
            rejected.append(subscription)
    return rejected


def merge(subscription: Subscription, found: Sequence[tuple[str, Sequence[Entry]]]) -> list[Entry]:
    """Return the entries that several patterns of one subscription match, each once and in order."""
    starts = subscription.patterns
    wanted = {e.seq: e for pattern, hits in found for e in hits if e.seq > starts[pattern]}
    return sorted(wanted.values(), key=_seq)


def without(entries: Sequence[Entry], producer: bytes) -> list[Entry]:
    """Return the entries without those of this producer that it asked not to get back."""
    return [entry for entry in entries if entry.origin != producer]
