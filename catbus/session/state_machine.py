"""One client's side of the protocol, without its transport: bytes in, replies into the send queue, effects out.

Synchronous and without I/O; the time is an argument. Whoever drives a session takes the effects of `receive` one by
one and carries each out before it takes the next:

    VerifyToken        call `admit` or `refuse`, unless the session is `closed` by then
    StartSubscription  call `joined`, then deliver the messages that match
    EndSubscription    stop delivering, then call `left`
    AppendMessage      append to the log, which calls `settle`
    BroadcastMessage   pass the message on, once
    ReadHistory        read the history, then call `recalled` or `refuse_request`
    SendHeads          send `head` on every stream whose subscriptions are live

It closes the connection once `closing` is set and the send queue has been sent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from math import inf
from typing import Any

from msgspec import Raw

from ..auth.grants import Grants, Identity
from ..delivery.send_queue import HeadLine, SendQueue
from ..errors import RETRYABLE, CloseCode, ErrorCode, PeerError
from ..limits.client_usage import ClientUsage
from ..limits.unauthenticated import UNAUTHENTICATED_OBJECT_BYTES
from ..log import APPEND_OVERHEAD, EPHEMERAL_SIZE, Append, Entry, Outcome, Rejected
from ..protocol import wire_messages as wire
from ..protocol.channels import check_channel, check_pattern
from ..protocol.json_splitter import JsonSplitter
from ..protocol.wire_messages import ProtocolVersion, Reply


class SessionState(Enum):
    """What a session may do: authenticate; everything; nothing more."""

    NEW = auto()
    OPEN = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class VerifyToken:
    token: str
    producer: str | None


@dataclass(frozen=True, slots=True)
class StartSubscription:
    request: wire.Subscribe


@dataclass(frozen=True, slots=True)
class EndSubscription:
    request: wire.Unsubscribe


@dataclass(frozen=True, slots=True)
class AppendMessage:
    append: Append
    epoch: str | None
    """For a retry: the epoch that the client knew when it first sent it."""


@dataclass(frozen=True, slots=True)
class BroadcastMessage:
    channel: str
    payload: bytes
    sender: str | None
    origin: bytes | None


@dataclass(frozen=True, slots=True)
class ReadHistory:
    request: wire.History


@dataclass(frozen=True, slots=True)
class SendHeads:
    """A client wants to know how far its subscriptions are complete."""


Effect = VerifyToken | StartSubscription | EndSubscription | AppendMessage | BroadcastMessage | ReadHistory | SendHeads


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Sizes in bytes, times in seconds."""

    message_size: int = 65_536
    subscriptions: int = 1_000
    auth_timeout: float = 10.0
    token_grace: float = 30.0


