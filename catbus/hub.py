"""What the sessions of one replica share, and the hands that carry out what each of them asks for."""

from __future__ import annotations

import os
import random
import socket
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Any
from typing import Protocol as Interface

import trio

from . import wire
from .auth import Authenticator, Grants, Identity, RoleSource, role_key
from .certificates import CertificateSource
from .config import Config
from .delivery import Delivery
from .errors import CloseCode, Code, PeerError, Unavailable
from .flush import Flusher
from .log import EPHEMERAL_SIZE, Append, Entry, Log, Outcome, Rejected, not_taken
from .mailbox import OVERHEAD, Budget, Mailbox, Outlet
from .permissions import Permissions
from .release import version
from .session import (
    Authenticate,
    Broadcast,
    Effect,
    Join,
    Leave,
    Measure,
    Recall,
    Session,
    SessionLimits,
    Submit,
    make_append,
)
from .subscription import Subscription
from .vitals import Vitals
from .wire import Protocol

STOPPING = "the replica is stopping"

TRANSPORTS = "websocket", "webtransport"

MAX_HISTORY = 1000
"""Messages in one page of `history` at the most."""

MAX_HISTORY_BYTES = 1 << 20
"""And about so many bytes, but for a single message."""

QUIET = 15.0
"""Seconds without anything sent, after which a client is told how far its subscriptions are complete."""
MARKED_AT_A_TIME = 500

SPREAD = 0.8
"""Over which part of the time that is left clients are sent away: the last of them need some to move in."""

TURN = 0.002
"""Seconds that one client is served in one go while others wait; a `ping` looks at all of its subscriptions."""


@dataclass(frozen=True, slots=True)
class HubStatistics:
    """`clients`: who is connected, by transport, and `opened`: how many have come so far.

    `published` counts publishes taken from sessions and over HTTP, whatever became of them.
    """

    clients: Mapping[str, int]
    opened: Mapping[str, int]
    published: int


