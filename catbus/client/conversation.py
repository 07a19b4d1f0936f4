"""The client's side of the protocol without its transport: bytes in, answers and messages out. No I/O, nobody waits.

A request puts a line into the outbox and returns where its answer will be. Whoever drives a conversation
    - sends what `take` returns, whenever `outgoing` says that there is something,
    - gives `receive` what comes in, and may let it wait while an inbox is `crowded` and nobody is `waiting`,
    - calls `lose` when the connection is gone.
The `wake` of an answer is called when it is there, or will never be: then `lost` is set. Who does not wait for it any
more just lets go of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from msgspec import Raw

from .. import wire
from ..errors import CloseCode, Code, Disconnected, PeerError, Refused
from ..framing import Framer
from .inbox import Inbox, Lane
from .messages import Message, Page, ServerMessage, decode
from .switchboard import Switchboard
from .transport import DATAGRAM, MAIN

FRAME = 32 * 1024
"""How many bytes of requests go together, unless one alone is longer."""

MAX_OBJECT = 128 * 1024 * 1024
"""The longest line taken from a broker: a page of history may have a thousand messages of 64 KiB."""

T = TypeVar("T")


def _nobody() -> None:
    pass


class Answer(Generic[T]):
    """Where the answer to a request will be."""

    __slots__ = ("value", "wake")

    def __init__(self) -> None:
        self.value: T | Refused | None = None
        self.wake: Callable[[], None] = _nobody

    def settle(self, value: T | Refused) -> None:
        self.value = value
        self.wake()


class Batch:
    """Publishes that somebody waits for together: a result each, a seq (None for an ephemeral one) or the refusal."""

    __slots__ = ("missing", "results", "wake")

    def __init__(self, size: int) -> None:
        self.results: list[int | Refused | None] = [None] * size
        self.missing = size
        self.wake: Callable[[], None] = _nobody

    def settle(self, place: int, result: int | Refused | None) -> None:
        self.results[place] = result
        self.missing -= 1
        if not self.missing:
            self.wake()


class Pending(NamedTuple):
    """A publish without an answer, with all that is needed to send it again, and who waits for it."""

    publish: wire.Publish
    after: int
    epoch: str
    batch: Batch
    place: int


class Conversation:
    """Everything that one client and its broker have said to each other and that still matters."""

    def __init__(self, on_event: Callable[[wire.GoAway | wire.Error], None] | None = None) -> None:
        self.client_id: str | None = None
        self.producer = ""
        self.epoch = ""
        self.head = 0
        self.floor: int | None = None
        self.limits: dict[str, int] = {}
        self.lost: tuple[str, int | None] | None = None
        """Why the connection is gone, and the closing code where there was one."""
        self.outgoing = 0
        """Bytes in the outbox."""
        self.subscriptions = Switchboard(self._say, self._number)
        self._on_event = on_event
        self._main = _new_lane("")
        self._lanes = {MAIN: self._main}
        self._outbox: deque[bytes] = deque()
        self._next_id = 1
        self._auths: deque[Answer[wire.AuthOk]] = deque()
        self._publishes: dict[int, Pending] = {}
        """In the order of their ids."""
        self._histories: dict[int, Answer[Page]] = {}
        self._pings: dict[int, Answer[wire.Pong]] = {}

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
        answer: Answer[wire.AuthOk] = Answer()
        self._say(wire.Auth(token, wire.Protocol.V1))
        self._auths.append(answer)
        return answer

    def publish(self, channel: str, payload: Raw, batch: Batch, place: int, *, ephemeral: bool, echo: bool) -> None:
        """Ask for a publish whose result goes to its place in the batch."""
        number = self._next_id
        publish = wire.Publish(channel, payload, number, ephemeral=ephemeral, echo=echo)
        line = wire.to_json(publish) + b"\n"
        limit = self.limits.get("message_size", len(line))
        if len(line) > limit + 1:
            batch.settle(place, Refused(Code.TOO_LARGE, f"larger than {limit} bytes"))
            return
        if line.count(b"[") + line.count(b"{") > wire.MAX_DEPTH and wire.depth(line) > wire.MAX_DEPTH:
            batch.settle(place, Refused(Code.BAD_MESSAGE, f"nested deeper than {wire.MAX_DEPTH}"))
            return
        self._put(line)
        self._next_id += 1
        self._publishes[number] = Pending(publish, self.head, self.epoch, batch, place)

    def subscribe(
        self,
        pattern: str,
        since: int | None,
        epoch: str | None,
        limit: int,
        *,
        stream: bool = False,
        datagrams: bool = False,
    ) -> Inbox:
        """Ask for a subscription whose inbox welcomes `limit` messages; `ValueError` if there is one already."""
        inbox = Inbox(pattern, since, epoch or self.epoch, limit, stream=stream, datagrams=datagrams)
        self.subscriptions.subscribe(inbox, since, epoch)
        return inbox

    def history(self, pattern: str, limit: int, before: int | None) -> Answer[Page]:
        answer: Answer[Page] = Answer()
        number = self._number()
        self._say(wire.History(pattern, limit, before, number))
        self._histories[number] = answer
        return answer

    def ping(self) -> Answer[wire.Pong]:
        answer: Answer[wire.Pong] = Answer()
        self._pings[self.keep_alive()] = answer
        return answer

    def keep_alive(self) -> int:
        """Ask for any sign of life, for which nobody need wait; returns its number."""
        number = self._number()
        self._say(wire.Ping(number))
        return number

    @property
    def crowded(self) -> bool:
        """Whether an inbox is full."""
        return bool(self.subscriptions.crowded)

    @property
    def unanswered(self) -> int:
        """How many publishes have no answer yet."""
        return len(self._publishes)

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for a reply, which may stand behind messages."""
        return bool(self._publishes or self.subscriptions.asking or self._histories or self._pings or self._auths)

    def check(self) -> None:
        """Raise `Disconnected` when the connection is gone."""
        if self.lost is not None:
            raise Disconnected(*self.lost)

    def lose(self, message: str, code: int | None = None) -> None:
        """The connection is gone: nothing that is still unanswered will be. The first reason stands."""
        if self.lost is not None:
            return
        self.lost = (message, code)
        self._outbox.clear()
        self.outgoing = 0
        orphans: list[Answer[Any] | Batch] = [*self._auths, *self._histories.values(), *self._pings.values()]
        orphans += dict.fromkeys(pending.batch for pending in self._publishes.values())
        for orphan in orphans:
            orphan.wake()
        self.subscriptions.lose()

    # What comes in

    def receive(self, data: bytes, stream: int = MAIN, ended: bool = False) -> None:
        """Understand more bytes of a stream, which may be its last, or a datagram.

        Raises `PeerError` with `close` when the broker makes no sense.
        """
        if stream == DATAGRAM:
            self._receive_datagram(data)
            return
        lane = self._lanes.get(stream)
        if lane is None:
            lane = self._lanes[stream] = _new_lane(self.epoch)
        routes = lane.routes
        for message in lane.feed(data):
            if type(message) is Message:
                inbox = routes.get(message.pattern)  # type: ignore[arg-type]  # no pattern is None
                if inbox is None and (inbox := lane.find(message.pattern)) is None:
                    continue
                seq = message.seq
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
        if ended:
            del self._lanes[stream]
            if routes or lane.fresh:
                raise PeerError(Code.BAD_MESSAGE, "a subscription's stream ended before it", CloseCode.BAD_MESSAGE)

    def _receive_datagram(self, data: bytes) -> None:
        """A message without a seq; anything else a newer broker may mean something by."""
        try:
            message = decode(data)
        except wire.UNDECODABLE:
            return
        if isinstance(message, Message) and message.seq is None:
            inbox = self.subscriptions.find(message.pattern)
            if inbox is not None:
                self._hand_over(message, inbox)

    def _hand_over(self, message: Message, inbox: Inbox) -> None:
        items = inbox.items
        items.append(message)
        waiting = len(items)
        if waiting == 1:
            inbox.wake()
        if waiting >= inbox.limit:
            self.subscriptions.crowd(inbox, message)

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
            self._auths.popleft().settle(Refused(reply.code, reply.message))

    def _published(self, reply: wire.Published) -> None:
        pending = self._publishes.pop(reply.id, None)  # type: ignore[arg-type]  # no id is None
        if reply.seq is not None and reply.seq > self.head:
            self.head = reply.seq
        if pending is not None:
            pending.batch.settle(pending.place, reply.seq)

    def _publish_error(self, reply: wire.PublishError) -> None:
        pending = self._publishes.pop(reply.id, None)  # type: ignore[arg-type]
        if pending is not None:
            pending.batch.settle(pending.place, Refused(reply.code, reply.message, reply.retry_after))

    def _gap(self, event: wire.Gap, lane: Lane) -> None:
        if event.epoch != lane.epoch:
            self._advance(event.last, event.epoch, lane)
        self.subscriptions.gap(event, lane)

    def _head(self, event: wire.Head, lane: Lane) -> None:
        self._advance(event.seq, event.epoch, lane)
        self.subscriptions.head(event, lane)

    def _page(self, page: Page) -> None:
        answer = self._histories.pop(page.id, None)  # type: ignore[arg-type]
        if answer is not None:
            answer.settle(page)

    def _pong(self, reply: wire.Pong) -> None:
        answer = self._pings.pop(reply.seq, None)
        if answer is not None:
            answer.settle(reply)

    def _error(self, reply: wire.Error) -> None:
        number = reply.id
        if number is None:
            # Only a history has no refusal of its own kind, and histories are answered in order.
            number = next(iter(self._histories), -1)
        answer = self._histories.pop(number, None)
        if answer is not None:
            answer.settle(Refused(reply.code, reply.message))
        elif reply.code is Code.BAD_MESSAGE:
            # It did not understand something that somebody here may be waiting for.
            raise PeerError(reply.code, reply.message, CloseCode.BAD_MESSAGE)
        else:
            self._tell(reply)

    def _tell(self, event: wire.GoAway | wire.Error) -> None:
        if self._on_event is not None:
            self._on_event(event)

    # Helpers

    def _number(self) -> int:
        """The next request's id."""
        number = self._next_id
        self._next_id += 1
        return number

    def _say(self, request: wire.Request) -> None:
        self._put(wire.to_json(request) + b"\n")

    def _put(self, line: bytes) -> None:
        self.check()
        self._outbox.append(line)
        self.outgoing += len(line)

    def _advance(self, seq: int, epoch: str, lane: Lane) -> None:
        """A stream tells where the log is; what is new to that stream may be old here, and the other way round."""
        if epoch == self.epoch:
            self.head = max(seq, self.head)
        elif epoch != lane.epoch:
            self.head, self.epoch = seq, epoch
        lane.epoch = epoch


