"""What a replica counts and measures, under the names that Prometheus knows it by.

Everything is counted where it happens, in plain numbers; here they are read, when somebody asks. The table says all
there is, and `docs/metrics.md` says what to make of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, GCCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..auth.token_errors import Reason
from ..endpoints.listen import Endpoint, EndpointStatistics
from ..endpoints.quic import QuicEndpoint, QuicStatistics
from ..errors import ErrorCode
from ..postgres import PostgresLog
from ..replica import Replica
from ..version import version
from .histogram import Histogram
from .loggers import lost_lines

STATES = "starting", "ready", "degraded", "draining"

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"

METRICS: dict[str, tuple[str, str]] = {
    # The replica
    "catbus_build_info": (GAUGE, "1, for the release that runs."),
    "catbus_state": (GAUGE, "1 for the state that the replica is in, 0 for the others."),
    "catbus_startup_seconds": (GAUGE, "How long it took until the log was open for the first time."),
    "catbus_certificate_expiry_timestamp_seconds": (GAUGE, "When the certificate expires, in seconds since 1970."),
    "catbus_event_loop_delay_seconds": (HISTOGRAM, "By how much tasks are woken late."),
    "catbus_output_lines_dropped_total": (COUNTER, "Log lines that were not written, as nobody read the output."),
    # Clients
    "catbus_sessions": (GAUGE, "Clients that are connected."),
    "catbus_sessions_opened_total": (COUNTER, "Clients that have connected."),
    "catbus_connections": (GAUGE, "Connections, whether or not there is a client in them yet."),
    "catbus_connections_refused_total": (COUNTER, "Connections over the limit of all, or of an address."),
    "catbus_connections_evicted_total": (
        COUNTER,
        "Connections that gave way to others at the limit, as they had shown no token.",
    ),
    "catbus_accepts_failed_total": (COUNTER, "How often a connection had to wait, as no file was left for it."),
    "catbus_sent_bytes_total": (COUNTER, "Bytes sent to clients."),
    "catbus_received_bytes_total": (COUNTER, "Bytes received from clients."),
    "catbus_http_requests_total": (COUNTER, "HTTP requests that were answered."),
    "catbus_refusals_total": (COUNTER, "Refusals and errors that clients were told, by code."),
    "catbus_reading_pauses_total": (
        COUNTER,
        "How often nothing was read from a client for a while, as it had as much under way as it may.",
    ),
    "catbus_tokens_refused_total": (COUNTER, "Tokens that were refused, by reason; the log has the details."),
    "catbus_faults_total": (COUNTER, "Mistakes of the broker's own that ended a request or a connection."),
    "catbus_quic_half_open": (GAUGE, "QUIC connections that have no session yet."),
    "catbus_quic_handshakes_total": (COUNTER, "QUIC handshakes that have begun, and that led to a session."),
    "catbus_quic_datagrams_total": (COUNTER, "UDP datagrams."),
    "catbus_quic_datagrams_dropped_total": (
        COUNTER,
        "UDP datagrams that were dropped: for no connection, or because too much of the same client or network waited.",
    ),
    "catbus_quic_violations_total": (COUNTER, "QUIC connections that ended because the peer broke the rules."),
    "catbus_quic_packets_lost_total": (COUNTER, "QUIC packets that did not arrive."),
    "catbus_unauthenticated_bytes": (GAUGE, "Bytes that are kept of peers that have shown no token, at the most."),
    "catbus_unauthenticated_evicted_total": (COUNTER, "Connections without a token that had to give way for that."),
    # Publishing and delivery
    "catbus_publishes_total": (COUNTER, "Messages that were to be published, whatever became of them."),
    "catbus_publishes_pending": (GAUGE, "Messages that wait to be written."),
    "catbus_publishes_pending_bytes": (GAUGE, "Bytes of them."),
    "catbus_subscriptions": (
        GAUGE,
        "Subscriptions that are up to date (live), or served from the log (late).",
    ),
    "catbus_patterns": (GAUGE, "Different channels and patterns that are subscribed to."),
    "catbus_deliveries_total": (COUNTER, "Messages handed on to be sent, once for each subscription that got them."),
    "catbus_delivery_latency_seconds": (HISTOGRAM, "From the database's stamp on a message to its being sent."),
    "catbus_lag_messages": (GAUGE, "By how many messages of the log the latest subscription is behind."),
    "catbus_lags_total": (COUNTER, "How often a subscription fell behind."),
    "catbus_sweeps_total": (COUNTER, "Pages of the log read for those that are behind."),
    "catbus_send_queue_bytes": (GAUGE, "Bytes of memory of what waits to be sent."),
    "catbus_withdrawals_total": (
        COUNTER,
        "How often messages for a client were given up, to be read again later.",
    ),
    "catbus_cpu_waiting": (GAUGE, "Connections that wait for their turn at the CPU."),
    "catbus_cpu_waits_total": (COUNTER, "How often a connection waited for its turn, as its client had used much."),
    "catbus_flush_passes_total": (COUNTER, "Passes over those for whom something waits."),
    "catbus_flushes_total": (COUNTER, "How often a client was sent something in such a pass."),
    "catbus_flush_seconds_total": (COUNTER, "Seconds spent in such passes."),
    # The log
    "catbus_log_available": (GAUGE, "Whether the log can be written and read."),
    "catbus_log_applied": (GAUGE, "The newest message that this replica has handed on."),
    "catbus_log_floor": (GAUGE, "The oldest message that still exists."),
    "catbus_log_head": (GAUGE, "The newest message that is known to be committed."),
    "catbus_log_missing_messages": (GAUGE, "Messages that were deleted from the log by hand and not repaired."),
    "catbus_log_size_bytes": (GAUGE, "What the log's tables take up."),
    "catbus_log_recent_messages": (GAUGE, "The newest messages that are kept in memory."),
    "catbus_log_recent_bytes": (GAUGE, "Bytes of them."),
    "catbus_log_jumps_total": (COUNTER, "How often messages had to be read because news of later ones came first."),
    "catbus_log_reads_total": (COUNTER, "Pages read from the database."),
    "catbus_commit_messages": (HISTOGRAM, "Messages in a commit."),
    "catbus_commit_duration_seconds": (HISTOGRAM, "From sending messages to the database to its answer."),
    "catbus_publish_latency_seconds": (
        HISTOGRAM,
        "From taking a message to its being committed, of the oldest in a commit.",
    ),
    "catbus_publishes_duplicate_total": (COUNTER, "Messages that an earlier try had already put into the log."),
    "catbus_publishes_from_sql_total": (
        COUNTER,
        "Messages from SQL that this replica has brought into the log.",
    ),
    "catbus_listener_polling": (GAUGE, "1 where news come by polling, because notifications do not come."),
    "catbus_listener_lag_messages": (GAUGE, "Committed messages that this replica has not handed on yet."),
    "catbus_notifications_total": (COUNTER, "Notifications heard."),
    "catbus_notifications_dropped_total": (COUNTER, "Notifications for which there was no room."),
    "catbus_notifications_rejected_total": (COUNTER, "Notifications that no replica of this log has sent."),
    "catbus_notification_floods_total": (
        COUNTER,
        "How often so many of them came that the replica polled instead of listening.",
    ),
    "catbus_notify_queue_usage_ratio": (GAUGE, "How much of the database's notification queue is in use."),
    "catbus_polls_total": (COUNTER, "How often the database was asked for news."),
    "catbus_retention_steps_total": (COUNTER, "How often this replica has closed a part of the log, or dropped one."),
    "catbus_retention_dropped_messages_total": (COUNTER, "Messages that it has dropped."),
    "catbus_retention_held_total": (COUNTER, "How often a part was to go and somebody used its table."),
    "catbus_ephemeral_total": (COUNTER, "Ephemeral messages to other replicas, from them, and lost on the way."),
    "catbus_replicas": (GAUGE, "Replicas that have said within the last minute that they are there."),
    "catbus_database_restarts_total": (COUNTER, "How often a task at the database was started again."),
    "catbus_database_failures_total": (COUNTER, "How often because of a mistake of the broker's own."),
}
"""By name: the type, and what it is."""

Labels = Mapping[str, str]
Reading = tuple[str, Labels, float | Histogram]


class Metrics(Collector):
    """Of one replica with its doors, and of the process that it is in."""

    def __init__(self, replica: Replica, doors: Mapping[str, Any]) -> None:
        self._replica = replica
        self._doors = doors
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def scrape(self) -> tuple[bytes, str]:
        """All of it, and the content type of that.

        Always in Prometheus's own form, which whoever scrapes understands: what the library makes of an Accept header
        is an exception, where the header is odd.
        """
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that nothing is read before it is asked for."""
        return ()

    def collect(self) -> Iterator[Metric]:
        readings: dict[str, list[tuple[Labels, float | Histogram]]] = {}
        for name, labels, value in self._read():
            readings.setdefault(name, []).append((labels, value))
        for name, (kind, text) in METRICS.items():
            if name in readings:
                yield _family(kind, name, text, readings[name])

    def _read(self) -> Iterator[Reading]:
        yield from _read_replica(self._replica)
        for transport, door in self._doors.items():
            labels = {"transport": transport}
            match door:
                case Endpoint():
                    yield from _read_websocket(door, labels)
                case QuicEndpoint():
                    yield from _read_webtransport(door, labels)
        if isinstance(self._replica.log, PostgresLog):
            yield from _read_postgres(self._replica.log)


