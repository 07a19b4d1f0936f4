"""What the sessions of one replica share: the log and what follows it, who is connected, and how all of them leave."""

from __future__ import annotations

import os
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from .auth.grants import Identity, client_of
from .auth.live_permissions import LivePermissions
from .auth.role_tokens import RoleSource, role_handle, role_key
from .auth.token_errors import RejectionReason, TokenRejected
from .auth.tokens import Authenticator
from .certificates import CertificateSource
from .config import Config
from .delivery.fan_out import Delivery
from .delivery.flusher import Flusher
from .delivery.send_queue import Budget, TransportWriter
from .errors import CloseCode, ErrorCode, PeerError, Unavailable
from .limits.connections_per_address import ConnectionsPerAddress
from .limits.cpu_fairness import CpuScheduler
from .limits.publish_rate import PublishRateLimits
from .limits.unauthenticated import UnauthenticatedPeers
from .log import EPHEMERAL_SIZE, Append, Entry, Log, Outcome, Rejected, not_taken
from .observability.loggers import RateLimitedLog, get_logger
from .observability.runtime_statistics import RuntimeStatistics
from .protocol import wire_messages as wire
from .protocol.wire_messages import clip
from .session.driver import MAX_HISTORY, STOPPING, SessionDriver, Streams
from .session.state_machine import BroadcastMessage, ClientUsage, make_append
from .version import version

TRANSPORTS = "websocket", "webtransport"

MARKED_AT_A_TIME = 500
"""Clients that are looked at before other tasks get a turn."""

MOVING_TIME = 2.0
"""Seconds that one client gets to find another replica."""

MOVES = 100
"""How many clients a second are sent to the other replicas, unless `drain.window` is too short for that."""

PUBLISHED_AT_A_TIME = 100
"""Messages of one request that are taken before other tasks get a turn."""

SPREAD = 0.8
"""Over which part of the time that is left clients are sent away: the last of them need some to move in."""

logger = get_logger("catbus.replica")


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """`clients`: who is connected, by transport, and `opened`: how many have come so far.

    `published` counts publishes taken from sessions and over HTTP, whatever became of them.
    """

    clients: Mapping[str, int]
    opened: Mapping[str, int]
    published: int


