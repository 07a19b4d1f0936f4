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

from ..auth.token_errors import RejectionReason
from ..endpoints.http.http_endpoint import HttpEndpoint, HttpEndpointStatistics
from ..endpoints.webtransport.quic_endpoint import QuicEndpoint, QuicEndpointStatistics
from ..errors import ErrorCode
from ..postgres import PostgresLog
from ..replica import Replica
from ..version import version
from .histogram import Histogram
from .loggers import dropped_log_lines

STATES = "starting", "ready", "degraded", "draining"

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"

METRICS: dict[str, tuple[str, str]] = {
    # The replica
    "catbus_build_info": (GAUGE, "1, for the running release."),
    "catbus_state": (GAUGE, "1 for the present state of the replica, 0 for the others."),
    "catbus_startup_seconds": (GAUGE, "Time from the start until the log was open."),
    "catbus_certificate_expiry_timestamp_seconds": (GAUGE, "Expiry of the certificate, in seconds since 1970."),
    "catbus_event_loop_delay_seconds": (HISTOGRAM, "Delay with which the event loop wakes a task."),
    "catbus_output_lines_dropped_total": (COUNTER, "Log lines dropped because the output was not read."),
    # Clients
    "catbus_sessions": (GAUGE, "Open sessions."),
    "catbus_sessions_opened_total": (COUNTER, "Sessions opened."),
    "catbus_connections": (GAUGE, "Open connections, with or without a session."),
    "catbus_connections_refused_total": (
        COUNTER,
        "Connections rejected at the limit of all connections or of an address.",
    ),
    "catbus_connections_evicted_total": (
        COUNTER,
        "Unauthenticated connections closed at the limit to make room for others.",
    ),
    "catbus_accepts_failed_total": (COUNTER, "Connections delayed because no file descriptor was free."),
    "catbus_sent_bytes_total": (COUNTER, "Bytes sent to clients."),
    "catbus_received_bytes_total": (COUNTER, "Bytes received from clients."),
    "catbus_http_requests_total": (COUNTER, "HTTP responses."),
    "catbus_refusals_total": (COUNTER, "Errors sent to clients, by code."),
    "catbus_reading_pauses_total": (
        COUNTER,
        "Pauses in reading from a client that had reached a limit, by reason.",
    ),
    "catbus_tokens_refused_total": (COUNTER, "Tokens rejected, by reason. The log has details."),
    "catbus_faults_total": (COUNTER, "Internal errors that ended a request or a connection."),
    "catbus_quic_half_open": (GAUGE, "QUIC connections without a session."),
    "catbus_quic_handshakes_total": (COUNTER, "QUIC handshakes begun, and completed with a session."),
    "catbus_quic_datagrams_total": (COUNTER, "UDP datagrams."),
    "catbus_quic_datagrams_dropped_total": (
        COUNTER,
        "UDP datagrams dropped, by reason: no connection, or too many of the same client or network waiting.",
    ),
    "catbus_quic_violations_total": (COUNTER, "QUIC connections closed because the peer violated the protocol."),
    "catbus_quic_packets_lost_total": (COUNTER, "QUIC packets lost."),
    "catbus_unauthenticated_bytes": (GAUGE, "Upper bound of the bytes kept for unauthenticated peers."),
    "catbus_unauthenticated_evicted_total": (COUNTER, "Unauthenticated connections closed to free those bytes."),
    # Publishing and delivery
    "catbus_publishes_total": (COUNTER, "Publishes received, whatever their outcome."),
    "catbus_publishes_pending": (GAUGE, "Publishes that wait to be appended."),
    "catbus_publishes_pending_bytes": (GAUGE, "Bytes of publishes that wait to be appended."),
    "catbus_subscriptions": (
        GAUGE,
        "Subscriptions that receive messages when they are committed (live), and that read from the log (lagging).",
    ),
    "catbus_patterns": (GAUGE, "Distinct channels and patterns with subscriptions."),
    "catbus_deliveries_total": (COUNTER, "Messages put into send queues, once for each subscription."),
    "catbus_delivery_latency_seconds": (HISTOGRAM, "Time from the database's timestamp of a message until it is sent."),
    "catbus_lag_messages": (GAUGE, "Largest lag of a subscription, in messages."),
    "catbus_lags_total": (COUNTER, "Times that a subscription began to lag."),
    "catbus_sweeps_total": (COUNTER, "Pages of the log read for lagging subscriptions."),
    "catbus_send_queue_bytes": (GAUGE, "Memory of all send queues, in bytes."),
    "catbus_withdrawals_total": (
        COUNTER,
        "Times that messages were removed from a send queue, to be read from the log later.",
    ),
    "catbus_cpu_waiting": (GAUGE, "Connections that wait for the CPU."),
    "catbus_cpu_waits_total": (COUNTER, "Times that a connection waited for the CPU because its client had used much."),
    "catbus_flush_passes_total": (COUNTER, "Passes of the flusher over sessions with waiting data."),
    "catbus_flushes_total": (COUNTER, "Send queues flushed."),
    "catbus_flush_seconds_total": (COUNTER, "Seconds spent in flusher passes."),
    # The log
    "catbus_log_available": (GAUGE, "1 if the log can be written and read, 0 otherwise."),
    "catbus_log_applied": (GAUGE, "Seq of the newest message that this replica has delivered."),
    "catbus_log_floor": (GAUGE, "Seq of the oldest message in the log."),
    "catbus_log_head": (GAUGE, "Seq of the newest message known to be committed."),
    "catbus_log_missing_messages": (GAUGE, "Messages deleted from the log by hand and not repaired."),
    "catbus_log_size_bytes": (GAUGE, "Size of the log's tables with their indexes."),
    "catbus_log_recent_messages": (GAUGE, "Recent messages kept in memory."),
    "catbus_log_recent_bytes": (GAUGE, "Bytes of recent messages kept in memory."),
    "catbus_log_jumps_total": (
        COUNTER,
        "Times that messages were read from the database because a notification of later ones arrived first.",
    ),
    "catbus_log_reads_total": (COUNTER, "Pages of the log read from the database."),
    "catbus_commit_messages": (HISTOGRAM, "Messages in a commit."),
    "catbus_commit_duration_seconds": (HISTOGRAM, "Time from sending a batch to the database until its reply."),
    "catbus_publish_latency_seconds": (
        HISTOGRAM,
        "Time from accepting a message until its commit, for the oldest message of a batch.",
    ),
    "catbus_publishes_duplicate_total": (COUNTER, "Retries of messages that were already in the log."),
    "catbus_publishes_from_sql_total": (
        COUNTER,
        "Messages from SQL that this replica has moved into the log.",
    ),
    "catbus_listener_polling": (GAUGE, "1 while the replica polls because notifications do not arrive, 0 otherwise."),
    "catbus_listener_lag_messages": (GAUGE, "Committed messages that this replica has not delivered yet."),
    "catbus_notifications_total": (COUNTER, "Notifications received."),
    "catbus_notifications_dropped_total": (COUNTER, "Notifications dropped because the queue was full."),
    "catbus_notifications_rejected_total": (
        COUNTER,
        "Notifications rejected because no replica of this log had sent them.",
    ),
    "catbus_notification_floods_total": (
        COUNTER,
        "Times that rejected notifications were so many that the replica polled instead of listening.",
    ),
    "catbus_notify_queue_usage_ratio": (GAUGE, "Used share of the database's notification queue."),
    "catbus_polls_total": (COUNTER, "Times that the database was polled."),
    "catbus_retention_steps_total": (COUNTER, "Parts of the log that this replica has closed or dropped."),
    "catbus_retention_dropped_messages_total": (COUNTER, "Messages that this replica has dropped."),
    "catbus_retention_held_total": (
        COUNTER,
        "Times that a part could not be dropped because another session used its table.",
    ),
    "catbus_ephemeral_total": (COUNTER, "Ephemeral messages sent to other replicas, received from them, and lost."),
    "catbus_replicas": (GAUGE, "Replicas with a heartbeat within the last minute."),
    "catbus_database_restarts_total": (COUNTER, "Restarts of tasks that use the database."),
    "catbus_database_failures_total": (COUNTER, "Restarts because of an internal error."),
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
                case HttpEndpoint():
                    yield from _read_websocket(door, labels)
                case QuicEndpoint():
                    yield from _read_webtransport(door, labels)
        if isinstance(self._replica.log, PostgresLog):
            yield from _read_postgres(self._replica.log)


def _read_replica(replica: Replica) -> Iterator[Reading]:
    sessions, delivery, flusher, runtime_statistics, log = (
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
    yield "catbus_output_lines_dropped_total", {}, dropped_log_lines.number
    for transport, number in sessions.sessions.items():
        yield "catbus_sessions", {"transport": transport}, number
        yield "catbus_sessions_opened_total", {"transport": transport}, sessions.opened[transport]
    for code in ErrorCode:
        yield "catbus_refusals_total", {"code": code.value}, runtime_statistics.refusals[code]
    for pause, number in runtime_statistics.pauses.items():
        yield "catbus_reading_pauses_total", {"reason": pause}, number
    for reason in RejectionReason:
        yield "catbus_tokens_refused_total", {"reason": reason.value}, runtime_statistics.refused_tokens[reason]
    yield "catbus_unauthenticated_bytes", {}, replica.unauthenticated.size
    yield "catbus_unauthenticated_evicted_total", {}, replica.unauthenticated.ended
    yield "catbus_publishes_total", {}, sessions.published
    yield "catbus_subscriptions", {"state": "live"}, delivery.live
    yield "catbus_subscriptions", {"state": "lagging"}, delivery.lagging
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


def _read_websocket(door: HttpEndpoint, labels: Labels) -> Iterator[Reading]:
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


def _read_refused(found: HttpEndpointStatistics | QuicEndpointStatistics, labels: Labels) -> Iterator[Reading]:
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
