"""What one subscription has received and the application has not yet taken. Pure: no I/O, nobody waits here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum, auto
from typing import NamedTuple

from ..errors import PeerError, Refused
from .messages import Gap, Head, Live, Message, ServerMessage

Event = Live | Gap | Head

Feed = Callable[[bytes], Iterator[ServerMessage | PeerError | None]]


class Lane:
    """One stream of the broker's, and whom what comes on it is for: all subscriptions but those with one of their own.

    `feed` makes objects of its bytes. `connection` is what it is a stream of.
    """

    __slots__ = ("connection", "epoch", "feed", "fresh", "routes")

    def __init__(self, feed: Feed, connection: object, epoch: str) -> None:
        self.feed = feed
        self.connection = connection
        self.epoch = epoch
        """Of the log that what comes here is from: one stream may be in the next while another is in the last still."""
        self.routes: dict[str, Inbox] = {}
        """Who gets the messages for a pattern; what comes for another pattern is for a subscription that was."""
        self.fresh: dict[str, Inbox] = {}
        """Those that the broker will send to, but has not: until it does, their epoch may be another than its own."""

    def heard(self, pattern: str) -> Inbox | None:
        """Who has the pattern, now that the broker says something about it."""
        inbox = self.fresh.pop(pattern, None)
        if inbox is not None:
            self.routes[pattern] = inbox
        return self.routes.get(pattern)

    def find(self, pattern: str | None) -> Inbox | None:
        """Whom a message is for that no route leads to: it may be the first since a `subscribed`."""
        if pattern not in self.fresh:
            return None
        inbox = self.heard(pattern)
        if inbox is not None:
            inbox.prove(self.epoch)
        return inbox


class Phase(Enum):
    """Where a subscription stands.

    ASKED: a `subscribe` is on its way, or will be when there is a connection. HELD: the broker sends. AWAY: it was told
    to stop, because nobody took what it sent; once there is room it is asked again, from where it stopped. ENDED:
    refused, revoked or left.
    """

    ASKED = auto()
    HELD = auto()
    AWAY = auto()
    ENDED = auto()


class Mark(NamedTuple):
    """Something that moves the cursor, in its place among the messages, and where the cursor is after it."""

    event: Event | None
    cursor: int
    epoch: str


def _nobody() -> None:
    pass


class Inbox:
    """One subscription: a queue of messages and marks, and a cursor at either end of it."""

    __slots__ = (
        "arrived",
        "arrived_epoch",
        "begun",
        "cursor",
        "datagrams",
        "ending",
        "epoch",
        "items",
        "lane",
        "limit",
        "live",
        "named",
        "pattern",
        "phase",
        "pressed",
        "resuming",
        "spilled",
        "stream",
        "wake",
    )

    def __init__(
        self,
        pattern: str,
        since: int | None,
        epoch: str,
        limit: int,
        *,
        named: bool = True,
        stream: bool = False,
        datagrams: bool = False,
    ) -> None:
        self.pattern = pattern
        self.named = named
        """Whether the broker is told the epoch; who leaves it out means the present one, whichever that is."""
        self.stream = stream
        self.datagrams = datagrams
        """What the broker is asked for: a stream of its own; ephemeral messages as datagrams."""
        self.lane: Lane | None = None
        """Where the broker sends what is for it, while it does."""
        self.phase = Phase.ASKED
        self.items: deque[Message | Mark] = deque()
        self.limit = limit
        """How many messages are welcome. More may come while somebody waits for what stands behind them."""
        self.begun = False
        """Whether the broker has ever agreed to send."""
        self.resuming = since is not None
        self.arrived = self.cursor = since or 0
        """`arrived`: complete up to here, the queue included. `cursor`: what the application has taken."""
        self.arrived_epoch = self.epoch = epoch
        self.live = False
        """Whether a `head` speaks of this subscription too."""
        self.pressed = False
        """Whether somebody wants to know when the queue is half empty."""
        self.spilled = 0
        """Bytes that came in beyond the limit, roughly."""
        self.ending: Refused | None = None
        """Raised once the queue is empty."""
        self.wake: Callable[[], None] = _nobody
        """Called when there is something to take after there was nothing, and when the phase changes."""

    def begin(self, seq: int, epoch: str) -> None:
        """The broker sends from now on. `seq` and `epoch` are where it stands."""
        self.phase = Phase.HELD
        self.begun = True
        if not self.resuming:
            # From now on, so this is where it is complete. With `since`, only what follows tells.
            self.arrived = self.cursor = seq
            self.arrived_epoch = self.epoch = epoch
            self.live = self.resuming = True
        else:
            self.live = False
        self.wake()

    def resume(self) -> tuple[int | None, str | None]:
        """The `since` and `epoch` to ask the broker for. What is queued here is not asked for again."""
        named, self.named = self.named, True
        if not self.resuming:
            return None, None
        return self.arrived, (self.arrived_epoch or None) if named else None

    def prove(self, epoch: str) -> None:
        """A message comes with no gap before it, so what came before stands in this epoch as it stood in its own."""
        if epoch != self.arrived_epoch:
            self.mark(None, self.arrived, epoch)

    def mark(self, event: Event | None, seq: int, epoch: str) -> None:
        """Everything up to `seq` of `epoch` has arrived. Where the epoch is another, the seqs may begin lower."""
        if epoch == self.arrived_epoch:
            seq = max(seq, self.arrived)
        self.arrived, self.arrived_epoch = seq, epoch
        items = self.items
        if isinstance(event, Head) and items and isinstance(last := items[-1], Mark) and isinstance(last.event, Head):
            items.pop()
        items.append(Mark(event, seq, epoch))
        if len(items) == 1:
            self.wake()

    def end(self, ending: Refused | None) -> None:
        """Nothing more will come."""
        self.phase = Phase.ENDED
        self.ending = ending
        self.wake()
