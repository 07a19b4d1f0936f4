"""Pages of messages for requests without a session: forward from a cursor, backward, and the wait for the next message.

Forward pages are read from the log as for lagging subscriptions, so they have the same gaps. A request that waits has
ordinary subscriptions, but only to be woken: it reads the messages from the log afterwards.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator, Hashable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from operator import attrgetter
from weakref import WeakValueDictionary

import trio
from msgspec import Struct

from ..error_codes import ErrorCode
from ..errors import PeerError, Unavailable
from ..limits.client_usage import ClientUsages
from ..limits.cpu_scheduler import CpuScheduler
from ..log import Entry, Log, LogPage
from .encoded_messages import OVERHEAD
from .fan_out import PAGE_BYTES, Delivery
from .page_size import MAX_PAGE_BYTES, newest_that_fit
from .send_queue import SendQueue
from .subscription import Subscription
from .topic_tree import TopicTree

FIRST_ROWS, MAX_ROWS = 100, 1000
"""Entries of the log that are read at once: few at first, because most of them may match."""

MAX_READS = 16
"""Reads of the log for one page. A page of a rare channel may have no message, and continues where it has ended."""

MAX_BACKWARD_PATTERNS = 10
"""Patterns of a page that is read backward. Each is a search of its own in the database."""

_seq = attrgetter("seq")


class MissingRange(Struct, frozen=True, rename={"first": "from", "last": "to"}):
    """A range of seqs in which messages may be missing: `from` and `to` are the first and the last of them.

    It is empty (`from` is above `to`) if the log has another epoch, and no message is missing.
    """

    first: int
    last: int
    reason: str


@dataclass(frozen=True, slots=True)
class MessagePage:
    """Matching entries in order. The page is complete up to `seq` of `epoch`, but for the `gap` before its entries.

    `more`: whether the log has entries behind the page that were not searched.
    """

    entries: Sequence[Entry]
    seq: int
    epoch: str
    more: bool
    gap: MissingRange | None = None

    @property
    def final(self) -> bool:
        """Whether to return it without waiting for messages."""
        return bool(self.entries) or self.more or self.gap is not None


class MessagePages:
    """What the requests for pages of one replica share. Each request has a `PageReader`."""

    def __init__(
        self,
        log: Log,
        delivery: Delivery,
        cpu_scheduler: CpuScheduler,
        client_usages: ClientUsages,
        send_queue_limit: int,
    ) -> None:
        self.log = log
        self.delivery = delivery
        self.cpu_scheduler = cpu_scheduler
        self.client_usages = client_usages
        self.send_queue_limit = send_queue_limit
        self.stopping = False
        """Whether requests wait no longer, because the replica is stopping."""
        self.wake_ups: set[WakeUp] = set()
        """Those of the requests that wait."""
        self.forward_turns, self.backward_turns = ClientTurns(), ClientTurns()
        """Turns of reading the database: forward and backward reads have a connection each."""

    def stop_waiting(self) -> None:
        """End the wait of all requests, now and in the future."""
        self.stopping = True
        for wake_up in self.wake_ups:
            wake_up.event.set()

    def check_memory(self) -> None:
        """Raise `PeerError` (overloaded) while too much memory is taken by replies that were not sent yet."""
        budget = self.delivery.budget
        if budget.replies > budget.for_replies:
            text = "too many responses wait to be read by clients (limits.send_queue_total)"
            raise PeerError(ErrorCode.OVERLOADED, text, retry_after=1.0)


class ClientTurns:
    """Lets one request after another read the database, and clients take turns.

    So many requests of one client delay neither those of others nor the catch-up of subscriptions by more than a read.
    """

    def __init__(self) -> None:
        self._all = trio.Lock()
        self._clients: WeakValueDictionary[Hashable, trio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, client: Hashable) -> AsyncIterator[None]:
        """Wait for a client's turn, which lasts as long as the context."""
        own = self._clients.get(client)
        if own is None:
            own = self._clients[client] = trio.Lock()
        async with own, self._all:
            yield


