"""Which subscriptions the broker has been asked to begin and to end, and which inbox its answers are for. Pure."""

from __future__ import annotations

from collections.abc import Callable

from .. import wire
from ..errors import Code, Refused
from .inbox import Inbox, Lane, Phase
from .messages import Message

SPILL = 8 * 1024 * 1024
"""How many bytes a full inbox may take on while somebody waits for what stands behind them."""

OVERHEAD = 256
"""What a message in memory adds to its payload, roughly, in bytes."""


class Switchboard:
    """The subscriptions of one conversation. `say` sends a request, `number` gives the next one its id.

    The answers come on different streams, and so in any order: each is known by its id.
    """

    def __init__(self, say: Callable[[wire.Request], None], number: Callable[[], int]) -> None:
        self.crowded: dict[Inbox, None] = {}
        """Those that are full."""
        self._say = say
        self._number = number
        self._silent = False
        self._inboxes: dict[str, Inbox] = {}
        """All that have not ended."""
        self._asked: dict[int, Inbox | None] = {}
        """What will be answered: an inbox's `subscribe`, or (None) an `unsubscribe`."""

    @property
    def asking(self) -> bool:
        """Whether an answer is still to come."""
        return bool(self._asked)

    def subscribe(self, inbox: Inbox, since: int | None, epoch: str | None) -> None:
        """Ask for a subscription. Its inbox has `begun` or is ENDED when the answer is there.

        Raises `ValueError` if there is one to the pattern already.
        """
        if inbox.pattern in self._inboxes:
            raise ValueError(f"this connection has a subscription to {inbox.pattern} already")
        self._ask(inbox, since, epoch)
        self._inboxes[inbox.pattern] = inbox

    def find(self, pattern: str | None) -> Inbox | None:
        """Whose the pattern is, while the broker sends for it: a datagram belongs to no stream."""
        inbox = self._inboxes.get(pattern) if pattern is not None else None
        return inbox if inbox is not None and inbox.phase is Phase.HELD else None

    def leave(self, inbox: Inbox) -> None:
        """End a subscription, from this side."""
        if inbox.phase is Phase.ENDED:
            return
        if inbox.phase is not Phase.AWAY and not self._silent:
            self._unsubscribe(inbox)
        self._close(inbox, None)

    def crowd(self, inbox: Inbox, message: Message) -> None:
        """A message has come to a full inbox."""
        inbox.pressed = True
        inbox.spilled += len(message.raw) + OVERHEAD
        self.crowded[inbox] = None
        if inbox.spilled > SPILL:
            self.suspend(inbox)

    def suspend(self, inbox: Inbox) -> None:
        """Have the broker stop sending to a full inbox; `relieve` takes it up again from where it stopped."""
        self.crowded.pop(inbox, None)
        if inbox.phase is Phase.HELD and not self._silent:
            self._unsubscribe(inbox)
            self._unroute(inbox)
            inbox.phase = Phase.AWAY

    def relieve(self, inbox: Inbox) -> None:
        """The application has taken enough out of an inbox that was full."""
        inbox.pressed = False
        inbox.spilled = 0
        self.crowded.pop(inbox, None)
        if inbox.phase is Phase.AWAY and not self._silent:
            inbox.phase = Phase.ASKED
            inbox.live = False
            self._ask(inbox, inbox.arrived, inbox.arrived_epoch or None)

    def lose(self) -> None:
        """The connection is gone; so says whoever is woken."""
        self._silent = True
        self.crowded.clear()
        for inbox in self._inboxes.values():
            inbox.wake()

    # What the broker says

    def subscribed(self, reply: wire.Subscribed, lane: Lane) -> None:
        if reply.epoch is not None:
            lane.epoch = reply.epoch
        inbox = self._answered(reply.id)
        if inbox is not None and inbox.phase is Phase.ASKED:
            (lane.fresh if inbox.resuming else lane.routes)[inbox.pattern] = inbox
            inbox.lane = lane
            inbox.begin(reply.seq, lane.epoch)

    def unsubscribed(self, reply: wire.Unsubscribed) -> None:
        self._answered(reply.id)

    def refused(self, reply: wire.SubscribeError) -> None:
        inbox = self._answered(reply.id)
        if inbox is not None and inbox.phase is Phase.ASKED:
            self._close(inbox, Refused(reply.code, reply.message))

    def revoked(self, reply: wire.Revoked, lane: Lane) -> None:
        inbox = lane.heard(reply.pattern)
        if inbox is not None:
            self._close(inbox, Refused(Code.REVOKED, "the permission was withdrawn"))

    def live(self, event: wire.Live, lane: Lane) -> None:
        inbox = lane.heard(event.pattern)
        if inbox is not None:
            inbox.live = True
            inbox.mark(event, event.seq, lane.epoch)

    def gap(self, event: wire.Gap, lane: Lane) -> None:
        inbox = lane.heard(event.pattern)
        if inbox is not None:
            inbox.mark(event, event.last, event.epoch)

    def head(self, event: wire.Head, lane: Lane) -> None:
        for inbox in lane.routes.values():
            if inbox.live:
                inbox.mark(event, event.seq, event.epoch)

    # Helpers

    def _ask(self, inbox: Inbox, since: int | None, epoch: str | None) -> None:
        number = self._number()
        self._say(wire.Subscribe(inbox.pattern, since, epoch, inbox.stream, inbox.datagrams, number))
        self._asked[number] = inbox

    def _unsubscribe(self, inbox: Inbox) -> None:
        number = self._number()
        self._say(wire.Unsubscribe(inbox.pattern, number))
        self._asked[number] = None

    def _answered(self, number: int | None) -> Inbox | None:
        """Whom a reply is for, which comes once for each request."""
        return self._asked.pop(number, None) if number is not None else None

    def _close(self, inbox: Inbox, ending: Refused | None) -> None:
        if self._inboxes.get(inbox.pattern) is inbox:
            del self._inboxes[inbox.pattern]
        self._unroute(inbox)
        self.crowded.pop(inbox, None)
        inbox.end(ending)

    def _unroute(self, inbox: Inbox) -> None:
        lane, inbox.lane = inbox.lane, None
        if lane is not None:
            for routes in (lane.routes, lane.fresh):
                if routes.get(inbox.pattern) is inbox:
                    del routes[inbox.pattern]
