"""The client side of `catbus.v1` on one connection, without I/O: bytes in, replies and messages out.

It lasts as long as the connection. `InFlightRequests`, `SubscriptionManager` and `ChannelMemberships` hold the state
that outlives it, and send their requests through it. The caller

| calls | when |
|---|---|
| `authenticate` | first |
| `resume`, or its halves `resume_subscriptions` and `resume_requests` | after `auth_ok` |
| `data_to_send`, and sends the result | `outgoing_bytes` is not 0 |
| `receive` | bytes arrive; it may pause reading while `has_full_queue` is true and `awaiting_reply` is false |
| `connection_lost` | the connection is lost |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from ..close_codes import CloseCode
from ..error_codes import ErrorCode
from ..errors import ConflictError, Disconnected, PeerError, Refused
from ..protocol import wire_messages as wire
from ..protocol.json_splitter import JsonSplitter
from .channel_memberships import ChannelMemberships
from .in_flight_requests import InFlightRequests, PendingReply
from .message_queue import MessageQueue
from .server_messages import Message, Page, ServerMessage, SnapshotPage, decode
from .shared_subscription import IncomingStream
from .subscription_manager import SubscriptionManager
from .transport_interface import DATAGRAM, MAIN_STREAM

MAX_SEND_SIZE = 32 * 1024
"""Bytes of requests that are sent together. A longer request is sent alone."""

MAX_OBJECT = 128 * 1024 * 1024
"""The longest line from a broker, in bytes: a page of history may have a thousand messages of 64 KiB."""


def _do_nothing() -> None:
    pass


class ProtocolConnection:
    """The state of one connection. `on_event` is called for `goaway`, and for an error that answers no request."""

    def __init__(
        self,
        in_flight: InFlightRequests,
        subscriptions: SubscriptionManager,
        memberships: ChannelMemberships,
        on_event: Callable[[wire.GoAway | wire.Error], None] | None = None,
    ) -> None:
        self.client_id: str | None = None
        self.producer = ""
        self.epoch = ""
        self.head = 0
        self.floor: int | None = None
        self.limits: dict[str, int] = {}
        self.goaway: wire.GoAway | None = None
        """The announcement that the broker will close the connection."""
        self.lost: tuple[str, int | None] | None = None
        """Why the connection was lost, with the close code if there was one."""
        self.outgoing_bytes = 0
        self._in_flight = in_flight
        self._subscriptions = subscriptions
        self._memberships = memberships
        self._on_event = on_event
        self._main_stream = self._new_incoming_stream("")
        self._incoming_streams = {MAIN_STREAM: self._main_stream}
        self._outgoing: deque[bytes] = deque()
        self._auth_replies: deque[PendingReply[wire.AuthOk]] = deque()

    # Sending

    def data_to_send(self) -> bytes:
        """Take the next whole lines to send together, oldest first. Empty if there are none."""
        outgoing = self._outgoing
        size = 0
        lines: list[bytes] = []
        while outgoing and (not lines or size + len(outgoing[0]) <= MAX_SEND_SIZE):
            line = outgoing.popleft()
            size += len(line)
            lines.append(line)
        self.outgoing_bytes -= size
        return b"".join(lines)

    def authenticate(self, token: str, wake: Callable[[], None] = _do_nothing) -> PendingReply[wire.AuthOk]:
        """Send a token, and the producer id of earlier connections. Raises `Disconnected`."""
        self.check_connected()
        reply: PendingReply[wire.AuthOk] = PendingReply(wake)
        # The broker reads the producer id of the first `auth` of a session only.
        producer = None if self.producer else self._in_flight.producer or None
        self.send_request(wire.Auth(token, wire.ProtocolVersion.V1, producer))
        self._auth_replies.append(reply)
        return reply

    def resume(self) -> None:
        """Resume all subscriptions and all requests without a reply here. Raises `Disconnected`."""
        self.resume_subscriptions()
        self.resume_requests()

    def resume_subscriptions(self) -> None:
        """Resume every subscription at its cursor on this connection. Raises `Disconnected`."""
        self.check_connected()
        self._subscriptions.resume(self)

    def resume_requests(self) -> None:
        """Send the requests without a reply, and all further ones, over this connection, and join all channels again.

        Raises `Disconnected`.
        """
        self.check_connected()
        self._in_flight.resume(self)
        self._memberships.resume(self)

    def send_ping(self) -> None:
        """Send a ping for which no task waits: any bytes from the broker are a sign of life."""
        self.send_request(wire.Ping(self._in_flight.next_id()))

    def send_request(self, request: wire.Request) -> None:
        self.send_line(wire.to_json(request) + b"\n")

    def send_line(self, line: bytes) -> None:
        """Queue a line. Does nothing on a lost connection: the waiting task learns of the loss by other means."""
        if self.lost is None:
            self._outgoing.append(line)
            self.outgoing_bytes += len(line)

    @property
    def has_full_queue(self) -> bool:
        """Whether the queue of a subscription is full."""
        return bool(self._subscriptions.full_queues)

    def pause_full_queues(self) -> None:
        """Have the broker stop sending to the queues that are full."""
        for queue in list(self._subscriptions.full_queues):
            self._subscriptions.pause_queue(queue)

    @property
    def awaiting_reply(self) -> bool:
        """Whether a request has no reply. The reply may come after messages."""
        states = (self._in_flight, self._subscriptions, self._memberships)
        return bool(self._auth_replies) or any(state.awaiting_reply for state in states)

    def check_connected(self) -> None:
        """Raise `Disconnected` if the connection is lost."""
        if self.lost is not None:
            raise Disconnected(*self.lost)

    def connection_lost(self, message: str, code: int | None = None) -> None:
        """Handle the loss of the connection: no reply comes from it any more. The first reason counts."""
        if self.lost is not None:
            return
        self.lost = (message, code)
        self._outgoing.clear()
        self.outgoing_bytes = 0
        self._subscriptions.connection_lost(self, self._incoming_streams.values())
        self._in_flight.connection_lost(self)
        for reply in self._auth_replies:
            reply.wake()

    # Receiving

    def receive(self, data: bytes, stream: int = MAIN_STREAM, ended: bool = False, reset: bool = False) -> None:
        """Handle bytes of a stream, or a datagram. `ended`: these are the last bytes of the stream.

        `reset`: the broker has reset the stream; the main stream says that its subscription has ended.
        Raises `PeerError` with `close` if the bytes violate the protocol.
        """
        if self.lost is not None:
            # Another connection has the requests now: a reply from here would be a second one.
            return
        if stream == DATAGRAM:
            self._receive_datagram(data)
            return
        incoming = self._incoming_streams.get(stream)
        if incoming is None:
            incoming = self._incoming_streams[stream] = self._new_incoming_stream(self.epoch)
        routes = incoming.routes
        for message in incoming.decode(data):
            if type(message) is Message:
                subscription = routes.get(message.pattern)  # type: ignore[arg-type]  # no pattern is None
                if subscription is None and (subscription := incoming.start_route(message.pattern)) is None:
                    continue
                seq = message.seq
                if seq is not None:
                    subscription.received_seq = seq
                for queue in subscription.receivers:
                    if seq is not None:
                        if seq <= queue.received_seq:
                            continue
                        queue.received_seq = seq
                    self._deliver(message, queue)
            elif isinstance(message, PeerError):
                raise PeerError(message.code, message.message, CloseCode.BAD_MESSAGE)
            elif (handler := _STREAM_HANDLERS.get(type(message))) is not None:
                handler(self, message, incoming)
            elif message is not None:
                _CONNECTION_HANDLERS[type(message)](self, message)
        if reset:
            self._subscriptions.stream_reset(self._incoming_streams.pop(stream))
        elif ended:
            del self._incoming_streams[stream]
            if self._subscriptions.stream_ended(incoming):
                raise PeerError(ErrorCode.BAD_MESSAGE, "a stream ended before its subscription", CloseCode.BAD_MESSAGE)

    def _receive_datagram(self, data: bytes) -> None:
        """Handle an ephemeral message. Other datagrams may come from a newer broker, and are ignored."""
        try:
            message = decode(data)
        except wire.UNDECODABLE:
            return
        if isinstance(message, Message) and message.seq is None:
            subscription = self._subscriptions.find_for_datagram(message.pattern, self)
            for queue in subscription.receivers if subscription is not None else ():
                self._deliver(message, queue)

    def _deliver(self, message: Message, queue: MessageQueue) -> None:
        items = queue.items
        items.append(message)
        waiting = len(items)
        if waiting == 1:
            queue.wake()
        if waiting >= queue.limit:
            self._subscriptions.queue_full(queue, message)

    def _auth_ok(self, reply: wire.AuthOk) -> None:
        self.client_id = reply.client_id
        self.producer = reply.producer
        self.floor = reply.floor
        self.limits = reply.limits
        self._advance(reply.head or 0, reply.epoch, self._main_stream)
        if self._auth_replies:
            self._auth_replies.popleft().settle(reply)

    def _auth_error(self, reply: wire.AuthError) -> None:
        if self._auth_replies:
            self._auth_replies.popleft().settle(Refused(reply.code, reply.message, reply.retry_after))

    def _published(self, reply: wire.Published) -> None:
        if reply.seq is not None and reply.seq > self.head:
            self.head = reply.seq
        self._in_flight.handle_published(reply.id, reply.seq)

    def _publish_error(self, reply: wire.PublishError) -> None:
        if reply.code is ErrorCode.CONFLICT and reply.seq is not None:
            reason: Refused = ConflictError(reply.message, reply.seq)
        else:
            reason = Refused(reply.code, reply.message, reply.retry_after)
        self._in_flight.handle_publish_error(reply.id, reason)

    def _subscribed(self, reply: wire.Subscribed, incoming: IncomingStream) -> None:
        # Another stream may already be in a later epoch than the one in which a subscription's own stream begins.
        if reply.epoch is not None and incoming is self._main_stream:
            self._advance(reply.seq, reply.epoch, incoming)
        self._subscriptions.handle_subscribed(reply, incoming)

    def _gap(self, event: wire.Gap, incoming: IncomingStream) -> None:
        if event.epoch != incoming.epoch:
            self._advance(event.last, event.epoch, incoming)
        self._subscriptions.handle_gap(event, incoming)

    def _members(self, page: wire.MemberList, incoming: IncomingStream) -> None:
        if page.pattern is None:
            self._in_flight.handle_reply(page.id, page)
        else:
            self._subscriptions.handle_members(page, incoming)

    def _head(self, event: wire.Head, incoming: IncomingStream) -> None:
        self._advance(event.seq, event.epoch, incoming)
        self._subscriptions.handle_head(event, incoming)

    def _error(self, reply: wire.Error) -> None:
        number = reply.id
        if number is None:
            # Only a history request has no error type of its own, and these are answered in order.
            number = self._in_flight.oldest_history_id()
        reason = Refused(reply.code, reply.message)
        if self._in_flight.handle_reply(number, reason) or self._in_flight.handle_publish_error(number, reason):
            return
        if self._memberships.handle_error(number, reason):
            return
        if self._subscriptions.handle_subscribe_error(wire.SubscribeError("", reply.message, reply.code, number)):
            return
        if reply.code is ErrorCode.BAD_MESSAGE and reply.id is None:
            # The broker could not read a request and cannot name it, and a task may wait for its reply.
            raise PeerError(reply.code, reply.message, CloseCode.BAD_MESSAGE)
        self._report(reply)

    def _goaway(self, event: wire.GoAway) -> None:
        self.goaway = event
        self._report(event)

    def _report(self, event: wire.GoAway | wire.Error) -> None:
        if self._on_event is not None:
            self._on_event(event)

    # Helpers

    def _new_incoming_stream(self, epoch: str) -> IncomingStream:
        framer: JsonSplitter[ServerMessage | None] = JsonSplitter(decode, MAX_OBJECT)
        return IncomingStream(framer.feed, self, epoch)

    def _advance(self, seq: int, epoch: str, incoming: IncomingStream) -> None:
        """Take head and epoch from a stream. The epoch of one stream may be older or newer than that of another."""
        if epoch == self.epoch:
            self.head = max(seq, self.head)
        elif epoch != incoming.epoch:
            self.head, self.epoch = seq, epoch
        incoming.epoch = epoch


_STREAM_HANDLERS: dict[type, Callable[[ProtocolConnection, Any, IncomingStream], object]] = {
    wire.Subscribed: ProtocolConnection._subscribed,
    wire.Revoked: lambda self, reply, incoming: self._subscriptions.handle_revoked(reply, incoming),
    wire.Live: lambda self, event, incoming: self._subscriptions.handle_live(event, incoming),
    wire.Gap: ProtocolConnection._gap,
    wire.Head: ProtocolConnection._head,
    SnapshotPage: lambda self, page, incoming: self._subscriptions.handle_snapshot_page(page, incoming),
    wire.MemberList: ProtocolConnection._members,
    wire.PresenceChange: lambda self, change, incoming: self._subscriptions.handle_presence(change, incoming),
}
"""Handlers of the messages about subscriptions, which arrive on the stream of the subscription."""

_CONNECTION_HANDLERS: dict[type, Callable[[ProtocolConnection, Any], object]] = {
    wire.AuthOk: ProtocolConnection._auth_ok,
    wire.AuthError: ProtocolConnection._auth_error,
    wire.Unsubscribed: lambda self, reply: self._subscriptions.handle_unsubscribed(reply, self),
    wire.SubscribeError: lambda self, reply: self._subscriptions.handle_subscribe_error(reply),
    wire.Published: ProtocolConnection._published,
    wire.PublishError: ProtocolConnection._publish_error,
    Page: lambda self, page: self._in_flight.handle_reply(page.id, page),
    wire.Pong: lambda self, pong: self._in_flight.handle_reply(pong.seq, pong),
    wire.Joined: lambda self, reply: self._memberships.handle_joined(reply),
    wire.Left: lambda self, reply: self._memberships.handle_left(reply),
    wire.GoAway: ProtocolConnection._goaway,
    wire.Error: ProtocolConnection._error,
}
