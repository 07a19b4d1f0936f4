"""The fan-out from the log to the send queues: match committed entries, encode them once, offer them to subscriptions.

The patterns of a subscription are in exactly one of two topic trees. In the live tree it is complete up to `position`
and gets every batch as it is applied. In the lagging tree it has a cursor of its own, and one reader catches up all of
them from the log. Subscribing with `since` and a full send queue are the same case: the subscription lags.

A subscription that wants the retained messages lags, too: it is held at its cursor until it has got a snapshot of them,
which a second reader reads in pages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterator, Sequence
from functools import partial
from operator import attrgetter

import trio

from ..errors import Unavailable
from ..log import Entry, Log, LogPage
from ..protocol.wire_messages import Gap, Live
from .catch_up import CatchUpSweeps, PatternMatches, feed
from .channel_rates import ChannelRates
from .delivery_statistics import DeliveryStatistics
from .erasure import erase_waiting, find_lowest_seq
from .send_queue import Budget, SendQueue
from .snapshot_page import SnapshotPage, begin_snapshot
from .snapshot_reader import SnapshotReader
from .subscription import (
    AHEAD,
    CLOSED,
    HELD,
    LIVE,
    PAGE_ROWS,
    READING,
    WAITING,
    Subscription,
    SubscriptionState,
    find_hits,
    offer,
)
from .subscription_trees import MEASURED_PER_CHECKPOINT, SubscriptionTrees

PAGE_BYTES = 1 << 20
"""Bytes of the log that are read at once, unless one entry has more."""

READ_RETRY_INTERVAL = 0.25
"""Seconds between attempts to read a log that is unavailable."""

SERVED_PER_CHECKPOINT = 50
"""Lagging subscriptions that are served from a page before other tasks run."""

KEPT_OF_BUDGET = 0.75
"""Part of the budget that is still in use after the largest send queues have dropped messages to stay within it."""

_size = attrgetter("size")


class Delivery:
    """Follows a log, and delivers its entries to subscriptions. Belongs to one Trio thread.

    When the send queues together hold more than `budget` allows, the largest drop messages that can be read from the
    log again, and their subscriptions lag.
    """

    def __init__(self, log: Log, budget: Budget | None = None) -> None:
        self.budget = Budget() if budget is None else budget
        self.position = 0
        """The newest seq that the live subscriptions have been offered."""
        self.at = 0
        """Commit time of the entry at `position`, in milliseconds since 1970; 0 if unknown."""
        self.unsent_since = 0
        """Commit time of the oldest entry offered since this was last set to 0, which the flusher does."""
        self.channel_rates = ChannelRates()
        self._log = log
        self.trees = SubscriptionTrees()
        self._lag = 0
        """The largest lag when `measure_lag` last ran."""
        # Subscriptions in these states, in order of arrival: `_set_state` keeps them.
        self._reading: dict[Subscription, None] = {}
        self._ahead: dict[Subscription, None] = {}
        self._by_send_queue: dict[SendQueue, dict[str, Subscription]] = {}
        """The subscriptions of each send queue, by pattern."""
        self._with_history: dict[SendQueue, None] = {}
        """The send queues in which pages of history may wait, or messages of subscriptions that have ended."""
        self._work = trio.Event()
        self._snapshot_reader = SnapshotReader(log, lambda: self.page_version, self._catch_up, self._make_room)
        self._snapshots = self._snapshot_reader.snapshots
        self._sweeps = CatchUpSweeps()
        self._lags = 0
        self._pages_read = 0
        self._withdrawals = 0
        self.page_version = 0
        """Changes when pages that were read before must not be used any more."""

    def statistics(self) -> DeliveryStatistics:
        """Return the statistics at a cost that does not depend on the number of subscriptions: anybody may ask."""
        if len(self.trees.lagging) <= MEASURED_PER_CHECKPOINT:
            deque(self.measure_lag(), maxlen=0)
        return DeliveryStatistics(
            position=self.position,
            live=len(self.trees.live),
            lagging=len(self.trees.lagging),
            patterns=self.trees.patterns,
            lag=self._lag,
            lags=self._lags,
            sweeps=self._pages_read,
            held=self.budget.held,
            withdrawals=self._withdrawals,
            delivered=self.budget.delivered,
        )

    def measure_lag(self) -> Iterator[None]:
        """Find the largest lag, in steps. `statistics` does so itself when few subscriptions lag."""
        self._lag = yield from self.trees.measure_lag(self.position)

    # The log's follower

    def apply(self, entries: Sequence[Entry]) -> None:
        """Offer the next entries to the live subscriptions. A subscription without room for all of its entries lags."""
        previous, self.position, self.at = self.position, entries[-1].seq, entries[-1].at
        self.unsent_since = self.unsent_since or entries[0].at
        self.channel_rates.count(entries)
        for subscription in offer(self.trees.live, entries, self._log.epoch):
            self._start_lagging(subscription, previous)
        for subscription in [s for s in self._ahead if s.cursor <= self.position]:
            self._catch_up(subscription)
        self._make_room()
        if self._reading:
            self._work.set()

    def restart(self, applied: int, lost: str = "epoch") -> None:
        """Continue after `applied`, and announce the gap to the subscriptions. `lost` is its reason.

        In another epoch, a lagging subscription whose cursor is below `applied` misses nothing: it gets an empty gap,
        and continues at its cursor. With "repair", a subscription that has not reached the deleted range continues at
        its cursor, and gets the gap there.
        """
        previous, self.position, self.at = self.position, applied, 0
        self.page_version += 1
        for subscription in self.trees.subscriptions():
            known = subscription.cursor if subscription.lagging else previous
            if lost == "epoch":
                # The seqs begin lower, so what was wanted after a seq of the other log is wanted from here on.
                subscription.patterns = {p: min(after, applied) for p, after in subscription.patterns.items()}
                subscription.head_sent = 0
                if subscription.lagging and known < applied:
                    self._announce_gap(subscription, known, known, lost)
                    if subscription.state is AHEAD:
                        self._catch_up(subscription)
                    self._work.set()
                    continue
            elif subscription.lagging and known >= applied:
                # Another replica has delivered to it what this one never had.
                if known == applied:
                    self._catch_up(subscription)
                continue
            elif lost == "repair" and subscription.lagging and known < previous:
                # It gets the gap when it reaches the deleted range.
                continue
            self._announce_gap(subscription, min(known, applied), applied, lost)
            if subscription.lagging and subscription.snapshot is None:
                self._go_live(subscription)

    def begin_erasure(self) -> int | None:
        self.page_version += 1
        for send_queue in [queue for queue in self._by_send_queue if queue.has_retained]:
            self._withdraw(send_queue)
            # What is left is pinned. Their subscriptions get another snapshot.
            for pattern in send_queue.drop_retained():
                subscription = self._find(send_queue, pattern)
                if subscription is not None and subscription.retained:
                    cursor = subscription.cursor if subscription.lagging else self.position
                    self._announce_gap(subscription, cursor, cursor, "erasure")
        for send_queue in self._with_history:
            send_queue.drop_retained()
        return find_lowest_seq(self._by_send_queue, self._with_history)

    def erase(self, seqs: Collection[int]) -> Iterator[None]:
        self.page_version += 1
        self.trees.forget_channels()
        self.channel_rates.clear()
        others = [queue for queue in self._with_history if queue not in self._by_send_queue]
        return erase_waiting(seqs, self._by_send_queue, others)

    def note_history(self, send_queue: SendQueue) -> None:
        """Something of the log may wait in a send queue that has no subscriptions."""
        if send_queue and send_queue not in self._with_history:
            self._with_history[send_queue] = None
            send_queue.when_emptied(partial(self._with_history.pop, send_queue))

    # Subscribing

    def subscribe(
        self, subscription: Subscription, pattern: str, since: int | None = None, epoch: str | None = None
    ) -> None:
        """Deliver the messages that match `pattern`: from now on, or from the log after `since` of `epoch`.

        Only a closed subscription may begin with `since` or with a snapshot, as a subscription has one cursor.
        """
        self.subscribe_all(subscription, (pattern,), since, epoch)

    def subscribe_all(
        self, subscription: Subscription, patterns: Collection[str], since: int | None = None, epoch: str | None = None
    ) -> None:
        """Do the same for several patterns, with one cursor for all of them."""
        if since is not None:
            resumption = self._log.resume(since, epoch)
            self._enter_all(subscription, patterns, resumption.cursor)
            subscription.live_line_due = True
            if resumption.lost is not None:
                self._announce_gap(subscription, min(since, resumption.cursor), resumption.cursor, resumption.lost)
            self._lag_from(subscription, resumption.cursor)
        elif subscription.retained:
            self.subscribe_from_snapshot(subscription, patterns, self.position)
        else:
            if subscription.state is CLOSED:
                self._set_state(subscription, LIVE)
            self._enter_all(subscription, patterns, self.position)

    def subscribe_from_snapshot(self, subscription: Subscription, patterns: Collection[str], cursor: int) -> None:
        """Deliver the retained messages up to `cursor` that match any of the patterns, and then what follows it."""
        self._enter_all(subscription, patterns, cursor)
        self._begin_snapshot(subscription, cursor)
        self._lag_from(subscription, cursor)

    def _enter_all(self, subscription: Subscription, patterns: Collection[str], cursor: int) -> None:
        self._by_send_queue.setdefault(subscription.send_queue, {}).update(dict.fromkeys(patterns, subscription))
        subscription.add_patterns(patterns, cursor)
        self.trees.enter(patterns, subscription)

    def unsubscribe(self, subscription: Subscription, pattern: str) -> None:
        """Deliver nothing more for `pattern`. Messages that are already in the send queue stay there."""
        self.trees.exit((pattern,), subscription)
        subscription.remove_pattern(pattern)
        if not subscription.patterns:
            self._set_state(subscription, CLOSED)
            subscription.snapshot = None
        elif subscription.snapshot is not None:
            # A pattern that the lost one covered is not in the snapshot yet.
            self._begin_snapshot(subscription, subscription.cursor)
        send_queue = subscription.send_queue
        send_queue.pin()
        subscriptions = self._by_send_queue[send_queue]
        del subscriptions[pattern]
        if not subscriptions:
            del self._by_send_queue[send_queue]
            self.note_history(send_queue)

    def broadcast(self, entry: Entry) -> None:
        """Offer an ephemeral message (its seq is 0) to the subscriptions that match and have room."""
        self.channel_rates.count([entry])
        self.trees.offer_ephemeral(entry)
        self._make_room()

    # Catching up. `next_position` and `serve` are the reader without its waiting.

    async def run(self) -> None:
        """Catch up lagging subscriptions for ever. Live deliveries run in between."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._snapshot_reader.run)
            nursery.start_soon(self._read_log)

    async def _read_log(self) -> None:
        """Read pages of the log for reading subscriptions for ever."""
        while True:
            position = self.next_position()
            if position is None:
                self._work = trio.Event()
                await self._work.wait()
                continue
            version = self.page_version
            try:
                page = await self._log.read(position, rows=self.rows_from(position), size=PAGE_BYTES)
            except Unavailable:
                await trio.sleep(READ_RETRY_INTERVAL)
                continue
            self._pages_read += 1
            await trio.lowlevel.checkpoint()
            if version != self.page_version:
                continue  # Its entries may be of the epoch before, or erased.
            for _ in self.serve(position, page):
                await trio.lowlevel.checkpoint()

    def next_position(self) -> int | None:
        """Return the seq after which to read next, or None."""
        return self._sweeps.next_position([s.cursor for s in self._reading], self._log.memory_floor)

    def rows_from(self, position: int) -> int:
        """Return how many entries to read from there: few if the send queues have room for few."""
        return max(s.rows for s in self._reading if position <= s.cursor < position + PAGE_ROWS)

    def serve(self, position: int, page: LogPage) -> Iterator[None]:
        """Deliver a page that was read from `position` to the lagging subscriptions whose cursor is in it.

        Exhaust the iterator before the next page. Between two steps anything else may happen.
        """
        version = self.page_version
        self._sweeps.note_page(position, page.last, self._log.memory_floor)
        if page.after > position:
            # Entries that retention dropped are missing for every lower cursor. A deleted range is a gap for the
            # subscriptions that have reached it.
            lowest = position if page.lost == "repair" else 0
            for subscription in list(self._reading):
                if lowest <= subscription.cursor < page.after:
                    self._announce_gap(subscription, subscription.cursor, page.after, page.lost)
                    subscription.cursor = page.after
        readers = [s for s in self._reading if page.after <= s.cursor <= page.last]
        matches: dict[Subscription, list[PatternMatches]] = {subscription: [] for subscription in readers}
        for group, hits in find_hits(self.trees.lagging, page.entries).items():
            found = PatternMatches(group.pattern, hits, self._log.epoch)
            for member in group.members:
                if member in matches:
                    matches[member].append(found)
        merged: dict[Hashable, PatternMatches] = {}
        for number, (subscription, wanted) in enumerate(matches.items(), 1):
            if number % SERVED_PER_CHECKPOINT == 0:
                self._make_room()
                yield
            if version != self.page_version:
                return
            reading = subscription.state is READING
            if not reading or not page.after <= subscription.cursor <= page.last:
                continue
            complete = feed(subscription, wanted, page.last, merged)
            progress, subscription.cursor = complete - subscription.cursor, complete
            if complete < page.last:
                subscription.rows = min(2 * progress or subscription.rows, PAGE_ROWS)
                self._set_state(subscription, WAITING)
                continue
            subscription.rows = min(2 * subscription.rows, PAGE_ROWS)
            if complete >= self.position:
                self._catch_up(subscription)
        self._make_room()

    # States

    def _set_state(self, subscription: Subscription, state: SubscriptionState) -> None:
        """Change the state of a subscription: nothing else does, nor moves it between the trees."""
        before = subscription.state
        if before is state:
            return
        if before is READING:
            del self._reading[subscription]
        elif before is AHEAD:
            del self._ahead[subscription]
        elif before is HELD and subscription.snapshot is not None:
            self._snapshots.remove(subscription)
        if subscription.patterns and (before is LIVE or state is LIVE):
            self.trees.exit(subscription.patterns, subscription)
            subscription.state = state
            self.trees.enter(subscription.patterns, subscription)
        else:
            subscription.state = state
        if state is READING:
            self._reading[subscription] = None
            self._work.set()
        elif state is AHEAD:
            self._ahead[subscription] = None
        elif state is HELD:
            self._snapshots.add(subscription)
        elif state is WAITING:
            subscription.send_queue.when_emptied(partial(self._stop_waiting, subscription))

    def _start_lagging(self, subscription: Subscription, cursor: int) -> None:
        """Catch up from the log a subscription that was live, and tell its client when it is live again."""
        self._lags += 1
        subscription.live_line_due = True
        self._lag_from(subscription, cursor)

    def _lag_from(self, subscription: Subscription, cursor: int) -> None:
        """Catch up a subscription from the log after `cursor`, as soon as its send queue is empty."""
        subscription.cursor = cursor
        if subscription.send_queue and cursor != self.position:
            self._set_state(subscription, WAITING)
        else:
            self._catch_up(subscription)

    def _catch_up(self, subscription: Subscription) -> None:
        """Read from the log for a lagging subscription, as soon as the log has the entries after its cursor.

        Its snapshot comes first.
        """
        if subscription.snapshot is not None:
            self._set_state(subscription, HELD)
        elif subscription.cursor < self.position:
            self._set_state(subscription, READING)
        elif max(subscription.cursor, subscription.snapshot_head) > self.position:
            self._set_state(subscription, AHEAD)
        else:
            self._go_live(subscription)

    def _stop_waiting(self, subscription: Subscription) -> None:
        """Continue with a subscription whose send queue has been emptied.

        If retention dropped entries meanwhile, it gets one gap for all of them when it is served.
        """
        if subscription.state is WAITING:
            self._catch_up(subscription)

    def _go_live(self, subscription: Subscription) -> None:
        """Deliver to a subscription as entries are committed. Its cursor is `position`."""
        self._set_state(subscription, LIVE)
        if subscription.live_line_due:
            subscription.live_line_due = False
            for pattern in subscription.named_patterns:
                subscription.put(Live(pattern, self.position), self._log.epoch)

    def _announce_gap(self, subscription: Subscription, known: int, cursor: int, reason: str) -> None:
        for pattern in subscription.named_patterns:
            subscription.put(Gap(pattern, known + 1, cursor, self._log.epoch, reason), self._log.epoch)
        subscription.send_queue.pin()
        if subscription.retained:
            self._begin_snapshot(subscription, cursor)

    def _begin_snapshot(self, subscription: Subscription, cursor: int) -> None:
        """Begin the snapshot of a subscription, or begin it again. A subscription that waits gets it afterwards."""
        if subscription.state is HELD:
            self._snapshots.remove(subscription)
        subscription.cursor = subscription.snapshot_cursor = cursor
        subscription.snapshot_head = 0
        subscription.snapshot = begin_snapshot(subscription.patterns)
        subscription.live_line_due = True
        if subscription.state is HELD:
            self._snapshots.add(subscription)
        elif subscription.state is not CLOSED and subscription.state is not WAITING:
            self._set_state(subscription, HELD)

    # The budget

    def _make_room(self) -> None:
        """If all send queues together hold too much, withdraw the messages of the largest."""
        budget = self.budget
        if budget.check():
            return
        for send_queue in sorted(self._by_send_queue, key=_size, reverse=True):
            self._withdraw(send_queue)
            if budget.messages <= KEPT_OF_BUDGET * budget.for_messages:
                break
        budget.note_withdrawal()

    def _withdraw(self, send_queue: SendQueue) -> None:
        dropped = send_queue.withdraw()
        self._withdrawals += bool(dropped)
        for pattern, messages in dropped.items():
            subscription = self._find(send_queue, pattern)
            assert subscription is not None
            snapshot = messages.position if isinstance(messages, SnapshotPage) else subscription.snapshot
            first = subscription.snapshot_cursor if isinstance(messages, SnapshotPage) else messages.first_seq - 1
            self._lags += not subscription.lagging
            cursor = min(first, subscription.cursor) if subscription.lagging else first
            # Its client reads slowly, so it waits even if its send queue is empty now.
            self._set_state(subscription, WAITING)
            subscription.cursor, subscription.snapshot, subscription.live_line_due = cursor, snapshot, True

    def _find(self, send_queue: SendQueue, pattern: str) -> Subscription | None:
        """Return the subscription that gets messages for a pattern, or for "": several patterns of one subscription."""
        subscriptions = self._by_send_queue[send_queue]
        return subscriptions.get(pattern) if pattern else next(iter(subscriptions.values()))
