"""What the sessions of one replica share, and the hands that carry out what each of them asks for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import trio

from . import wire
from .auth import Authenticator, Identity
from .config import Config
from .delivery import Delivery, Subscription
from .errors import CloseCode, Code, PeerError, Unavailable
from .flush import Flusher
from .log import Append, Entry, Log, Outcome, Rejected
from .mailbox import Mailbox, Outlet
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
from .wire import Protocol

MAX_HISTORY = 1000
"""Messages in one page of `history` at the most."""


@dataclass(frozen=True, slots=True)
class HubStatistics:
    """`published` counts publishes taken from sessions and over HTTP, whatever became of them."""

    clients: int
    published: int


class Hub:
    """The middle of a replica: log, delivery and flusher, and who is connected. Belongs to one Trio thread."""

    def __init__(self, config: Config, log: Log, authenticator: Authenticator) -> None:
        self.config = config
        self.log = log
        self.authenticator = authenticator
        self.flusher = Flusher()
        self.delivery = Delivery(log)
        self.draining = False
        self.clients: set[Client] = set()
        self._published = 0

    def statistics(self) -> HubStatistics:
        return HubStatistics(len(self.clients), self._published)

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

    def open_client(self, outlet: Outlet, *, transport: str) -> Client:
        """A new connection. Its owner calls `leave` in the end, whatever happens."""
        client = Client(self, outlet, transport)
        self.clients.add(client)
        if self.draining:
            client.drain()
        return client

    def authenticate(self, token: str) -> Identity:
        """Who bears the token; raises `PeerError`."""
        return self.authenticator.verify(token, time.time())

    async def publish(self, identity: Identity, requests: Sequence[wire.Publish]) -> list[Outcome | None]:
        """Publish for somebody who has no session; answers in the order of the requests, None for an ephemeral one.

        Cancelling it leaves open which of them are committed.
        """
        outcomes: dict[int, Outcome | None] = {}
        done = trio.Event()

        def settle(index: int, _: Append, outcome: Outcome) -> None:
            outcomes[index] = outcome
            if len(outcomes) == len(requests):
                done.set()

        for index, request in enumerate(requests):
            try:
                append = make_append(request, identity, b"", partial(settle, index))
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
        if self.draining:
            append.settle(append, Rejected(Code.SHUTTING_DOWN, "this replica is stopping"))
        elif epoch is not None and epoch != self.log.epoch:
            append.settle(append, Rejected(Code.UNKNOWN, "first sent in another epoch of the log"))
        else:
            self.log.submit(append)

    def broadcast(self, message: Broadcast) -> None:
        """Pass an ephemeral message on to the sessions of this replica."""
        self._published += 1
        at = time.time_ns() // 1_000_000
        self.delivery.broadcast(Entry(0, at, message.channel, message.payload, message.sender, message.origin))

    def limits(self) -> dict[str, int]:
        """The limits that a client is told of, by name."""
        limits = self.config.limits
        return {
            "message_size": limits.message_size,
            "subscriptions": limits.subscriptions,
            "pending_publishes": limits.pending_publishes,
            "history": MAX_HISTORY,
        }

    def drain(self) -> None:
        """Ask every client to leave, once its publishes have been answered."""
        self.draining = True
        for client in list(self.clients):
            client.drain()


class Client:
    """One connected client, whatever the transport. Its endpoint feeds it bytes and sends what its mailbox holds."""

    def __init__(self, hub: Hub, outlet: Outlet, transport: str) -> None:
        limits = hub.config.limits
        self.transport = transport
        self.mailbox = Mailbox(outlet, hub.flusher.wake, limits.mailbox)
        self.session = Session(
            self.mailbox,
            SessionLimits(limits.message_size, limits.subscriptions, limits.auth_timeout, limits.token_grace),
            trio.current_time(),
        )
        self.session.on_settled = self._settled
        self._hub = hub
        self._pending_limit = limits.pending_publishes
        self._subscriptions: dict[str, Subscription] = {}
        self._producer = ""
        self._closing = trio.Event()
        self._room = trio.Event()
        self._draining = False

    @property
    def protocol(self) -> Protocol:
        return self.session.protocol

    @property
    def deadline(self) -> float:
        """The Trio time at which `tick` is due."""
        return self.session.deadline

    @property
    def closing(self) -> tuple[CloseCode, str] | None:
        """Set when the connection is to be closed, once the mailbox has been sent."""
        return self.session.closing

    async def receive(self, data: bytes) -> None:
        """Take more bytes and do what they ask for.

        Waits while the client has too many publishes on their way or too many replies unread; an answer to each
        publish is owed within `database.publish_timeout`, which bounds the former. Cancelling it drops what was not
        yet understood: the connection must be closed then.
        """
        if self._draining:
            return
        for effect in self.session.receive(data, trio.current_time()):
            await self._perform(effect)
            while self.session.pending >= self._pending_limit or self.mailbox.full:
                await self._wait_for_room()
        if self.session.closing is not None:
            self._closing.set()

    def tick(self) -> None:
        """`deadline` has passed."""
        self.session.tick(trio.current_time())
        if self.session.closing is not None:
            self._closing.set()

    def close(self, code: CloseCode, reason: str) -> None:
        """Have the connection closed once the mailbox has been sent."""
        self.session.close(code, reason)
        self._closing.set()

    async def wait_closing(self) -> None:
        """Wait until `closing` is set."""
        await self._closing.wait()

    def drain(self) -> None:
        """Take nothing more, and close when all publishes have been answered."""
        self._draining = True
        self.session.say(wire.GoAway("the replica is stopping", 1.0))
        self._settled()

    def leave(self) -> None:
        """The connection is gone."""
        self._hub.clients.discard(self)
        for pattern, subscription in self._subscriptions.items():
            self._hub.delivery.unsubscribe(subscription, pattern)
        self._subscriptions.clear()
        self.session.abandon()
        self.mailbox.take()
        self._closing.set()

    def _settled(self) -> None:
        self._room.set()
        if self._draining and not self.session.pending:
            self.close(CloseCode.SHUTTING_DOWN, "the replica is stopping")

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
                self._join(effect)
            case Leave():
                self._leave(effect.pattern)
            case Measure():
                self._measure(effect.seq)
            case Authenticate():
                self._authenticate(effect)
            case Recall():
                await self._recall(effect.request)

    def _authenticate(self, effect: Authenticate) -> None:
        hub, session = self._hub, self.session
        try:
            if not hub.log.epoch:
                raise PeerError(Code.UNAVAILABLE, "the database has not been reached yet", CloseCode.UNAVAILABLE)
            identity = hub.authenticate(effect.token)
            subject = identity.client_id or ""
            if not self._producer:
                claimed = effect.producer
                known = claimed is not None and hub.authenticator.check_producer(claimed, subject)
                self._producer = claimed if claimed and known else hub.authenticator.new_producer(subject)
            producer = hub.authenticator.check_producer(self._producer, subject) or session.producer
            reply = wire.AuthOk(
                identity.client_id,
                producer=self._producer,
                epoch=hub.log.epoch,
                head=hub.delivery.position,
                floor=hub.log.floor,
                limits=hub.limits(),
            )
            withdrawn = session.admit(identity, reply, producer, trio.current_time(), time.time())
        except PeerError as error:
            session.refuse(error)
            return
        for pattern in withdrawn:
            self._leave(pattern, revoked=True)

    def _join(self, effect: Join) -> None:
        delivery, session = self._hub.delivery, self.session
        pattern = effect.pattern
        held = self._subscriptions.pop(pattern, None)
        if held is not None:
            delivery.unsubscribe(held, pattern)
        session.joined(pattern, delivery.position)
        subscription = next(iter(self._subscriptions.values()), None) if self.protocol is Protocol.FIRST else None
        if subscription is None:
            subscription = Subscription(self.mailbox, self.protocol, session.producer)
        self._subscriptions[pattern] = subscription
        delivery.subscribe(subscription, pattern, effect.since, effect.epoch)

    def _leave(self, pattern: str, *, revoked: bool = False) -> None:
        delivery = self._hub.delivery
        delivery.unsubscribe(self._subscriptions.pop(pattern), pattern)
        if revoked:
            self.mailbox.withdraw(pattern)
        self.session.left(pattern, delivery.position, revoked=revoked)

    def _measure(self, seq: int) -> None:
        hub = self._hub
        head = None
        if self.session.identity is not None and not any(s.late for s in self._subscriptions.values()):
            head = wire.Head(hub.delivery.position, hub.log.epoch, hub.delivery.at)
        self.session.measured(seq, head)

    async def _recall(self, request: wire.History) -> None:
        limit = min(request.limit, MAX_HISTORY)
        try:
            entries, more = await self._hub.log.history(request.pattern, before=request.before, limit=limit)
        except Unavailable as error:
            self.session.refuse_request(PeerError(Code.UNAVAILABLE, str(error)))
        else:
            self.session.recalled(request, entries, more)