class Hub:
    """The middle of a replica: log, delivery and flusher, and who is connected. Belongs to one Trio thread.

    Without `roles`, role tokens are refused.
    """

    def __init__(
        self,
        config: Config,
        log: Log,
        authenticator: Authenticator,
        certificates: CertificateSource | None = None,
        roles: RoleSource | None = None,
    ) -> None:
        self.config = config
        self.log = log
        self.authenticator = authenticator
        self.certificates = certificates
        """Where there is WebTransport, or TLS on the WebSocket port."""
        self.webtransport_port: int | None = None
        self.flusher = Flusher()
        self.delivery = Delivery(log, Budget(config.limits.mailbox_total))
        self.vitals = Vitals(self.delivery)
        self.flusher.on_pass = self.vitals.flushed
        self.scrape: Callable[[], tuple[bytes, str]] | None = None
        """What is counted and measured, as Prometheus reads it, and its content type; once the doors are open."""
        self.draining = False
        self.clients: set[Client] = set()
        self.permissions = Permissions(roles)
        self._roles = roles
        self._departure: float | None = None
        self._closed = False
        self._left = trio.lowlevel.ParkingLot()
        self._published = 0
        self._clients = Counter(dict.fromkeys(TRANSPORTS, 0))
        self._opened = Counter(self._clients)
        self._started = time.time_ns() // 1_000_000

    def statistics(self) -> HubStatistics:
        return HubStatistics(dict(self._clients), dict(self._opened), self._published)

    def describe(self) -> dict[str, Any]:
        """How this replica is, in a few words that the others pass on."""
        delivery = self.delivery.statistics()
        return {
            "name": socket.gethostname(),
            "pid": os.getpid(),
            "version": version(),
            "started": self._started,
            "state": self.readiness,
            "clients": len(self.clients),
            "applied": self.log.applied,
            "late": delivery.late,
            "lag": delivery.lag,
        }

    def report(self) -> dict[str, object]:
        """How this replica is, and its log, for whoever runs it, as it is written in JSON."""
        log = self.log
        return {
            **self.describe(),
            "epoch": log.epoch,
            "head": log.applied,
            "floor": log.floor,
            "log": log.report(),
        }

    @property
    def readiness(self) -> str:
        """`starting` until the log has been read for the first time, then `ready` or `degraded`; `draining` at the end.

        `degraded` means that the log is out of reach: sessions stay, publishes wait.
        """
        if self.draining:
            return "draining"
        if not self.log.epoch:
            return "starting"
        return "ready" if self.log.available else "degraded"

    def open_client(self, outlet: Outlet, *, transport: str, streams: Streams | None = None) -> Client:
        """A new connection. Its owner calls `leave` in the end, whatever happens."""
        client = Client(self, outlet, transport, streams)
        self.clients.add(client)
        self._clients[transport] += 1
        self._opened[transport] += 1
        if self._closed:
            client.finish()
        return client

    def forget_client(self, client: Client) -> None:
        if client in self.clients:
            self.clients.remove(client)
            self._clients[client.transport] -= 1
        self._left.unpark_all()

    async def authenticate(self, token: str) -> Identity:
        """Who bears the token; raises `PeerError` that closes. A role's is waited for, for seconds at the most."""
        key = role_key(token)
        if key is None or self._roles is None:
            return self.authenticator.verify(token, time.time())
        try:
            identity = (await self._roles.find([key])).get(key)
        except Unavailable as error:
            raise PeerError(Code.UNAVAILABLE, str(error), CloseCode.UNAVAILABLE) from None
        if identity is None:
            raise PeerError(Code.UNAUTHENTICATED, "no role has this token", CloseCode.UNAUTHENTICATED)
        return identity

    async def publish(
        self, identity: Identity, requests: Sequence[wire.Publish], producer: bytes = b""
    ) -> list[Outcome | None]:
        """Publish for somebody who has no session; answers in the order of the requests, None for an ephemeral one.

        With `producer`, the same requests may be published again and are recognised by their places. Cancelling it
        leaves open which of them are committed.
        """
        outcomes: dict[int, Outcome | None] = {}
        done = trio.Event()

        def settle(index: int, _: Append, outcome: Outcome) -> None:
            outcomes[index] = outcome
            if len(outcomes) == len(requests):
                done.set()

        for index, request in enumerate(requests):
            request.id, request.retry = index, False
            try:
                append = make_append(request, identity, producer, partial(settle, index))
            except PeerError as error:
                outcomes[index] = Rejected(error.code, error.message)
                continue
            if request.ephemeral:
                self.broadcast(Broadcast(append.channel, append.payload, append.sender, None))
                outcomes[index] = None
            else:
                self.submit(append)
        if len(outcomes) < len(requests):
            await done.wait()
        return [outcomes[index] for index in range(len(requests))]

    def submit(self, append: Append, epoch: str | None = None) -> None:
        """Append to the log, unless it is a retry from an epoch of which nothing can be known."""
        self._published += 1
        if self._closed:
            append.settle(append, not_taken(append, Rejected(Code.SHUTTING_DOWN, STOPPING)))
        elif epoch is not None and epoch != self.log.epoch:
            append.settle(append, Rejected(Code.UNKNOWN, "first sent in another epoch of the log"))
        else:
            self.log.submit(append)

    def broadcast(self, message: Broadcast) -> None:
        """Pass an ephemeral message on to the sessions of this replica, and to the other replicas."""
        self._published += 1
        at = time.time_ns() // 1_000_000
        entry = Entry(0, at, message.channel, message.payload, message.sender, message.origin)
        self.delivery.broadcast(entry)
        self.log.broadcast(entry)

    def limits(self) -> dict[str, int]:
        """The limits that a client is told of, by name."""
        limits = self.config.limits
        return {
            "message_size": limits.message_size,
            "subscriptions": limits.subscriptions,
            "pending_publishes": limits.pending_publishes,
            "history": MAX_HISTORY,
            "ephemeral_size": EPHEMERAL_SIZE,
        }

    @property
    def reconnect_in(self) -> float | None:
        """When a client should come back, to another replica: seconds, at random; None while it may stay."""
        if self._departure is None:
            return None
        left = max(0.0, self._departure - trio.current_time())
        return random.uniform(0, SPREAD * left)  # noqa: S311 (no secret)

    async def mark_time(self) -> None:
        """Say to whoever hears nothing how far it has got, for ever: else retention would overtake its cursors."""
        while True:
            await trio.sleep(1)
            now = trio.current_time()
            for index, client in enumerate(tuple(self.clients)):
                if index % MARKED_AT_A_TIME == 0:
                    await trio.lowlevel.checkpoint()
                client.mark_time(now)

    async def send_away(self) -> None:
        """Be not ready for a while, then tell every client to leave, and give all of them the time to."""
        settings = self.config.drain
        self.draining = True
        await trio.sleep(settings.delay)
        self._departure = trio.current_time() + settings.window
        for client in list(self.clients):
            client.send_away()
        with trio.move_on_at(self._departure):
            while self.clients:
                await self._left.park()

    def finish(self) -> None:
        """Take no more publishes, and close every client once those that it has sent have been answered."""
        self._closed = True
        for client in list(self.clients):
            client.finish()