def _read_replica(replica: Replica) -> Iterator[Reading]:
    hubs, delivery, flusher, runtime_statistics, log = (
        replica.statistics(),
        replica.delivery.statistics(),
        replica.flusher.statistics(),
        replica.runtime_statistics,
        replica.log,
    )
    yield "catbus_build_info", {"version": version()}, 1
    for state in STATES:
        yield "catbus_state", {"state": state}, state == replica.readiness
    if runtime_statistics.startup is not None:
        yield "catbus_startup_seconds", {}, runtime_statistics.startup
    if replica.certificates is not None:
        expires = replica.certificates.credentials(datetime.now(UTC)).expires
        yield "catbus_certificate_expiry_timestamp_seconds", {}, expires.timestamp()
    yield "catbus_event_loop_delay_seconds", {}, runtime_statistics.loop_delay
    yield "catbus_output_lines_dropped_total", {}, lost_lines.number
    for transport, number in hubs.clients.items():
        yield "catbus_sessions", {"transport": transport}, number
        yield "catbus_sessions_opened_total", {"transport": transport}, hubs.opened[transport]
    for code in ErrorCode:
        yield "catbus_refusals_total", {"code": code.value}, runtime_statistics.refusals[code]
    for pause, number in runtime_statistics.pauses.items():
        yield "catbus_reading_pauses_total", {"reason": pause}, number
    for reason in Reason:
        yield "catbus_tokens_refused_total", {"reason": reason.value}, runtime_statistics.refused_tokens[reason]
    yield "catbus_unauthenticated_bytes", {}, replica.unauthenticated.size
    yield "catbus_unauthenticated_evicted_total", {}, replica.unauthenticated.ended
    yield "catbus_publishes_total", {}, hubs.published
    yield "catbus_subscriptions", {"state": "live"}, delivery.live
    yield "catbus_subscriptions", {"state": "late"}, delivery.late
    yield "catbus_patterns", {}, delivery.patterns
    yield "catbus_deliveries_total", {}, delivery.delivered
    yield "catbus_delivery_latency_seconds", {}, runtime_statistics.delivery_latency
    yield "catbus_lag_messages", {}, delivery.lag
    yield "catbus_lags_total", {}, delivery.lags
    yield "catbus_sweeps_total", {}, delivery.sweeps
    yield "catbus_send_queue_bytes", {}, delivery.held
    yield "catbus_withdrawals_total", {}, delivery.withdrawals
    yield "catbus_cpu_waiting", {}, replica.cpu_scheduler.waiting
    yield "catbus_cpu_waits_total", {}, replica.cpu_scheduler.waits
    yield "catbus_flush_passes_total", {}, flusher.passes
    yield "catbus_flushes_total", {}, flusher.flushes
    yield "catbus_flush_seconds_total", {}, flusher.spent
    yield "catbus_log_available", {}, log.available
    yield "catbus_log_applied", {}, log.applied
    yield "catbus_log_floor", {}, log.floor


