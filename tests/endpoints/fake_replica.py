"""A replica double whose sessions do what a test says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from typing import Any

import trio

from catbus.auth.grants import Grants, Identity
from catbus.close_codes import CloseCode
from catbus.config import Config
from catbus.delivery.fan_out import Delivery
from catbus.delivery.flusher import Flusher
from catbus.delivery.message_pages import MessagePages
from catbus.delivery.send_queue import SendQueue, TransportWriter
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError
from catbus.limits.client_usage import ClientUsages
from catbus.limits.connections_per_address import ConnectionsPerAddress
from catbus.limits.cpu_scheduler import CpuScheduler
from catbus.limits.unauthenticated import UnauthenticatedPeers
from catbus.log import Committed, MemoryLog, Outcome
from catbus.observability.runtime_statistics import RuntimeStatistics
from catbus.presence.local import LocalPresence
from catbus.protocol.wire_messages import Publish
from catbus.session.hooks import ClientInfo
from catbus.session.session_report import OpenSession
from catbus.session.transport_streams import Streams


class FakeClient:
    """A `SessionInterface`. Echoes every chunk as a line, unless told otherwise."""

    authenticated = True

    def __init__(self, replica: FakeReplica, writer: TransportWriter) -> None:
        self.replica = replica
        self.send_queue = SendQueue(writer, lambda send_queue: None)
        self.closing: tuple[CloseCode, str] | None = None
        self.received: list[bytes] = []
        self.left = False
        self._closing = trio.Event()

    @property
    def client(self) -> Hashable:
        return self

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
        await self.replica.authenticate(token)

    async def receive(self, data: bytes) -> None:
        self.received.append(data)
        await self.replica.on_receive(self, data)

    def count_received(self, size: int) -> None:
        """Count nothing."""

    def close(self, code: CloseCode, reason: str) -> None:
        if self.closing is None:
            self.closing = code, reason
        self._closing.set()

    async def wait_closing(self) -> None:
        await self._closing.wait()

    def end(self) -> None:
        self.left = True
        self.closing = None
        self.send_queue.take()
        self._closing.set()


async def echo(client: FakeClient, data: bytes) -> None:
    client.send_queue.put(data + b"\n")


class UnreachableLog(MemoryLog):
    """A log that reports a problem."""

    @property
    def problem(self) -> str:
        return "database"


class FakeReplica:
    """A `ReplicaInterface`. Knows the tokens `good` and `narrow`. Publishing numbers the messages from 1."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self.readiness = "ready"
        self.log = UnreachableLog()
        self.delivery = Delivery(self.log)
        self.flusher = Flusher()
        self.client_usages = ClientUsages(self.config.limits.sessions, self.config.limits.subscriptions_total)
        self.presence = LocalPresence()
        self.consumers = None
        self.certificates = None
        self.webtransport_port = None
        self.addresses = ConnectionsPerAddress(self.config.limits.address_connections)
        self.unauthenticated = UnauthenticatedPeers()
        self.cpu_scheduler = CpuScheduler()
        self.message_pages = MessagePages(
            self.log, self.delivery, self.cpu_scheduler, self.client_usages, self.config.limits.send_queue
        )
        self.runtime_statistics = RuntimeStatistics(self.delivery)
        self.sessions: list[FakeClient] = []
        self.networks: list[str] = []
        """The networks of the clients."""
        self.networks_of_tokens: list[str] = []
        self.clients_of_requests: list[Hashable] = []
        self.published: list[Publish] = []
        self.on_receive: Callable[[FakeClient, bytes], Awaitable[None]] = echo
        self.on_publish: Callable[[Publish], Outcome | None] = lambda request: Committed(len(self.published))

    @property
    def refusals(self) -> list[ErrorCode]:
        """The errors that were counted."""
        return list(self.runtime_statistics.errors_sent.elements())

    def open_session(
        self, writer: TransportWriter, *, transport: str, streams: Streams | None = None, network: str = ""
    ) -> FakeClient:
        assert transport in ("websocket", "sse")
        self.networks.append(network)
        client = FakeClient(self, writer)
        self.sessions.append(client)
        return client

    def describe(self) -> dict[str, Any]:
        return {"state": self.readiness}

    async def report_all(self) -> dict[str, object]:
        return self.describe()

    def sessions_after(self, session_id: int) -> Sequence[OpenSession]:
        """Have no sessions that can be described: those here are doubles."""
        return ()

    async def disconnect_client(self, client_id: str) -> int:
        return 0

    async def revoke_client(
        self, client_id: str, issued_before: float | None = None, forget_after: float | None = None
    ) -> float:
        return issued_before or 0.0

    async def scrape_all(self) -> None:
        """Export no metrics."""

    async def authenticate(self, token: str, network: str = "") -> Identity:
        self.networks_of_tokens.append(network)
        if token == "narrow":
            return Identity("bob", Grants(("a.*",), ("*",)), None)
        if token != "good" and not token.startswith("sub-ab"):
            raise PeerError(ErrorCode.UNAUTHENTICATED, "not a token of ours", CloseCode.UNAUTHENTICATED)
        return Identity("alice" if token == "good" else None, Grants.ALL, None)

    async def publish(
        self,
        identity: Identity,
        requests: Sequence[Publish],
        producer: bytes = b"",
        client: Hashable = None,
        *,
        source: ClientInfo | None = None,
    ) -> list[Outcome | None]:
        outcomes: list[Outcome | None] = []
        self.clients_of_requests.append(client)
        for request in requests:
            self.published.append(request)
            outcomes.append(self.on_publish(request))
        return outcomes
