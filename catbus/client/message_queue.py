"""What one subscription has received and the application has not yet taken. Pure: no I/O, nobody waits here."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

from msgspec import structs

from ..errors import Refused
from .server_messages import Gap, Head, Live, Message, Page

Event = Live | Gap | Head


class Phase(Enum):
    """Where an inbox stands.

    ASKED: a `subscribe` that covers it is on its way, or will be when there is a connection. HELD: it gets what the
    broker sends. AWAY: it gets nothing, because nobody took what came; once there is room the broker is asked again,
    from where it stopped. ENDED: refused, revoked or left.
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
    """What one iteration gets of a subscription: a queue of messages and marks, and a cursor at either end of it."""

    __slots__ = (
        "arrived",
        "arrived_epoch",
        "begun",
        "cursor",
        "ending",
        "epoch",
        "items",
        "limit",
        "named",
        "pattern",
        "phase",
        "pressed",
        "resuming",
        "spilled",
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
    ) -> None:
        self.pattern = pattern
        self.named = named
        """Whether the broker is told the epoch; who leaves it out means the present one, whichever that is."""
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
            self.resuming = True
        self.wake()

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

    def gap(self, gap: Gap) -> None:
        """Hand on what may be missing, unless it arrived here before: another inbox may begin further back."""
        if gap.epoch == self.arrived_epoch:
            if gap.last <= self.arrived:
                return
            gap = structs.replace(gap, first=max(gap.first, self.arrived + 1))
        self.mark(gap, gap.last, gap.epoch)

    def end(self, ending: Refused | None) -> None:
        """Nothing more will come."""
        self.phase = Phase.ENDED
        self.ending = ending
        self.wake()


class Recent:
    """The newest `count` messages up to where an inbox has begun, to be put before all that it gets.

    The subscription is there already, so no message falls between the pages and what is new. Ask for what is `wanted`
    and hand each page to `take`, until nothing is.
    """

    def __init__(self, inbox: Inbox, count: int) -> None:
        self._inbox = inbox
        self._epoch = inbox.epoch
        self._missing = count
        self._before = inbox.cursor + 1
        self._messages: deque[Message] = deque()

    @property
    def wanted(self) -> tuple[int, int] | None:
        """How many messages to ask for, and below which seq; None when there is nothing more to ask for."""
        return (self._missing, self._before) if self._missing else None

    def take(self, page: Page) -> None:
        """Keep a page; with the last one, put all of them into the inbox."""
        messages = page.messages[-self._missing :]
        self._messages.extendleft(reversed(messages))
        self._missing -= len(messages)
        if messages:
            self._before = messages[0].seq or 0
        if self._missing and messages and page.more:
            return
        self._missing = 0
        inbox = self._inbox
        # In another epoch the pages may be of another log: the gap that the inbox has says what may be missing.
        if self._messages and inbox.arrived_epoch == self._epoch:
            inbox.cursor = (self._messages[0].seq or 1) - 1
            inbox.items.extendleft(reversed(self._messages))
