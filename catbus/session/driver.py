"""The driver of one session: carries out the effects of its state machine, on any transport."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from math import inf
from time import perf_counter

import trio

from ..auth.grants import Grants, Identity, client_of
from ..auth.tokens import token_kind
from ..close_codes import CloseCode
from ..config import LimitSettings
from ..delivery.page_size import MAX_HISTORY, newest_that_fit
from ..delivery.send_queue import SendQueue, TransportWriter
from ..error_codes import ErrorCode
from ..errors import PeerError, Unavailable
from ..limits.unauthenticated import TOO_MUCH, UnauthenticatedPeer
from ..log import EPHEMERAL_SIZE, Rejected
from ..protocol import wire_messages as wire
from ..protocol.wire_messages import ProtocolVersion
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
from .heads import HeadSender
from .hooks import ClientInfo
from .publishing import STOPPING
from .services import SessionServices
from .session_presence import SessionPresence
from .session_subscriptions import SessionSubscriptions
from .state_machine import Session, SessionLimits
from .transport_streams import Streams

MEMBERSHIP_COST = 10
"""Messages of the publish rate that a `join`, a `leave`, and a `subscribe` with `presence` count as: they write to the
database or read from it, and a membership can be announced to many sessions."""


class SessionDriver:
    """Runs one session on any transport. An endpoint feeds it bytes, and sends the contents of its send queues.

    The session has one send queue, and one for each subscription with its own stream.
    """

    def __init__(
        self,
        services: SessionServices,
        writer: TransportWriter,
        transport: str,
        streams: Streams | None,
        network: str,
        session_id: int,
        on_authenticated: Callable[[SessionDriver], None],
        on_ended: Callable[[SessionDriver], None],
    ) -> None:
        """`on_authenticated` is called when the client has sent its first valid token."""
        limits = services.config.limits
        self.transport = transport
        self._session_id = session_id
        self.send_queue = SendQueue(writer, services.flusher.wake, limits.send_queue, services.delivery.budget)
        self.session = Session(
            self.send_queue,
            SessionLimits(
                limits.message_size,
                limits.subscriptions,
                limits.joined_channels,
                limits.auth_timeout,
                # A token that was accepted after its `exp` is valid for the whole leeway.
                max(limits.token_grace, services.config.auth.leeway),
            ),
            trio.current_time(),
            on_settled=self._handle_settled,
            on_error=services.statistics.count_error,
            roles_known=services.permissions.is_known,
            check_publishes=services.hooks.check_publishes,
        )
        self._unauthenticated = UnauthenticatedPeer(services.unauthenticated, self._evict)
        self._services = services
        self.token_kind = ""
        """The kind of its last token, valid or not."""
        self._on_authenticated = on_authenticated
        self._on_ended = on_ended
        self._network = network
        self._pending_limit = limits.pending_publishes
        self._producer = ""
        self.presence = SessionPresence(self.session, services, session_id)
        self.subscriptions = SessionSubscriptions(self.session, services, self.presence, streams)
        self.heads = HeadSender(self.session, services.delivery, services.log)
        self._closing = trio.Event()
        self._deadline = trio.CancelScope()
        self._leave_at = inf
        """When the broker closes an event stream, because it is draining."""
        self._room = trio.Event()
        self._finishing = self._ended = False
        self._publish_rate = services.publish_rates.new(trio.current_time())
        self._uncharged = self._uncharged_bytes = 0
        """Messages, and bytes of their texts, that are not charged to the publish rate yet."""
        self._counted = False
        """Whether it counts among the sessions of its client."""

    @property
    def closing(self) -> tuple[CloseCode, str] | None:
        """Set when the connection is to be closed, after the contents of the send queue."""
        return self.session.closing

    def count_received(self, size: int) -> None:
        """Count bytes from the peer, which are kept in memory until `receive` has processed them."""
        self._unauthenticated.received(size)

    @property
    def authenticated(self) -> bool:
        """Whether the client has sent a valid token."""
        return self.session.identity is not None

    @property
    def info(self) -> ClientInfo:
        """The client, for hooks."""
        identity = self.session.identity
        return ClientInfo(
            None if identity is None else identity.client_id, self.transport, self._network, self._session_id
        )

    @property
    def client(self) -> Hashable:
        """The client of the last valid token, or an object of its own."""
        return self.session.usage.client

    async def receive(self, data: bytes) -> None:
        """Process bytes from the client.

        Waits while the client has too many pending publishes or unread replies, and while its token is verified. Each
        publish is acknowledged within `database.publish_timeout`. Cancelling it drops the rest of the bytes, so the
        connection must be closed afterwards.
        """
        if self._finishing:
            return
        session, send_queue = self.session, self.send_queue
        cpu_scheduler, most, allowance = self._services.cpu_scheduler, self._pending_limit, self._services.log.allowance
        began = perf_counter()
        for effect in session.receive(data):
            if effect is not None:
                await self._perform(effect)
                continue
            # A session without pending publishes would have nothing to wait for.
            while not self._ended and (
                send_queue.full or session.pending >= most or (session.usage.cost >= allowance and session.pending)
            ):
                await self._wait_for_room()
                allowance = self._services.log.allowance
            if perf_counter() - began > cpu_scheduler.slices.peer:
                await self._charge()
                await cpu_scheduler.yield_cpu()
                began, allowance = perf_counter(), self._services.log.allowance
        await self._charge()
        if session.closing is not None:
            self._closing.set()

    def close(self, code: CloseCode, reason: str) -> None:
        """Close the connection after the contents of the send queue."""
        self.session.close(code, reason)
        self._closing.set()

    async def wait_closing(self) -> None:
        """Wait until `closing` is set or the session has ended. Meanwhile check the session's deadlines."""
        while not self._closing.is_set():
            with trio.move_on_at(min(self.session.deadline, self._leave_at)) as self._deadline:
                await self._closing.wait()
            now = trio.current_time()
            self.session.check_deadline(now)
            if now >= self._leave_at:
                self.close(CloseCode.SHUTTING_DOWN, STOPPING)
            if self.session.closing is not None:
                self._closing.set()

    def send_goaway(self) -> None:
        """If the replica is draining, tell the client when to reconnect. The broker closes an event stream then."""
        delay = self._services.reconnect_delay()
        if delay is not None and self.session.identity is not None:
            self.heads.send()
            self.session.send(wire.GoAway(STOPPING, round(delay, 3)))
            if self.session.protocol is ProtocolVersion.EVENTS:
                self._leave_at = self._deadline.deadline = trio.current_time() + delay

    def finish(self) -> None:
        """Process nothing more, and close when all publishes have been acknowledged."""
        self._finishing = True
        self._handle_settled()

    def update_role(self, identity: Identity | None) -> bool:
        """Apply the present permissions of the session's role, or (None) its deletion. Return whether they changed."""
        session = self.session
        if session.closed or session.identity is None:
            return False
        same = identity is not None and identity.client_id == session.identity.client_id
        grants = identity.grants if identity is not None and same else Grants()
        before = session.identity.grants
        if same and grants == before:
            return False
        self._revoke(session.update_grants(grants), before, grants)
        if not same:
            self._close_revoked("the role was deleted" if identity is None else "the role is another client's now")
        return True

    def revoke_token(self) -> None:
        """Deliver nothing more, and close, because the session's token was revoked.

        The subscriptions do not end with `revoked`: a client that has another token resumes them.
        """
        session = self.session
        if not session.closed and session.identity is not None:
            before = session.identity.grants
            self.subscriptions.withdraw(session.update_grants(Grants()))
            self._withdraw_publishes(before, Grants())
            self._close_revoked("the token was revoked")

    def disconnect(self) -> None:
        """Close, because an administrator wants so. The client may connect again."""
        self.close(CloseCode.DISCONNECTED, "an administrator disconnected the client")

    def _close_revoked(self, reason: str) -> None:
        self.session.send(wire.Error(reason, ErrorCode.REVOKED))
        self.close(CloseCode.REVOKED, reason)

    def end(self) -> None:
        """End the session, because its connection has ended. Call it once or more."""
        self._ended = True
        self._on_ended(self)
        self._services.permissions.remove(self)
        self._services.revocations.remove(self)
        if self._counted:
            self._counted = False
            self._services.client_usages.remove_session(self.session.usage)
        self.subscriptions.close()
        self.presence.close()
        self.session.abandon()
        self.send_queue.close()
        self._room.set()
        self._closing.set()
        self._unauthenticated.release()

    def _evict(self) -> None:
        """Close, because other unauthenticated peers need the memory of this one."""
        self.session.reject_token(PeerError(ErrorCode.OVERLOADED, TOO_MUCH, CloseCode.OVERLOADED))
        self._closing.set()

    def _handle_hook_failed(self) -> None:
        self.close(CloseCode.INTERNAL, "the application that serves this session failed")

    def _handle_settled(self) -> None:
        self._room.set()
        if self._finishing and not self.session.pending:
            self.close(CloseCode.SHUTTING_DOWN, STOPPING)

    async def _wait_for_room(self) -> None:
        self._room = trio.Event()
        self._services.statistics.read_pauses["replies" if self.send_queue.full else "publishes"] += 1
        if self.send_queue.full:
            self.send_queue.when_emptied(self._room.set)
        await self._room.wait()

    # One method per effect

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case AppendMessage():
                self._uncharged += 1
                self._uncharged_bytes += effect.append.size
                self._services.publisher.submit(effect.append, effect.epoch)
            case BroadcastMessage():
                self._uncharged += 1
                self._uncharged_bytes += len(effect.channel) + len(effect.payload)
                self._services.publisher.broadcast(effect)
            case StartSubscription():
                self._uncharged += MEMBERSHIP_COST if effect.request.presence else 0
                await self.subscriptions.wait_until_read(effect.request.pattern)
                self.subscriptions.subscribe(effect.request)
            case EndSubscription():
                await self.subscriptions.wait_until_read(effect.request.pattern)
                self.subscriptions.unsubscribe(effect.request)
            case CheckPublish():
                await self._check_publish(effect)
            case SendHeads():
                self.heads.send()
            case VerifyToken():
                try:
                    await self._authenticate(effect.token, effect.producer)
                except PeerError as error:
                    if not self.session.closed:
                        self.session.reject_token(error)
            case ReadHistory():
                await self._send_history(effect.request)
            case JoinChannel():
                self._uncharged += MEMBERSHIP_COST
                self.presence.join(effect.request, effect.info)
            case LeaveChannel():
                self._uncharged += MEMBERSHIP_COST
                self.presence.leave(effect.request.channel, effect.request.id)
            case ReadMembers():
                self._uncharged += 1 + await self.presence.send_members(effect.request)

    async def _charge(self) -> None:
        """Charge the client's publish rate, and wait while it is exceeded."""
        if self._uncharged:
            wait = self._publish_rate.spend(self._uncharged, self._uncharged_bytes, trio.current_time())
            self._uncharged = self._uncharged_bytes = 0
            if wait > 0:
                self._services.statistics.read_pauses["rate"] += 1
                await trio.sleep(wait)

    async def _check_publish(self, effect: CheckPublish) -> None:
        try:
            effect.replaced = await self._services.hooks.check_publish(effect.message, self.info)
        except PeerError as error:
            effect.rejection = error
            self._uncharged += 1

    async def _authenticate(self, token: str, claimed_producer: str | None = None) -> None:
        """Verify a token and accept its identity. Raises `PeerError`."""
        services, session = self._services, self.session
        authentication = services.authentication
        self.token_kind = token_kind(token)
        if not services.log.epoch:
            raise PeerError(ErrorCode.UNAVAILABLE, "the database has not been reached yet", CloseCode.UNAVAILABLE)
        changes = services.permissions.changes
        identity = await authentication.verify(token, self._network, self.transport)
        if session.identity is None and not session.closed:
            client = replace(self.info, client_id=identity.client_id)
            await services.hooks.enter_session(client, self._closing, self._handle_hook_failed)
        if session.closed:
            # Meanwhile its deadline has passed, its connection has ended, or the replica has stopped.
            raise PeerError(ErrorCode.UNAVAILABLE, "the session was closed while its token was verified")
        usage = session.usage
        if not self._counted:
            usage = services.client_usages.add_session(client_of(identity, token, self._network))
            self._counted = True
        rates = identity.publish_rate, identity.publish_bytes
        self._publish_rate = services.publish_rates.get(usage.client, trio.current_time(), *rates)
        subject = identity.client_id or ""
        if not self._producer:
            self._producer = authentication.resume_producer(claimed_producer, subject)
        producer = authentication.producer_key(self._producer, subject) or session.producer
        reply = wire.AuthOk(
            identity.client_id,
            producer=self._producer,
            epoch=services.log.epoch,
            head=services.delivery.position,
            floor=services.log.floor,
            limits=client_limits(services.config.limits),
        )
        new = session.identity is None
        before = Grants() if session.identity is None else session.identity.grants
        revoked = session.accept_token(identity, reply, producer, trio.current_time(), time.time(), usage)
        if identity.admin:
            self.token_kind = "admin key"
        if new:
            self._on_authenticated(self)
            self.presence.announce(self.transport, self._network)
        self._unauthenticated.release()
        self._deadline.deadline = session.deadline
        services.permissions.add(self, identity.role, changes)
        services.revocations.add(self, identity.client_id, identity.issued)
        self._revoke(revoked, before, identity.grants)
        self.send_goaway()

    async def open_event_stream(
        self,
        token: str,
        patterns: Collection[str],
        since: int | None,
        epoch: str | None,
        *,
        retained: bool = False,
        presence: bool = False,
    ) -> None:
        """Authenticate the client of an event stream, and subscribe to all its patterns. Raises `PeerError`.

        All that this client requests is in the head of its HTTP request, so it gets no replies, and an error ends it.
        """
        session = self.session
        session.protocol = ProtocolVersion.EVENTS
        try:
            await self._authenticate(token)
            self.subscriptions.subscribe_event_stream(patterns, since, epoch, retained=retained, presence=presence)
        except PeerError as error:
            # The client has it from the HTTP response. The log and session events have it from here.
            session.close(error.close or CloseCode.BAD_MESSAGE, error.message)
            raise
        if since is None:
            self.heads.send()

    def _revoke(self, patterns: Sequence[str], before: Grants, grants: Grants) -> None:
        """End these subscriptions, and withdraw the pending publishes that the new grants do not allow."""
        self._withdraw_publishes(before, grants)
        self.presence.revoke()
        ended = self.subscriptions.revoke(patterns)
        if ended and not self.session.subscriptions and self.session.protocol is ProtocolVersion.EVENTS:
            self.close(CloseCode.REVOKED, "the permission for each pattern was withdrawn")

    def _withdraw_publishes(self, before: Grants, grants: Grants) -> None:
        session = self.session
        if session.pending and grants.write != before.write:
            rejection = Rejected(ErrorCode.UNAUTHORIZED, "no write grant covers this channel any more")
            self._services.log.withdraw(
                session.usage.client,
                lambda append: append.owner is session and not grants.may_write(append.channel),
                rejection,
            )

    async def _send_history(self, request: wire.History) -> None:
        limit = min(request.limit, MAX_HISTORY)
        try:
            entries, more = await self._services.log.history(request.pattern, before=request.before, limit=limit)
        except Unavailable as error:
            self.session.reject_request(request, PeerError(ErrorCode.UNAVAILABLE, str(error)))
            return
        kept = newest_that_fit(entries)
        self.session.send_history(request, kept, more or len(kept) < len(entries))
        self._services.delivery.note_history(self.send_queue)


def client_limits(limits: LimitSettings) -> dict[str, int]:
    """Return the limits that `auth_ok` names."""
    return {
        "message_size": limits.message_size,
        "subscriptions": limits.subscriptions,
        "pending_publishes": limits.pending_publishes,
        "history": MAX_HISTORY,
        "ephemeral_size": EPHEMERAL_SIZE,
        "joined_channels": limits.joined_channels,
    }
