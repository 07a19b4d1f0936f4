"""One replica: its log, what its sessions share, the sessions themselves, and how they leave when it stops."""

from __future__ import annotations

import os
import random
import secrets
import socket
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from operator import attrgetter
from typing import Any, Protocol

import trio

from .auth.grants import Identity
from .auth.jwt_keys import KeySetSource
from .auth.live_permissions import LivePermissions
from .auth.revocations import Revocations
from .auth.role_tokens import RoleSource
from .auth.tokens import Authenticator
from .certificates import CertificateSource
from .config import Config, split_address
from .delivery.fan_out import Delivery
from .delivery.flusher import Flusher
from .delivery.message_pages import ClientTurns, MessagePages
from .delivery.send_queue import Budget, TransportWriter
from .limits.client_usage import ClientUsages
from .limits.connections_per_address import ConnectionsPerAddress
from .limits.cpu_scheduler import CpuScheduler
from .limits.publish_rate import PublishRateLimits
from .limits.unauthenticated import UnauthenticatedPeers
from .log import Log, Outcome
from .log.consumers import Consumers
from .observability.runtime_statistics import RuntimeStatistics
from .presence import Presence
from .presence.local import LocalPresence
from .processes.worker import Worker
from .protocol.wire_messages import Publish
from .session.authentication import Authentication
from .session.driver import SessionDriver
from .session.hooks import ClientInfo, Hooks
from .session.presence_watch import PresenceFeeder
from .session.publishing import Publisher
from .session.services import SessionServices
from .session.session_events import SessionEvents
from .session.session_report import OpenSession
from .session.transport_streams import Streams
from .version import version

TRANSPORTS = "websocket", "webtransport", "sse"

HEADS_PER_CHECKPOINT = 500
"""Sessions that are checked for a due `head` before other tasks run."""

RECONNECT_TIME = 2.0
"""Seconds that a client needs at most to connect to another replica."""

RECONNECTS_PER_SECOND = 100
"""Clients per second that are sent to the other replicas, unless `drain.window` is too short for that."""

RECONNECT_SPREAD = 0.8
"""Part of the remaining time over which clients are told to reconnect. The last of them use the rest to do so."""


@dataclass(frozen=True, slots=True)
class ReplicaStatistics:
    """Sessions now and so far, by transport, and publishes received from all sources, whatever their outcome."""

    sessions: Mapping[str, int]
    opened: Mapping[str, int]
    published: int


class OpenEndpoint(Protocol):
    """An endpoint that accepts connections at its addresses until it is closed."""

    addresses: list[str]

    def close(self) -> None: ...


MetricsExporter = Callable[["Replica"], tuple[bytes, str]]
"""Returns the metrics of a replica, and their content type."""