class Session:
    """The state of one client: who it is, what it subscribed to, what it is owed."""

    def __init__(
        self,
        send_queue: SendQueue,
        limits: SessionLimits,
        now: float,
        *,
        on_settled: Callable[[], None] = lambda: None,
        on_error: Callable[[ErrorCode], None] = lambda _: None,
        roles_known: Callable[[], bool] = lambda: True,
    ) -> None:
        """`on_settled` is called whenever `pending` has decreased, until `abandon`.

        `on_error` is called with the code of each error that the session sends. `roles_known` returns whether the
        permissions of roles are known just now: if not, requests of a session with a role are rejected.
        """
        self.send_queue = send_queue
        self.state = SessionState.NEW
        self.protocol = ProtocolVersion.FIRST
        self.identity: Identity | None = None
        self.producer = b""
        self.usage = ClientUsage(object())
        """Which part of the log it takes. It stays the same, so that what it publishes keeps its order."""
        self.patterns: set[str] = set()
        self.pending = 0
        """Publishes that have not been settled yet."""
        self.deadline = now + limits.auth_timeout
        """When `tick` is due."""
        self.closing: tuple[CloseCode, str] | None = None
        self._on_settled: Callable[[], None] | None = on_settled
        self._on_error = on_error
        self._roles_known = roles_known
        self._limits = limits
        self._framer = JsonSplitter(wire.decode_client, min(UNAUTHENTICATED_OBJECT_BYTES, limits.message_size))

    @property
    def protocol(self) -> ProtocolVersion:
        """Which specification the client knows, as far as it has said."""
        return self.send_queue.protocol

    @protocol.setter
    def protocol(self, protocol: ProtocolVersion) -> None:
        self.send_queue.protocol = protocol

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken from the client, nor owed to it but what has been said."""
        return self.state is SessionState.CLOSED

    # What the client says

    def receive(self, data: bytes) -> Iterator[Effect | None]:
        """Understand more bytes. Take every effect and carry it out before the next; take them all.

        None comes after each object, whether it had an effect or not: there are replies now that take room.
        """
        if self.closed:
            return
        try:
            for message in self._framer.feed(data):
                if isinstance(message, PeerError):
                    self.say(wire.Error(message.message, message.code, message.id))
                else:
                    try:
                        yield from _HANDLERS[type(message)](self, message)
                    except PeerError as error:
                        self.say(error_reply(message, error))
                yield None
                if self.closed:
                    return
        except PeerError as error:
            self.say(wire.Error(error.message, error.code))
            self.close(error.close or CloseCode.BAD_MESSAGE, error.message)

    def tick(self, now: float) -> None:
        """The time has come that `deadline` names."""
        if now < self.deadline:
            return
        if self.state is SessionState.NEW:
            text = f"no auth within {self._limits.auth_timeout:g} s"
            self.say(wire.AuthError(text, ErrorCode.AUTH_TIMEOUT))
            self.close(CloseCode.AUTH_TIMEOUT, text)
        elif self.state is SessionState.OPEN:
            self.say(wire.Error("the token has expired", ErrorCode.TOKEN_EXPIRED))
            self.close(CloseCode.TOKEN_EXPIRED, "the token has expired")

    # What has become of it

    def admit(
        self,
        identity: Identity,
        reply: wire.AuthOk,
        producer: bytes,
        now: float,
        wall: float,
        usage: ClientUsage | None = None,
    ) -> list[str]:
        """The token was good. Returns the patterns held that it does not cover any more.

        `usage`: that of the client whose session it is, when it has become known. `wall` is the time that tokens are
        stamped with, in seconds since 1970; `now` counts as `deadline` does.
        """
        if self.identity is not None and self.identity.client_id != identity.client_id:
            raise PeerError(ErrorCode.UNAUTHORIZED, "a session cannot become another client's")
        self.state = SessionState.OPEN
        self._framer.limit = self._limits.message_size
        self.identity = identity
        if usage is not None:
            self.usage = usage
        self.producer = producer
        self.deadline = inf if identity.expires is None else now + identity.expires - wall + self._limits.token_grace
        self.say(reply)
        return self._unreadable(identity.grants)

    def regrant(self, grants: Grants) -> list[str]:
        """The role that the token stands for may this from now on. Returns the patterns held that it may not read."""
        assert self.identity is not None
        self.identity = replace(self.identity, grants=grants)
        return self._unreadable(grants)

    def _unreadable(self, grants: Grants) -> list[str]:
        return [pattern for pattern in self.patterns if not grants.may_read(pattern)]

    def refuse(self, error: PeerError) -> None:
        """The token was not good, or nobody knows; without `close` in the error the session goes on as who it was.

        It also does where it is open and trying again can help: an outage is a pause.
        """
        self.say(wire.AuthError(error.message, error.code, error.retry_after))
        if error.close is not None and (error.code not in RETRYABLE or self.state is not SessionState.OPEN):
            self.close(error.close, error.message)

    def joined(self, request: wire.Subscribe, seq: int, epoch: str, own: SendQueue | None = None) -> None:
        """The subscription is there, with a stream of its `own` where that is not None: what it gets goes there.

        It begins in this `epoch`. A session that had no subscription may not have heard of it, and a stream of its own
        may be read before or after what other streams say.
        """
        self.patterns.add(request.pattern)
        self.say(wire.Subscribed(request.pattern, seq, own is not None, epoch or None, request.id), own)

    def left(self, request: wire.Unsubscribe, seq: int, send_queue: SendQueue | None = None) -> None:
        self.patterns.discard(request.pattern)
        self.say(wire.Unsubscribed(request.pattern, seq, request.id), send_queue)

    def revoked(self, pattern: str, seq: int, send_queue: SendQueue | None = None) -> None:
        self.patterns.discard(pattern)
        self.say(wire.Revoked(pattern, seq), send_queue)

    def settled(self, append: Append, outcome: Outcome) -> None:
        """The fate of a publish; `Append.settle` of every one that this session submits."""
        self.pending -= 1
        self.usage.cost -= append.size + APPEND_OVERHEAD
        if self.state is SessionState.CLOSED and self.closing is None:
            pass
        elif isinstance(outcome, Rejected):
            self.say(wire.PublishError(append.channel, outcome.message, outcome.code, append.id))
        elif append.acknowledge:
            self.say(wire.Published(append.channel, append.id, outcome.seq, outcome.duplicate))
        if self._on_settled is not None:
            self._on_settled()

    def recalled(self, request: wire.History, entries: Sequence[Entry], more: bool) -> None:
        """What was asked for has been read, unless the client may not have it any more by now."""
        if self.closed:
            return
        try:
            self._check_readable(request.pattern)
        except PeerError as error:
            self.refuse_request(request, error)
            return
        messages = [
            wire.ChannelMessage(e.channel, Raw(e.payload), request.pattern, e.seq, e.at, e.sender) for e in entries
        ]
        self.say(wire.HistoryPage(messages, more, request.id))

    def refuse_request(self, request: wire.History | wire.Subscribe, error: PeerError) -> None:
        self.say(error_reply(request, error))

    def say(self, reply: Reply, send_queue: SendQueue | None = None) -> None:
        """Queue a reply in the words that the client knows; unless a send queue is named, in the session's own."""
        if isinstance(reply, wire.ERROR_REPLIES):
            self._on_error(reply.code)
        line = wire.encode(reply, self.protocol)
        if line is not None:
            (self.send_queue if send_queue is None else send_queue).put(
                HeadLine(line) if isinstance(reply, wire.Head) else line
            )

    def close(self, code: CloseCode, reason: str) -> None:
        """Take nothing more from the client, and close once the send queue has been sent. The first reason stands."""
        self.state = SessionState.CLOSED
        if self.closing is None:
            self.closing = (code, reason)

    def abandon(self) -> None:
        """End the session without a reply, because the connection is gone.

        Pending publishes refer to the session until the log settles them, so nothing of the connection may be reachable
        from it: the garbage collector would free that much later.
        """
        self.state = SessionState.CLOSED
        self.closing = None
        self._on_settled = None

    # One handler a message

    def _auth(self, message: wire.Auth) -> Iterator[Effect]:
        if self.state is SessionState.NEW:
            self.protocol = ProtocolVersion.V1 if message.protocol >= 1 else ProtocolVersion.FIRST
        yield VerifyToken(message.token, message.producer)

    def _subscribe(self, message: wire.Subscribe) -> Iterator[Effect]:
        self._check_readable(message.pattern)
        if message.pattern not in self.patterns and len(self.patterns) >= self._limits.subscriptions:
            raise PeerError(ErrorCode.LIMIT, f"at most {self._limits.subscriptions} subscriptions a session")
        yield StartSubscription(wire.Subscribe(message.pattern) if self.protocol is ProtocolVersion.FIRST else message)

    def _unsubscribe(self, message: wire.Unsubscribe) -> Iterator[Effect]:
        self._authenticated()
        check_pattern(message.pattern)
        if message.pattern in self.patterns:
            yield EndSubscription(message)
        elif self.protocol is ProtocolVersion.FIRST:
            # To the first version it was no mistake.
            self.say(wire.Unsubscribed(message.pattern, 0))
        else:
            raise PeerError(ErrorCode.INVALID_PATTERN, "not subscribed to this pattern")

    def _publish(self, message: wire.Publish) -> Iterator[Effect]:
        identity = self._vouched(ErrorCode.UNKNOWN if message.retry else ErrorCode.UNAVAILABLE)
        append = make_append(message, identity, self.producer, self.settled, self.usage.client, self)
        if message.ephemeral:
            yield BroadcastMessage(append.channel, append.payload, append.sender, append.origin)
            if message.ack:
                self.say(wire.Published(append.channel, append.id))
        else:
            self.pending += 1
            self.usage.cost += append.size + APPEND_OVERHEAD
            yield AppendMessage(append, message.epoch if message.retry else None)

    def _history(self, message: wire.History) -> Iterator[Effect]:
        self._check_readable(message.pattern)
        yield ReadHistory(message)

    def _ping(self, message: wire.Ping) -> Iterator[Effect]:
        self.say(wire.Pong(message.seq))
        yield SendHeads()

    def _authenticated(self) -> Identity:
        if self.identity is None:
            raise PeerError(ErrorCode.UNAUTHENTICATED, "authenticate first")
        return self.identity

    def _vouched(self, code: ErrorCode = ErrorCode.UNAVAILABLE) -> Identity:
        """Who the client is, and what it may, unless nobody knows that at the moment."""
        identity = self._authenticated()
        if identity.role is not None and not self._roles_known():
            raise PeerError(code, "the database has been away for so long that nobody knows what the role may by now")
        return identity

    def _check_readable(self, pattern: str) -> None:
        identity = self._vouched()
        check_pattern(pattern)
        if not identity.grants.may_read(pattern):
            raise PeerError(ErrorCode.UNAUTHORIZED, "no read grant covers this pattern")


