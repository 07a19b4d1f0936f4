"""The table of metrics: each metric of a replica with its name, type, labels, description and value.

The parts of the broker count in plain numbers, which are read from here. `docs/metrics.md` has the same table, which a
test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from ..auth.token_errors import RejectionReason
from ..error_codes import ErrorCode
from ..postgres.log import PostgresStatistics
from ..postgres.maintenance.consumer_lags import ConsumerLag
from ..session.presence_watch import MAX_ALL_CHANGES
from ..version import version
from .histogram import Histogram
from .loggers import dropped_log_lines
from .metric_sources import MetricSources, Reading, by_transport, of_key_sets, of_postgres, of_quic, of_websocket

STATES = "starting", "ready", "degraded", "draining"

GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"


@dataclass(frozen=True, slots=True)
class MetricDeclaration:
    """A metric: its name, its type, a sentence about it, the names of its labels, and how it is read."""

    name: str
    kind: str
    text: str
    read: Callable[[MetricSources], Reading]
    labels: tuple[str, ...] = ()


def gauge(name: str, text: str, read: Callable[[MetricSources], Reading], *labels: str) -> MetricDeclaration:
    """Declare a number that rises and falls."""
    return MetricDeclaration(name, GAUGE, text, read, labels)


def counter(name: str, text: str, read: Callable[[MetricSources], Reading], *labels: str) -> MetricDeclaration:
    """Declare a number that only rises."""
    return MetricDeclaration(name, COUNTER, text, read, labels)


def histogram(name: str, text: str, read: Callable[[MetricSources], Reading]) -> MetricDeclaration:
    """Declare a distribution."""
    return MetricDeclaration(name, HISTOGRAM, text, read)


def _certificate_expiry(sources: MetricSources) -> float | None:
    if sources.replica.certificates is None:
        return None
    return sources.replica.certificates.credentials(datetime.now(UTC)).expires.timestamp()


def _rejected_connections(sources: MetricSources) -> Mapping[tuple[str, str], float]:
    return {
        (reason, transport): number
        for transport, found in sources.endpoints.items()
        for reason, number in (("limit", found.rejected), ("address", found.rejected_by_address))
    }


def of_consumers(read: Callable[[ConsumerLag], float]) -> Callable[[MetricSources], Reading]:
    """Read a value of each consumer, if the log is in PostgreSQL."""
    return of_postgres(lambda log: {name: read(lag) for name, lag in log.consumers.items()})


def _batch_sizes(found: PostgresStatistics) -> Histogram:
    sizes = Histogram([2**power for power in range(len(found.batch_sizes))])
    sizes.counts[:-1], sizes.sum = found.batch_sizes, found.appended + found.duplicates
    return sizes


SECTIONS: dict[str, tuple[MetricDeclaration, ...]] = {
    "The replica": (
        gauge("catbus_build_info", "1, for the running release.", lambda _: {version(): 1}, "version"),
        gauge(
            "catbus_worker_up",
            "1 for each worker that answers, 0 for one that does not.",
            lambda _: 1,
        ),
        counter(
            "catbus_worker_restarts_total",
            "How often the worker was started again.",
            lambda s: 0 if s.replica.worker is None else s.replica.worker.restarts,
        ),
        gauge(
            "catbus_state",
            "1 for the present state of the replica, 0 for the others.",
            lambda s: {state: state == s.replica.readiness for state in STATES},
            "state",
        ),
        gauge(
            "catbus_startup_seconds",
            "Time from the start until the log was open.",
            lambda s: s.replica.runtime_statistics.startup,
        ),
        gauge(
            "catbus_certificate_expiry_timestamp_seconds",
            "Expiry of the certificate, in seconds since 1970.",
            _certificate_expiry,
        ),
        histogram(
            "catbus_event_loop_delay_seconds",
            "Delay with which the event loop wakes a task.",
            lambda s: s.replica.runtime_statistics.loop_delay,
        ),
        counter(
            "catbus_output_lines_dropped_total",
            "Log lines dropped because the output was not read.",
            lambda _: dropped_log_lines.number,
        ),
    ),
    "Clients": (
        gauge("catbus_sessions", "Open sessions.", lambda s: s.sessions.sessions, "transport"),
        counter("catbus_sessions_opened_total", "Sessions opened.", lambda s: s.sessions.opened, "transport"),
        counter(
            "catbus_session_events_total",
            "Session events, published or dropped.",
            lambda s: s.replica.session_events.counts,
            "outcome",
        ),
        gauge(
            "catbus_connections",
            "Open connections, with or without a session.",
            by_transport(lambda endpoint: endpoint.connections),
            "transport",
        ),
        counter(
            "catbus_connections_rejected_total",
            "Connections rejected at the limit of all connections or of an address.",
            _rejected_connections,
            "reason",
            "transport",
        ),
        counter(
            "catbus_connections_evicted_total",
            "Unauthenticated connections closed at the limit to make room for others.",
            by_transport(lambda endpoint: endpoint.evicted),
            "transport",
        ),
        counter(
            "catbus_accepts_delayed_total",
            "Connections delayed because no file descriptor was free.",
            of_websocket(lambda endpoint: {"websocket": endpoint.accept_failures}),
            "transport",
        ),
        counter(
            "catbus_sent_bytes_total",
            "Bytes sent to clients.",
            by_transport(lambda endpoint: endpoint.sent),
            "transport",
        ),
        counter(
            "catbus_received_bytes_total",
            "Bytes received from clients.",
            by_transport(lambda endpoint: endpoint.received),
            "transport",
        ),
        counter(
            "catbus_http_requests_total",
            "HTTP responses.",
            of_websocket(
                lambda endpoint: {(path, str(status)): number for (path, status), number in endpoint.requests.items()}
            ),
            "path",
            "status",
        ),
        counter(
            "catbus_errors_sent_total",
            "Errors sent to clients, by code.",
            lambda s: {code.value: s.replica.runtime_statistics.errors_sent[code] for code in ErrorCode},
            "code",
        ),
        counter(
            "catbus_read_pauses_total",
            "Pauses in reading from a client that had reached a limit, by reason.",
            lambda s: s.replica.runtime_statistics.read_pauses,
            "reason",
        ),
        counter(
            "catbus_tokens_rejected_total",
            "Tokens rejected, by reason. The log has details.",
            lambda s: {
                reason.value: s.replica.runtime_statistics.rejected_tokens[reason] for reason in RejectionReason
            },
            "reason",
        ),
        gauge("catbus_revocations", "Clients with revoked tokens.", lambda s: len(s.replica.revocations)),
        counter(
            "catbus_sessions_revoked_total",
            "Sessions closed because their token was revoked.",
            lambda s: s.replica.revocations.closed,
        ),
        counter("catbus_key_set_fetches_total", "Fetches of JWT key sets.", of_key_sets(lambda found: found.fetches)),
        counter(
            "catbus_key_set_fetch_failures_total",
            "Fetches of JWT key sets that failed. The last keys stay in use.",
            of_key_sets(lambda found: found.failures),
        ),
        gauge(
            "catbus_key_set_age_seconds",
            "Time since the oldest JWT key set was fetched, or since the start.",
            of_key_sets(lambda found: found.age),
        ),
        counter(
            "catbus_internal_errors_total",
            "Internal errors that ended a request or a connection.",
            by_transport(lambda endpoint: endpoint.internal_errors),
            "transport",
        ),
        gauge(
            "catbus_unauthenticated_bytes",
            "Upper bound of the bytes kept for unauthenticated peers.",
            lambda s: s.replica.unauthenticated.size,
        ),
        counter(
            "catbus_unauthenticated_evicted_total",
            "Unauthenticated connections closed to free those bytes.",
            lambda s: s.replica.unauthenticated.evicted,
        ),
        gauge(
            "catbus_quic_half_open_connections",
            "QUIC connections without a session.",
            of_quic(lambda quic: quic.half_open),
        ),
        counter(
            "catbus_quic_handshakes_started_total",
            "QUIC handshakes started.",
            of_quic(lambda quic: quic.handshakes_begun),
        ),
        counter(
            "catbus_quic_handshakes_completed_total",
            "QUIC handshakes completed with a session.",
            of_quic(lambda quic: quic.handshakes_completed),
        ),
        counter(
            "catbus_quic_datagrams_total",
            "UDP datagrams.",
            of_quic(lambda quic: {"in": quic.datagrams_in, "out": quic.datagrams_out}),
            "direction",
        ),
        counter(
            "catbus_quic_datagrams_dropped_total",
            "UDP datagrams dropped, by reason: of no connection, too many of the same client or network waiting, or of "
            "another worker.",
            of_quic(
                lambda quic: {
                    "no_connection": quic.dropped - quic.dropped_over_share - quic.dropped_misrouted,
                    "queue_full": quic.dropped_over_share,
                    "other_worker": quic.dropped_misrouted,
                }
            ),
            "reason",
        ),
        counter(
            "catbus_quic_protocol_errors_total",
            "QUIC connections closed because the peer violated the protocol.",
            of_quic(lambda quic: quic.violations),
        ),
        counter("catbus_quic_packets_lost_total", "QUIC packets lost.", of_quic(lambda quic: quic.lost)),
    ),
    "Presence": (
        gauge(
            "catbus_presence_memberships",
            "Memberships of this replica's sessions: once for each session and channel.",
            lambda s: s.presence.memberships,
        ),
        gauge(
            "catbus_presence_patterns",
            "Patterns whose members are watched on this replica.",
            lambda s: s.presence.patterns,
        ),
        gauge(
            "catbus_presence_members",
            "Members in memory: those in the channels of these patterns; in a log in memory, all.",
            lambda s: s.presence.members,
        ),
        counter(
            "catbus_presence_events_total",
            "Members that joined, changed or left, in these channels.",
            lambda s: s.presence.events,
        ),
        counter(
            "catbus_presence_writes_total",
            "Statements that have written memberships.",
            lambda s: s.presence.writes,
        ),
        counter(
            "catbus_presence_written_total",
            "Memberships written by these statements.",
            lambda s: s.presence.written,
        ),
        counter(
            "catbus_presence_reads_total",
            "Statements that have read memberships for the watched patterns.",
            lambda s: s.presence.reads,
        ),
        counter(
            "catbus_presence_snapshots_total",
            "Snapshots of members begun for subscriptions. Some replace changes that a client did not read in time.",
            lambda s: s.presence_feed.snapshots,
        ),
        gauge(
            "catbus_presence_waiting_changes",
            f"Changed members that wait until a send queue has room: at most {MAX_ALL_CHANGES:,}, then snapshots.",
            lambda s: s.presence_feed.changes,
        ),
    ),
    "Publishing and delivery": (
        counter(
            "catbus_publishes_total",
            "Publishes received, whatever their outcome.",
            lambda s: s.sessions.published,
        ),
        gauge(
            "catbus_publishes_pending",
            "Publishes that wait to be appended.",
            of_postgres(lambda log: log.pending),
        ),
        gauge(
            "catbus_publishes_pending_bytes",
            "Bytes of publishes that wait to be appended.",
            of_postgres(lambda log: log.pending_bytes),
        ),
        gauge(
            "catbus_subscriptions",
            "Subscriptions that receive messages when they are committed (live), and that read from the log (lagging).",
            lambda s: {"live": s.delivery.live, "lagging": s.delivery.lagging},
            "state",
        ),
        gauge(
            "catbus_subscribed_patterns",
            "Distinct channels and patterns with subscriptions.",
            lambda s: s.delivery.patterns,
        ),
        counter(
            "catbus_deliveries_total",
            "Messages put into send queues, once for each subscription.",
            lambda s: s.delivery.delivered,
        ),
        histogram(
            "catbus_delivery_latency_seconds",
            "Time from the database's timestamp of a message until it is sent.",
            lambda s: s.replica.runtime_statistics.delivery_latency,
        ),
        gauge(
            "catbus_subscription_lag_messages",
            "Largest lag of a subscription, in messages.",
            lambda s: s.delivery.lag,
        ),
        counter(
            "catbus_subscriptions_lagged_total",
            "Times that a subscription began to lag.",
            lambda s: s.delivery.lags,
        ),
        counter(
            "catbus_catch_up_reads_total",
            "Pages of the log read for lagging subscriptions.",
            lambda s: s.delivery.sweeps,
        ),
        gauge("catbus_send_queue_bytes", "Memory of all send queues, in bytes.", lambda s: s.delivery.held),
        counter(
            "catbus_send_queue_withdrawals_total",
            "Times that messages were removed from a send queue, to be read from the log later.",
            lambda s: s.delivery.withdrawals,
        ),
        gauge(
            "catbus_cpu_waiting_connections",
            "Connections that wait for the CPU.",
            lambda s: s.replica.cpu_scheduler.waiting,
        ),
        counter(
            "catbus_cpu_waits_total",
            "Times that a connection waited for the CPU because its client had used much.",
            lambda s: s.replica.cpu_scheduler.waits,
        ),
        counter(
            "catbus_flush_passes_total",
            "Passes of the flusher over sessions with waiting data.",
            lambda s: s.flusher.passes,
        ),
        counter("catbus_flushes_total", "Send queues flushed.", lambda s: s.flusher.flushes),
        counter("catbus_flush_seconds_total", "Seconds spent in flusher passes.", lambda s: s.flusher.spent),
    ),
    "The log": (
        gauge(
            "catbus_log_available",
            "1 if the log can be written and read, 0 otherwise.",
            lambda s: s.replica.log.available,
        ),
        gauge(
            "catbus_log_applied",
            "Seq of the newest message that this replica has delivered.",
            lambda s: s.replica.log.applied,
        ),
        gauge("catbus_log_floor", "Seq of the oldest message in the log.", lambda s: s.replica.log.floor),
        gauge(
            "catbus_log_head",
            "Seq of the newest message known to be committed.",
            of_postgres(lambda log: log.announced),
        ),
        gauge(
            "catbus_log_missing_messages",
            "Messages deleted from the log by hand and not repaired.",
            of_postgres(lambda log: log.missing),
        ),
        counter(
            "catbus_log_erasures_total",
            "Erasures after which this replica has searched its memory for erased messages.",
            of_postgres(lambda log: log.erasures),
        ),
        gauge(
            "catbus_log_unvacuumed_tables",
            "Tables whose files still contain old rows of erased messages.",
            of_postgres(lambda log: log.unvacuumed),
        ),
        gauge(
            "catbus_retained_messages",
            "Retained messages at the last check.",
            of_postgres(lambda log: log.retained_messages),
        ),
        gauge(
            "catbus_retained_bytes",
            "Bytes of the channels, payloads and senders of retained messages at the last check.",
            of_postgres(lambda log: log.retained_bytes),
        ),
        gauge(
            "catbus_log_size_bytes",
            "Size of the log's tables with their indexes.",
            of_postgres(lambda log: log.table_size),
        ),
        gauge("catbus_log_recent_messages", "Recent messages kept in memory.", of_postgres(lambda log: log.recent)),
        gauge(
            "catbus_log_recent_bytes",
            "Bytes of recent messages kept in memory.",
            of_postgres(lambda log: log.recent_bytes),
        ),
        counter(
            "catbus_log_out_of_order_total",
            "Times that messages were read from the database because later ones arrived first.",
            of_postgres(lambda log: log.jumps),
        ),
        counter(
            "catbus_log_reads_total",
            "Pages of the log read from the database.",
            of_postgres(lambda log: log.reads),
        ),
        histogram("catbus_commit_messages", "Messages in a commit.", of_postgres(_batch_sizes)),
        histogram(
            "catbus_commit_duration_seconds",
            "Time from sending a batch to the database until its reply.",
            of_postgres(lambda log: log.commit_duration),
        ),
        histogram(
            "catbus_publish_latency_seconds",
            "Time from accepting a message until its commit, for the oldest message of a batch.",
            of_postgres(lambda log: log.publish_latency),
        ),
        counter(
            "catbus_publishes_duplicate_total",
            "Retries of messages that were already in the log.",
            of_postgres(lambda log: log.duplicates),
        ),
        counter(
            "catbus_publishes_conflict_total",
            "Publishes rejected because the channel had another retained message than they expected.",
            of_postgres(lambda log: log.conflicts),
        ),
        counter(
            "catbus_publishes_from_sql_total",
            "Messages from SQL that this replica has moved into the log.",
            of_postgres(lambda log: log.moved),
        ),
        gauge(
            "catbus_listener_polling",
            "1 while the replica polls because notifications do not arrive, 0 otherwise.",
            of_postgres(lambda log: log.polling),
        ),
        gauge(
            "catbus_listener_lag_messages",
            "Committed messages that this replica has not delivered yet.",
            lambda s: None if s.postgres is None else max(0, s.postgres.announced - s.replica.log.applied),
        ),
        counter(
            "catbus_notifications_received_total",
            "Notifications received.",
            of_postgres(lambda log: log.notifications),
        ),
        counter(
            "catbus_notifications_dropped_total",
            "Notifications dropped because the queue was full.",
            of_postgres(lambda log: log.dropped),
        ),
        counter(
            "catbus_notifications_rejected_total",
            "Notifications rejected because no replica of this log had sent them.",
            of_postgres(lambda log: log.rejected),
        ),
        counter(
            "catbus_notification_floods_total",
            "Times that rejected notifications were so many that the replica polled instead of listening.",
            of_postgres(lambda log: log.floods),
        ),
        gauge(
            "catbus_notify_queue_usage_ratio",
            "Used share of the database's notification queue.",
            of_postgres(lambda log: log.queue),
        ),
        counter("catbus_polls_total", "Times that the database was polled.", of_postgres(lambda log: log.polls)),
        counter(
            "catbus_retention_steps_total",
            "Parts of the log that this replica has closed or dropped.",
            of_postgres(lambda log: log.retention_steps),
        ),
        counter(
            "catbus_retention_messages_dropped_total",
            "Messages that this replica has dropped.",
            of_postgres(lambda log: log.retention_dropped),
        ),
        counter(
            "catbus_retention_blocked_total",
            "Times that a part could not be dropped because another session used its table.",
            of_postgres(lambda log: log.retention_held),
        ),
        gauge(
            "catbus_retention_held",
            "1 while a consumer with `hold` keeps a part that is too old, 0 otherwise.",
            of_postgres(lambda log: log.retention_held_by_consumer),
        ),
        counter(
            "catbus_ephemeral_sent_total",
            "Ephemeral messages sent to the other replicas.",
            of_postgres(lambda log: log.ephemeral_sent),
        ),
        counter(
            "catbus_ephemeral_received_total",
            "Ephemeral messages received from the other replicas.",
            of_postgres(lambda log: log.ephemeral_received),
        ),
        counter(
            "catbus_ephemeral_dropped_total",
            "Ephemeral messages that were not sent to the other replicas, or perhaps not.",
            of_postgres(lambda log: log.ephemeral_dropped),
        ),
        gauge(
            "catbus_replicas",
            "Replicas with a heartbeat within the last minute.",
            of_postgres(lambda log: log.replicas),
        ),
        counter(
            "catbus_database_task_restarts_total",
            "Restarts of tasks that use the database.",
            of_postgres(lambda log: log.restarts),
        ),
        counter(
            "catbus_database_task_failures_total",
            "Restarts because of an internal error.",
            of_postgres(lambda log: log.failures),
        ),
    ),
    "Consumers": (
        gauge(
            "catbus_consumer_lag_messages",
            "Messages of all channels that the slowest partition has not received.",
            of_consumers(lambda lag: lag.messages),
            "consumer",
        ),
        gauge(
            "catbus_consumer_lag_seconds",
            "Age of the oldest of these messages.",
            of_consumers(lambda lag: lag.seconds),
            "consumer",
        ),
        gauge(
            "catbus_consumer_gaps",
            "Partitions that retention has overtaken, so that receiving is an error.",
            of_consumers(lambda lag: lag.gaps),
            "consumer",
        ),
        gauge(
            "catbus_consumer_dead_letters",
            "Rejected messages that nobody has processed or deleted.",
            of_consumers(lambda lag: lag.dead_letters),
            "consumer",
        ),
    ),
    "Webhooks": (
        counter(
            "catbus_webhook_attempts_total",
            "Attempts of this replica to deliver a batch to a URL.",
            of_postgres(lambda log: log.webhooks.attempts),
            "outcome",
        ),
        histogram(
            "catbus_webhook_attempt_duration_seconds",
            "Time of an attempt, until the response or the error.",
            of_postgres(lambda log: log.webhooks.durations),
        ),
        counter(
            "catbus_webhook_messages_total",
            "Messages that receivers accepted, or that became dead letters after too many attempts.",
            of_postgres(lambda log: {"delivered": log.webhooks.messages, "dead": log.webhooks.rejected}),
            "outcome",
        ),
        counter(
            "catbus_webhook_pauses_total",
            "Consumers whose deliveries were paused because the receiver responded with 410.",
            of_postgres(lambda log: log.webhooks.paused),
        ),
        counter(
            "catbus_webhook_leases_lost_total",
            "Leases that could not be ended in time, so that a batch may be delivered again.",
            of_postgres(lambda log: log.webhooks.lost_leases),
        ),
        gauge(
            "catbus_webhook_deliveries",
            "Deliveries of this replica: running ones, and those that wait because too many run.",
            of_postgres(lambda log: {"running": log.webhooks.running, "waiting": log.webhooks.waiting}),
            "state",
        ),
        gauge(
            "catbus_webhook_open_circuits",
            "Consumers of which this replica makes one attempt at a time, because several have failed.",
            of_postgres(lambda log: log.webhooks.open_circuits),
        ),
    ),
}
"""All metrics, by their section in `docs/metrics.md`."""

METRICS = {declared.name: declared for section in SECTIONS.values() for declared in section}
