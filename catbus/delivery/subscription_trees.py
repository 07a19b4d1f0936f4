"""The two topic trees of a replica's subscriptions: those that are live, and those that lag. Pure."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator

from ..log import Entry
from .encoded_messages import EncodedMessages
from .subscription import LIVE, Subscription
from .topic_tree import TopicTree

MEASURED_PER_CHECKPOINT = 500
"""Lagging subscriptions whose lag is measured before other tasks run."""


class SubscriptionTrees:
    """The patterns of all subscriptions: those of one subscription are in exactly one of the trees, by its state."""

    def __init__(self) -> None:
        self.live: TopicTree[Subscription] = TopicTree()
        self.lagging: TopicTree[Subscription] = TopicTree()
        self._in_both = 0
        """Patterns that are in both trees."""

    @property
    def patterns(self) -> int:
        """Number of different patterns."""
        return self.live.patterns + self.lagging.patterns - self._in_both

    def enter(self, patterns: Collection[str], subscription: Subscription) -> None:
        """Add patterns of a subscription to the tree of its state."""
        tree, other = self._trees(subscription)
        for pattern in patterns:
            self._in_both += pattern not in tree and pattern in other
            tree.add(pattern, subscription)

    def exit(self, patterns: Collection[str], subscription: Subscription) -> None:
        """Remove patterns of a subscription, if they are there."""
        tree, other = self._trees(subscription)
        for pattern in patterns:
            self._in_both -= tree.remove(pattern, subscription) and pattern not in tree and pattern in other

    def _trees(self, subscription: Subscription) -> tuple[TopicTree[Subscription], TopicTree[Subscription]]:
        """Return the tree that a subscription is in, and the other one."""
        return (self.live, self.lagging) if subscription.state is LIVE else (self.lagging, self.live)

    def subscriptions(self) -> dict[Subscription, None]:
        """Return all subscriptions."""
        groups = [group for tree in (self.live, self.lagging) for group in tree.groups()]
        return dict.fromkeys(member for group in groups for member in group.members)

    def forget_channels(self) -> None:
        """Forget the channels that were looked up."""
        self.live.forget_channels()
        self.lagging.forget_channels()

    def measure_lag(self, position: int) -> Generator[None, None, int]:
        """Find the largest lag, in steps, and return it."""
        lag = looked = 0
        for group in list(self.lagging.groups()):
            for member in list(group.members):
                lag = max(lag, position - member.cursor)
                looked += 1
                if looked % MEASURED_PER_CHECKPOINT == 0:
                    yield
        return lag

    def count_by_pattern(self) -> Iterator[tuple[str, int, int]]:
        """Yield the patterns of now, each with its present numbers of live and of lagging subscriptions, in steps.

        A pattern may come twice.
        """
        for group in [*self.live.groups(), *self.lagging.groups()]:
            yield group.pattern, self.live.members(group.pattern), self.lagging.members(group.pattern)

    def count_matches(self, channel: str) -> int:
        """Return how many subscriptions match a channel."""
        return sum(len(group.members) for tree in (self.live, self.lagging) for group in tree.match(channel))

    def offer_ephemeral(self, entry: Entry) -> None:
        """Offer an ephemeral message (its seq is 0) to the subscriptions that match and have room."""
        served: set[Subscription] = set()
        merged = EncodedMessages("", [entry])
        for tree in (self.live, self.lagging):
            for group in tree.match(entry.channel):
                single = EncodedMessages(group.pattern, [entry])
                for subscription in group.members:
                    if subscription in served or (entry.origin is not None and subscription.producer == entry.origin):
                        continue
                    if subscription.merge_key is not None:
                        served.add(subscription)
                    encoded = merged if subscription.is_event_stream else single
                    if subscription.send_datagram is None or not subscription.send_datagram(encoded.lines):
                        queue = subscription.send_queue
                        queue.count.dropped += not queue.offer(encoded)
