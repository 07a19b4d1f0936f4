"""The state machine of one session, without its transport: bytes in, replies into the send queue, effects out.

Synchronous and without I/O; the time is an argument. The driver of a session takes the effects of `receive` one by one
and carries each out before it takes the next (`effects.py`).

When `closing` is set, the driver closes the connection after the contents of the send queue.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from math import inf
from typing import Any

from msgspec import UNSET, Raw

from ..auth.grants import Grants, Identity
from ..close_codes import CloseCode
from ..delivery.reply_lines import HeadLine, HistoryLine
from ..delivery.send_queue import SendQueue
from ..delivery.subscription import Subscription
from ..error_codes import RETRYABLE, ErrorCode
from ..errors import PeerError
from ..limits.client_usage import ClientUsage
from ..limits.unauthenticated import UNAUTHENTICATED_OBJECT_BYTES
from ..log import APPEND_OVERHEAD, Append, Entry, Outcome, Rejected
from ..presence.interface import MAX_INFO
from ..protocol import wire_messages as wire
from ..protocol.channels import check_channel, check_pattern, is_reserved
from ..protocol.json_splitter import JsonSplitter
from ..protocol.server_sent_events import encode_reply
from ..protocol.wire_messages import ProtocolVersion, Reply
from .appends import RESERVED, Settle, conflict_as_unknown, make_append, unknown_if_retry
from .effects import (
    AppendMessage,
    BroadcastMessage,
    CheckPublish,
    Effect,
    EndSubscription,
    JoinChannel,
    LeaveChannel,
    ReadHistory,
    ReadMembers,
    SendHeads,
    StartSubscription,
    VerifyToken,
)
from .error_replies import error_reply


class SessionState(Enum):
    """NEW: only `auth` and `ping` are allowed. OPEN: all requests are. CLOSED: nothing more is processed."""

    NEW = auto()
    OPEN = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Sizes in bytes, times in seconds."""

    message_size: int = 65_536
    subscriptions: int = 1_000
    joined_channels: int = 100
    auth_timeout: float = 10.0
    token_grace: float = 30.0