def _new_lane(epoch: str) -> Lane:
    framer: Framer[ServerMessage | None] = Framer(decode, MAX_OBJECT)
    return Lane(framer.feed, epoch)


_OF_A_LANE: dict[type, Callable[[Conversation, Any, Lane], None]] = {
    wire.Subscribed: lambda self, reply, lane: self.subscriptions.subscribed(reply, lane),
    wire.Revoked: lambda self, reply, lane: self.subscriptions.revoked(reply, lane),
    wire.Live: lambda self, event, lane: self.subscriptions.live(event, lane),
    wire.Gap: Conversation._gap,
    wire.Head: Conversation._head,
}
"""What is said of the subscriptions whose messages come on the same stream."""

_HANDLERS: dict[type, Callable[[Conversation, Any], None]] = {
    wire.AuthOk: Conversation._auth_ok,
    wire.AuthError: Conversation._auth_error,
    wire.Unsubscribed: lambda self, reply: self.subscriptions.unsubscribed(reply),
    wire.SubscribeError: lambda self, reply: self.subscriptions.refused(reply),
    wire.Published: Conversation._published,
    wire.PublishError: Conversation._publish_error,
    Page: Conversation._page,
    wire.Pong: Conversation._pong,
    wire.GoAway: Conversation._tell,
    wire.Error: Conversation._error,
}
