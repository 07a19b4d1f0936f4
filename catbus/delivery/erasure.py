"""Erasing messages while they wait to be sent: in send queues, and in the subscriptions of this process. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from ..log import Entry
from .encoded_messages import EncodedMessages
from .send_queue import SendQueue
from .subscription import Subscription

ERASED_PER_CHECKPOINT = 100
"""Send queues from which messages are erased before other tasks run."""

SubscriptionsByQueue = Mapping[SendQueue, Mapping[str, Subscription]]


def find_lowest_seq(subscriptions: SubscriptionsByQueue, others: Iterable[SendQueue]) -> int | None:
    """Return the lowest seq of the messages that wait; None if there are none. `others`: send queues without any."""
    seqs = [seq for queue in (*subscriptions, *others) if (seq := queue.lowest_seq()) is not None]
    seqs += [entry.seq for taken in _taken(subscriptions) for entry in taken if entry.seq]
    return min(seqs, default=None)


def erase_waiting(
    seqs: Collection[int], subscriptions: SubscriptionsByQueue, others: Sequence[SendQueue]
) -> Iterator[None]:
    """Drop these messages, in steps. No subscription lags by it: they cannot be read from anywhere."""
    for taken in _taken(subscriptions):
        kept = [entry for entry in taken if entry.seq not in seqs]
        taken.clear()
        taken.extend(kept)
    remainders: dict[EncodedMessages, EncodedMessages | None] = {}
    for number, send_queue in enumerate([*subscriptions, *others], 1):
        send_queue.erase(seqs, remainders)
        if number % ERASED_PER_CHECKPOINT == 0:
            yield


def _taken(subscriptions: SubscriptionsByQueue) -> Iterator[deque[Entry]]:
    for group in subscriptions.values():
        for subscription in group.values():
            if subscription.taken is not None:
                yield subscription.taken
