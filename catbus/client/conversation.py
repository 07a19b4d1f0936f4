"""The client's side of the protocol without its transport: bytes in, answers and messages out. No I/O, nobody waits.

A request puts a line into the outbox and returns where its answer will be. Whoever drives a conversation
    - sends what `take` returns, whenever `outgoing` says that there is something,
    - gives `receive` what comes in, and reads on only while `crowded` is empty or somebody is `waiting`,
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
from ..wire import Request
from .inbox import Inbox, Phase
from .messages import Message, Page, ServerMessage, decode

FRAME = 32 * 1024
"""How many bytes of requests go together, unless one alone is longer."""

MAX_OBJECT = 128 * 1024 * 1024
"""The longest line taken from a broker: a page of history may have a thousand messages of 64 KiB."""

SPILL = 8 * 1024 * 1024
"""How many bytes a full inbox may take on while somebody waits for a reply behind them."""

OVERHEAD = 256
"""What a message in memory adds to its payload, roughly, in bytes."""

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
        self.crowded: dict[Inbox, None] = {}
        """The inboxes that are full."""
        self._on_event = on_event
        self._framer: Framer[ServerMessage | None] = Framer(decode, MAX_OBJECT)
        self._outbox: deque[bytes] = deque()
        self._next_id = 1
        self._auths: deque[Answer[wire.AuthOk]] = deque()
        self._publishes: dict[int, Pending] = {}
        """In the order of their ids."""
        self._histories: dict[int, Answer[Page]] = {}
        self._pings: dict[int, Answer[wire.Pong]] = {}
        self._inboxes: dict[str, Inbox] = {}
        self._routes: dict[str, Inbox] = {}
        """Those of them that the broker sends to now; what comes for another pattern is for a subscription that was."""
        self._fresh: dict[str, Inbox] = {}
        """Those that the broker will send to, but has not: until it does, their epoch may be another than its own."""
        self._asked: dict[str, deque[Inbox | None]] = {}
        """What will be answered for each pattern, in order: an inbox's `subscribe`, or (None) an `unsubscribe`."""

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

    def subscribe(self, pattern: str, since: int | None, epoch: str | None, limit: int) -> Inbox:
        """Ask for a subscription. The inbox leaves `Phase.ASKED` when the answer is there."""
        if pattern in self._inboxes:
            raise ValueError(f"this connection has a subscription to {pattern} already")
        inbox = Inbox(pattern, since, epoch or self.epoch, limit)
        self._ask(inbox, wire.Subscribe(pattern, since, epoch))
        self._inboxes[pattern] = inbox
        return inbox

    def leave(self, inbox: Inbox) -> None:
        """End a subscription, from this side."""
        if inbox.phase is Phase.ENDED:
            return
        if inbox.phase is not Phase.AWAY and self.lost is None:
            self._unsubscribe(inbox)
        self._close(inbox, None)

    def suspend(self, inbox: Inbox) -> None:
        """Have the broker stop sending to an inbox that is full; `relieve` takes it up again."""
        self.crowded.pop(inbox, None)
        if inbox.phase is Phase.HELD and self.lost is None:
            self._unsubscribe(inbox)
            self._unroute(inbox)
            inbox.phase = Phase.AWAY

    def relieve(self, inbox: Inbox) -> None:
        """The application has taken enough out of an inbox that was full."""
        inbox.pressed = False
        inbox.spilled = 0
        self.crowded.pop(inbox, None)
        if inbox.phase is Phase.AWAY and self.lost is None:
            inbox.phase = Phase.ASKED
            inbox.live = False
            self._ask(inbox, wire.Subscribe(inbox.pattern, inbox.arrived, inbox.arrived_epoch or None))

    def history(self, pattern: str, limit: int, before: int | None) -> Answer[Page]:
        answer: Answer[Page] = Answer()
        self._say(wire.History(pattern, limit, before, self._next_id))
        self._histories[self._next_id] = answer
        self._next_id += 1
        return answer

    def ping(self) -> Answer[wire.Pong]:
        answer: Answer[wire.Pong] = Answer()
        self._pings[self._next_id] = answer
        self.keep_alive()
        return answer

    def keep_alive(self) -> None:
        """Ask for any sign of life, for which nobody waits."""
        self._say(wire.Ping(self._next_id))
        self._next_id += 1

    @property
    def unanswered(self) -> int:
        """How many publishes have no answer yet."""
        return len(self._publishes)

    @property
    def waiting(self) -> bool:
        """Whether somebody waits for a reply, which may stand behind messages."""
        return bool(self._publishes or self._histories or self._pings or self._asked or self._auths)

    def lose(self, message: str, code: int | None = None) -> None:
        """The connection is gone: nothing that is still unanswered will be. The first reason stands."""
        if self.lost is not None:
            return
        self.lost = (message, code)
        orphans: list[Answer[Any] | Batch | Inbox] = [*self._auths, *self._histories.values(), *self._pings.values()]
        orphans += dict.fromkeys(pending.batch for pending in self._publishes.values())
        orphans += self._inboxes.values()
        self.crowded.clear()
        self._outbox.clear()
        self.outgoing = 0
        for orphan in orphans:
            orphan.wake()

    def check(self) -> None:
        """Raise `Disconnected` when the connection is gone."""
        if self.lost is not None:
            raise Disconnected(*self.lost)

    # What comes in

    def receive(self, data: bytes) -> None:
        """Understand more bytes. Raises `PeerError` with `close` when the broker makes no sense."""
        routes = self._routes
        for message in self._framer.feed(data):
            if type(message) is Message:
                inbox = routes.get(message.pattern)  # type: ignore[arg-type]  # no subscription is None
                if inbox is None and (inbox := self._prove(message.pattern)) is None:
                    continue
                seq = message.seq
                if seq is not None:
                    if seq <= inbox.arrived:
                        continue
                    inbox.arrived = seq
                items = inbox.items
                items.append(message)
                waiting = len(items)
                if waiting == 1:
                    inbox.wake()
                if waiting >= inbox.limit:
                    self._crowd(inbox, message)
            elif isinstance(message, PeerError):
                raise PeerError(message.code, message.message, CloseCode.BAD_MESSAGE)
            elif message is not None:
                _HANDLERS[type(message)](self, message)

    def _crowd(self, inbox: Inbox, message: Message) -> None:
        inbox.pressed = True
        inbox.spilled += len(message.raw) + OVERHEAD
        self.crowded[inbox] = None
        if inbox.spilled > SPILL:
            self.suspend(inbox)

    def _auth_ok(self, reply: wire.AuthOk) -> None:
        self.client_id = reply.client_id
        self.producer = reply.producer
        self.limits = reply.limits
        self.floor = reply.floor
        self._advance(reply.head or 0, reply.epoch)
        if self._auths:
            self._auths.popleft().settle(reply)

    def _auth_error(self, reply: wire.AuthError) -> None:
        if self._auths:
            self._auths.popleft().settle(Refused(reply.code, reply.message))

    def _subscribed(self, reply: wire.Subscribed) -> None:
        inbox = self._answered(reply.pattern)
        if inbox is not None and inbox.phase is Phase.ASKED:
            (self._fresh if inbox.resuming else self._routes)[reply.pattern] = inbox
            inbox.begin(reply.seq, self.epoch)

    def _unsubscribed(self, reply: wire.Unsubscribed) -> None:
        self._answered(reply.pattern)

    def _subscribe_error(self, reply: wire.SubscribeError) -> None:
        inbox = self._answered(reply.pattern)
        if inbox is not None and inbox.phase is Phase.ASKED:
            self._close(inbox, Refused(reply.code, reply.message))

    def _revoked(self, reply: wire.Revoked) -> None:
        inbox = self._heard(reply.pattern)
        if inbox is not None:
            self._close(inbox, Refused(Code.REVOKED, "the permission was withdrawn"))

    def _published(self, reply: wire.Published) -> None:
        pending = self._publishes.pop(reply.id, None)  # type: ignore[arg-type]  # no publish is None
        if reply.seq is not None and reply.seq > self.head:
            self.head = reply.seq
        if pending is not None:
            pending.batch.settle(pending.place, reply.seq)

    def _publish_error(self, reply: wire.PublishError) -> None:
        pending = self._publishes.pop(reply.id, None)  # type: ignore[arg-type]
        if pending is not None:
            pending.batch.settle(pending.place, Refused(reply.code, reply.message, reply.retry_after))

    def _live(self, event: wire.Live) -> None:
        inbox = self._heard(event.pattern)
        if inbox is not None:
            inbox.live = True
            inbox.mark(event, event.seq, self.epoch)

    def _gap(self, event: wire.Gap) -> None:
        inbox = self._heard(event.pattern)
        if event.epoch != self.epoch:
            self._advance(event.last, event.epoch)
        if inbox is not None:
            inbox.mark(event, event.last, event.epoch)

    def _head(self, event: wire.Head) -> None:
        self._advance(event.seq, event.epoch)
        for inbox in self._routes.values():
            if inbox.live:
                inbox.mark(event, event.seq, event.epoch)

    def _history(self, page: Page) -> None:
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
        elif self._on_event is not None:
            self._on_event(reply)

    def _goaway(self, event: wire.GoAway) -> None:
        if self._on_event is not None:
            self._on_event(event)

    # Helpers

    def _say(self, request: Request) -> None:
        self._put(wire.to_json(request) + b"\n")

    def _put(self, line: bytes) -> None:
        self.check()
        self._outbox.append(line)
        self.outgoing += len(line)

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

    def _close(self, inbox: Inbox, ending: Refused | None) -> None:
        if self._inboxes.get(inbox.pattern) is inbox:
            del self._inboxes[inbox.pattern]
        self._unroute(inbox)
        self.crowded.pop(inbox, None)
        inbox.end(ending)

    def _heard(self, pattern: str) -> Inbox | None:
        """Who has the pattern, now that the broker says something about it."""
        inbox = self._fresh.pop(pattern, None)
        if inbox is not None:
            self._routes[pattern] = inbox
        return self._routes.get(pattern)

    def _prove(self, pattern: str | None) -> Inbox | None:
        """Whom a message is for, if it is the first one since its `subscribed`."""
        if pattern not in self._fresh:
            return None
        inbox = self._heard(pattern)
        if inbox is not None:
            inbox.prove(self.epoch)
        return inbox

    def _unroute(self, inbox: Inbox) -> None:
        for routes in (self._routes, self._fresh):
            if routes.get(inbox.pattern) is inbox:
                del routes[inbox.pattern]

    def _advance(self, seq: int, epoch: str) -> None:
        self.head = max(seq, self.head) if epoch == self.epoch else seq
        self.epoch = epoch


_HANDLERS: dict[type, Callable[[Conversation, Any], None]] = {
    wire.AuthOk: Conversation._auth_ok,
    wire.AuthError: Conversation._auth_error,
    wire.Subscribed: Conversation._subscribed,
    wire.Unsubscribed: Conversation._unsubscribed,
    wire.SubscribeError: Conversation._subscribe_error,
    wire.Published: Conversation._published,
    wire.PublishError: Conversation._publish_error,
    wire.Live: Conversation._live,
    wire.Head: Conversation._head,
    wire.Gap: Conversation._gap,
    wire.Revoked: Conversation._revoked,
    Page: Conversation._history,
    wire.GoAway: Conversation._goaway,
    wire.Pong: Conversation._pong,
    wire.Error: Conversation._error,
}