def _read_websocket(door: Endpoint, labels: Labels) -> Iterator[Reading]:
    found = door.statistics()
    yield "catbus_connections", labels, found.connections
    yield from _read_refused(found, labels)
    yield "catbus_connections_evicted_total", labels, found.evicted
    yield "catbus_accepts_failed_total", labels, found.starved
    yield "catbus_sent_bytes_total", labels, found.sent
    yield "catbus_received_bytes_total", labels, found.received
    yield "catbus_faults_total", labels, found.faults
    for (path, status), number in found.requests.items():
        yield "catbus_http_requests_total", {"path": path, "status": str(status)}, number


def _read_refused(found: EndpointStatistics | QuicStatistics, labels: Labels) -> Iterator[Reading]:
    yield "catbus_connections_refused_total", {**labels, "reason": "limit"}, found.refused
    yield "catbus_connections_refused_total", {**labels, "reason": "address"}, found.crowded


def _read_webtransport(door: QuicEndpoint, labels: Labels) -> Iterator[Reading]:
    found = door.statistics()
    yield "catbus_connections", labels, found.connections
    yield "catbus_sent_bytes_total", labels, found.sent
    yield "catbus_received_bytes_total", labels, found.received
    yield "catbus_faults_total", labels, found.faults
    yield from _read_refused(found, labels)
    yield "catbus_quic_half_open", {}, found.half_open
    yield "catbus_quic_handshakes_total", {"outcome": "begun"}, found.begun
    yield "catbus_quic_handshakes_total", {"outcome": "completed"}, found.completed
    yield "catbus_quic_datagrams_total", {"direction": "in"}, found.datagrams_in
    yield "catbus_quic_datagrams_total", {"direction": "out"}, found.datagrams_out
    yield "catbus_quic_datagrams_dropped_total", {"reason": "unknown"}, found.dropped - found.overdrawn
    yield "catbus_quic_datagrams_dropped_total", {"reason": "share"}, found.overdrawn
    yield "catbus_connections_evicted_total", labels, found.evicted
    yield "catbus_quic_violations_total", {}, found.violations
    yield "catbus_quic_packets_lost_total", {}, found.lost