class Replica:
    """The registry of a replica's sessions, and the services that they share. Belongs to one Trio thread.

    `certificates` is needed for WebTransport, and for TLS on the WebSocket port. Without `roles`, role tokens are
    rejected. Without an `exporter`, there are no metrics. `hooks` are those of the program that embeds the broker.
    Without `revocations`, those that are made here are kept in memory. Without `key_sets`, no keys are fetched. Without
    `presence`, this replica has no others. Without `consumers`, the log has none. `worker` says which worker of its
    broker it is, if that has workers.
    """

    def __init__(
        self,
        config: Config,
        log: Log,
        authenticator: Authenticator,
        certificates: CertificateSource | None = None,
        roles: RoleSource | None = None,
        exporter: MetricsExporter | None = None,
        hooks: Hooks | None = None,
        revocations: Revocations | None = None,
        key_sets: KeySetSource | None = None,
        presence: Presence | None = None,
        consumers: Consumers | None = None,
        worker: Worker | None = None,
    ) -> None:
        self.worker = worker
        self.config = config
        self.log = log
        self.authenticator = authenticator
        self.certificates = certificates
        self.delivery = Delivery(log, Budget(config.limits.send_queue_total))
        self.runtime_statistics = RuntimeStatistics(self.delivery)
        self.flusher = Flusher(on_flushed=self.runtime_statistics.record_flush)
        self.endpoints: dict[str, OpenEndpoint] = {}
        """The open endpoints, by transport."""
        self.unauthenticated = UnauthenticatedPeers()
        self.permissions = LivePermissions(roles)
        self.revocations = Revocations() if revocations is None else revocations
        self.key_sets = key_sets
        self.presence: Presence = LocalPresence(config.presence.grace) if presence is None else presence
        self.consumers = consumers
        self.presence_feeder = PresenceFeeder(self.presence)
        self.cpu_scheduler = CpuScheduler()
        self.client_usages = ClientUsages(config.limits.sessions, config.limits.subscriptions_total)
        self.addresses = ConnectionsPerAddress(config.limits.address_connections)
        self.message_pages = MessagePages(
            log, self.delivery, self.cpu_scheduler, self.client_usages, config.limits.send_queue
        )
        self.id = secrets.token_hex(8)
        """Identifies the replica until it stops."""
        self.session_events = SessionEvents(self.id, log, publish=config.events.sessions)
        self.sessions: dict[SessionDriver, OpenSession] = {}
        """The open sessions, the oldest first."""
        self.draining = False
        publish_rates = PublishRateLimits(config.limits.publish_rate, config.limits.publish_bytes)
        hooks = hooks or Hooks()
        self._authentication = Authentication(
            authenticator,
            roles,
            self.revocations,
            key_sets,
            self.cpu_scheduler,
            self.runtime_statistics,
            config.limits.client_id,
            hooks,
            config.auth.leeway,
        )
        self._publisher = Publisher(log, self.delivery, publish_rates, self.cpu_scheduler, hooks)
        self._services = SessionServices(
            config=config,
            log=log,
            delivery=self.delivery,
            flusher=self.flusher,
            authentication=self._authentication,
            publisher=self._publisher,
            hooks=hooks,
            permissions=self.permissions,
            revocations=self.revocations,
            publish_rates=publish_rates,
            client_usages=self.client_usages,
            unauthenticated=self.unauthenticated,
            cpu_scheduler=self.cpu_scheduler,
            statistics=self.runtime_statistics,
            presence=self.presence,
            presence_feeder=self.presence_feeder,
            member_turns=ClientTurns(),
            replica_id=self.id,
            reconnect_delay=self._reconnect_delay,
        )
        self._exporter = exporter
        self._drain_deadline: float | None = None
        self._closing = False
        self._session_closed = trio.lowlevel.ParkingLot()
        self._session_ids = count(1)
        self._sessions = Counter(dict.fromkeys(TRANSPORTS, 0))
        self._opened = Counter(self._sessions)
        self._started = time.time_ns() // 1_000_000

    def statistics(self) -> ReplicaStatistics:
        return ReplicaStatistics(dict(self._sessions), dict(self._opened), self._publisher.published)

    def describe(self) -> dict[str, Any]:
        """Describe this replica for the other replicas."""
        delivery = self.delivery.statistics()
        return {
            "id": self.id,
            "name": socket.gethostname(),
            "pid": os.getpid(),
            "version": version(),
            "started": self._started,
            "state": self.readiness,
            "clients": len(self.sessions),
            "applied": self.log.applied,
            "lagging": delivery.lagging,
            "lag": delivery.lag,
        }

    def report(self) -> dict[str, object]:
        """Describe this replica and its log for an operator, as a JSON object."""
        log = self.log
        return {
            **self.describe(),
            "epoch": log.epoch,
            "head": log.applied,
            "floor": log.floor,
            "log": log.report(),
        }

    async def report_all(self) -> dict[str, object]:
        """Return `report`, and with workers descriptions of all of them as `workers`. This takes 0.5 s at most."""
        found = self.report()
        if self.worker is not None:
            found["workers"] = await self.worker.siblings.add_reports(self.describe())
        return found

    @property
    def readiness(self) -> str:
        """`starting` until the log has been read for the first time, then `ready` or `degraded`; `draining` at the end.

        `degraded`: the log is unreachable and publishes wait, or messages are missing from it. Sessions stay open.
        """
        if self.draining:
            return "draining"
        if not self.log.epoch:
            return "starting"
        return "degraded" if self.log.problem else "ready"

    def scrape(self) -> tuple[bytes, str] | None:
        """Return the metrics in Prometheus's text format, and its content type; None without an exporter."""
        return None if self._exporter is None else self._exporter(self)

    async def scrape_all(self) -> tuple[bytes, str] | None:
        """Return `scrape`, with workers for all of them: see `SiblingClient.add_metrics`. This takes 0.5 s at most."""
        found = self.scrape()
        if found is None or self.worker is None:
            return found
        text, content_type = found
        return await self.worker.siblings.add_metrics(text), content_type

    # Endpoints and sessions

    def add_endpoint(self, transport: str, endpoint: OpenEndpoint) -> None:
        """Register an endpoint that is open."""
        self.endpoints[transport] = endpoint

    @property
    def webtransport_port(self) -> int | None:
        """The port of the WebTransport endpoint, also if another worker has it, or None while there is none."""
        if self.worker is not None:
            return self.worker.webtransport_port
        endpoint = self.endpoints.get("webtransport")
        return None if endpoint is None else split_address(endpoint.addresses[0])[1]

    def open_session(
        self, writer: TransportWriter, *, transport: str, streams: Streams | None = None, network: str = ""
    ) -> SessionDriver:
        """Open a session for a new connection from this network. The caller calls `end` when the connection ends."""
        session_id, opened = next(self._session_ids), time.time_ns() // 1_000_000
        session = SessionDriver(
            self._services, writer, transport, streams, network, session_id, self._note_authenticated, self._remove
        )
        self.sessions[session] = OpenSession(session_id, opened, trio.current_time(), network, session)
        self._sessions[transport] += 1
        self._opened[transport] += 1
        if self._closing:
            session.finish()
        return session

    def _note_authenticated(self, session: SessionDriver) -> None:
        self.session_events.opened(self.sessions[session])

    def _remove(self, session: SessionDriver) -> None:
        opened = self.sessions.pop(session, None)
        if opened is not None:
            self._sessions[session.transport] -= 1
            self.session_events.closed(opened)
        self._session_closed.unpark_all()

    def sessions_after(self, session_id: int) -> Sequence[OpenSession]:
        """Return the open sessions with a greater id, in the order of their ids."""
        found = list(self.sessions.values())
        return found[bisect_right(found, session_id, key=attrgetter("id")) :]

    async def disconnect_client(self, client_id: str) -> int:
        """Close all sessions of a client, on every replica, as `Revocations.disconnect` does, within a second."""
        return await self.revocations.disconnect(client_id)

    async def authenticate(self, token: str, network: str = "") -> Identity:
        """Return the identity of a token that came from this network. Raises `PeerError` that closes."""
        return await self._authentication.verify(token, network)

    async def revoke_client(
        self, client_id: str, issued_before: float | None = None, forget_after: float | None = None
    ) -> float:
        """Revoke the tokens of a client that were issued before a time, on every replica, as `Revocations.revoke` does.

        When it returns, this replica rejects such tokens; it closes the sessions with them at once, and other replicas
        do the same within a second.
        """
        return await self.revocations.revoke(client_id, issued_before, forget_after)

    async def publish(
        self,
        identity: Identity,
        requests: Sequence[Publish],
        producer: bytes = b"",
        client: Hashable = None,
        *,
        source: ClientInfo | None = None,
        charged: bool = True,
    ) -> list[Outcome | None]:
        """Publish without a session, as `Publisher.publish` does."""
        return await self._publisher.publish(identity, requests, producer, client, source=source, charged=charged)

    async def send_heads(self) -> None:
        """Send `head` to quiet sessions for ever, so that retention does not overtake their clients' cursors.

        Also measure the lag of the lagging subscriptions, and divide the time in which messages are counted.
        """
        while True:
            self.delivery.channel_rates.advance(trio.current_time())
            await trio.sleep(1)
            now = trio.current_time()
            for index, session in enumerate(tuple(self.sessions)):
                if index % HEADS_PER_CHECKPOINT == 0:
                    await trio.lowlevel.checkpoint()
                session.heads.send_due(now)
            for _ in self.delivery.measure_lag():
                await trio.lowlevel.checkpoint()

    # Stopping

    def _reconnect_delay(self) -> float | None:
        """Return a random time in seconds after which a client should reconnect; None unless draining."""
        if self._drain_deadline is None:
            return None
        left = max(0.0, self._drain_deadline - trio.current_time())
        return random.uniform(0, RECONNECT_SPREAD * left)  # noqa: S311 (no secret)

    async def drain(self) -> None:
        """Report not ready for `drain.delay`, then have all clients reconnect elsewhere, and wait until they have left.

        Clients reconnect at random times within `drain.window`, so that they do not overload the other replicas. The
        window is shorter for few clients.
        """
        settings = self.config.drain
        self.draining = True
        await trio.sleep(settings.delay)
        window = min(settings.window, RECONNECT_TIME + len(self.sessions) / RECONNECTS_PER_SECOND)
        self._drain_deadline = trio.current_time() + window
        self.message_pages.stop_waiting()
        for session in list(self.sessions):
            session.send_goaway()
        with trio.move_on_at(self._drain_deadline):
            while self.sessions:
                await self._session_closed.park()

    def finish(self) -> None:
        """Reject further publishes, and close each session when its pending publishes are acknowledged."""
        self._closing = True
        self._publisher.close()
        for session in list(self.sessions):
            session.finish()
