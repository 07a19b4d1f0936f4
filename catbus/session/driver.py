"""One connected client, whatever its transport: the hands that carry out what its session asks for."""

from __future__ import annotations

import random
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Protocol

import trio

from ..auth.grants import Grants, Identity, client_of
from ..config import LimitSettings
from ..delivery.send_queue import OVERHEAD, SendQueue, TransportWriter
from ..delivery.subscription import Subscription
from ..errors import CloseCode, ErrorCode, PeerError, Unavailable
from ..limits.unauthenticated import TOO_MUCH, UnauthenticatedPeer
from ..log import EPHEMERAL_SIZE, Rejected
from ..protocol import wire_messages as wire
from ..protocol.wire_messages import ProtocolVersion
from .publishing import STOPPING
from .services import SessionServices
from .state_machine import (
    AppendMessage,
    BroadcastMessage,
    Effect,
    EndSubscription,
    ReadHistory,
    SendHeads,
    Session,
    SessionLimits,
    StartSubscription,
    VerifyToken,
)

MAX_HISTORY = 1000
"""Messages in one page of `history` at the most."""

MAX_HISTORY_BYTES = 1 << 20
"""And about so many bytes, but for a single message."""

QUIET = 15.0
"""Seconds without anything sent, after which a client is told how far its subscriptions are complete."""


class Streams(Protocol):
    """What a transport can do that has more than one stream, and datagrams."""

    def open_stream(self, on_stopped: Callable[[SendQueue], None]) -> SendQueue | None:
        """A send queue whose content goes over a stream of its own; None when the peer allows no more of them.

        `on_stopped` is called with it when the peer does not want the rest, or has taken nothing of it for too long.
        Then nothing of it is sent any more.
        """

    def end_stream(self, send_queue: SendQueue) -> None:
        """End that stream after what the send queue holds. Nothing is put into it any more."""

    def send_datagram(self, data: bytes) -> bool:
        """Send a datagram, at most once; False when it is too large for one."""


