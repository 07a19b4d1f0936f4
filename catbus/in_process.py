"""What the broker's own process uses without a connection: subscriptions and history."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import trio

from .delivery.encoded_messages import EncodedMessages
from .delivery.fan_out import PAGE_BYTES
from .delivery.send_queue import SendQueue
from .delivery.snapshots import SNAPSHOT_ROWS
from .delivery.subscription import Subscription
from .log import Entry
from .protocol.channels import check_pattern
from .protocol.wire_messages import Gap, decode_payload, decode_server
from .replica import Replica


@dataclass(frozen=True, slots=True)
class LocalMessage:
    """A message from a subscription or the history. `at`: milliseconds since 1970. An ephemeral one has no `seq`."""

    channel: str
    data: bytes
    seq: int | None
    at: int
    sender: str | None
    pattern: str
    retain: bool = False
    """Whether it was published with `retain`."""

    @property
    def payload(self) -> Any:
        """The payload, decoded."""
        return decode_payload(self.data)


@dataclass(frozen=True, slots=True)
class LocalPage:
    """A page of messages from the log, oldest first. `more`: there are older ones."""

    messages: tuple[LocalMessage, ...]
    more: bool


@dataclass(frozen=True, slots=True)
class LocalSnapshot:
    """The retained messages of a pattern, in the byte order of their channels: the state up to `seq` of `epoch`.

    A channel whose retained message has changed since then may be missing. The change follows after `seq`.
    """

    messages: tuple[LocalMessage, ...]
    seq: int
    epoch: str


async def read_history(replica: Replica, pattern: str, before: int | None, limit: int) -> LocalPage:
    """Read the newest messages that match, as `Broker.history` does. Raises `PeerError` and `Unavailable`."""
    check_pattern(pattern)
    entries, more = await replica.log.history(pattern, before=before, limit=limit)
    return LocalPage(tuple(_make_message(entry, pattern) for entry in entries), more)


async def read_retained(replica: Replica, pattern: str) -> LocalSnapshot:
    """Read the retained messages that match, as `Broker.retained` does. Raises `PeerError` and `Unavailable`."""
    check_pattern(pattern)
    log, delivery = replica.log, replica.delivery
    while True:
        version, epoch, until = delivery.page_version, log.epoch, delivery.position
        messages: list[LocalMessage] = []
        after, complete = None, False
        # Pages from before and after an erasure, or of two epochs, are not one state.
        while not complete and version == delivery.page_version:
            page = await log.retained(pattern, after=after, until=until, rows=SNAPSHOT_ROWS, size=PAGE_BYTES)
            messages += [_make_message(entry, pattern) for entry in page.entries]
            after, complete = page.last, page.complete
        if version == delivery.page_version:
            return LocalSnapshot(tuple(messages), until, epoch)


def _make_message(entry: Entry, pattern: str) -> LocalMessage:
    return LocalMessage(entry.channel, entry.payload, entry.seq or None, entry.at, entry.sender, pattern, entry.retain)


class LocalSubscription(AsyncIterator[LocalMessage]):
    """The messages that match one pattern. Messages wait in a bounded send queue, and above its limit in the log."""

    def __init__(self, replica: Replica, pattern: str, since: int | None, epoch: str | None) -> None:
        check_pattern(pattern)
        self.pattern = pattern
        self.cursor = replica.delivery.position if since is None else since
        """The seq up to which it is complete, to resume after."""
        self.epoch = replica.log.epoch
        self.gaps: list[Gap] = []
        """Ranges of seqs that may be missing, oldest first."""
        self._delivery = replica.delivery
        self._ready: deque[Entry] = deque()
        self._arrived = trio.Event()
        self._send_queue = SendQueue(self, self._wake, replica.config.limits.send_queue, self._delivery.budget)
        self._subscription = Subscription(self._send_queue, taken=self._ready)
        self._closed = False
        self._delivery.subscribe(self._subscription, pattern, since, epoch)

    async def __anext__(self) -> LocalMessage:
        """Return the next message. Cancelling it loses none."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._unpack()
        while not self._ready:
            if self._closed:
                raise StopAsyncIteration
            self._arrived = trio.Event()
            await self._arrived.wait()
            self._unpack()
        entry = self._ready.popleft()
        self.cursor = entry.seq or self.cursor
        await trio.lowlevel.cancel_shielded_checkpoint()
        return _make_message(entry, self.pattern)

    def close(self) -> None:
        """End the subscription, and the iteration over it."""
        self._closed = True
        self._delivery.unsubscribe(self._subscription, self.pattern)
        self._send_queue.close()
        self._arrived.set()

    def flush(self) -> None:
        """Do nothing: the iteration takes the messages."""

    def _wake(self, _: SendQueue) -> None:
        self._arrived.set()

    def _unpack(self) -> None:
        for item in self._send_queue.take():
            if isinstance(item, EncodedMessages):
                self._ready.extend(item.entries)
            else:
                reply = decode_server(item)
                if isinstance(reply, Gap):
                    self.gaps.append(reply)
                    self.cursor, self.epoch = reply.last, reply.epoch