class PageReader:
    """Reads pages for one request: messages that match any of `patterns`, at most `limit` in a page.

    The patterns must be valid and different. All methods raise `Unavailable` while the log cannot be read, and
    `PeerError` when the replica has no memory for a page. Cancelling them changes nothing.
    """

    def __init__(self, pages: MessagePages, patterns: Sequence[str], limit: int, client: Hashable) -> None:
        self._pages = pages
        self._patterns = patterns
        self._limit = limit
        self._client = client
        self._tree: TopicTree[None] = TopicTree()
        for pattern in patterns:
            self._tree.add(pattern, None)

    @property
    def stopping(self) -> bool:
        """Whether `wait` returns at once, because the replica is stopping."""
        return self._pages.stopping

    async def read_after(self, since: int | None, epoch: str | None = None) -> MessagePage:
        """Read forward from the cursor `since` of `epoch`, or of the present one. Without `since`: from the newest seq.

        A gap is announced before the first message. A page ends before a second gap, and where the log changes its
        epoch.
        """
        log = self._pages.log
        present = _epoch(log)
        cursor, gap = log.applied if since is None else since, None
        if since is not None and (resumption := log.resume(since, epoch)).lost is not None:
            cursor = resumption.cursor
            gap = MissingRange(min(since, cursor) + 1, cursor, resumption.lost)
        entries: list[Entry] = []
        size, rows = 0, min(max(self._limit, FIRST_ROWS), MAX_ROWS)
        for _ in range(MAX_READS):
            if cursor >= log.applied:
                break
            try:
                page = await self._read(cursor, rows)
            except Unavailable:
                if not entries and gap is None:
                    raise
                break
            if log.epoch != present:
                break
            rows = min(2 * rows, MAX_ROWS)
            if page.after > cursor:
                if entries or gap is not None:
                    break
                gap = MissingRange(cursor + 1, page.after, page.lost)
            found = [entry for entry in page.entries if self._tree.match(entry.channel)]
            sizes = list(accumulate((entry.size + OVERHEAD for entry in found), initial=size))
            room = min(self._limit - len(entries), bisect_right(sizes, MAX_PAGE_BYTES) - 1)
            kept = found[: room if entries else max(1, room)]
            entries += kept
            if len(kept) < len(found):
                cursor = found[len(kept)].seq - 1
                break
            size, cursor = sizes[-1], page.last
            if len(entries) == self._limit:
                break
        return MessagePage(entries, cursor, present, cursor < log.applied or log.epoch != present, gap)

    async def read_before(self, before: int | None) -> MessagePage:
        """Read the newest messages below the seq `before`, or the newest of all. `more`: whether there are older ones.

        The page ends at `before`, or at the newest seq: reading forward from there misses nothing.
        """
        log, newest = self._pages.log, self._pages.log.applied
        present = _epoch(log)
        end = newest if before is None else min(max(before - 1, 0), newest)
        found: dict[int, Entry] = {}
        floor, more = 0, False
        for pattern in self._patterns:
            self._pages.check_memory()
            await self._pages.cpu_scheduler.yield_cpu()
            async with self._pages.backward_turns.turn(self._client):
                entries, older = await log.history(pattern, before=end + 1, limit=self._limit)
            if older:
                # Below its oldest message, this pattern may have others that the page does not have.
                more, floor = True, max(floor, entries[0].seq if entries else end + 1)
            found.update((entry.seq, entry) for entry in entries)
        if log.epoch != present:
            raise Unavailable("the log has another epoch: read again")
        kept = newest_that_fit([found[seq] for seq in sorted(found) if seq >= floor])[-self._limit :]
        return MessagePage(kept, end, present, more or len(kept) < len(found))

    async def _read(self, cursor: int, rows: int) -> LogPage:
        pages = self._pages
        pages.check_memory()
        await pages.cpu_scheduler.yield_cpu()
        if cursor >= pages.log.memory_floor - 1:
            return await pages.log.read(cursor, rows=rows, size=PAGE_BYTES)
        async with pages.forward_turns.turn(self._client):
            return await pages.log.read(cursor, rows=rows, size=PAGE_BYTES)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a session and its subscriptions, which `wait` makes. Raises `PeerError` for one too many."""
        usages, number = self._pages.client_usages, len(self._patterns)
        usage = usages.add_session(self._client)
        try:
            usages.check_subscriptions(usage, number)
            usages.add_subscriptions(usage, number)
            try:
                yield
            finally:
                usages.add_subscriptions(usage, -number)
        finally:
            usages.remove_session(usage)

    async def wait(self, page: MessagePage, deadline: float) -> int:
        """Wait until messages follow a page, but not after the Trio time `deadline`, and not while `stopping`.

        Returns the seq from which to read on, in the epoch of the page: no message up to there matches. It may be that
        none follows there either.
        """
        delivery = self._pages.delivery
        await trio.lowlevel.checkpoint()
        if self._pages.stopping or page.epoch != self._pages.log.epoch:
            return page.seq
        wake_up = WakeUp(delivery, self._pages.send_queue_limit)
        self._pages.wake_ups.add(wake_up)
        try:
            wake_up.subscribe(self._patterns, page)
            with trio.move_on_at(deadline):
                await wake_up.event.wait()
            # One message wakes many requests: what they do next is their clients' share of the CPU.
            await self._pages.cpu_scheduler.acquire()
            return max(page.seq, wake_up.complete(page.seq))
        finally:
            self._pages.wake_ups.discard(wake_up)
            wake_up.close()


class WakeUp:
    """The subscriptions of one waiting request. `event` is set when something was put into their send queue."""

    def __init__(self, delivery: Delivery, send_queue_limit: int) -> None:
        self.event = trio.Event()
        self._delivery = delivery
        self._send_queue = SendQueue(self, self._wake, send_queue_limit, delivery.budget)
        self._subscriptions: dict[str, Subscription] = {}

    def subscribe(self, patterns: Sequence[str], page: MessagePage) -> None:
        """Subscribe to the messages after a page."""
        live = page.seq == self._delivery.position
        for pattern in patterns:
            subscription = Subscription(self._send_queue, send_datagram=_drop_ephemeral_message)
            self._subscriptions[pattern] = subscription
            # Live subscriptions put no `live` line into the send queue, which would wake the request.
            self._delivery.subscribe(subscription, pattern, None if live else page.seq, page.epoch)

    def complete(self, seq: int) -> int:
        """Return the seq up to which no message was delivered; `seq` if there is a line about the position."""
        first = self._send_queue.withdraw()
        if self._send_queue:
            return seq
        position = self._delivery.position
        cursors = [each.cursor if each.lagging else position for each in self._subscriptions.values()]
        return min([*cursors, *(messages.first_seq - 1 for messages in first.values())])

    def close(self) -> None:
        """End the subscriptions."""
        for pattern, subscription in self._subscriptions.items():
            self._delivery.unsubscribe(subscription, pattern)
        self._send_queue.close()

    def flush(self) -> None:
        """Do nothing: the request reads from the log."""

    def _wake(self, _: SendQueue) -> None:
        self.event.set()


def _drop_ephemeral_message(data: bytes) -> bool:
    """Take the place of a datagram: ephemeral messages are not in the log, so they do not wake a request."""
    return True


def _epoch(log: Log) -> str:
    """Return the epoch of a log. Raises `Unavailable` before it has been read for the first time."""
    if not log.epoch:
        raise Unavailable("the database has not been reached yet")
    return log.epoch
