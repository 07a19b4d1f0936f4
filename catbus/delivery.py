"""From the log to the mailboxes: committed entries are matched, encoded once, and offered to who subscribed.

A subscription stands in exactly one of two topic trees. In the live one it is complete up to `position` and gets
every batch as it is applied. In the late one it has a cursor of its own and is caught up from the log by one reader
that all late subscriptions share. Joining with `since`, falling behind and starting up are the same case: late.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import attrgetter

import trio

from .errors import Unavailable
from .log import Entry, Log, Page
from .mailbox import OVERHEAD, Mailbox, Run
from .topics import Group, TopicTree
from .wire import Gap, Live, Reply, encode

PAGE_ROWS = 1000
PAGE_BYTES = 1 << 20
RETRY = 0.25
"""Seconds between tries to read a log that is unavailable."""

_seq = attrgetter("seq")


class Subscription:
    """What one session wants to hear of, and how far it has heard it.

    A session of `catbus.v1` has one for each pattern. A first-version session has a single one for all its patterns,
    which is why it gets one copy of a message however many of them match.
    """

    __slots__ = (
        "cursor",
        "late",
        "mailbox",
        "marked",
        "overlapping",
        "owed_live",
        "patterns",
        "producer",
        "send_datagram",
        "stalled",
    )

    def __init__(
        self, mailbox: Mailbox, producer: bytes = b"", send_datagram: Callable[[bytes], bool] | None = None
    ) -> None:
        self.mailbox = mailbox
        self.producer = producer
        self.send_datagram = send_datagram
        """How ephemeral messages go that fit into a datagram, past the mailbox; False for one that does not fit."""
        self.patterns: dict[str, int] = {}
        """Each pattern, and the seq after which its messages are wanted."""
        self.overlapping = False
        """Whether there are several of them."""
        self.late = False
        self.cursor = 0
        """Complete up to here; kept only while late."""
        self.stalled = False
        """Late, and waiting for its mailbox to be emptied."""
        self.owed_live = False
        self.marked = 0
        """The newest seq up to which a `head` has called it complete."""

    def say(self, mark: Reply) -> None:
        line = encode(mark, self.mailbox.protocol)
        if line is not None:
            self.mailbox.put(line)


@dataclass(frozen=True, slots=True)
class DeliveryStatistics:
    """`live` and `late` count subscriptions, `lags` how often one fell behind, `sweeps` the pages read for the late."""

    position: int
    live: int
    late: int
    lags: int
    sweeps: int


class Delivery:
    """Follows a log and keeps the mailboxes of those who subscribed in step with it. Belongs to one Trio thread."""

    def __init__(self, log: Log) -> None:
        self.position = 0
        """The newest seq that the live subscriptions have been offered."""
        self.at = 0
        """When the entry at `position` was committed, in milliseconds since 1970; 0 where that is not known."""
        self._log = log
        self._live: TopicTree[Subscription] = TopicTree()
        self._late: TopicTree[Subscription] = TopicTree()
        self._waiting: dict[Subscription, None] = {}
        """All that are late."""
        self._ahead: dict[Subscription, None] = {}
        """Those of them whose cursor is above `position`: another replica has told them more than this one knows."""
        self._work = trio.Event()
        self._swept = 0
        self._lags = 0
        self._sweeps = 0

    def statistics(self) -> DeliveryStatistics:
        return DeliveryStatistics(self.position, len(self._live), len(self._late), self._lags, self._sweeps)

    # The log's follower

    def apply(self, entries: Sequence[Entry]) -> None:
        """Offer the next entries to the live subscriptions; who has no room for all of its own goes late."""
        for subscription in _offer(self._live, entries):
            self._lags += 1
            subscription.owed_live = True
            self._go_late(subscription, self.position)
        self.position = entries[-1].seq
        self.at = entries[-1].at
        for subscription in [s for s in self._ahead if s.cursor <= self.position]:
            del self._ahead[subscription]
            if subscription.cursor == self.position:
                self._go_live(subscription)
        if self._waiting:
            self._work.set()

    def restart(self, applied: int, lost: str = "epoch") -> None:
        """Go on after `applied`, and tell everyone what may be missing: `lost` is "epoch" or "retention".

        In another epoch, who is late and not beyond `applied` misses nothing, is told so, and goes on from its cursor.
        """
        previous, self.position, self.at = self.position, applied, 0
        members = [member for tree in (self._live, self._late) for group in tree.groups() for member in group.members]
        for subscription in dict.fromkeys(members):
            known = subscription.cursor if subscription.late else previous
            if lost == "epoch":
                # The seqs begin lower, so what was wanted after a seq of the other log is wanted from here on.
                subscription.patterns = {p: min(after, applied) for p, after in subscription.patterns.items()}
                subscription.marked = 0
                if subscription.late and known < applied:
                    self._ahead.pop(subscription, None)
                    self._announce_gap(subscription, known, known, lost)
                    self._work.set()
                    continue
            elif subscription.late and known >= applied:
                # Another replica has served it with what this one never had.
                if known == applied:
                    self._go_live(subscription)
                continue
            self._announce_gap(subscription, min(known, applied), applied, lost)
            if subscription.late:
                self._go_live(subscription)

    # Subscribing

    def subscribe(
        self, subscription: Subscription, pattern: str, since: int | None = None, epoch: str | None = None
    ) -> None:
        """Deliver what matches `pattern`: from now on, or after `since` of `epoch` first and then live."""
        if since is None:
            subscription.patterns[pattern] = self.position
            subscription.overlapping = len(subscription.patterns) > 1
            (self._late if subscription.late else self._live).add(pattern, subscription)
            return
        resumption = self._log.resume(since, epoch)
        subscription.patterns[pattern] = resumption.cursor
        subscription.owed_live = True
        if resumption.lost is not None:
            self._announce_gap(subscription, min(since, resumption.cursor), resumption.cursor, resumption.lost)
        self._go_late(subscription, resumption.cursor)
        if resumption.cursor == self.position:
            self._go_live(subscription)
        elif resumption.cursor > self.position:
            self._ahead[subscription] = None

    def unsubscribe(self, subscription: Subscription, pattern: str) -> None:
        """Deliver nothing more for `pattern`. What is in the mailbox already stays there."""
        (self._late if subscription.late else self._live).remove(pattern, subscription)
        subscription.patterns.pop(pattern, None)
        subscription.overlapping = len(subscription.patterns) > 1
        if not subscription.patterns:
            self._waiting.pop(subscription, None)
            self._ahead.pop(subscription, None)

    def broadcast(self, entry: Entry) -> None:
        """Offer an ephemeral message (its seq is 0) to everyone, once; who has no room does not get it."""
        served: set[Subscription] = set()
        for tree in (self._live, self._late):
            for group in tree.match(entry.channel):
                run = Run(group.pattern, [entry])
                for subscription in group.members:
                    if subscription in served or (entry.origin is not None and subscription.producer == entry.origin):
                        continue
                    if subscription.overlapping:
                        served.add(subscription)
                    if subscription.send_datagram is None or not subscription.send_datagram(run.lines):
                        subscription.mailbox.offer(run)

    # Catching up: `next_position` and `serve` are the reader without its waiting

    async def run(self) -> None:
        """Catch up whoever is late, for ever. Live deliveries go between any two pages."""
        while True:
            position = self.next_position()
            if position is None:
                self._work = trio.Event()
                await self._work.wait()
                continue
            try:
                page = await self._log.read(position, rows=PAGE_ROWS, size=PAGE_BYTES)
            except Unavailable:
                await trio.sleep(RETRY)
                continue
            self._sweeps += 1
            self.serve(position, page)
            await trio.lowlevel.checkpoint()

    def next_position(self) -> int | None:
        """Where to read: on from the last page towards the head, and from there back to the lowest cursor.

        Starting from the lowest every time would let a stream of newcomers starve those who are nearly there.
        """
        cursors = [s.cursor for s in self._waiting if s.cursor < self.position and not s.stalled]
        further_on = [cursor for cursor in cursors if cursor >= self._swept]
        return min(further_on or cursors, default=None)

    def serve(self, position: int, page: Page) -> None:
        """Feed a page that was read from `position` to the late subscriptions that it continues."""
        self._swept = page.last
        if page.after > position:
            for subscription in self._waiting:
                if subscription.cursor < page.after:
                    self._announce_gap(subscription, subscription.cursor, page.after, "retention")
                    subscription.cursor = page.after
        shelves: dict[Subscription, list[_Shelf]] = {
            s: [] for s in self._waiting if page.after <= s.cursor <= page.last and not s.stalled
        }
        for group, hits in _matches(self._late, page.entries).items():
            shelf = _Shelf(group.pattern, hits)
            for member in group.members:
                if member in shelves:
                    shelves[member].append(shelf)
        for subscription, found in shelves.items():
            complete = self._feed(subscription, found, page.last)
            subscription.cursor = complete
            if complete < page.last:
                self._stall(subscription)
            elif complete >= self.position:
                self._go_live(subscription)

    def _feed(self, subscription: Subscription, shelves: list[_Shelf], last: int) -> int:
        """Offer as much as there is room for; returns up to where the subscription is complete then."""
        if not shelves:
            return last
        shelf, start = shelves[0], 0
        if not subscription.overlapping:
            start = subscription.patterns[shelf.pattern]
        else:
            shelf = _Shelf("", _merge(subscription, [(s.pattern, s.entries) for s in shelves]))
        if subscription.producer in shelf.origins:
            shelf = _Shelf(shelf.pattern, _without(shelf.entries, subscription.producer))
        run, complete = shelf.cut(max(subscription.cursor, start), subscription.mailbox, last)
        if run is not None:
            subscription.mailbox.offer(run)
        return complete

    def _stall(self, subscription: Subscription) -> None:
        subscription.stalled = True
        subscription.mailbox.when_emptied(partial(self._unstall, subscription))

    def _unstall(self, subscription: Subscription) -> None:
        subscription.stalled = False
        self._work.set()

    # Between the trees

    def _go_late(self, subscription: Subscription, cursor: int) -> None:
        for pattern in subscription.patterns:
            self._live.remove(pattern, subscription)
            self._late.add(pattern, subscription)
        subscription.late = True
        subscription.cursor = cursor
        self._waiting[subscription] = None
        if subscription.mailbox:
            self._stall(subscription)
        self._work.set()

    def _go_live(self, subscription: Subscription) -> None:
        """Nothing is awaited between finding the cursor at `position` and this."""
        for pattern in subscription.patterns:
            self._late.remove(pattern, subscription)
            self._live.add(pattern, subscription)
        subscription.late = False
        del self._waiting[subscription]
        self._ahead.pop(subscription, None)
        if subscription.owed_live:
            subscription.owed_live = False
            for pattern in subscription.patterns:
                subscription.say(Live(pattern, self.position))

    def _announce_gap(self, subscription: Subscription, known: int, cursor: int, reason: str) -> None:
        for pattern in subscription.patterns:
            subscription.say(Gap(pattern, known + 1, cursor, self._log.epoch, reason))


class _Shelf:
    """What one pattern matched in a page; every stretch of it that somebody needs is encoded once."""

    def __init__(self, pattern: str, entries: Sequence[Entry]) -> None:
        self.pattern = pattern
        self.entries = entries
        self.origins = {entry.origin for entry in entries}
        self._ends = list(accumulate(len(e.payload) + len(e.channel) + OVERHEAD + len(pattern) for e in entries))
        self._runs: dict[tuple[int, int], Run] = {}

    def cut(self, cursor: int, mailbox: Mailbox, last: int) -> tuple[Run | None, int]:
        """What goes into the mailbox of what stands after `cursor`, and up to where that is complete.

        An empty mailbox gets one message at least, whatever its size.
        """
        entries, ends = self.entries, self._ends
        start = bisect_right(entries, cursor, key=_seq)
        if start == len(entries):
            return None, last
        stop = bisect_right(ends, (ends[start - 1] if start else 0) + mailbox.room, lo=start)
        if stop == start and not mailbox:
            stop += 1
        complete = last if stop == len(entries) else entries[stop].seq - 1
        if stop == start:
            return None, complete
        run = self._runs.get((start, stop))
        if run is None:
            run = self._runs[start, stop] = Run(self.pattern, entries[start:stop])
        return run, complete


def _matches(tree: TopicTree[Subscription], entries: Sequence[Entry]) -> dict[Group[Subscription], list[Entry]]:
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


def _offer(tree: TopicTree[Subscription], entries: Sequence[Entry]) -> list[Subscription]:
    """Offer entries to all who want them: each gets all of its own or none. Returns those who had no room."""
    turned_away: list[Subscription] = []
    overlapping: dict[Subscription, list[tuple[str, Sequence[Entry]]]] = {}
    for group, hits in _matches(tree, entries).items():
        shared = run = Run(group.pattern, hits)
        origins = {entry.origin for entry in hits if entry.origin is not None}
        for subscription in group.members:
            if subscription.overlapping:
                overlapping.setdefault(subscription, []).append((group.pattern, hits))
                continue
            if origins:
                mine = subscription.producer in origins
                run = Run(group.pattern, _without(hits, subscription.producer)) if mine else shared
            if not subscription.mailbox.offer(run):
                turned_away.append(subscription)
    for subscription, found in overlapping.items():
        wanted = _without(_merge(subscription, found), subscription.producer)
        if not subscription.mailbox.offer(Run("", wanted)):
            turned_away.append(subscription)
    return turned_away


def _merge(subscription: Subscription, found: Sequence[tuple[str, Sequence[Entry]]]) -> list[Entry]:
    """What several patterns of one subscription matched, in order and once."""
    starts = subscription.patterns
    wanted = {e.seq: e for pattern, hits in found for e in hits if e.seq > starts[pattern]}
    return sorted(wanted.values(), key=_seq)


def _without(entries: Sequence[Entry], producer: bytes) -> list[Entry]:
    """The entries but for those that this producer asked not to get back."""
    return [entry for entry in entries if entry.origin != producer]