def _read_postgres(log: PostgresLog) -> Iterator[Reading]:
    found = log.statistics()
    sizes = Histogram([2**power for power in range(len(found.batch_sizes))])
    sizes.counts[:-1], sizes.sum = found.batch_sizes, found.appended + found.duplicates
    yield "catbus_publishes_pending", {}, found.pending
    yield "catbus_publishes_pending_bytes", {}, found.pending_bytes
    yield "catbus_log_head", {}, found.announced
    yield "catbus_log_missing_messages", {}, found.missing
    yield "catbus_log_size_bytes", {}, found.table_size
    yield "catbus_log_recent_messages", {}, found.recent
    yield "catbus_log_recent_bytes", {}, found.recent_bytes
    yield "catbus_log_jumps_total", {}, found.jumps
    yield "catbus_log_reads_total", {}, found.reads
    yield "catbus_commit_messages", {}, sizes
    yield "catbus_commit_duration_seconds", {}, found.commit_duration
    yield "catbus_publish_latency_seconds", {}, found.publish_latency
    yield "catbus_publishes_duplicate_total", {}, found.duplicates
    yield "catbus_publishes_from_sql_total", {}, found.moved
    yield "catbus_listener_polling", {}, found.polling
    yield "catbus_listener_lag_messages", {}, max(0, found.announced - log.applied)
    yield "catbus_notifications_total", {}, found.notifications
    yield "catbus_notifications_dropped_total", {}, found.dropped
    yield "catbus_notifications_rejected_total", {}, found.rejected
    yield "catbus_notification_floods_total", {}, found.floods
    yield "catbus_notify_queue_usage_ratio", {}, found.queue
    yield "catbus_polls_total", {}, found.polls
    yield "catbus_retention_steps_total", {}, found.retention_steps
    yield "catbus_retention_dropped_messages_total", {}, found.retention_dropped
    yield "catbus_retention_held_total", {}, found.retention_held
    yield "catbus_ephemeral_total", {"direction": "out"}, found.ephemeral_sent
    yield "catbus_ephemeral_total", {"direction": "in"}, found.ephemeral_received
    yield "catbus_ephemeral_total", {"direction": "dropped"}, found.ephemeral_dropped
    yield "catbus_replicas", {}, found.replicas
    yield "catbus_database_restarts_total", {}, found.restarts
    yield "catbus_database_failures_total", {}, found.failures


def _family(kind: str, name: str, text: str, readings: list[tuple[Labels, float | Histogram]]) -> Metric:
    labels = list(readings[0][0])
    if kind == HISTOGRAM:
        family = HistogramMetricFamily(name, text, labels=labels)
        for values, found in readings:
            assert isinstance(found, Histogram)
            limits = [*map(str, found.bounds), "+Inf"]
            buckets = list(zip(limits, accumulate(found.counts), strict=True))
            family.add_metric(list(values.values()), buckets, found.sum)
        return family
    made = (GaugeMetricFamily if kind == GAUGE else CounterMetricFamily)(name, text, labels=labels)
    for values, found in readings:
        assert not isinstance(found, Histogram)
        made.add_metric(list(values.values()), float(found))
    return made
