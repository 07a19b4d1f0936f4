"""The parts of a replica and of its sessions that the endpoints use."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from typing import Any, Protocol

from ..auth.grants import Identity
from ..certificates import CertificateSource
from ..close_codes import CloseCode
from ..config import Config
from ..delivery.fan_out import Delivery
from ..delivery.flusher import Flusher
from ..delivery.message_pages import MessagePages
from ..delivery.send_queue import SendQueue, TransportWriter
from ..limits.connections_per_address import ConnectionsPerAddress
from ..limits.cpu_scheduler import CpuScheduler
from ..limits.unauthenticated import UnauthenticatedPeers
from ..log import Log, Outcome
from ..log.consumers import Consumers
from ..observability.runtime_statistics import RuntimeStatistics
from ..presence import Presence
from ..protocol.wire_messages import Publish
from ..session.hooks import ClientInfo
from ..session.session_report import OpenSession
from ..session.transport_streams import Streams


class SessionInterface(Protocol):
    """A session as the endpoint of its connection uses it. `SessionDriver` documents the methods."""

    @property
    def send_queue(self) -> SendQueue: ...

    @property
    def closing(self) -> tuple[CloseCode, str] | None: ...

    @property
    def authenticated(self) -> bool: ...

    @property
    def client(self) -> Hashable: ...

    def count_received(self, size: int) -> None: ...

    async def receive(self, data: bytes) -> None: ...

    async def open_event_stream(
        self,
        token: str,
        patterns: Collection[str],
        since: int | None,
        epoch: str | None,
        *,
        retained: bool = False,
        presence: bool = False,
    ) -> None: ...

    def close(self, code: CloseCode, reason: str) -> None: ...

    async def wait_closing(self) -> None: ...

    def end(self) -> None: ...


class ReplicaInterface(Protocol):
    """A replica as its endpoints use it. `Replica` documents the methods."""

    @property
    def config(self) -> Config: ...

    @property
    def log(self) -> Log: ...

    @property
    def delivery(self) -> Delivery: ...

    @property
    def presence(self) -> Presence: ...

    @property
    def consumers(self) -> Consumers | None: ...

    @property
    def message_pages(self) -> MessagePages: ...

    @property
    def flusher(self) -> Flusher: ...

    @property
    def certificates(self) -> CertificateSource | None: ...

    @property
    def addresses(self) -> ConnectionsPerAddress: ...

    @property
    def unauthenticated(self) -> UnauthenticatedPeers: ...

    @property
    def cpu_scheduler(self) -> CpuScheduler: ...

    @property
    def runtime_statistics(self) -> RuntimeStatistics: ...

    @property
    def readiness(self) -> str: ...

    @property
    def webtransport_port(self) -> int | None: ...

    def describe(self) -> dict[str, Any]: ...

    async def report_all(self) -> dict[str, object]: ...

    async def scrape_all(self) -> tuple[bytes, str] | None: ...

    def open_session(
        self, writer: TransportWriter, *, transport: str, streams: Streams | None = None, network: str = ""
    ) -> SessionInterface: ...

    def sessions_after(self, session_id: int) -> Sequence[OpenSession]: ...

    async def disconnect_client(self, client_id: str) -> int: ...

    async def revoke_client(
        self, client_id: str, issued_before: float | None = None, forget_after: float | None = None
    ) -> float: ...

    async def authenticate(self, token: str, network: str = "") -> Identity: ...

    async def publish(
        self,
        identity: Identity,
        requests: Sequence[Publish],
        producer: bytes = b"",
        client: Hashable = None,
        *,
        source: ClientInfo | None = None,
    ) -> list[Outcome | None]: ...