_HANDLERS: dict[type, Callable[[Session, Any], Iterator[Effect]]] = {
    wire.Auth: Session._auth,
    wire.Subscribe: Session._subscribe,
    wire.Unsubscribe: Session._unsubscribe,
    wire.Publish: Session._publish,
    wire.History: Session._history,
    wire.Ping: Session._ping,
}


def make_append(
    message: wire.Publish,
    identity: Identity,
    producer: bytes,
    settle: Callable[[Append, Outcome], None],
    client: Hashable = None,
    owner: object = None,
) -> Append:
    """What a publish puts into the log, if it may; raises `PeerError`. `client`: whose share of the log it takes."""
    check_channel(message.channel)
    if not identity.grants.may_write(message.channel):
        raise PeerError(ErrorCode.UNAUTHORIZED, "no write grant covers this channel")
    if message.retry and None in (message.id, message.after, message.epoch):
        raise PeerError(ErrorCode.BAD_MESSAGE, "a retry needs `id`, and the `after` and `epoch` of its first sending")
    if message.ephemeral:
        size = len(message.channel) + len(bytes(message.payload)) + len(wire.to_json(identity.client_id))
        if size > EPHEMERAL_SIZE:
            raise PeerError(ErrorCode.TOO_LARGE, f"an ephemeral message may have at most {EPHEMERAL_SIZE} bytes")
    return Append(
        channel=message.channel,
        payload=wire.payload_bytes(message.payload),
        settle=settle,
        producer=producer if producer and message.id is not None else None,
        number=message.id or 0,
        sender=identity.client_id,
        origin=None if message.echo else producer or None,
        after=message.after if message.retry else None,
        id=message.id,
        acknowledge=message.ack,
        owner=owner,
        client=client,
    )


def error_reply(message: wire.ClientMessage, error: PeerError) -> Reply:
    """The reply that refuses a message: of the type that its sender waits for."""
    match message:
        case wire.Auth():
            return wire.AuthError(error.message, error.code)
        case wire.Subscribe(pattern=pattern) | wire.Unsubscribe(pattern=pattern):
            return wire.SubscribeError(wire.clip(pattern), error.message, error.code, message.id)
        case wire.Publish(channel=channel):
            return wire.PublishError(wire.clip(channel), error.message, error.code, message.id)
        case wire.History():
            return wire.Error(error.message, error.code, message.id)
        case _:
            return wire.Error(error.message, error.code)
