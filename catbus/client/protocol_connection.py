"""The client's side of the protocol without its transport: bytes in, answers and messages out. No I/O, nobody waits.

It lasts as long as one connection. What outlives that is in the `Ledger` and the `Switchboard`, which have what they
ask for put into its outbox. Whoever drives a conversation
    - calls `authenticate`, and when that is answered `take_over`, or its two halves one after the other,
    - sends what `take` returns, whenever `outgoing` says that there is something,
    - gives `receive` what comes in, and may let it wait while an inbox is `crowded` and nobody is `waiting`,
    - calls `lose` when the connection is gone. `wake` is called then, and when the broker says that it will be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ..errors import CloseCode, Disconnected, ErrorCode, PeerError, Refused
from ..protocol import wire_messages as wire
from ..protocol.json_splitter import JsonSplitter
from .in_flight_requests import Answer, Ledger
from .message_queue import Inbox
from .server_messages import Message, Page, ServerMessage, decode
from .subscription_manager import Lane, Switchboard
from .transport_interface import DATAGRAM, MAIN

FRAME = 32 * 1024
"""How many bytes of requests go together, unless one alone is longer."""

MAX_OBJECT = 128 * 1024 * 1024
"""The longest line taken from a broker: a page of history may have a thousand messages of 64 KiB."""


def _nobody() -> None:
    pass


class Conversation:
    """What one client and its broker say to each other over one connection."""

    def __init__(
        self,
        ledger: Ledger,
        subscriptions: Switchboard,
        on_event: Callable[[wire.GoAway | wire.Error], None] | None = None,
    ) -> None:
        self.client_id: str | None = None
        self.producer = ""
        self.epoch = ""
        self.head = 0
        self.floor: int | None = None
        self.limits: dict[str, int] = {}
        self.goaway: wire.GoAway | None = None
        """What the broker has said of its end."""
        self.lost: tuple[str, int | None] | None = None
        """Why the connection is gone, and the closing code where there was one."""
        self.outgoing = 0
        """Bytes in the outbox."""
        self.wake: Callable[[], None] = _nobody
        self._ledger = ledger
        self._subscriptions = subscriptions
        self._on_event = on_event
        self._main = self._new_lane("")
        self._lanes = {MAIN: self._main}
        self._outbox: deque[bytes] = deque()
        self._auths: deque[Answer[wire.AuthOk]] = deque()

    # What goes out

    def take(self) -> bytes:
        """The next whole lines to be sent together, oldest first; empty when there are none."""
        outbox = self._outbox
        size = 0
        lines: list[bytes] = []
        while outbox and (not lines or size + len(outbox[0]) <= FRAME):
            line = outbox.popleft()
            size += len(line)
            lines.append(line)
        self.outgoing -= size
        return b"".join(lines)

    def authenticate(self, token: str) -> Answer[wire.AuthOk]:
        """Say who we are, and as whom we have published. Raises `Disconnected`."""
        self.check()
        answer: Answer[wire.AuthOk] = Answer()
        # Heeded in the first `auth` of a session only.
        producer = None if self.producer else self._ledger.producer or None
        self.say(wire.Auth(token, wire.ProtocolVersion.V1, producer))
        self._auths.append(answer)
        return answer

    def take_over(self) -> None:
        """Go on here with everything that is not finished. Raises `Disconnected`."""
        self.take_over_subscriptions()
        self.take_over_requests()

    def take_over_subscriptions(self) -> None:
        """Have the subscriptions moved here, each from where it stands. Raises `Disconnected`."""
        self.check()
        self._subscriptions.resume(self)

    def take_over_requests(self) -> None:
        """Send what has no answer, and what comes from now on, to this broker. Raises `Disconnected`."""
        self.check()
        self._ledger.resume(self)

    def keep_alive(self) -> None:
        """Ask for any sign of life, for which nobody need wait."""
        self.say(wire.Ping(self._ledger.number()))

    def say(self, request: wire.Request) -> None:
        self.put(wire.to_json(request) + b"\n")

    def put(self, line: bytes) -> None:
        """Send a line, unless the connection is gone: whoever asks will be told in another way."""
        if self.lost is None:
            self._outbox.append(line)
            self.outgoing += len(line)

    @property
    def crowded(self) -> bool:
        """Whether an inbox is full."""
        return bool(self._subscriptions.crowded)

    def suspend_crowded(self) -> None:
        """Have the broker stop sending to the inboxes that are full."""
        for inbox in list(self._subscriptions.crowded):
            self._subscriptions.suspend(inbox)

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for a reply, which may stand behind messages."""
        return bool(self._ledger.waiting or self._subscriptions.asking or self._auths)

    def check(self) -> None:
        """Raise `Disconnected` when the connection is gone."""
        if self.lost is not None:
            raise Disconnected(*self.lost)

    def lose(self, message: str, code: int | None = None) -> None:
        """The connection is gone: nothing that is still unanswered will be, here. The first reason stands."""
        if self.lost is not None:
            return
        self.lost = (message, code)
        self._outbox.clear()
        self.outgoing = 0
        self._subscriptions.lose(self, self._lanes.values())
        self._ledger.lose(self)
        for answer in self._auths:
            answer.wake()
        self.wake()

    # What comes in

    def receive(self, data: bytes, stream: int = MAIN, ended: bool = False, reset: bool = False) -> None:
        """Understand more bytes of a stream, which may be its last, or a datagram.

        `reset`: the broker has given the stream up, and says on the session's stream that its subscription has ended.
        Raises `PeerError` with `close` when the broker makes no sense.
        """
        if self.lost is not None:
            # What was unanswered has been taken elsewhere: an answer from here would be one too many.
            return
        if stream == DATAGRAM:
            self._receive_datagram(data)
            return
        lane = self._lanes.get(stream)
        if lane is None:
            lane = self._lanes[stream] = self._new_lane(self.epoch)
        routes = lane.routes
        for message in lane.decode(data):
            if type(message) is Message:
                feed = routes.get(message.pattern)  # type: ignore[arg-type]  # no pattern is None
                if feed is None and (feed := lane.find(message.pattern)) is None:
                    continue
                seq = message.seq
                if seq is not None:
                    feed.arrived = seq
                for inbox in feed.hearing:
                    if seq is not None:
                        if seq <= inbox.arrived:
                            continue
                        inbox.arrived = seq
                    self._hand_over(message, inbox)
            elif isinstance(message, PeerError):
                raise PeerError(message.code, message.message, CloseCode.BAD_MESSAGE)
            elif (about := _OF_A_LANE.get(type(message))) is not None:
                about(self, message, lane)
            elif message is not None:
                _HANDLERS[type(message)](self, message)
        if reset:
            self._subscriptions.forsake(self._lanes.pop(stream))
        elif ended:
            del self._lanes[stream]
            if self._subscriptions.end(lane):
                raise PeerError(ErrorCode.BAD_MESSAGE, "a subscription's stream ended before it", CloseCode.BAD_MESSAGE)

    def _receive_datagram(self, data: bytes) -> None:
        """A message without a seq; anything else a newer broker may mean something by."""
        try:
            message = decode(data)
        except wire.UNDECODABLE:
            return
        if isinstance(message, Message) and message.seq is None:
            feed = self._subscriptions.find(message.pattern, self)
            for inbox in feed.hearing if feed is not None else ():
                self._hand_over(message, inbox)

    def _hand_over(self, message: Message, inbox: Inbox) -> None:
        items = inbox.items
        items.append(message)
        waiting = len(items)
        if waiting == 1:
            inbox.wake()
        if waiting >= inbox.limit:
            self._subscriptions.crowd(inbox, message)

    def _auth_ok(self, reply: wire.AuthOk) -> None:
        self.client_id = reply.client_id
        self.producer = reply.producer
        self.floor = reply.floor
        self.limits = reply.limits
        self._advance(reply.head or 0, reply.epoch, self._main)
        if self._auths:
            self._auths.popleft().settle(reply)

    def _auth_error(self, reply: wire.AuthError) -> None:
        if self._auths:
            self._auths.popleft().settle(Refused(reply.code, reply.message, reply.retry_after))

    def _published(self, reply: wire.Published) -> None:
        if reply.seq is not None and reply.seq > self.head:
            self.head = reply.seq
        self._ledger.published(reply.id, reply.seq)

    def _publish_error(self, reply: wire.PublishError) -> None:
        self._ledger.refused(reply.id, Refused(reply.code, reply.message, reply.retry_after))

    def _subscribed(self, reply: wire.Subscribed, lane: Lane) -> None:
        # Other streams may have told of a later epoch than the one in which a subscription's own stream begins.
        if reply.epoch is not None and lane is self._main:
            self._advance(reply.seq, reply.epoch, lane)
        self._subscriptions.subscribed(reply, lane)

    def _gap(self, event: wire.Gap, lane: Lane) -> None:
        if event.epoch != lane.epoch:
            self._advance(event.last, event.epoch, lane)
        self._subscriptions.gap(event, lane)

    def _head(self, event: wire.Head, lane: Lane) -> None:
        self._advance(event.seq, event.epoch, lane)
        self._subscriptions.head(event, lane)

    def _error(self, reply: wire.Error) -> None:
        number = reply.id
        if number is None:
            # Only a history has no refusal of its own kind, and histories are answered in order.
            number = self._ledger.oldest_history()
        reason = Refused(reply.code, reply.message)
        if self._ledger.answered(number, reason) or self._ledger.refused(number, reason):
            return
        if self._subscriptions.refused(wire.SubscribeError("", reply.message, reply.code, number)):
            return
        if reply.code is ErrorCode.BAD_MESSAGE and reply.id is None:
            # It did not understand something that somebody here may be waiting for, and cannot say what.
            raise PeerError(reply.code, reply.message, CloseCode.BAD_MESSAGE)
        self._tell(reply)

    def _goaway(self, event: wire.GoAway) -> None:
        self.goaway = event
        self._tell(event)
        self.wake()

    def _tell(self, event: wire.GoAway | wire.Error) -> None:
        if self._on_event is not None:
            self._on_event(event)

    # Helpers

    def _new_lane(self, epoch: str) -> Lane:
        framer: JsonSplitter[ServerMessage | None] = JsonSplitter(decode, MAX_OBJECT)
        return Lane(framer.feed, self, epoch)

    def _advance(self, seq: int, epoch: str, lane: Lane) -> None:
        """A stream tells where the log is; what is new to that stream may be old here, and the other way round."""
        if epoch == self.epoch:
            self.head = max(seq, self.head)
        elif epoch != lane.epoch:
            self.head, self.epoch = seq, epoch
        lane.epoch = epoch


_OF_A_LANE: dict[type, Callable[[Conversation, Any, Lane], object]] = {
    wire.Subscribed: Conversation._subscribed,
    wire.Revoked: lambda self, reply, lane: self._subscriptions.revoked(reply, lane),
    wire.Live: lambda self, event, lane: self._subscriptions.live(event, lane),
    wire.Gap: Conversation._gap,
    wire.Head: Conversation._head,
}
"""What is said of the subscriptions whose messages come on the same stream."""

_HANDLERS: dict[type, Callable[[Conversation, Any], object]] = {
    wire.AuthOk: Conversation._auth_ok,
    wire.AuthError: Conversation._auth_error,
    wire.Unsubscribed: lambda self, reply: self._subscriptions.unsubscribed(reply, self),
    wire.SubscribeError: lambda self, reply: self._subscriptions.refused(reply),
    wire.Published: Conversation._published,
    wire.PublishError: Conversation._publish_error,
    Page: lambda self, page: self._ledger.answered(page.id, page),
    wire.Pong: lambda self, pong: self._ledger.answered(pong.seq, pong),
    wire.GoAway: Conversation._goaway,
    wire.Error: Conversation._error,
}
