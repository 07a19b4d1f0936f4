"""From the log to the send queues: committed entries are matched, encoded once, and offered to who subscribed.

A subscription stands in exactly one of two topic trees. In the live one it is complete up to `position` and gets
every batch as it is applied. In the late one it has a cursor of its own and is caught up from the log by one reader
that all late subscriptions share. Joining with `since`, falling behind and starting up are the same case: late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import trio

from ..errors import Unavailable
from ..log import Entry, Log, LogPage
from ..protocol.wire_messages import Gap, Live
from .send_queue import Budget, EncodedMessages, SendQueue
from .subscription import PAGE_ROWS, PatternMatches, Subscription, find_hits, merge, offer, without
from .topic_tree import TopicTree

PAGE_BYTES = 1 << 20
RETRY = 0.25
"""Seconds between tries to read a log that is unavailable."""

SERVED = 50
"""Late subscriptions that are served from a page before other tasks get a turn."""

SURVEYED = 500
"""Lagging subscriptions whose cursors are looked at before other tasks get a turn."""

KEPT = 0.75
"""How much of the budget is still in use when it has been exceeded and the largest send queues have given theirs
back."""

_size = attrgetter("size")


@dataclass(frozen=True, slots=True)
class DeliveryStatistics:
    """`live` and `lagging` count subscriptions, `lags` how often one fell behind, `sweeps` the pages read for the late.

    `patterns`: how many different ones they are for. `lag`: by how many messages of the log the latest of the late is
    behind. `held`: bytes in all send queues. `withdrawals`: how often a send queue has given its messages back to
    make room.
    `delivered`: messages that were taken to be sent, each as often as it was.
    """

    position: int
    live: int
    lagging: int
    patterns: int
    lag: int
    lags: int
    sweeps: int
    held: int
    withdrawals: int
    delivered: int


class Delivery:
    """Follows a log and keeps the send queues of those who subscribed in step with it. Belongs to one Trio thread.

    When the send queues together hold more than `budget` allows, the largest give back what can be had from the log,
    and their subscriptions are late.
    """

    def __init__(self, log: Log, budget: Budget | None = None) -> None:
        self.budget = Budget() if budget is None else budget
        self.position = 0
        """The newest seq that the live subscriptions have been offered."""
        self.at = 0
        """When the entry at `position` was committed, in milliseconds since 1970; 0 where that is not known."""
        self.unsent_since = 0
        """The same of the oldest entry offered since this was last set to 0: by then, all of them had been sent."""
        self._log = log
        self._live: TopicTree[Subscription] = TopicTree()
        self._lagging: TopicTree[Subscription] = TopicTree()
        self._in_both = 0
        """How many patterns are in both trees."""
        self._lag = 0
        """By how many messages the latest of the late was behind, as `survey` has found it."""
        self._reading: dict[Subscription, None] = {}
        """Those of the late that can be served: neither stalled nor ahead."""
        self._ahead: dict[Subscription, None] = {}
        """Those whose cursor is above `position`: another replica has told them more than this one knows."""
        self._readers: dict[SendQueue, dict[str, Subscription]] = {}
        """Whom a send queue is for, by pattern."""
        self._work = trio.Event()
        self._near = False
        """Whether the sweep that read last was the one through what is in memory."""
        self._swept = {True: 0, False: 0}
        """How far that sweep has got, and the other."""
        self._lags = 0
        self._sweeps = 0
        self._withdrawals = 0
        self._restarts = 0
        self._alarm = self.budget.for_messages

    def statistics(self) -> DeliveryStatistics:
        """Take the figures, at the same cost whatever the number of subscriptions: a stranger may ask for them."""
        if len(self._lagging) <= SURVEYED:
            deque(self.survey(), maxlen=0)
        return DeliveryStatistics(
            position=self.position,
            live=len(self._live),
            lagging=len(self._lagging),
            patterns=self._live.patterns + self._lagging.patterns - self._in_both,
            lag=self._lag,
            lags=self._lags,
            sweeps=self._sweeps,
            held=self.budget.held,
            withdrawals=self._withdrawals,
            delivered=self.budget.delivered,
        )

    def survey(self) -> Iterator[None]:
        """Look at the cursors of all lagging subscriptions, in steps; where they are few, `statistics` does."""
        lag = looked = 0
        for group in list(self._lagging.groups()):
            for member in list(group.members):
                lag = max(lag, self.position - member.cursor)
                looked += 1
                if looked % SURVEYED == 0:
                    yield
        self._lag = lag

    # The log's follower

    def apply(self, entries: Sequence[Entry]) -> None:
        """Offer the next entries to the live subscriptions; who has no room for all of its own goes late."""
        previous, self.position, self.at = self.position, entries[-1].seq, entries[-1].at
        self.unsent_since = self.unsent_since or entries[0].at
        for subscription in offer(self._live, entries):
            self._fall_behind(subscription, previous)
        for subscription in [s for s in self._ahead if s.cursor <= self.position]:
            del self._ahead[subscription]
            self._read_for(subscription)
        self._make_room()
        if self._reading:
            self._work.set()

    def restart(self, applied: int, lost: str = "epoch") -> None:
        """Go on after `applied`, and tell everyone what may be missing: `lost` is the reason.

        In another epoch, who is late and not beyond `applied` misses nothing, is told so, and goes on from its cursor.
        With "repair", a subscription that has not come as far as the hole goes on from its cursor, and is told there.
        """
        previous, self.position, self.at = self.position, applied, 0
        self._restarts += 1
        groups = [group for tree in (self._live, self._lagging) for group in tree.groups()]
        for subscription in dict.fromkeys(member for group in groups for member in group.members):
            known = subscription.cursor if subscription.lagging else previous
            if lost == "epoch":
                # The seqs begin lower, so what was wanted after a seq of the other log is wanted from here on.
                subscription.patterns = {p: min(after, applied) for p, after in subscription.patterns.items()}
                subscription.marked = 0
                if subscription.lagging and known < applied:
                    self._ahead.pop(subscription, None)
                    self._announce_gap(subscription, known, known, lost)
                    self._work.set()
                    continue
            elif subscription.lagging and known >= applied:
                # Another replica has served it with what this one never had.
                if known == applied:
                    self._go_live(subscription)
                continue
            elif lost == "repair" and subscription.lagging and known < previous:
                # It is told when it gets there.
                continue
            self._announce_gap(subscription, min(known, applied), applied, lost)
            if subscription.lagging:
                self._go_live(subscription)

    # Subscribing

    def subscribe(
        self, subscription: Subscription, pattern: str, since: int | None = None, epoch: str | None = None
    ) -> None:
        """Deliver what matches `pattern`: from now on, or after `since` of `epoch` first and then live."""
        self._readers.setdefault(subscription.send_queue, {})[pattern] = subscription
        if since is None:
            subscription.patterns[pattern] = self.position
            subscription.overlapping = len(subscription.patterns) > 1
            self._enter(pattern, subscription)
            return
        resumption = self._log.resume(since, epoch)
        subscription.patterns[pattern] = resumption.cursor
        subscription.live_line_due = True
        if resumption.lost is not None:
            self._announce_gap(subscription, min(since, resumption.cursor), resumption.cursor, resumption.lost)
        self._go_late(subscription, resumption.cursor)
        if resumption.cursor == self.position:
            self._go_live(subscription)

    def unsubscribe(self, subscription: Subscription, pattern: str) -> None:
        """Deliver nothing more for `pattern`. What is in the send queue already stays there."""
        self._exit(pattern, subscription)
        subscription.patterns.pop(pattern, None)
        subscription.overlapping = len(subscription.patterns) > 1
        if not subscription.patterns:
            self._reading.pop(subscription, None)
            self._ahead.pop(subscription, None)
        send_queue = subscription.send_queue
        send_queue.fix()
        readers = self._readers[send_queue]
        del readers[pattern]
        if not readers:
            del self._readers[send_queue]

    def broadcast(self, entry: Entry) -> None:
        """Offer an ephemeral message (its seq is 0) to everyone, once; who has no room does not get it."""
        served: set[Subscription] = set()
        for tree in (self._live, self._lagging):
            for group in tree.match(entry.channel):
                run = EncodedMessages(group.pattern, [entry])
                for subscription in group.members:
                    if subscription in served or (entry.origin is not None and subscription.producer == entry.origin):
                        continue
                    if subscription.overlapping:
                        served.add(subscription)
                    if subscription.send_datagram is None or not subscription.send_datagram(run.lines):
                        subscription.send_queue.offer(run)
        self._make_room()

    # Catching up: `next_position` and `serve` are the reader without its waiting

    async def run(self) -> None:
        """Catch up whoever is late, for ever. Live deliveries go in between."""
        while True:
            position = self.next_position()
            if position is None:
                self._work = trio.Event()
                await self._work.wait()
                continue
            try:
                page = await self._log.read(position, rows=self.rows_from(position), size=PAGE_BYTES)
            except Unavailable:
                await trio.sleep(RETRY)
                continue
            self._sweeps += 1
            await trio.lowlevel.checkpoint()
            for _ in self.serve(position, page):
                await trio.lowlevel.checkpoint()

    def next_position(self) -> int | None:
        """Where to read next. Two sweeps take turns: one through what is in memory, and one through what is before it.

        So who lacks little is served at once, however much others lack. Either sweep reads on from its last page
        towards the head, and from there back to the lowest cursor: starting from the lowest every time would let a
        stream of newcomers starve those who are nearly there.
        """
        recent = self._log.recent
        cursors: dict[bool, list[int]] = {True: [], False: []}
        for subscription in self._reading:
            cursors[subscription.cursor >= recent - 1].append(subscription.cursor)
        near = bool(cursors[True]) and (not self._near or not cursors[False])
        found = cursors[near]
        if not found:
            return None
        self._near = near
        further_on = [cursor for cursor in found if cursor >= self._swept[near]]
        return min(further_on or found)

    def rows_from(self, position: int) -> int:
        """How many entries to read from there: not many for somebody who has room for few."""
        return max(s.rows for s in self._reading if position <= s.cursor < position + PAGE_ROWS)

    def serve(self, position: int, page: LogPage) -> Iterator[None]:
        """Feed a page that was read from `position` to the late subscriptions that it continues.

        To be exhausted before the next page. Between any two steps anything else may happen.
        """
        restarts = self._restarts
        self._swept[position >= self._log.recent - 1] = page.last
        if page.after > position:
            # What retention has taken is gone for every lower cursor; a hole is a gap for those that have come to it.
            lowest = position if page.lost == "repair" else 0
            for subscription in self._reading:
                if lowest <= subscription.cursor < page.after:
                    self._announce_gap(subscription, subscription.cursor, page.after, page.lost)
                    subscription.cursor = page.after
        readers = [s for s in self._reading if page.after <= s.cursor <= page.last]
        matches: dict[Subscription, list[PatternMatches]] = {subscription: [] for subscription in readers}
        for group, hits in find_hits(self._lagging, page.entries).items():
            found = PatternMatches(group.pattern, hits)
            for member in group.members:
                if member in matches:
                    matches[member].append(found)
        for number, (subscription, wanted) in enumerate(matches.items(), 1):
            if number % SERVED == 0:
                self._make_room()
                yield
            if restarts != self._restarts:
                return
            if subscription not in self._reading or not page.after <= subscription.cursor <= page.last:
                continue
            complete = self._feed(subscription, wanted, page.last)
            progress, subscription.cursor = complete - subscription.cursor, complete
            if complete < page.last:
                subscription.rows = min(2 * progress or subscription.rows, PAGE_ROWS)
                self._stall(subscription)
                continue
            subscription.rows = min(2 * subscription.rows, PAGE_ROWS)
            if complete >= self.position:
                self._go_live(subscription)
        self._make_room()

    def _feed(self, subscription: Subscription, matches: list[PatternMatches], last: int) -> int:
        """Offer as much as there is room for; returns up to where the subscription is complete then."""
        patterns = subscription.patterns
        matches = [found for found in matches if found.pattern in patterns]
        if not matches:
            return last
        found, start = matches[0], 0
        if not subscription.overlapping:
            start = patterns[found.pattern]
        else:
            found = PatternMatches("", merge(subscription, [(m.pattern, m.entries) for m in matches]))
        if subscription.producer in found.origins:
            found = PatternMatches(found.pattern, without(found.entries, subscription.producer))
        run, complete = found.cut(max(subscription.cursor, start), subscription.send_queue, last)
        if run is not None:
            subscription.send_queue.offer(run)
        return complete

    # Between the trees

    def _trees(self, subscription: Subscription) -> tuple[TopicTree[Subscription], TopicTree[Subscription]]:
        """The one in which it stands, and the other."""
        return (self._lagging, self._live) if subscription.lagging else (self._live, self._lagging)

    def _enter(self, pattern: str, subscription: Subscription) -> None:
        tree, other = self._trees(subscription)
        self._in_both += pattern not in tree and pattern in other
        tree.add(pattern, subscription)

    def _exit(self, pattern: str, subscription: Subscription) -> None:
        tree, other = self._trees(subscription)
        self._in_both -= tree.remove(pattern, subscription) and pattern not in tree and pattern in other

    def _move(self, subscription: Subscription, *, lagging: bool) -> None:
        for pattern in subscription.patterns:
            self._exit(pattern, subscription)
        subscription.lagging = lagging
        for pattern in subscription.patterns:
            self._enter(pattern, subscription)

    def _go_late(self, subscription: Subscription, cursor: int) -> None:
        self._move(subscription, lagging=True)
        subscription.cursor = cursor
        if subscription.send_queue:
            self._stall(subscription)
        else:
            self._read_for(subscription)

    def _fall_behind(self, subscription: Subscription, cursor: int) -> None:
        self._lags += 1
        subscription.live_line_due = True
        self._go_late(subscription, cursor)

    def _read_for(self, subscription: Subscription) -> None:
        """Have a late subscription served from the log, as soon as that has what it lacks."""
        if subscription.cursor > self.position:
            self._ahead[subscription] = None
        elif subscription.cursor == self.position:
            self._go_live(subscription)
        else:
            self._reading[subscription] = None
            self._work.set()

    def _stall(self, subscription: Subscription) -> None:
        """Serve a late subscription no more until its send queue has been emptied.

        What retention does to it meanwhile it is told once, when it is served again.
        """
        self._reading.pop(subscription, None)
        if not subscription.stalled:
            subscription.stalled = True
            subscription.send_queue.when_emptied(partial(self._unstall, subscription))

    def _unstall(self, subscription: Subscription) -> None:
        if subscription.stalled:
            subscription.stalled = False
            if subscription.patterns:
                self._read_for(subscription)

    def _go_live(self, subscription: Subscription) -> None:
        """Nothing is awaited between finding the cursor at `position` and this."""
        self._move(subscription, lagging=False)
        subscription.stalled = False
        self._reading.pop(subscription, None)
        self._ahead.pop(subscription, None)
        if subscription.live_line_due:
            subscription.live_line_due = False
            for pattern in subscription.patterns:
                subscription.say(Live(pattern, self.position))

    def _announce_gap(self, subscription: Subscription, known: int, cursor: int, reason: str) -> None:
        for pattern in subscription.patterns:
            subscription.say(Gap(pattern, known + 1, cursor, self._log.epoch, reason))
        subscription.send_queue.fix()

    # The budget

    def _make_room(self) -> None:
        """Where all send queues together hold too much, have the largest give back their messages."""
        budget = self.budget
        slack = budget.for_messages // 8
        if budget.messages <= self._alarm:
            self._alarm = max(budget.for_messages, min(self._alarm, budget.messages + slack))
            return
        for send_queue in sorted(self._readers, key=_size, reverse=True):
            self._withdraw(send_queue)
            if budget.messages <= KEPT * budget.for_messages:
                break
        # What is left now cannot be had again, and is not looked through for every batch.
        self._alarm = max(budget.for_messages, budget.messages + slack)

    def _withdraw(self, send_queue: SendQueue) -> None:
        readers = self._readers[send_queue]
        dropped = send_queue.withdraw()
        self._withdrawals += bool(dropped)
        for pattern, seq in dropped.items():
            # A subscription to several patterns has all of the send queue.
            subscription = readers[pattern] if pattern else next(iter(readers.values()))
            if subscription.lagging:
                subscription.live_line_due = True
                subscription.cursor = min(subscription.cursor, seq - 1)
            else:
                self._fall_behind(subscription, seq - 1)
            # It has been slow, so it waits even where nothing is left of what it waits for.
            self._stall(subscription)