class Session:
    """One session: its identity, its subscriptions, its pending publishes, and when it closes."""

    def __init__(
        self,
        send_queue: SendQueue,
        limits: SessionLimits,
        now: float,
        *,
        on_settled: Callable[[], None] = lambda: None,
        on_error: Callable[[ErrorCode], None] = lambda _: None,
        roles_known: Callable[[], bool] = lambda: True,
        check_publishes: bool = False,
    ) -> None:
        """`on_settled` is called whenever `pending` has decreased, until `abandon`.

        `on_error` is called with the code of each error that the session sends. `roles_known` returns whether the
        permissions of roles are known just now: if not, requests of a session with a role are rejected. With
        `check_publishes`, each publish that is allowed is a `CheckPublish` first.
        """
        self.send_queue = send_queue
        self.state = SessionState.NEW
        self.protocol = ProtocolVersion.FIRST
        self.identity: Identity | None = None
        self.producer = b""
        self.usage = ClientUsage(object())
        """What its client uses. It stays the same for the whole session, so that publishes keep their order."""
        self.subscriptions: dict[str, Subscription] = {}
        """By pattern. The patterns of a first-version session share one subscription."""
        self.channels: set[str] = set()
        """The channels of which it is a member."""
        self.pending = 0
        """Publishes that have not been settled yet."""
        self.published = 0
        """Publishes that were allowed, whatever became of them."""
        self.deadline = now + limits.auth_timeout
        """When `check_deadline` is due."""
        self.closing: tuple[CloseCode, str] | None = None
        self._on_settled: Callable[[], None] | None = on_settled
        self._on_error = on_error
        self._roles_known = roles_known
        self._check_publishes = check_publishes
        self._limits = limits
        self._splitter = JsonSplitter(wire.decode_client, min(UNAUTHENTICATED_OBJECT_BYTES, limits.message_size))

    @property
    def protocol(self) -> ProtocolVersion:
        """The version of the protocol that the client uses; the first version until `auth` has said otherwise."""
        return self.send_queue.protocol

    @protocol.setter
    def protocol(self, protocol: ProtocolVersion) -> None:
        self.send_queue.protocol = protocol

    @property
    def closed(self) -> bool:
        """Whether nothing more is processed, and nothing is sent but what is in the send queue."""
        return self.state is SessionState.CLOSED

    # From the client

    def receive(self, data: bytes) -> Iterator[Effect | None]:
        """Process bytes. Take all effects, and carry out each before the next.

        None follows each object, with or without effects, because its replies may have filled the send queue.
        """
        if self.closed:
            return
        try:
            for message in self._splitter.feed(data):
                if isinstance(message, PeerError):
                    self.send(wire.Error(message.message, message.code, message.id))
                else:
                    try:
                        yield from _HANDLERS[type(message)](self, message)
                    except PeerError as error:
                        self.send(error_reply(message, error))
                yield None
                if self.closed:
                    return
        except PeerError as error:
            self.send(wire.Error(error.message, error.code))
            self.close(error.close or CloseCode.BAD_MESSAGE, error.message)

    def check_deadline(self, now: float) -> None:
        """Close the session if `deadline` has passed."""
        if now < self.deadline:
            return
        if self.state is SessionState.NEW:
            text = f"no auth within {self._limits.auth_timeout:g} s"
            self.send(wire.AuthError(text, ErrorCode.AUTH_TIMEOUT))
            self.close(CloseCode.AUTH_TIMEOUT, text)
        elif self.state is SessionState.OPEN:
            self.send(wire.Error("the token has expired", ErrorCode.TOKEN_EXPIRED))
            self.close(CloseCode.TOKEN_EXPIRED, "the token has expired")

    # From the driver

    def accept_token(
        self,
        identity: Identity,
        reply: wire.AuthOk,
        producer: bytes,
        now: float,
        wall: float,
        usage: ClientUsage | None = None,
    ) -> list[str]:
        """Accept a valid token. Return the patterns of subscriptions that it no longer allows.

        `usage`: what the token's client uses. `wall`: the time in seconds since 1970, as in tokens; `now`: the time by
        the clock of `deadline`.
        """
        if self.identity is not None and self.identity.client_id != identity.client_id:
            raise PeerError(ErrorCode.UNAUTHORIZED, "a session cannot become another client's")
        self.state = SessionState.OPEN
        self._splitter.limit = self._limits.message_size
        self.identity = identity
        if usage is not None:
            self.usage = usage
        self.producer = producer
        self.deadline = inf if identity.expires is None else now + identity.expires - wall + self._limits.token_grace
        self.send(reply)
        return self._unreadable(identity.grants)

    def update_grants(self, grants: Grants) -> list[str]:
        """Apply changed permissions. Return the patterns of subscriptions that they no longer allow."""
        assert self.identity is not None
        self.identity = replace(self.identity, grants=grants)
        return self._unreadable(grants)

    def _unreadable(self, grants: Grants) -> list[str]:
        return [pattern for pattern in self.subscriptions if not grants.may_read(pattern)]

    def reject_token(self, error: PeerError) -> None:
        """Reject a token that is not valid or could not be verified.

        Without `close` in the error, the session continues with its present identity. So does an open session if a
        retry can help: an outage of the database does not close sessions.
        """
        self.send(wire.AuthError(error.message, error.code, error.retry_after))
        if error.close is not None and (error.code not in RETRYABLE or self.state is not SessionState.OPEN):
            self.close(error.close, error.message)

    def subscribed(self, request: wire.Subscribe, subscription: Subscription, seq: int, epoch: str) -> None:
        """Add a subscription, and acknowledge it in its own send queue.

        The reply names the `epoch` that the subscription begins in: a client without subscriptions may not know it,
        and may read a stream before or after other streams.
        """
        self.subscriptions[request.pattern] = subscription
        send_queue = subscription.send_queue
        own_stream = send_queue is not self.send_queue
        self.send(wire.Subscribed(request.pattern, seq, own_stream, epoch or None, request.id), send_queue)

    def remove_subscription(self, pattern: str) -> Subscription | None:
        """Remove the subscription to a pattern, and return it; None if there is none."""
        return self.subscriptions.pop(pattern, None)

    def unsubscribed(self, request: wire.Unsubscribe, seq: int, send_queue: SendQueue | None = None) -> None:
        """Acknowledge the end of a subscription."""
        self.send(wire.Unsubscribed(request.pattern, seq, request.id), send_queue)

    def revoked(self, pattern: str, seq: int, send_queue: SendQueue | None = None) -> None:
        """Tell the client that its permission for a subscription was withdrawn."""
        self.send(wire.Revoked(pattern, seq), send_queue)

    def settled(self, append: Append, outcome: Outcome) -> None:
        """Acknowledge or reject a publish of this session: this is `Append.settle` of all its publishes."""
        self.pending -= 1
        self.usage.cost -= append.size + APPEND_OVERHEAD
        if self.state is SessionState.CLOSED and self.closing is None:
            pass
        elif isinstance(outcome, Rejected):
            seq = outcome.retained_seq
            self.send(wire.PublishError(append.channel, outcome.message, outcome.code, append.id, seq=seq))
        elif append.acknowledge:
            self.send(wire.Published(append.channel, append.id, outcome.seq, outcome.duplicate))
        if self._on_settled is not None:
            self._on_settled()

    def send_history(self, request: wire.History, entries: Sequence[Entry], more: bool) -> None:
        """Send a page of the history, unless the client's permission was withdrawn meanwhile."""
        if self.closed:
            return
        try:
            self._check_readable(request.pattern)
        except PeerError as error:
            self.reject_request(request, error)
            return
        messages = [
            wire.ChannelMessage(e.channel, Raw(e.payload), request.pattern, e.seq, e.at, e.sender, e.retain)
            for e in entries
        ]
        page = wire.encode(wire.HistoryPage(messages, more, request.id), self.protocol)
        erased = PeerError(ErrorCode.UNAVAILABLE, "messages of this page were erased just now: request it again")
        instead = wire.encode(error_reply(request, erased), self.protocol)
        if page is not None and instead is not None:
            self.send_queue.put(HistoryLine(page, [e.seq for e in entries], instead))

    def joined(self, request: wire.Join) -> None:
        """Acknowledge that the session is a member of a channel."""
        self.channels.add(request.channel)
        self.send(wire.Joined(request.channel, request.id))

    def left(self, channel: str, number: int | None = None) -> None:
        """Tell the client that the session is not a member of a channel. `number`: the id of its request, if any."""
        self.channels.discard(channel)
        self.send(wire.Left(channel, number))

    def unreadable_channels(self) -> list[str]:
        """Return the channels of which the session is a member although its grants do not allow to read them."""
        grants = Grants() if self.identity is None else self.identity.grants
        return [channel for channel in self.channels if not grants.may_read(channel)]

    def send_members(self, request: wire.ListMembers, members: list[wire.ChannelMember], next_page: str | None) -> None:
        """Send a page of members, unless the client's permission was withdrawn meanwhile."""
        if self.closed:
            return
        try:
            self._check_readable(request.pattern)
        except PeerError as error:
            self.reject_request(request, error)
        else:
            self.send(wire.MemberList(members, next=next_page, id=request.id))

    def reject_request(
        self, request: wire.History | wire.Subscribe | wire.Join | wire.ListMembers, error: PeerError
    ) -> None:
        """Send the error reply to a request."""
        self.send(error_reply(request, error))

    def send(self, reply: Reply, send_queue: SendQueue | None = None) -> None:
        """Put a reply into a send queue, by default the session's own, in the client's version of the protocol."""
        if isinstance(reply, wire.ERROR_REPLIES):
            self._on_error(reply.code)
        line = encode_reply(reply, self.protocol)
        if line is not None:
            queue = self.send_queue if send_queue is None else send_queue
            queue.put(HeadLine(line) if isinstance(reply, wire.Head) else line)

    def close(self, code: CloseCode, reason: str) -> None:
        """Process nothing more, and close after the contents of the send queue. The first reason stays."""
        self.state = SessionState.CLOSED
        if self.closing is None:
            self.closing = (code, reason)

    def abandon(self) -> None:
        """End the session without a reply, because its connection has ended.

        Pending publishes refer to the session until the log settles them, so nothing of the connection may be reachable
        from it: the garbage collector would free that much later.
        """
        self.state = SessionState.CLOSED
        self.closing = None
        self._on_settled = None

    # One handler per type of message

    def _auth(self, message: wire.Auth) -> Iterator[Effect]:
        if self.state is SessionState.NEW:
            self.protocol = ProtocolVersion.V1 if message.protocol >= 1 else ProtocolVersion.FIRST
        yield VerifyToken(message.token, message.producer)

    def _subscribe(self, message: wire.Subscribe) -> Iterator[Effect]:
        self.check_subscribe((message.pattern,))
        yield StartSubscription(wire.Subscribe(message.pattern) if self.protocol is ProtocolVersion.FIRST else message)

    def _unsubscribe(self, message: wire.Unsubscribe) -> Iterator[Effect]:
        self._authenticated()
        check_pattern(message.pattern)
        if message.pattern in self.subscriptions:
            yield EndSubscription(message)
        elif self.protocol is ProtocolVersion.FIRST:
            # The first version accepts it.
            self.send(wire.Unsubscribed(message.pattern, 0))
        else:
            raise PeerError(ErrorCode.INVALID_PATTERN, "not subscribed to this pattern")

    def _publish(self, message: wire.Publish) -> Iterator[Effect]:
        append = self._make_append(message, self.settled)
        if self._check_publishes:
            check = CheckPublish(message)
            yield check
            if self.closed:
                return  # Without a reply, the client publishes it again on its next connection.
            if check.rejection is not None:
                raise unknown_if_retry(message, check.rejection)
            # Meanwhile the permission may have been withdrawn.
            append = self._make_append(message, conflict_as_unknown(self.settled) if check.replaced else self.settled)
        self.published += 1
        if message.ephemeral:
            yield BroadcastMessage(append.channel, append.payload, append.sender, append.origin)
            if message.ack:
                self.send(wire.Published(append.channel, append.id))
        else:
            self.pending += 1
            self.usage.cost += append.size + APPEND_OVERHEAD
            yield AppendMessage(append, message.epoch if message.retry else None)

    def _make_append(self, message: wire.Publish, settle: Settle) -> Append:
        identity = self._known_identity(ErrorCode.UNKNOWN if message.retry else ErrorCode.UNAVAILABLE)
        return make_append(message, identity, self.producer, settle, self.usage.client, self)

    def _history(self, message: wire.History) -> Iterator[Effect]:
        self._check_readable(message.pattern)
        yield ReadHistory(message)

    def _join(self, message: wire.Join) -> Iterator[Effect]:
        self._check_channel_readable(message.channel)
        info = b"null" if message.info is UNSET else wire.payload_bytes(message.info)
        if len(info) > MAX_INFO:
            raise PeerError(ErrorCode.TOO_LARGE, f"`info` may have at most {MAX_INFO} bytes")
        if message.channel not in self.channels and len(self.channels) >= self._limits.joined_channels:
            raise PeerError(
                ErrorCode.LIMIT, f"a session is a member of at most {self._limits.joined_channels} channels"
            )
        yield JoinChannel(message, None if info == b"null" else info)

    def _leave(self, message: wire.Leave) -> Iterator[Effect]:
        self._authenticated()
        check_channel(message.channel)
        if message.channel in self.channels:
            yield LeaveChannel(message)
        else:
            self.left(message.channel, message.id)

    def _list_members(self, message: wire.ListMembers) -> Iterator[Effect]:
        self._check_readable(message.pattern)
        yield ReadMembers(message)

    def _ping(self, message: wire.Ping) -> Iterator[Effect]:
        self.send(wire.Pong(message.seq))
        yield SendHeads()

    def _authenticated(self) -> Identity:
        if self.identity is None:
            raise PeerError(ErrorCode.UNAUTHENTICATED, "authenticate first")
        return self.identity

    def _known_identity(self, code: ErrorCode = ErrorCode.UNAVAILABLE) -> Identity:
        """Return the identity, unless the present permissions of its role are unknown."""
        identity = self._authenticated()
        if identity.role is not None and not self._roles_known():
            raise PeerError(
                code, "the database has been unreachable for so long that the role's permissions are unknown"
            )
        return identity

    def check_subscribe(self, patterns: Collection[str]) -> None:
        """Raise `PeerError` if the client must not subscribe to one of these patterns, or has too many."""
        for pattern in patterns:
            self._check_readable(pattern)
        added = sum(pattern not in self.subscriptions for pattern in patterns)
        if added and len(self.subscriptions) + added > self._limits.subscriptions:
            raise PeerError(ErrorCode.LIMIT, f"at most {self._limits.subscriptions} subscriptions a session")

    def _check_channel_readable(self, channel: str) -> None:
        identity = self._known_identity()
        check_channel(channel)
        if is_reserved(channel) or not identity.grants.may_read(channel):
            text = RESERVED if is_reserved(channel) else "no read grant covers this channel"
            raise PeerError(ErrorCode.UNAUTHORIZED, text)

    def _check_readable(self, pattern: str) -> None:
        identity = self._known_identity()
        check_pattern(pattern)
        if not identity.grants.may_read(pattern):
            raise PeerError(ErrorCode.UNAUTHORIZED, "no read grant covers this pattern")


_HANDLERS: dict[type, Callable[[Session, Any], Iterator[Effect]]] = {
    wire.Auth: Session._auth,
    wire.Subscribe: Session._subscribe,
    wire.Unsubscribe: Session._unsubscribe,
    wire.Publish: Session._publish,
    wire.History: Session._history,
    wire.Join: Session._join,
    wire.Leave: Session._leave,
    wire.ListMembers: Session._list_members,
    wire.Ping: Session._ping,
}
