"""Which subscriptions the broker has been asked to begin and to end, and which inboxes its answers are for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ..errors import RETRYABLE, ErrorCode, PeerError, Refused
from ..protocol import wire_messages as wire
from ..protocol.wire_messages import Subscribe
from .in_flight_requests import Desk
from .message_queue import Inbox, Phase
from .server_messages import Message, ServerMessage

Decode = Callable[[bytes], Iterator[ServerMessage | PeerError | None]]


class Lane:
    """One stream of the broker's, and whom what comes on it is for: all subscriptions but those with one of their own.

    `decode` makes objects of its bytes. `connection` is what it is a stream of.
    """

    __slots__ = ("connection", "decode", "epoch", "fresh", "routes")

    def __init__(self, decode: Decode, connection: object, epoch: str) -> None:
        self.decode = decode
        self.connection = connection
        self.epoch = epoch
        """Of the log that what comes here is from: one stream may be in the next while another is in the last still."""
        self.routes: dict[str, Feed] = {}
        """Who gets the messages for a pattern; what comes for another pattern is for a subscription that was."""
        self.fresh: dict[str, Feed] = {}
        """Those that the broker will send to, but has not: until it does, their epoch may be another than its own."""

    @property
    def feeds(self) -> list[Feed]:
        """All that are heard here."""
        return [*self.routes.values(), *self.fresh.values()]

    def heard(self, pattern: str) -> Feed | None:
        """Who has the pattern, now that the broker says something about it."""
        feed = self.fresh.pop(pattern, None)
        if feed is not None:
            self.routes[pattern] = feed
        return self.routes.get(pattern)

    def find(self, pattern: str | None) -> Feed | None:
        """Whom a message is for that no route leads to: it may be the first since a `subscribed`."""
        if pattern not in self.fresh:
            return None
        feed = self.heard(pattern)
        if feed is not None:
            for inbox in feed.hearing:
                inbox.prove(self.epoch)
        return feed


class Feed:
    """One subscription on the wire, and the inboxes that share it.

    The broker is asked with the lowest place at which one of them stands, and each drops what it has already. Only the
    answer to the newest `subscribe` counts. One `subscribe` covers inboxes of one epoch, because the broker tells from
    the epoch of a cursor what is missing; the others are asked for when it has caught up.
    """

    __slots__ = ("arrived", "asked", "covered", "datagrams", "epoch", "hearing", "inboxes", "lane", "live", "pattern",
                 "since", "stream")  # fmt: skip

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.stream = self.datagrams = False
        """What the broker is asked for: a stream of its own; ephemeral messages as datagrams."""
        self.inboxes: dict[Inbox, None] = {}
        """All that have not ended."""
        self.hearing: tuple[Inbox, ...] = ()
        """Those that get what comes on its lane."""
        self.lane: Lane | None = None
        """Where the broker sends what is for it, while it does."""
        self.asked: int | None = None
        """The id of the newest `subscribe`, while it has no answer."""
        self.covered: tuple[Inbox, ...] = ()
        """The inboxes that the newest `subscribe` covers."""
        self.since: int | None = None
        self.epoch = ""
        """Where the newest `subscribe` begins."""
        self.arrived = 0
        """How far it has come on its lane."""
        self.live = False
        """Whether a `head` speaks of it too."""

    @property
    def wanted(self) -> bool:
        """Whether an inbox has room for what comes."""
        return any(inbox.phase is not Phase.AWAY for inbox in self.inboxes)

    def ask(self, number: int, head: int, epoch: str) -> Subscribe:
        """The `subscribe` that covers as many inboxes as one can, at a broker whose log is in that epoch, at `head`.

        What is queued here is not asked for again.
        """
        present = [inbox for inbox in self.inboxes if inbox.phase is not Phase.AWAY]
        begun = [inbox for inbox in present if inbox.resuming]
        # One that waits in another epoch comes first: what the broker says of that leads it into the present one.
        first = min(begun, key=lambda inbox: (inbox in self.hearing, inbox.arrived_epoch == epoch), default=None)
        self.since, where = None, None
        together: list[Inbox] = []
        if first is not None:
            self.epoch = first.arrived_epoch
            together = [inbox for inbox in begun if inbox.arrived_epoch == first.arrived_epoch]
            self.since = min(inbox.arrived for inbox in together)
            if len(begun) < len(present) and first.arrived_epoch == epoch:
                # An inbox that begins now begins at the head, and another one's cursor may be above that.
                self.since = min(self.since, head)
            if any(inbox.named for inbox in together):
                where = first.arrived_epoch or None
        self.covered = tuple(inbox for inbox in present if inbox in together or not inbox.resuming)
        for inbox in together:
            inbox.named = True
        for inbox in present:
            inbox.phase = Phase.ASKED
        self.asked = number
        return Subscribe(self.pattern, self.since, where, self.stream, self.datagrams, number)


SPILL = 8 * 1024 * 1024
"""How many bytes a full inbox may take on while somebody waits for what stands behind them."""

OVERHEAD = 256
"""What a message in memory adds to its payload, roughly, in bytes."""


class Switchboard:
    """The subscriptions of one client, which outlive its connections. `number` gives the next request its id.

    All inboxes of a pattern share one `Feed`. The answers come on different streams, and so in any order: each is known
    by its id. A feed hears one connection at a time: the last one that has agreed to send. There it was asked for with
    where it stood, so nothing is missing between, and what both have sent is dropped by its seq.
    """

    def __init__(self, number: Callable[[], int]) -> None:
        self.crowded: dict[Inbox, None] = {}
        """Those that are full."""
        self._desk: Desk | None = None
        """The connection to ask, if there is one."""
        self._number = number
        self._feeds: dict[str, Feed] = {}
        """All that have an inbox."""
        self._asked: dict[int, Feed | None] = {}
        """What will be answered: a feed's `subscribe`, or (None) an `unsubscribe`."""
        self._again: dict[Feed, None] = {}
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
        """An inbox that welcomes `limit` messages of a pattern. `present` is the epoch where none is named.

        It has `begun`, or is ENDED, at once or when the broker has answered.
        """
        feed = self._feeds.setdefault(pattern, Feed(pattern))
        more = (stream and not feed.stream) or (datagrams and not feed.datagrams)
        feed.stream, feed.datagrams = feed.stream or stream, feed.datagrams or datagrams
        inbox = Inbox(pattern, since, epoch or present, limit, named=epoch is not None or since is None)
        feed.inboxes[inbox] = None
        desk = self._desk
        if since is not None or more or desk is None or (feed.since or 0) > desk.head:
            self._ask(feed)
        elif feed.asked is not None:
            feed.covered += (inbox,)
        elif feed.lane is not None and feed.lane.connection is desk and pattern in feed.lane.routes:
            # What is new from now on comes already.
            lane = feed.lane
            inbox.begin(max(feed.arrived, desk.head) if lane.epoch == desk.epoch else feed.arrived, lane.epoch)
            feed.hearing += (inbox,)
        else:
            self._ask(feed)
        return inbox

    def find(self, pattern: str | None, desk: Desk) -> Feed | None:
        """Whose the pattern is, while this connection sends for it: a datagram belongs to no stream."""
        feed = self._feeds.get(pattern) if pattern is not None else None
        return feed if feed is not None and feed.lane is not None and feed.lane.connection is desk else None

    def leave(self, inbox: Inbox) -> None:
        """End an inbox from this side, and with the last one the subscription."""
        if inbox.phase is not Phase.ENDED:
            self._close(inbox, None)

    def crowd(self, inbox: Inbox, message: Message) -> None:
        """A message has come to a full inbox."""
        inbox.pressed = True
        inbox.spilled += len(message.raw) + OVERHEAD
        self.crowded[inbox] = None
        if inbox.spilled > SPILL:
            self.suspend(inbox)

    def suspend(self, inbox: Inbox) -> None:
        """Hand a full inbox nothing more; `relieve` has it go on from where it stopped."""
        self.crowded.pop(inbox, None)
        feed = self._feeds.get(inbox.pattern)
        if feed is None or inbox not in feed.inboxes:
            return
        feed.hearing = tuple(each for each in feed.hearing if each is not inbox)
        # Where it has been asked for already, it goes on with the answer to that.
        if inbox.phase is Phase.HELD:
            inbox.phase = Phase.AWAY
            if not feed.wanted:
                self._unsubscribe(feed)

    def relieve(self, inbox: Inbox) -> None:
        """The application has taken enough out of an inbox that was full."""
        inbox.pressed = False
        inbox.spilled = 0
        self.crowded.pop(inbox, None)
        if inbox.phase is Phase.AWAY:
            inbox.phase = Phase.ASKED
            self._ask(self._feeds[inbox.pattern])

    # Between connections

    def resume(self, desk: Desk) -> None:
        """Another connection is there: ask it to go on where each subscription stands.

        One before it, if it is still there, goes on being heard for each until its answer.
        """
        self._desk = desk
        self._forget_asked()
        for feed in self._feeds.values():
            if feed.wanted:
                self._ask(feed)

    def lose(self, desk: Desk, lanes: Iterable[Lane]) -> None:
        """A connection is gone, and its lanes with it. What was heard there waits for the next one."""
        for lane in lanes:
            for feed in lane.feeds:
                for inbox in feed.hearing:
                    self.crowded.pop(inbox, None)
                self._unroute(feed)
        if self._desk is desk:
            self._desk = None
            self._forget_asked()
            for feed in self._feeds.values():
                for inbox in feed.inboxes:
                    if inbox.phase is Phase.HELD:
                        inbox.phase = Phase.ASKED

    def wake(self) -> None:
        """There will be no further connection, and so say those who are woken."""
        for feed in self._feeds.values():
            for inbox in feed.inboxes:
                inbox.wake()

    # What the broker says

    def subscribed(self, reply: wire.Subscribed, lane: Lane) -> None:
        if reply.epoch is not None:
            lane.epoch = reply.epoch
        feed = self._answered(reply.id)
        if feed is None:
            return
        self._unroute(feed)
        feed.lane, feed.live = lane, feed.since is None
        (lane.routes if feed.live else lane.fresh)[feed.pattern] = feed
        feed.arrived = reply.seq if feed.since is None else feed.since
        feed.hearing = tuple(inbox for inbox in feed.covered if inbox.phase is Phase.ASKED)
        # A replica that is behind sends from `since` on, not from where it is.
        start = max(reply.seq, feed.arrived) if feed.epoch == lane.epoch else reply.seq
        for inbox in feed.hearing:
            inbox.begin(start, lane.epoch)

    def unsubscribed(self, reply: wire.Unsubscribed, desk: Desk) -> None:
        """The broker ends a subscription: as it was asked to, or because its own stream was not read for too long.

        One that is still wanted then goes on from where it stands.
        """
        if reply.id is not None:
            self._answered(reply.id)
            return
        feed = self._feeds.get(reply.pattern)
        if feed is None or not feed.wanted or feed.asked is not None or desk is not self._desk:
            return
        if feed.lane is None or feed.lane.connection is desk:
            self._unroute(feed)
            self._ask(feed)

    def forsake(self, lane: Lane) -> None:
        """The broker sends nothing more on a stream; `unsubscribed` says what comes of its subscription."""
        for feed in lane.feeds:
            self._unroute(feed)

    def end(self, lane: Lane) -> bool:
        """A stream has ended. True where its subscription has not, and no other one takes its place."""
        left = lane.feeds
        self.forsake(lane)
        return any(feed.asked is None for feed in left)

    def refused(self, reply: wire.SubscribeError) -> bool:
        """A request was refused; false when none is without an answer under this id."""
        known = reply.id in self._asked
        feed = self._answered(reply.id)
        if feed is None:
            return known
        # A `subscribe` that is refused leaves what it was to replace.
        heard = feed.hearing if feed.lane is not None and feed.lane.connection is self._desk else ()
        for inbox in heard:
            inbox.phase = Phase.HELD
        for inbox in [inbox for inbox in feed.inboxes if inbox.phase is Phase.ASKED]:
            if inbox.begun and reply.code in RETRYABLE:
                self._again[feed] = None
            else:
                self._close(inbox, Refused(reply.code, reply.message))
        if feed in self._again:
            self.doubted()
        return True

    def retry(self) -> None:
        """Ask again for what could not be taken up."""
        again, self._again = self._again, {}
        for feed in again:
            if feed.asked is None and any(inbox.phase is Phase.ASKED for inbox in feed.inboxes):
                self._ask(feed)

    def revoked(self, reply: wire.Revoked, lane: Lane) -> None:
        feed = lane.heard(reply.pattern)
        if feed is not None:
            if feed.asked is None:
                # The broker has ended it already.
                self._unroute(feed)
            for inbox in list(feed.inboxes):
                self._close(inbox, Refused(ErrorCode.REVOKED, "the permission was withdrawn"))

    def live(self, event: wire.Live, lane: Lane) -> None:
        feed = lane.heard(event.pattern)
        if feed is None:
            return
        feed.live = True
        feed.arrived = max(feed.arrived, event.seq)
        for inbox in feed.hearing:
            inbox.mark(event, event.seq, lane.epoch)
        if (
            lane.connection is self._desk
            and feed.asked is None
            and feed not in self._again
            and any(inbox.phase is Phase.ASKED for inbox in feed.inboxes)
        ):
            # The others stand in another epoch.
            self._ask(feed)

    def gap(self, event: wire.Gap, lane: Lane) -> None:
        feed = lane.heard(event.pattern)
        if feed is not None:
            feed.arrived = event.last
            for inbox in feed.hearing:
                inbox.gap(event)

    def head(self, event: wire.Head, lane: Lane) -> None:
        for feed in lane.routes.values():
            if feed.live:
                for inbox in feed.hearing:
                    inbox.mark(event, event.seq, event.epoch)

    # Helpers

    def _ask(self, feed: Feed) -> None:
        desk = self._desk
        if desk is not None:
            number = self._number()
            desk.say(feed.ask(number, desk.head, desk.epoch))
            self._asked[number] = feed

    def _unsubscribe(self, feed: Feed) -> None:
        """Have the broker stop sending, where it does or has been asked to."""
        desk = self._desk
        if desk is not None and (feed.asked is not None or (feed.lane is not None and feed.lane.connection is desk)):
            number = self._number()
            desk.say(wire.Unsubscribe(feed.pattern, number))
            self._asked[number] = None
        feed.asked = None
        self._unroute(feed)

    def _answered(self, number: int | None) -> Feed | None:
        """Which feed a reply is for: that to the newest `subscribe` of one."""
        feed = self._asked.pop(number, None) if number is not None else None
        if feed is None or feed.asked != number:
            return None
        feed.asked = None
        return feed

    def _forget_asked(self) -> None:
        """There is no answer to come from a connection that another one follows."""
        self._asked.clear()
        self._again.clear()
        for feed in self._feeds.values():
            feed.asked = None

    def _close(self, inbox: Inbox, ending: Refused | None) -> None:
        self.crowded.pop(inbox, None)
        feed = self._feeds[inbox.pattern]
        wanted = feed.wanted
        del feed.inboxes[inbox]
        feed.hearing = tuple(each for each in feed.hearing if each is not inbox)
        if wanted and not feed.wanted:
            self._unsubscribe(feed)
        if not feed.inboxes:
            del self._feeds[inbox.pattern]
            self._again.pop(feed, None)
        inbox.end(ending)

    def _unroute(self, feed: Feed) -> None:
        lane, feed.lane = feed.lane, None
        feed.hearing = ()
        if lane is not None:
            for routes in (lane.routes, lane.fresh):
                if routes.get(feed.pattern) is feed:
                    del routes[feed.pattern]


def _nobody() -> None:
    pass
