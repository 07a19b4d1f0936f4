"""Which inbox a message is for, and which subscriptions the broker has been asked to begin and to end. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from .. import wire
from ..errors import Code, Refused
from .inbox import Inbox, Phase
from .messages import Message

SPILL = 8 * 1024 * 1024
"""How many bytes a full inbox may take on while somebody waits for what stands behind them."""

OVERHEAD = 256
"""What a message in memory adds to its payload, roughly, in bytes."""


class Switchboard:
    """The subscriptions of one conversation. `say` sends a request."""

    def __init__(self, say: Callable[[wire.Request], None]) -> None:
        self.routes: dict[str, Inbox] = {}
        """Who gets the messages for a pattern; what comes for another pattern is for a subscription that was."""
        self.crowded: dict[Inbox, None] = {}
        """Those that are full."""
        self._say = say
        self._silent = False
        self._inboxes: dict[str, Inbox] = {}
        """All that have not ended."""
        self._fresh: dict[str, Inbox] = {}
        """Those that the broker will send to, but has not: until it does, their epoch may be another than its own."""
        self._asked: dict[str, deque[Inbox | None]] = {}
        """What will be answered for each pattern, in order: an inbox's `subscribe`, or (None) an `unsubscribe`."""

    @property
    def asking(self) -> bool:
        """Whether an answer is still to come."""
        return bool(self._asked)

    def subscribe(self, pattern: str, since: int | None, epoch: str | None, limit: int, current_epoch: str) -> Inbox:
        """Ask for a subscription. Its inbox has `begun` or is ENDED when the answer is there."""
        if pattern in self._inboxes:
            raise ValueError(f"this connection has a subscription to {pattern} already")
        inbox = Inbox(pattern, since, epoch or current_epoch, limit)
        self._ask(inbox, wire.Subscribe(pattern, since, epoch))
        self._inboxes[pattern] = inbox
        return inbox

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
            self._ask(inbox, wire.Subscribe(inbox.pattern, inbox.arrived, inbox.arrived_epoch or None))

    def lose(self) -> None:
        """The connection is gone; so says whoever is woken."""
        self._silent = True
        self.crowded.clear()
        for inbox in self._inboxes.values():
            inbox.wake()

    # What the broker says

    def subscribed(self, reply: wire.Subscribed, epoch: str) -> None:
        inbox = self._answered(reply.pattern)
        if inbox is not None and inbox.phase is Phase.ASKED:
            (self._fresh if inbox.resuming else self.routes)[reply.pattern] = inbox
            inbox.begin(reply.seq, epoch)

    def unsubscribed(self, reply: wire.Unsubscribed) -> None:
        self._answered(reply.pattern)

    def refused(self, reply: wire.SubscribeError) -> None:
        inbox = self._answered(reply.pattern)
        if inbox is not None and inbox.phase is Phase.ASKED:
            self._close(inbox, Refused(reply.code, reply.message))

    def revoked(self, reply: wire.Revoked) -> None:
        inbox = self._heard(reply.pattern)
        if inbox is not None:
            self._close(inbox, Refused(Code.REVOKED, "the permission was withdrawn"))

    def live(self, event: wire.Live, epoch: str) -> None:
        inbox = self._heard(event.pattern)
        if inbox is not None:
            inbox.live = True
            inbox.mark(event, event.seq, epoch)

    def gap(self, event: wire.Gap) -> None:
        inbox = self._heard(event.pattern)
        if inbox is not None:
            inbox.mark(event, event.last, event.epoch)

    def head(self, event: wire.Head) -> None:
        for inbox in self.routes.values():
            if inbox.live:
                inbox.mark(event, event.seq, event.epoch)

    def find(self, pattern: str | None, epoch: str) -> Inbox | None:
        """Whom a message is for that no route leads to: it may be the first since a `subscribed`."""
        if pattern not in self._fresh:
            return None
        inbox = self._heard(pattern)
        if inbox is not None:
            inbox.prove(epoch)
        return inbox

    # Helpers

    def _ask(self, inbox: Inbox, request: wire.Subscribe) -> None:
        self._say(request)
        self._asked.setdefault(inbox.pattern, deque()).append(inbox)

    def _unsubscribe(self, inbox: Inbox) -> None:
        self._say(wire.Unsubscribe(inbox.pattern))
        self._asked.setdefault(inbox.pattern, deque()).append(None)

    def _answered(self, pattern: str) -> Inbox | None:
        """Whom a reply about a pattern is for: requests are answered in order, each once."""
        asked = self._asked.get(pattern)
        if asked is None:
            return None
        inbox = asked.popleft()
        if not asked:
            del self._asked[pattern]
        return inbox

    def _heard(self, pattern: str) -> Inbox | None:
        """Who has the pattern, now that the broker says something about it."""
        inbox = self._fresh.pop(pattern, None)
        if inbox is not None:
            self.routes[pattern] = inbox
        return self.routes.get(pattern)

    def _close(self, inbox: Inbox, ending: Refused | None) -> None:
        if self._inboxes.get(inbox.pattern) is inbox:
            del self._inboxes[inbox.pattern]
        self._unroute(inbox)
        self.crowded.pop(inbox, None)
        inbox.end(ending)

    def _unroute(self, inbox: Inbox) -> None:
        for routes in (self.routes, self._fresh):
            if routes.get(inbox.pattern) is inbox:
                del routes[inbox.pattern]
