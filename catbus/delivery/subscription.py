"""Subscriptions: their patterns, cursor and state, and how entries get into their send queues. Pure: no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Sequence
from enum import Enum, auto
from operator import attrgetter

from ..log import Entry
from ..protocol.server_sent_events import encode_reply
from ..protocol.wire_messages import Gap, Live, ProtocolVersion
from .encoded_messages import EncodedMessages
from .reply_lines import SubscriptionLine
from .send_queue import SendQueue
from .snapshot_page import SnapshotPosition
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
    """Its cursor, or what its snapshot shows, is above `Delivery.position`: this replica has to receive more first."""
    HELD = auto()
    """Nothing of the log, until it has got the rest of its snapshot of the retained messages."""


CLOSED, LIVE, READING, WAITING, AHEAD, HELD = SubscriptionState


class Subscription:
    """One session's interest in one or more patterns, with one cursor.

    A session of `catbus.v1` has a subscription for each pattern. A first-version session and an event stream have one
    for all their patterns, so they get one copy of a message, however many of the patterns match.
    """

    __slots__ = (
        "client",
        "cursor",
        "head_sent",
        "live_line_due",
        "merge_key",
        "patterns",
        "producer",
        "retained",
        "rows",
        "send_datagram",
        "send_queue",
        "snapshot",
        "snapshot_cursor",
        "snapshot_head",
        "started_after",
        "state",
        "taken",
    )

    def __init__(
        self,
        send_queue: SendQueue,
        producer: bytes = b"",
        send_datagram: Callable[[bytes], bool] | None = None,
        taken: deque[Entry] | None = None,
        *,
        retained: bool = False,
        client: Hashable = None,
    ) -> None:
        self.send_queue = send_queue
        self.retained = retained
        """Whether a gap is followed by a snapshot of the retained messages."""
        self.client = client
        """The client with which it shares its turns of reading snapshots; by default it shares them with none."""
        self.taken = taken
        """Messages that were taken from the send queue and not handed on, of a subscription in this process."""
        self.producer = producer
        self.send_datagram = send_datagram
        """Sends an ephemeral message as a datagram, past the send queue. Returns False for one that does not fit."""
        self.state = CLOSED
        self.patterns: dict[str, int] = {}
        """Each pattern, and the seq after which its messages are wanted; 0 in an event stream, whose cursor says it."""
        self.started_after = 0
        """The seq after which the messages of an event stream are wanted."""
        self.merge_key: Hashable = None
        """Set if its messages are merged from several patterns. Subscriptions with the same key get the same ones."""
        self.cursor = 0
        """The seq up to which it is complete; valid only while it lags."""
        self.snapshot: SnapshotPosition | None = None
        """Where its snapshot continues, before anything of the log is read for it; None without one."""
        self.snapshot_cursor = 0
        """The cursor of its last snapshot."""
        self.snapshot_head = 0
        """The seq up to which it needs messages before what it got of its last snapshot is a state."""
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

    def add_patterns(self, patterns: Collection[str], after: int) -> None:
        """Want the messages of these patterns after a seq. An event stream gets all of its patterns in one call."""
        self.started_after = after
        # Event streams share what is merged of a page, whatever their cursors are.
        self.patterns.update(dict.fromkeys(patterns, 0 if self.is_event_stream else after))
        self._update_merge_key()

    def wanted_after(self, pattern: str) -> int:
        """Return the seq after which messages of one of its patterns are wanted."""
        return self.started_after if self.is_event_stream else self.patterns[pattern]

    def remove_pattern(self, pattern: str) -> None:
        """Want nothing more of a pattern, if it is here."""
        self.patterns.pop(pattern, None)
        self._update_merge_key()

    def _update_merge_key(self) -> None:
        if self.is_event_stream:
            self.merge_key = frozenset(self.patterns)
        else:
            # The patterns of a first-version session begin at different seqs, so no other subscription gets the same.
            self.merge_key = self if len(self.patterns) > 1 else None

    @property
    def is_event_stream(self) -> bool:
        return self.send_queue.protocol is ProtocolVersion.EVENTS

    @property
    def named_patterns(self) -> Collection[str]:
        """The patterns that lines about its position name. An event stream has one position for all its patterns."""
        return ("",) if self.is_event_stream else self.patterns

    def put(self, reply: Gap | Live, epoch: str) -> None:
        """Put a line about its position into its send queue. The first version of the protocol has no such lines."""
        line = encode_reply(reply, self.send_queue.protocol, epoch, snapshot_follows=self.retained)
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


def offer(tree: TopicTree[Subscription], entries: Sequence[Entry], epoch: str) -> list[Subscription]:
    """Offer entries of an epoch to the subscriptions that match: all or none to each. Return those without room."""
    rejected: list[Subscription] = []
    merged: dict[Hashable, MergedMembers] = {}
    for group, hits in find_hits(tree, entries).items():
        shared = encoded = EncodedMessages(group.pattern, hits)
        origins = {entry.origin for entry in hits if entry.origin is not None}
        for subscription in group.members:
            if (key := subscription.merge_key) is not None:
                members = merged.get(key)
                if members is None:
                    members = merged[key] = MergedMembers()
                members.add(subscription, group.pattern, hits)
                continue
            if origins:
                mine = subscription.producer in origins
                encoded = EncodedMessages(group.pattern, without(hits, subscription.producer)) if mine else shared
            if not subscription.send_queue.offer(encoded):
                rejected.append(subscription)
    for members in merged.values():
        rejected += members.offer(epoch)
    return rejected


class MergedMembers:
    """The subscriptions with one merge key that match entries of a batch, and these entries by pattern."""

    __slots__ = ("found", "subscriptions")

    def __init__(self) -> None:
        self.found: dict[str, Sequence[Entry]] = {}
        self.subscriptions: dict[Subscription, None] = {}

    def add(self, subscription: Subscription, pattern: str, hits: Sequence[Entry]) -> None:
        self.found[pattern] = hits
        self.subscriptions[subscription] = None

    def offer(self, epoch: str) -> list[Subscription]:
        """Offer the entries, each once and in order, to all subscriptions. Return those without room."""
        first = next(iter(self.subscriptions))
        entries = merge(first, list(self.found.items()))
        # Event streams have no producer, so they all get the same.
        encoded = EncodedMessages("", without(entries, first.producer), epoch)
        return [each for each in self.subscriptions if not each.send_queue.offer(encoded)]


def merge(subscription: Subscription, found: Sequence[tuple[str, Sequence[Entry]]]) -> list[Entry]:
    """Return the entries that several patterns of one subscription match, each once and in order."""
    if len(found) == 1:
        [(pattern, hits)] = found
        start = subscription.patterns[pattern]
        return list(hits) if hits[0].seq > start else [e for e in hits if e.seq > start]
    starts = subscription.patterns
    wanted = {e.seq: e for pattern, hits in found for e in hits if e.seq > starts[pattern]}
    return sorted(wanted.values(), key=_seq)


def without(entries: Sequence[Entry], producer: bytes) -> list[Entry]:
    """Return the entries without those of this producer that it asked not to get back."""
    return [entry for entry in entries if entry.origin != producer]
