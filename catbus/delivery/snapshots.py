"""The snapshots of retained messages: which page is read next, and how much of it each held subscription gets. Pure.

`Delivery` in `fan_out.py` reads the pages, and changes the states of the subscriptions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

from ..log import Entry, RetainedPage
from .encoded_messages import OVERHEAD
from .send_queue import SendQueue
from .snapshot_page import SnapshotPage, SnapshotPosition
from .subscription import Subscription

SNAPSHOT_ROWS = 400
"""Maximum number of messages in a page of a snapshot."""

SNAPSHOT_BYTES = 64 << 10
"""Bytes of a page of a snapshot, unless one message has more."""

SERVED_PER_CHECKPOINT = 50
"""Held subscriptions that get a page before other tasks run."""


class SnapshotRequest(NamedTuple):
    """A page to read: messages at `position` with a seq up to `until`, of `size` bytes at most."""

    position: SnapshotPosition
    until: int
    size: int


class Snapshots:
    """The subscriptions that wait for pages of their snapshots.

    Clients take turns, and the send queues of one client do. A send queue without room loses its turn until it has been
    emptied, so no page is read for a client that does not read. Subscriptions at the same position share a page.
    """

    def __init__(self, on_ready: Callable[[], None], on_complete: Callable[[Subscription], None]) -> None:
        """`on_ready` is called when `next_request` may have a page to read again.

        `on_complete` is called with a subscription that has got the last page and is not held any more.
        """
        self._on_ready = on_ready
        self._on_complete = on_complete
        self._held: dict[SendQueue, dict[Subscription, None]] = {}
        self._by_position: dict[SnapshotPosition, dict[Subscription, None]] = {}
        self._turns: dict[Hashable, dict[SendQueue, None]] = {}
        """The clients in the order of their turns, each with its send queues in that order."""
        self._full: set[SendQueue] = set()
        """The send queues that have no turn until they are emptied."""

    def add(self, subscription: Subscription) -> None:
        """Send pages to a subscription from its `snapshot` on."""
        assert subscription.snapshot is not None
        send_queue = subscription.send_queue
        self._held.setdefault(send_queue, {})[subscription] = None
        self._by_position.setdefault(subscription.snapshot, {})[subscription] = None
        if send_queue not in self._full:
            self._give_turn(_client_of(subscription), send_queue)

    def remove(self, subscription: Subscription) -> None:
        """Send no more pages to a subscription. Its `snapshot` is still that with which it was added."""
        assert subscription.snapshot is not None
        held, same = self._held[subscription.send_queue], self._by_position[subscription.snapshot]
        del held[subscription], same[subscription]
        if not held:
            del self._held[subscription.send_queue]
        if not same:
            del self._by_position[subscription.snapshot]

    def next_request(self) -> SnapshotRequest | None:
        """Return the page to read for the client whose turn it is; None if no send queue has room."""
        while self._turns:
            client = next(iter(self._turns))
            send_queues = self._turns.pop(client)
            send_queue = next(iter(send_queues))
            del send_queues[send_queue]
            if send_queues:
                self._turns[client] = send_queues
            if send_queue not in self._held:
                continue
            if not _has_room(send_queue):
                self._pause(client, send_queue)
                continue
            self._give_turn(client, send_queue)
            position = next(iter(self._held[send_queue])).snapshot
            assert position is not None
            until = max(subscription.cursor for subscription in self._by_position[position])
            return SnapshotRequest(position, until, min(SNAPSHOT_BYTES, max(1, send_queue.room)))
        return None

    def serve(self, request: SnapshotRequest, page: RetainedPage) -> Iterator[None]:
        """Send the page that was requested to all subscriptions at its position whose send queue has room.

        Between two steps anything else may happen. The rest of the steps may be left out.
        """
        position, until, _ = request
        shared: dict[tuple[Hashable, ...], SnapshotPage] = {}
        waiting = self._by_position.get(position, {})
        for number, subscription in enumerate(list(waiting), 1):
            if number % SERVED_PER_CHECKPOINT == 0:
                yield
            # The page lacks messages for a subscription whose cursor was set above `until` meanwhile.
            if subscription in waiting and subscription.cursor <= until and _has_room(subscription.send_queue):
                self._serve_one(subscription, position, page, shared)

    def _serve_one(
        self,
        subscription: Subscription,
        position: SnapshotPosition,
        page: RetainedPage,
        shared: dict[tuple[Hashable, ...], SnapshotPage],
    ) -> None:
        send_queue = subscription.send_queue
        subscription.snapshot_head = max(subscription.snapshot_head, page.head)
        # Messages above its cursor come to it after the snapshot.
        entries = [entry for entry in page.entries if entry.seq <= subscription.cursor]
        count = _fitting(entries, send_queue)
        following: SnapshotPosition | None
        if count < len(entries):
            if not count:
                self._pause(_client_of(subscription), send_queue)
                return
            following = position._replace(after=entries[count - 1].channel)
        elif not page.complete:
            following = position._replace(after=page.last)
        else:
            following = SnapshotPosition(position.patterns[1:]) if len(position.patterns) > 1 else None
        if count or following is None:
            pattern = "" if subscription.is_event_stream else position.patterns[0]
            key = pattern, len(entries), count
            if key not in shared:
                shared[key] = SnapshotPage(pattern, entries[:count], position, complete=following is None)
            send_queue.offer(shared[key])
        self.remove(subscription)
        subscription.snapshot = following
        if following is None:
            self._on_complete(subscription)
        else:
            self.add(subscription)

    def _give_turn(self, client: Hashable, send_queue: SendQueue) -> None:
        self._turns.setdefault(client, {})[send_queue] = None
        self._on_ready()

    def _pause(self, client: Hashable, send_queue: SendQueue) -> None:
        """Read nothing for a send queue until it has been emptied."""
        turns = self._turns.get(client, {})
        turns.pop(send_queue, None)
        if not turns:
            self._turns.pop(client, None)
        if send_queue not in self._full:
            self._full.add(send_queue)
            send_queue.when_emptied(partial(self._continue, client, send_queue))

    def _continue(self, client: Hashable, send_queue: SendQueue) -> None:
        self._full.discard(send_queue)
        if send_queue in self._held:
            self._give_turn(client, send_queue)


def _client_of(subscription: Subscription) -> Hashable:
    return subscription.send_queue if subscription.client is None else subscription.client


def _has_room(send_queue: SendQueue) -> bool:
    """Whether to read a page for a send queue. One that is empty gets a message, whatever its size."""
    return not send_queue or send_queue.room >= SNAPSHOT_BYTES


def _fitting(entries: Sequence[Entry], send_queue: SendQueue) -> int:
    """Return how many of these messages fit into a send queue."""
    ends = list(accumulate(entry.size + OVERHEAD for entry in entries))
    return max(bisect_right(ends, send_queue.room), 0 if send_queue else min(1, len(entries)))
