"""The sources of the metrics: the statistics of a replica, its endpoints and its log, taken for one scrape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..auth.jwt_keys import KeySetStatistics
from ..delivery.delivery_statistics import DeliveryStatistics
from ..delivery.flusher import FlushStatistics
from ..endpoints.http.http_endpoint import HttpEndpoint, HttpEndpointStatistics
from ..endpoints.webtransport.quic_endpoint import QuicEndpoint, QuicEndpointStatistics
from ..postgres import PostgresLog
from ..postgres.log import PostgresStatistics
from ..presence import PresenceStatistics
from ..replica import Replica, ReplicaStatistics
from ..session.presence_watch import FeedStatistics
from .histogram import Histogram

Reading = float | Histogram | Mapping[str, float] | Mapping[tuple[str, str], float] | None
"""The value of a metric, or its values by those of its labels; None where it does not exist."""


@dataclass(frozen=True, slots=True)
class MetricSources:
    """The statistics for one scrape, each taken once. What the replica does not have is missing or None."""

    replica: Replica
    sessions: ReplicaStatistics
    delivery: DeliveryStatistics
    flusher: FlushStatistics
    presence: PresenceStatistics
    presence_feed: FeedStatistics
    endpoints: Mapping[str, HttpEndpointStatistics | QuicEndpointStatistics]
    """By transport."""
    websocket: HttpEndpointStatistics | None
    quic: QuicEndpointStatistics | None
    postgres: PostgresStatistics | None


def read_sources(replica: Replica) -> MetricSources:
    """Take the statistics of a replica and its open endpoints."""
    websocket, quic = None, None
    for endpoint in replica.endpoints.values():
        match endpoint:
            case HttpEndpoint():
                websocket = endpoint.statistics()
            case QuicEndpoint():
                quic = endpoint.statistics()
    found = {"websocket": websocket, "webtransport": quic}
    return MetricSources(
        replica,
        replica.statistics(),
        replica.delivery.statistics(),
        replica.flusher.statistics(),
        replica.presence.statistics(),
        replica.presence_feeder.statistics(),
        {transport: statistics for transport, statistics in found.items() if statistics is not None},
        websocket,
        quic,
        replica.log.statistics() if isinstance(replica.log, PostgresLog) else None,
    )


def by_transport(
    read: Callable[[HttpEndpointStatistics | QuicEndpointStatistics], float],
) -> Callable[[MetricSources], Reading]:
    """Read a value of each endpoint."""
    return lambda sources: {transport: read(found) for transport, found in sources.endpoints.items()}


def of_websocket(read: Callable[[HttpEndpointStatistics], Reading]) -> Callable[[MetricSources], Reading]:
    """Read a value of the WebSocket endpoint, if there is one."""
    return lambda sources: None if sources.websocket is None else read(sources.websocket)


def of_quic(read: Callable[[QuicEndpointStatistics], Reading]) -> Callable[[MetricSources], Reading]:
    """Read a value of the WebTransport endpoint, if there is one."""
    return lambda sources: None if sources.quic is None else read(sources.quic)


def of_postgres(read: Callable[[PostgresStatistics], Reading]) -> Callable[[MetricSources], Reading]:
    """Read a value of the log, if it is in PostgreSQL."""
    return lambda sources: None if sources.postgres is None else read(sources.postgres)


def of_key_sets(read: Callable[[KeySetStatistics], float]) -> Callable[[MetricSources], Reading]:
    """Read a value of the key sets; 0 if none are fetched."""
    return lambda sources: 0.0 if sources.replica.key_sets is None else read(sources.replica.key_sets.statistics())