class Replica:
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
        self.delivery = Delivery(log, Budget(config.limits.send_queue_total))
        self.runtime_statistics = RuntimeStatistics(self.delivery)
        self.flusher.on_pass = self.runtime_statistics.flushed
        self.scrape: Callable[[], tuple[bytes, str]] | None = None
        """What is counted and measured, as Prometheus reads it, and its content type; once the doors are open."""
        self.unauthenticated = UnauthenticatedPeers()
        self.draining = False
        self.clients: set[SessionDriver] = set()
        self.permissions = LivePermissions(roles)
        self.cpu_scheduler = CpuScheduler()
        self.quotas = PublishRateLimits(config.limits.publish_rate, config.limits.publish_bytes)
        self.shares: dict[Hashable, ClientUsage] = {}
        """Those of the clients that have sessions, by what `client_of` tells of their tokens."""
        self.subscriptions = 0
        """How many all of them have."""
        self.addresses = ConnectionsPerAddress(config.limits.address_connections)
        self._roles = roles
        self._refusals = RateLimitedLog(logger.info)
        """Tokens that were refused: a stranger can send as many as it likes."""
        self._departure: float | None = None
        self._closed = False
        self._left = trio.lowlevel.ParkingLot()
        self._published = 0
        self._clients = Counter(dict.fromkeys(TRANSPORTS, 0))
        self._opened = Counter(self._clients)
        self._started = time.time_ns() // 1_000_000

    def statistics(self) -> ReplicaStatistics:
        return ReplicaStatistics(dict(self._clients), dict(self._opened), self._published)

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
            "lagging": delivery.lagging,
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

        `degraded` means that the log is out of reach, and publishes wait, or that it lacks messages: sessions stay.
        """
        if self.draining:
            return "draining"
        if not self.log.epoch:
            return "starting"
        return "degraded" if self.log.trouble else "ready"

    def open_client(
        self, writer: TransportWriter, *, transport: str, streams: Streams | None = None, network: str = ""
    ) -> SessionDriver:
        """A new connection, from this network. Its owner calls `leave` in the end, whatever happens."""
        client = SessionDriver(self, writer, transport, streams, network)
        self.clients.add(client)
        self._clients[transport] += 1
        self._opened[transport] += 1
        if self._closed:
            client.finish()
        return client

    def forget_client(self, client: SessionDriver) -> None:
        if client in self.clients:
            self.clients.remove(client)
            self._clients[client.transport] -= 1
        self._left.unpark_all()

    async def authenticate(self, token: str, network: str = "") -> Identity:
        """Who bears the token, in this network; raises `PeerError` that closes.

        A role's is waited for, for seconds at the most. From then on the client has its share of the CPU.
        """
        try:
            key = role_key(token)
            if key is None or self._roles is None:
                identity = self.authenticator.verify(token, time.time())
            else:
                identity = await self._find_role(self._roles, key)
            longest = self.config.limits.client_id
            if identity.client_id is not None and len(identity.client_id.encode()) > longest:
                raise TokenRejected(
                    RejectionReason.CLAIMS, f"its client_id has more than {longest} bytes (limits.client_id)"
                )
            self.cpu_scheduler.prove(client_of(identity, token, network))
            return identity
        except TokenRejected as error:
            self.runtime_statistics.refused_tokens[error.reason] += 1
            fields: dict[str, Any] = {} if error.subject is None else {"client_id": clip(error.subject)}
            self._refusals.log(
                trio.current_time(),
                "a token was refused",
                kind=error.reason,
                reason=error.reason.value,
                detail=error.detail,
                **fields,
            )
            raise

    async def _find_role(self, roles: RoleSource, key: bytes) -> Identity:
        try:
            identity = (await roles.find([key])).get(key)
        except Unavailable as error:
            raise PeerError(ErrorCode.UNAVAILABLE, str(error), CloseCode.UNAVAILABLE) from None
        if identity is None:
            detail = f"no role {role_handle(key)}: it was deleted, or never was"
            raise TokenRejected(RejectionReason.ROLE, detail, message="no role has this token")
        return identity

    async def publish(
        self, identity: Identity, requests: Sequence[wire.Publish], producer: bytes = b"", client: Hashable = None
    ) -> list[Outcome | None]:
        """Publish for somebody who has no session; answers in the order of the requests, None for an ephemeral one.

        With `producer`, the same requests may be published again and are recognised by their places. Those with the
        same `client`, or client_id, share a part of the log. Cancelling it leaves open which of them are committed.
        """
        payer = identity.client_id or client
        if payer is not None:
            self._charge(payer, identity, requests)
        outcomes: dict[int, Outcome | None] = {}
        done = trio.Event()

        def settle(index: int, _: Append, outcome: Outcome) -> None:
            outcomes[index] = outcome
            if len(outcomes) == len(requests):
                done.set()

        for index, request in enumerate(requests):
            if index % PUBLISHED_AT_A_TIME == PUBLISHED_AT_A_TIME - 1:
                await self.cpu_scheduler.next()
            request.id, request.retry = index, False
            try:
                append = make_append(request, identity, producer, partial(settle, index), payer)
            except PeerError as error:
                outcomes[index] = Rejected(error.code, error.message)
                continue
            if request.ephemeral:
                self.broadcast(BroadcastMessage(append.channel, append.payload, append.sender, None))
                outcomes[index] = None
            else:
                self.submit(append)
        if len(outcomes) < len(requests):
            await done.wait()
        return [outcomes[index] for index in range(len(requests))]

    def _charge(self, payer: Hashable, identity: Identity, requests: Sequence[wire.Publish]) -> None:
        """Spend of a client's quota what is to be published for it. Raises `PeerError` when it has used that up."""
        now = trio.current_time()
        quota = self.quotas.of(payer, now, identity.publish_rate, identity.publish_bytes)
        if (wait := quota.spend(0, 0, now)) > 0:
            raise PeerError(
                ErrorCode.RATE_LIMITED, "the client publishes too much (limits.publish_rate)", retry_after=wait
            )
        quota.spend(len(requests), sum(len(bytes(request.payload)) for request in requests), now)

    def submit(self, append: Append, epoch: str | None = None) -> None:
        """Append to the log, unless it is a retry from an epoch of which nothing can be known."""
        self._published += 1
        if self._closed:
            append.settle(append, not_taken(append, Rejected(ErrorCode.SHUTTING_DOWN, STOPPING)))
        elif epoch is not None and epoch != self.log.epoch:
            append.settle(append, Rejected(ErrorCode.UNKNOWN, "first sent in another epoch of the log"))
        else:
            self.log.submit(append)

    def broadcast(self, message: BroadcastMessage) -> None:
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
        """Say to whoever hears nothing how far it has got, for ever: else retention would overtake its cursors.

        And find out how far the lagging subscriptions are behind.
        """
        while True:
            await trio.sleep(1)
            now = trio.current_time()
            for index, client in enumerate(tuple(self.clients)):
                if index % MARKED_AT_A_TIME == 0:
                    await trio.lowlevel.checkpoint()
                client.mark_time(now)
            for _ in self.delivery.survey():
                await trio.lowlevel.checkpoint()

    async def send_away(self) -> None:
        """Be not ready for a while, then tell every client to leave, and wait until all have left.

        The clients move over `drain.window`, so that they do not overrun the other replicas. Few of them do not, and
        get less.
        """
        settings = self.config.drain
        self.draining = True
        await trio.sleep(settings.delay)
        window = min(settings.window, MOVING_TIME + len(self.clients) / MOVES)
        self._departure = trio.current_time() + window
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
