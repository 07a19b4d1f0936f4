"""One subscription on the wire, which all inboxes of a pattern share, and the stream that it comes on. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import PeerError
from ..protocol.wire_messages import Subscribe
from .inbox import Inbox, Phase
from .messages import ServerMessage

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
