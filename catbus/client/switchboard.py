"""Which subscriptions the broker has been asked to begin and to end, and which inbox its answers are for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .. import wire
from ..errors import RETRYABLE, Code, Refused
from .inbox import Inbox, Lane, Phase
from .ledger import Desk
from .messages import Message

SPILL = 8 * 1024 * 1024
"""How many bytes a full inbox may take on while somebody waits for what stands behind them."""

OVERHEAD = 256
"""What a message in memory adds to its payload, roughly, in bytes."""


class Switchboard:
    """The subscriptions of one client, which outlive its connections. `number` gives the next request its id.

    The answers come on different streams, and so in any order: each is known by its id. A subscription hears one
    connection at a time: the last one that has agreed to send. There it was asked for with where it stood, so nothing
    is missing between, and what both have sent is dropped by its seq.
    """

    def __init__(self, number: Callable[[], int]) -> None:
        self.crowded: dict[Inbox, None] = {}
        """Those that are full."""
        self._desk: Desk | None = None
        """The connection to ask, if there is one."""
        self._number = number
        self._inboxes: dict[str, Inbox] = {}
        """All that have not ended."""
        self._asked: dict[int, Inbox | None] = {}
        """What will be answered: an inbox's `subscribe`, or (None) an `unsubscribe`."""
        self._again: list[Inbox] = []
        """Those that the broker could not take up again just now."""
        self.doubted: Callable[[], None] = _nobody
        """Called when a subscription is to be asked for again on this connection: after a pause, by `retry`."""

    @property
    def retrying(self) -> bool:
        """Whether something waits for `retry`."""
        return bool(self._again)

    @property
    def asking(self) -> bool:
        """Whether an answer is still to come."""
        return bool(self._asked)

    def subscribe(
        self,
        pattern: str,
        since: int | None,
        epoch: str | None,
        limit: int,
        *,
        present: str = "",
        stream: bool = False,
        datagrams: bool = False,
    ) -> Inbox:
        """Ask for a subscription whose inbox welcomes `limit` messages. `present` is the epoch where none is named.

        The inbox has `begun` or is ENDED when the answer is there. Raises `ValueError` if there is one already.
        """
        if pattern in self._inboxes:
            raise ValueError(f"this connection has a subscription to {pattern} already")
        named = epoch is not None
        inbox = Inbox(pattern, since, epoch or present, limit, named=named, stream=stream, datagrams=datagrams)
        self._inboxes[pattern] = inbox
        self._ask(inbox)
        return inbox

    def find(self, pattern: str | None, desk: Desk) -> Inbox | None:
        """Whose the pattern is, while this connection sends for it: a datagram belongs to no stream."""
        inbox = self._inboxes.get(pattern) if pattern is not None else None
        return inbox if inbox is not None and inbox.lane is not None and inbox.lane.connection is desk else None

    def leave(self, inbox: Inbox) -> None:
        """End a subscription, from this side."""
        if inbox.phase is Phase.ENDED:
            return
        if inbox.phase is not Phase.AWAY:
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
        if inbox.phase is Phase.HELD:
            self._unsubscribe(inbox)
            inbox.phase = Phase.AWAY
        # Where it has been asked for on another connection, that one begins where this one is not heard any more.
        self._unroute(inbox)

    def relieve(self, inbox: Inbox) -> None:
        """The application has taken enough out of an inbox that was full."""
        inbox.pressed = False
        inbox.spilled = 0
        self.crowded.pop(inbox, None)
        if inbox.phase is Phase.AWAY:
            self._ask(inbox)

    # Between connections

    def resume(self, desk: Desk) -> None:
        """Another connection is there: ask it to go on where each subscription stands.

        One before it, if it is still there, goes on being heard for each until its answer.
        """
        self._desk = desk
        self._asked.clear()
        self._again.clear()
        for inbox in self._inboxes.values():
            if inbox.phase is not Phase.AWAY:
                self._ask(inbox)

    def lose(self, desk: Desk, lanes: Iterable[Lane]) -> None:
        """A connection is gone, and its lanes with it. Those who were heard there wait for the next one."""
        for lane in lanes:
            for inbox in {*lane.routes.values(), *lane.fresh.values()}:
                self._unroute(inbox)
                self.crowded.pop(inbox, None)
        if self._desk is desk:
            self._desk = None
            self._asked.clear()
            self._again.clear()
            for inbox in self._inboxes.values():
                if inbox.phase is Phase.HELD:
                    inbox.phase = Phase.ASKED

    def wake(self) -> None:
        """There will be no further connection, and so say those who are woken."""
        for inbox in self._inboxes.values():
            inbox.wake()

    # What the broker says

    def subscribed(self, reply: wire.Subscribed, lane: Lane) -> None:
        if reply.epoch is not None:
            lane.epoch = reply.epoch
        inbox = self._answered(reply.id)
        if inbox is not None and inbox.phase is Phase.ASKED:
            self._unroute(inbox)
            (lane.fresh if inbox.resuming else lane.routes)[inbox.pattern] = inbox
            inbox.lane = lane
            inbox.begin(reply.seq, lane.epoch)

    def unsubscribed(self, reply: wire.Unsubscribed, desk: Desk) -> None:
        """The broker ends a subscription: as it was asked to, or because its own stream was not read for too long.

        One that is still wanted then goes on from where it stands.
        """
        if reply.id is not None:
            self._answered(reply.id)
            return
        inbox = self._inboxes.get(reply.pattern)
        if inbox is None or inbox.phase is not Phase.HELD or desk is not self._desk:
            return
        if inbox.lane is None or inbox.lane.connection is desk:
            self._unroute(inbox)
            self._ask(inbox)

    def forsake(self, lane: Lane) -> None:
        """The broker sends nothing more on a stream; `unsubscribed` says what comes of its subscription."""
        for inbox in {*lane.routes.values(), *lane.fresh.values()}:
            self._unroute(inbox)

    def refused(self, reply: wire.SubscribeError) -> bool:
        """A request was refused; false when none is without an answer under this id."""
        known = reply.id in self._asked
        inbox = self._answered(reply.id)
        if inbox is None or inbox.phase is not Phase.ASKED:
            return known
        if inbox.begun and reply.code in RETRYABLE:
            self._again.append(inbox)
            self.doubted()
        else:
            self._close(inbox, Refused(reply.code, reply.message))
        return True

    def retry(self) -> None:
        """Ask again for what could not be taken up."""
        again, self._again = self._again, []
        for inbox in again:
            if self._inboxes.get(inbox.pattern) is inbox and inbox.phase is Phase.ASKED:
                self._ask(inbox)

    def revoked(self, reply: wire.Revoked, lane: Lane) -> None:
        inbox = lane.heard(reply.pattern)
        if inbox is not None:
            if inbox.phase is Phase.ASKED:
                # It was to move to another connection.
                self._unsubscribe(inbox)
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

    def _ask(self, inbox: Inbox) -> None:
        inbox.phase = Phase.ASKED
        if self._desk is not None:
            number = self._number()
            since, epoch = inbox.resume()
            self._desk.say(wire.Subscribe(inbox.pattern, since, epoch, inbox.stream, inbox.datagrams, number))
            self._asked[number] = inbox

    def _unsubscribe(self, inbox: Inbox) -> None:
        if self._desk is not None:
            number = self._number()
            self._desk.say(wire.Unsubscribe(inbox.pattern, number))
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


def _nobody() -> None:
    pass