class Streams(Interface):
    """What a transport can do that has more than one stream, and datagrams."""

    def open_stream(self, on_stopped: Callable[[Mailbox], None]) -> Mailbox | None:
        """A mailbox whose content goes over a stream of its own; None when the peer allows no more of them.

        `on_stopped` is called with it when the peer does not want the rest. Then nothing of it is sent any more.
        """

    def end_stream(self, mailbox: Mailbox) -> None:
        """End that stream after what the mailbox holds. Nothing is put into it any more."""

    def send_datagram(self, data: bytes) -> bool:
        """Send a datagram, at most once; False when it is too large for one."""


class Client:
    """One connected client, whatever the transport. Its endpoint feeds it bytes and sends what its mailboxes hold.

    There is one mailbox for the session, and one for each subscription that has a stream of its own.
    """

    def __init__(self, hub: Hub, outlet: Outlet, transport: str, streams: Streams | None) -> None:
        limits = hub.config.limits
        self.transport = transport
        self.mailbox = Mailbox(outlet, hub.flusher.wake, limits.mailbox, hub.delivery.budget)
        self.session = Session(
            self.mailbox,
            SessionLimits(limits.message_size, limits.subscriptions, limits.auth_timeout, limits.token_grace),
            trio.current_time(),
        )
        self.session.on_settled = self._settled
        self.session.on_refused = hub.vitals.refused
        self.session.roles_known = lambda: hub.permissions.known
        self._hub = hub
        self._streams = streams
        self._pending_limit = limits.pending_publishes
        self._subscriptions: dict[str, Subscription] = {}
        self._producer = ""
        self._marked = 0
        self._next_mark = trio.current_time() + random.uniform(0, QUIET)  # noqa: S311 (no secret)
        self._closing = trio.Event()
        self._alarm = trio.CancelScope()
        self._room = trio.Event()
        self._finishing = False

    @property
    def closing(self) -> tuple[CloseCode, str] | None:
        """Set when the connection is to be closed, once the mailbox has been sent."""
        return self.session.closing

    async def receive(self, data: bytes) -> None:
        """Take more bytes and do what they ask for.

        Waits while the client has too many publishes on their way or too many replies unread, and while its token is
        looked up; an answer to each publish is owed within `database.publish_timeout`, which bounds the first.
        Cancelling it drops what was not yet understood: the connection must be closed then.
        """
        if self._finishing:
            return
        began = perf_counter()
        for effect in self.session.receive(data):
            if effect is not None:
                await self._perform(effect)
                continue
            while self.session.pending >= self._pending_limit or self.mailbox.full:
                await self._wait_for_room()
            if perf_counter() - began > TURN:
                await trio.lowlevel.checkpoint()
                began = perf_counter()
        if self.session.closing is not None:
            self._closing.set()

    def close(self, code: CloseCode, reason: str) -> None:
        """Have the connection closed once the mailbox has been sent."""
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

    def send_away(self) -> None:
        """Say that the replica is stopping, if it is, and when to come back."""
        reconnect_in = self._hub.reconnect_in
        if reconnect_in is not None and self.session.identity is not None:
            self._say_heads()
            self.session.say(wire.GoAway(STOPPING, round(reconnect_in, 3)))

    def mark_time(self, now: float) -> None:
        """Say how far its subscriptions are complete, where it has heard nothing else for a while."""
        if now >= self._next_mark:
            self._next_mark = now + QUIET
            self._say_heads(now - QUIET)

    def finish(self) -> None:
        """Take nothing more, and close when all publishes have been answered."""
        self._finishing = True
        self._settled()

    def regrant(self, identity: Identity | None) -> None:
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
            session.say(wire.Error(reason, Code.REVOKED))
            self.close(CloseCode.REVOKED, reason)

    def leave(self) -> None:
        """The connection is gone."""
        self._hub.forget_client(self)
        self._hub.permissions.release(self)
        for pattern, subscription in self._subscriptions.items():
            self._hub.delivery.unsubscribe(subscription, pattern)
            subscription.mailbox.close()
        self._subscriptions.clear()
        self.session.abandon()
        self.mailbox.close()
        self._closing.set()

    def _settled(self) -> None:
        self._room.set()
        if self._finishing and not self.session.pending:
            self.close(CloseCode.SHUTTING_DOWN, STOPPING)

    async def _wait_for_room(self) -> None:
        self._room = trio.Event()
        if self.mailbox.full:
            self.mailbox.when_emptied(self._room.set)
        await self._room.wait()

    # One method an effect

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case Submit():
                self._hub.submit(effect.append, effect.epoch)
            case Broadcast():
                self._hub.broadcast(effect)
            case Join():
                self._join(effect.request)
            case Leave():
                self._leave(effect.request)
            case Measure():
                self._say_heads()
            case Authenticate():
                await self._authenticate(effect)
            case Recall():
                await self._recall(effect.request)

    async def _authenticate(self, effect: Authenticate) -> None:
        hub, session = self._hub, self.session
        try:
            if not hub.log.epoch:
                raise PeerError(Code.UNAVAILABLE, "the database has not been reached yet", CloseCode.UNAVAILABLE)
            changes = hub.permissions.changes
            identity = await hub.authenticate(effect.token)
            if session.closed:
                return  # Its time was over meanwhile, or it has left, or this replica has stopped.
            subject = identity.client_id or ""
            if not self._producer:
                claimed = effect.producer
                known = claimed is not None and hub.authenticator.check_producer(claimed, subject)
                self._producer = claimed if claimed and known else hub.authenticator.new_producer(subject, time.time())
            producer = hub.authenticator.check_producer(self._producer, subject) or session.producer
            reply = wire.AuthOk(
                identity.client_id,
                producer=self._producer,
                epoch=hub.log.epoch,
                head=hub.delivery.position,
                floor=hub.log.floor,
                limits=hub.limits(),
            )
            before = Grants() if session.identity is None else session.identity.grants
            withdrawn = session.admit(identity, reply, producer, trio.current_time(), time.time())
        except PeerError as error:
            if not session.closed:
                session.refuse(error)
            return
        self._alarm.deadline = session.deadline
        hub.permissions.hold(self, identity.role, changes)
        self._withdraw(withdrawn, before, identity.grants)
        self.send_away()

    def _join(self, request: wire.Subscribe) -> None:
        delivery, session, streams = self._hub.delivery, self.session, self._streams
        pattern = request.pattern
        held = self._take_out(pattern)
        if held is not None:
            self._end_stream(held)
        own = streams.open_stream(partial(self._stopped, pattern)) if streams is not None and request.stream else None
        session.joined(request, delivery.position, self._hub.log.epoch, own)
        subscription = next(iter(self._subscriptions.values()), None) if session.protocol is Protocol.FIRST else None
        if subscription is None:
            subscription = Subscription(
                self.mailbox if own is None else own,
                session.producer,
                streams.send_datagram if streams is not None and request.datagrams else None,
            )
        self._subscriptions[pattern] = subscription
        delivery.subscribe(subscription, pattern, request.since, request.epoch)

    def _leave(self, request: wire.Unsubscribe) -> None:
        subscription = self._take_out(request.pattern)
        assert subscription is not None
        self.session.left(request, self._hub.delivery.position, subscription.mailbox)
        self._end_stream(subscription)

    def _withdraw(self, patterns: Sequence[str], before: Grants, grants: Grants) -> None:
        """End these subscriptions, and take back what is still to be published and may not be."""
        for pattern in patterns:
            self._revoke(pattern)
        session = self.session
        if session.pending and grants.write != before.write:
            refusal = Rejected(Code.UNAUTHORIZED, "no write grant covers this channel any more")
            self._hub.log.withdraw(lambda a: a.settle == session.settled and not grants.may_write(a.channel), refusal)

    def _revoke(self, pattern: str) -> None:
        subscription = self._take_out(pattern)
        assert subscription is not None
        subscription.mailbox.revoke(pattern, subscription.patterns)
        self.session.revoked(pattern, self._hub.delivery.position, subscription.mailbox)
        self._end_stream(subscription)

    def _stopped(self, pattern: str, own: Mailbox) -> None:
        """The peer has stopped a subscription's own stream, by which it unsubscribes."""
        if pattern in self._subscriptions and self._subscriptions[pattern].mailbox is own:
            self._take_out(pattern)
            self.session.left(wire.Unsubscribe(pattern), self._hub.delivery.position)

    def _take_out(self, pattern: str) -> Subscription | None:
        """Deliver nothing more for a pattern, if it is held."""
        subscription = self._subscriptions.pop(pattern, None)
        if subscription is not None:
            self._hub.delivery.unsubscribe(subscription, pattern)
        return subscription

    def _end_stream(self, subscription: Subscription) -> None:
        if subscription.mailbox is not self.mailbox and self._streams is not None:
            self._streams.end_stream(subscription.mailbox)

    def _say_heads(self, quiet_since: float | None = None) -> None:
        """Say on each stream up to where all subscriptions on it are complete, unless one of them is late.

        With `quiet_since` only where nothing has been sent from then on, and that is news to somebody.
        """
        if self.session.identity is None:
            return
        hub, mailbox = self._hub, self.mailbox
        head = wire.Head(hub.delivery.position, hub.log.epoch, hub.delivery.at)
        late = held = False
        for subscription in self._subscriptions.values():
            own = subscription.mailbox
            if own is mailbox:
                held, late = True, late or subscription.late
            elif not (subscription.late or own.full or subscription.marked == head.seq) and _is_quiet(own, quiet_since):
                subscription.marked = head.seq
                self.session.say(head, own)
        news = quiet_since is None or (held and self._marked != head.seq and _is_quiet(mailbox, quiet_since))
        if news and not late:
            self._marked = head.seq
            self.session.say(head)

    async def _recall(self, request: wire.History) -> None:
        limit = min(request.limit, MAX_HISTORY)
        try:
            entries, more = await self._hub.log.history(request.pattern, before=request.before, limit=limit)
        except Unavailable as error:
            self.session.refuse_request(request, PeerError(Code.UNAVAILABLE, str(error)))
            return
        # The newest that fit, and always one: a page is held in memory, here and by the client, as one object.
        sizes = list(accumulate(len(entry.payload) + OVERHEAD for entry in reversed(entries)))
        kept = entries[-max(1, bisect_right(sizes, MAX_HISTORY_BYTES)) :]
        self.session.recalled(request, kept, more or len(kept) < len(entries))


def _is_quiet(mailbox: Mailbox, since: float | None) -> bool:
    """Whether it is empty, and was last flushed before then. Anything is quiet where there is no time to compare."""
    return since is None or (not mailbox and mailbox.rests_until < since)