class SessionDriver:
    """One connected client, whatever the transport. Its endpoint feeds it bytes and sends what its send queues hold.

    There is one send queue for the session, and one for each subscription that has a stream of its own.
    """

    def __init__(
        self,
        services: SessionServices,
        writer: TransportWriter,
        transport: str,
        streams: Streams | None,
        network: str,
        on_left: Callable[[SessionDriver], None],
    ) -> None:
        limits = services.config.limits
        self.transport = transport
        self.send_queue = SendQueue(writer, services.flusher.wake, limits.send_queue, services.delivery.budget)
        self.session = Session(
            self.send_queue,
            SessionLimits(
                limits.message_size,
                limits.subscriptions,
                limits.auth_timeout,
                # A token that was taken after its `exp` is good for the whole of the leeway.
                max(limits.token_grace, services.config.auth.leeway),
            ),
            trio.current_time(),
            on_settled=self._settled,
            on_error=services.statistics.count_error,
            roles_known=services.permissions.is_known,
        )
        self._unauthenticated = UnauthenticatedPeer(services.unauthenticated, self._give_way)
        self._services = services
        self._on_left = on_left
        self._streams = streams
        self._network = network
        self._pending_limit = limits.pending_publishes
        self._subscriptions: dict[str, Subscription] = {}
        self._producer = ""
        self._marked = 0
        self._next_mark = trio.current_time() + random.uniform(0, QUIET)  # noqa: S311 (no secret)
        self._closing = trio.Event()
        self._alarm = trio.CancelScope()
        self._room = trio.Event()
        self._finishing = self._left = False
        self._quota = services.quotas.new(trio.current_time())
        self._published = self._published_bytes = 0
        """Messages, and bytes of their texts, that its quota has yet to pay for."""
        self._counted = False
        """Whether it counts among the sessions of its client."""

    @property
    def closing(self) -> tuple[CloseCode, str] | None:
        """Set when the connection is to be closed, once the send queue has been sent."""
        return self.session.closing

    def heard(self, size: int) -> None:
        """The peer has sent so many bytes, which are kept until `receive` has understood them."""
        self._unauthenticated.received(size)

    @property
    def proven(self) -> bool:
        """Whether it has shown a token that was good."""
        return self.session.identity is not None

    async def receive(self, data: bytes) -> None:
        """Take more bytes and do what they ask for.

        Waits while the client has too many publishes on their way or too many replies unread, and while its token is
        looked up; an answer to each publish is owed within `database.publish_timeout`, which bounds the first.
        Cancelling it drops what was not yet understood: the connection must be closed then.
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
            while not self._left and (
                send_queue.full or session.pending >= most or (session.usage.cost >= allowance and session.pending)
            ):
                await self._wait_for_room()
                allowance = self._services.log.allowance
            if perf_counter() - began > cpu_scheduler.slices.peer:
                await self._pay()
                await cpu_scheduler.yield_cpu()
                began, allowance = perf_counter(), self._services.log.allowance
        await self._pay()
        if session.closing is not None:
            self._closing.set()

    def close(self, code: CloseCode, reason: str) -> None:
        """Have the connection closed once the send queue has been sent."""
        self.session.close(code, reason)
        self._closing.set()

    async def wait_closing(self) -> None:
        """Wait until `closing` is set or the client has left, and see meanwhile that it keeps its deadlines."""
        while not self._closing.is_set():
            with trio.move_on_at(self.session.deadline) as self._alarm:
                await self._closing.wait()
            self.session.tick(trio.current_time())
            if self.session.closing is not None:
                self._closing.set()

    def send_goaway(self) -> None:
        """Say that the replica is stopping, if it is, and when to come back."""
        delay = self._services.reconnect_delay()
        if delay is not None and self.session.identity is not None:
            self._say_heads()
            self.session.say(wire.GoAway(STOPPING, round(delay, 3)))

    def send_due_head(self, now: float) -> None:
        """Say how far its subscriptions are complete, where it has heard nothing else for a while."""
        if now >= self._next_mark:
            self._next_mark = now + QUIET
            self._say_heads(now - QUIET)

    def finish(self) -> None:
        """Take nothing more, and close when all publishes have been answered."""
        self._finishing = True
        self._settled()

    def update_role(self, identity: Identity | None) -> None:
        """The role that the token stands for is this now, or is no more: what it may not any more ends at once."""
        session = self.session
        if session.closed or session.identity is None:
            return
        same = identity is not None and identity.client_id == session.identity.client_id
        grants = identity.grants if identity is not None and same else Grants()
        before = session.identity.grants
        if same and grants == before:
            return
        self._withdraw(session.regrant(grants), before, grants)
        if not same:
            reason = "the role was deleted" if identity is None else "the role is another client's now"
            session.say(wire.Error(reason, ErrorCode.REVOKED))
            self.close(CloseCode.REVOKED, reason)

    def leave(self) -> None:
        """The connection is gone."""
        self._on_left(self)
        self._services.permissions.remove(self)
        if self._counted:
            self._counted = False
            self._services.usages.remove_session(self.session.usage)
        for pattern, subscription in self._subscriptions.items():
            self._services.delivery.unsubscribe(subscription, pattern)
            subscription.send_queue.close()
        self._count_subscriptions(-len(self._subscriptions))
        self._subscriptions.clear()
        self._left = True
        self.session.abandon()
        self.send_queue.close()
        self._room.set()
        self._closing.set()
        self._unauthenticated.release()

    def _give_way(self) -> None:
        """Others that have shown no token need the memory that is kept for this one."""
        self.session.refuse(PeerError(ErrorCode.OVERLOADED, TOO_MUCH, CloseCode.OVERLOADED))
        self._closing.set()

    def _settled(self) -> None:
        self._room.set()
        if self._finishing and not self.session.pending:
            self.close(CloseCode.SHUTTING_DOWN, STOPPING)

    async def _wait_for_room(self) -> None:
        self._room = trio.Event()
        self._services.statistics.read_pauses["replies" if self.send_queue.full else "publishes"] += 1
        if self.send_queue.full:
            self.send_queue.when_emptied(self._room.set)
        await self._room.wait()

    # One method an effect

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case AppendMessage():
                self._published += 1
                self._published_bytes += effect.append.size
                self._services.publisher.submit(effect.append, effect.epoch)
            case BroadcastMessage():
                self._published += 1
                self._published_bytes += len(effect.channel) + len(effect.payload)
                self._services.publisher.broadcast(effect)
            case StartSubscription():
                await self._wait_until_read(effect.request.pattern)
                self._join(effect.request)
            case EndSubscription():
                await self._wait_until_read(effect.request.pattern)
                self._leave(effect.request)
            case SendHeads():
                self._say_heads()
            case VerifyToken():
                await self._authenticate(effect)
            case ReadHistory():
                await self._recall(effect.request)

    async def _wait_until_read(self, pattern: str) -> None:
        """Wait until what is said of `pattern` does not make messages stay in memory that the client does not read.

        That is so once those of all clients are too many.
        """
        held = self._subscriptions.get(pattern)
        for send_queue in (self.send_queue,) if held is None else (self.send_queue, held.send_queue):
            while send_queue.to_be_emptied:
                emptied = trio.Event()
                send_queue.when_emptied(emptied.set)
                await emptied.wait()

    async def _pay(self) -> None:
        """Spend of the client's quota what it has published; wait where it has used that up."""
        if self._published:
            wait = self._quota.spend(self._published, self._published_bytes, trio.current_time())
            self._published = self._published_bytes = 0
            if wait > 0:
                self._services.statistics.read_pauses["rate"] += 1
                await trio.sleep(wait)

    async def _authenticate(self, effect: VerifyToken) -> None:
        services, session = self._services, self.session
        authentication = services.authentication
        try:
            if not services.log.epoch:
                raise PeerError(ErrorCode.UNAVAILABLE, "the database has not been reached yet", CloseCode.UNAVAILABLE)
            changes = services.permissions.changes
            identity = await authentication.verify(effect.token, self._network)
            if session.closed:
                return  # Its time was over meanwhile, or it has left, or this replica has stopped.
            usage = session.usage
            if not self._counted:
                usage = services.usages.add_session(client_of(identity, effect.token, self._network))
                self._counted = True
            rates = identity.publish_rate, identity.publish_bytes
            self._quota = services.quotas.get(usage.client, trio.current_time(), *rates)
            subject = identity.client_id or ""
            if not self._producer:
                self._producer = authentication.resume_producer(effect.producer, subject)
            producer = authentication.producer_key(self._producer, subject) or session.producer
            reply = wire.AuthOk(
                identity.client_id,
                producer=self._producer,
                epoch=services.log.epoch,
                head=services.delivery.position,
                floor=services.log.floor,
                limits=client_limits(services.config.limits),
            )
            before = Grants() if session.identity is None else session.identity.grants
            withdrawn = session.admit(identity, reply, producer, trio.current_time(), time.time(), usage)
        except PeerError as error:
            if not session.closed:
                session.refuse(error)
            return
        self._unauthenticated.release()
        self._alarm.deadline = session.deadline
        services.permissions.add(self, identity.role, changes)
        self._withdraw(withdrawn, before, identity.grants)
        self.send_goaway()

    def _join(self, request: wire.Subscribe) -> None:
        delivery, session, streams = self._services.delivery, self.session, self._streams
        pattern = request.pattern
        held = self._take_out(pattern)
        if held is not None:
            self._end_stream(held)
        else:
            try:
                self._services.usages.check_subscriptions(session.usage)
            except PeerError as error:
                session.refuse_request(request, error)
                return
        own = streams.open_stream(partial(self._stopped, pattern)) if streams is not None and request.stream else None
        session.joined(request, delivery.position, self._services.log.epoch, own)
        subscription = (
            next(iter(self._subscriptions.values()), None) if session.protocol is ProtocolVersion.FIRST else None
        )
        if subscription is None:
            subscription = Subscription(
                self.send_queue if own is None else own,
                session.producer,
                streams.send_datagram if streams is not None and request.datagrams else None,
            )
        self._subscriptions[pattern] = subscription
        self._count_subscriptions(1)
        delivery.subscribe(subscription, pattern, request.since, request.epoch)

    def _leave(self, request: wire.Unsubscribe) -> None:
        subscription = self._take_out(request.pattern)
        own = None if subscription is None else subscription.send_queue
        self.session.left(request, self._services.delivery.position, own)
        if subscription is not None:
            self._end_stream(subscription)

    def _withdraw(self, patterns: Sequence[str], before: Grants, grants: Grants) -> None:
        """End these subscriptions, and take back what is still to be published and may not be."""
        session = self.session
        ended = {pattern: subscription for pattern in patterns if (subscription := self._take_out(pattern)) is not None}
        gone: dict[SendQueue, set[str]] = {}
        for pattern, subscription in ended.items():
            gone.setdefault(subscription.send_queue, set()).add(pattern)
        for subscription in dict.fromkeys(ended.values()):
            if (some := gone.pop(subscription.send_queue, None)) is not None:
                subscription.send_queue.revoke(some, subscription.patterns)
        for pattern, subscription in ended.items():
            session.revoked(pattern, self._services.delivery.position, subscription.send_queue)
            self._end_stream(subscription)
        if session.pending and grants.write != before.write:
            refusal = Rejected(ErrorCode.UNAUTHORIZED, "no write grant covers this channel any more")
            self._services.log.withdraw(
                session.usage.client,
                lambda append: append.owner is session and not grants.may_write(append.channel),
                refusal,
            )

    def _stopped(self, pattern: str, own: SendQueue) -> None:
        """A subscription's own stream was stopped by the peer, or given up as unread; the subscription ends with it."""
        if pattern in self._subscriptions and self._subscriptions[pattern].send_queue is own:
            self._take_out(pattern)
            self.session.left(wire.Unsubscribe(pattern), self._services.delivery.position)

    def _take_out(self, pattern: str) -> Subscription | None:
        """Deliver nothing more for a pattern, if it is held."""
        subscription = self._subscriptions.pop(pattern, None)
        if subscription is not None:
            self._services.delivery.unsubscribe(subscription, pattern)
            self._count_subscriptions(-1)
        return subscription

    def _count_subscriptions(self, number: int) -> None:
        self._services.usages.add_subscriptions(self.session.usage, number)

    def _end_stream(self, subscription: Subscription) -> None:
        if subscription.send_queue is not self.send_queue and self._streams is not None:
            self._streams.end_stream(subscription.send_queue)

    def _say_heads(self, quiet_since: float | None = None) -> None:
        """Say on each stream up to where all subscriptions on it are complete, unless one of them is late.

        With `quiet_since` only where nothing has been sent from then on, and that is news to somebody.
        """
        if self.session.identity is None:
            return
        delivery, send_queue = self._services.delivery, self.send_queue
        head = wire.Head(delivery.position, self._services.log.epoch, delivery.at)
        lagging = held = False
        for subscription in self._subscriptions.values():
            own = subscription.send_queue
            if own is send_queue:
                held, lagging = True, lagging or subscription.lagging
            elif not (subscription.lagging or own.full or subscription.head_sent == head.seq) and _is_quiet(
                own, quiet_since
            ):
                subscription.head_sent = head.seq
                self.session.say(head, own)
        news = quiet_since is None or (held and self._marked != head.seq and _is_quiet(send_queue, quiet_since))
        if news and not lagging:
            self._marked = head.seq
            self.session.say(head)

    async def _recall(self, request: wire.History) -> None:
        limit = min(request.limit, MAX_HISTORY)
        try:
            entries, more = await self._services.log.history(request.pattern, before=request.before, limit=limit)
        except Unavailable as error:
            self.session.refuse_request(request, PeerError(ErrorCode.UNAVAILABLE, str(error)))
            return
        # The newest that fit, and always one: a page is held in memory, here and by the client, as one object.
        sizes = list(accumulate(entry.size + OVERHEAD for entry in reversed(entries)))
        kept = entries[-max(1, bisect_right(sizes, MAX_HISTORY_BYTES)) :]
        self.session.recalled(request, kept, more or len(kept) < len(entries))


def client_limits(limits: LimitSettings) -> dict[str, int]:
    """Return the limits that `auth_ok` names."""
    return {
        "message_size": limits.message_size,
        "subscriptions": limits.subscriptions,
        "pending_publishes": limits.pending_publishes,
        "history": MAX_HISTORY,
        "ephemeral_size": EPHEMERAL_SIZE,
    }


def _is_quiet(send_queue: SendQueue, since: float | None) -> bool:
    """Whether it is empty, and was last flushed before then. Anything is quiet where there is no time to compare."""
    return since is None or (not send_queue and send_queue.rests_until < since)
