"""The durable log in PostgreSQL, which any number of replicas share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio

from ..config import DatabaseSettings, RetentionSettings, WebhookSettings
from ..errors import Unavailable
from ..log import Append, Entry, Follower, LogPage, RecentMessages, Rejected, Resumption, RetainedPage
from ..log.interface import MAX_PENDING, MAX_PENDING_BYTES
from ..observability.histogram import Histogram
from .access.asyncpg_bridge import DATABASE_ERRORS, Bridge, DatabaseConnection, open_bridge
from .access.migrations import migrate
from .access.reconnecting_tasks import ReconnectingTasks, ReportProgress
from .access.single_statements import SingleStatements
from .append.log_writer import LogWriter
from .consumers.consumer_administration import ConsumerAdministration
from .ephemeral.ephemeral_relay import EphemeralRelay
from .follow.log_reader import LogReader, read_error
from .follow.log_tail import LogTail
from .listen.notification_listener import NotificationListener
from .maintenance.consumer_lags import ConsumerLag, ConsumerLags
from .maintenance.erasure import Selection, erase_messages
from .maintenance.heartbeat import Heartbeat
from .maintenance.log_retention import LogRetention
from .maintenance.retained_budget import RetainedBudget
from .maintenance.schedule import MaintenanceSchedule
from .maintenance.vacuum import Vacuum
from .outbox_relay import OutboxRelay
from .presence.stored_presence import StoredPresence
from .revocations.stored_revocations import StoredRevocations
from .roles.role_changes import RoleChanges
from .roles.role_lookup import RoleLookup
from .webhooks.webhook_delivery import WebhookDelivery, WebhookStatistics

_ROWS, _SIZE = 1000, 1 << 20
"""Rows and bytes of a page in which missing entries are read."""


@dataclass(frozen=True, slots=True)
class PostgresStatistics:
    """The statistics of a log since its start. `batch_sizes` counts batches of up to 1, 2, 4, ... messages."""

    commits: int
    appended: int
    duplicates: int
    conflicts: int
    """Messages that were rejected because of another retained message than the expected one."""
    moved: int
    """Messages published from SQL that this replica has moved into the log."""
    batch_sizes: tuple[int, ...]
    commit_duration: Histogram
    publish_latency: Histogram
    pending: int
    pending_bytes: int
    recent: int
    recent_bytes: int
    notifications: int
    dropped: int
    """Notifications that were dropped because too many waited. Polls replace those of the log."""
    rejected: int
    """Forged notifications."""
    floods: int
    """How often a flood of them made the replica stop listening for some seconds."""
    unannounced: int
    """How often a poll found commits that no notification had announced."""
    jumps: int
    """How often entries had to be read, because later ones or only their position arrived."""
    polls: int
    polling: bool
    """Whether the replica polls often, because notifications do not arrive or do not announce everything."""
    announced: int
    """The newest seq that is known to be committed."""
    missing: int
    """How many messages are missing in the log because somebody deleted them by hand."""
    erasures: int
    """How often messages were erased that this replica might have in memory."""
    retained_messages: int
    """Retained messages at the last check."""
    retained_bytes: int
    """Bytes of their texts at the last check."""
    unvacuumed: int
    """Tables that have old rows of erased messages, at the last check."""
    looks: int
    """How often the outbox was polled."""
    reads: int
    floor: int
    table_size: int
    """Bytes of the log at the last check."""
    retention_steps: int
    """How often this replica closed or emptied a partition."""
    retention_dropped: int
    """How many entries it removed."""
    retention_held: int
    """How often a transaction used a partition that was to be emptied."""
    retention_held_by_consumer: bool
    """Whether a consumer with `hold` kept a partition that is too old, at the last check."""
    consumers: Mapping[str, ConsumerLag]
    """Consumers by name at the last measurement, and those beyond a limit together: see `consumer_lags.collect`."""
    retention_stepped: int | None
    """The time of the last step, in milliseconds since 1970."""
    ephemeral_sent: int
    """Ephemeral messages that were sent to the other replicas."""
    ephemeral_statements: int
    """Statements that have sent them."""
    ephemeral_received: int
    ephemeral_dropped: int
    """Ephemeral messages that were not sent, or not with certainty."""
    queue: float
    """How much of the database's notification queue was in use at the last heartbeat, from 0 to 1."""
    replicas: int
    """The number of replicas with a heartbeat within the last minute."""
    restarts: int
    """How often a service was started again after an outage or an unexpected error."""
    failures: int
    """How often because of an unexpected error, which is a bug."""
    stray_errors: int
    webhooks: WebhookStatistics


class PostgresLog:
    """A `Log` in PostgreSQL.

    `url` replaces the one in the settings. `recent`: bytes of the newest entries that stay in memory. `pending` and
    `pending_bytes`: publishes that may wait to be appended. `presence_grace`: see `StoredPresence`. `webhooks`: whether
    and how this replica delivers messages to URLs.
    """

    def __init__(
        self,
        settings: DatabaseSettings,
        retention: RetentionSettings | None = None,
        webhooks: WebhookSettings | None = None,
        *,
        url: str | None = None,
        recent: int = 64 << 20,
        pending: int = MAX_PENDING,
        pending_bytes: int = MAX_PENDING_BYTES,
        presence_grace: float = 10.0,
    ) -> None:
        self._settings = settings
        self._url = url or settings.url
        self._role_changes = RoleChanges()
        self.roles = RoleLookup(self._connect_verified, self._role_changes)
        """Looks up role tokens while the log runs."""
        self.revocations = StoredRevocations(self._connect_verified)
        self.presence = StoredPresence(self._connect, presence_grace)
        """The members of channels, for the sessions of this replica, while the log runs."""
        self.consumers = ConsumerAdministration(SingleStatements(self._connect))
        """The consumers, for administrators, while the log runs."""
        self._server = ""
        self._bridge: Bridge | None = None
        self._tasks = ReconnectingTasks("schema", "listener", "writer", "reader")
        self._tail = LogTail(RecentMessages(recent))
        self._relay = EphemeralRelay(self._connect, self._tail)
        self._listener = NotificationListener(
            self._connect_listener,
            self._tail,
            lambda: self._writer.pid,
            self._relay,
            self._role_changes,
            self.revocations,
            self.presence.reader.note_version,
            lossless=settings.failover == "lossless",
        )
        self._reader = LogReader(self._connect_verified)
        self._history_reader = LogReader(self._connect)
        self._heartbeat = Heartbeat()
        retention = retention or RetentionSettings()
        self._retention = LogRetention(retention)
        self._retained_budget = RetainedBudget(retention.retained)
        self._vacuum = Vacuum()
        self._consumer_lags = ConsumerLags()
        self._maintenance = MaintenanceSchedule(
            self._connect,
            self._retention,
            self._retained_budget,
            self._heartbeat,
            self._vacuum,
            self._consumer_lags,
        )
        self._writer = LogWriter(
            self._connect_verified,
            self._tail,
            self._listener.poll_now,
            synchronous_commit=settings.synchronous_commit,
            timeout=settings.publish_timeout,
            pending=pending,
            pending_bytes=pending_bytes,
        )
        self._outbox_relay = OutboxRelay(self._connect, self._writer.move)
        self._webhook_settings = webhooks or WebhookSettings()
        self._webhooks = WebhookDelivery(self._connect, lambda: self._tail.applied, self._webhook_settings)

    @property
    def epoch(self) -> str:
        return self._tail.epoch

    @property
    def applied(self) -> int:
        return self._tail.applied

    @property
    def floor(self) -> int:
        return min(self._tail.floor, self._tail.applied + 1)

    @property
    def memory_floor(self) -> int:
        return self._tail.recent.first

    @property
    def available(self) -> bool:
        return self._tasks.available

    @property
    def problem(self) -> str:
        if not self.available:
            return "database"
        return "messages are missing" if self._listener.deleted_ranges.report.count else ""

    @property
    def allowance(self) -> int:
        return self._writer.allowance

    def submit(self, append: Append) -> None:
        self._writer.submit(append)

    def withdraw(self, client: Hashable, unwanted: Callable[[Append], bool], rejected: Rejected) -> None:
        self._writer.withdraw(client, unwanted, rejected)

    def broadcast(self, entry: Entry) -> None:
        self._relay.broadcast(entry)

    async def read(self, after: int, *, rows: int = 1000, size: int = 1 << 20) -> LogPage:
        while True:
            await trio.lowlevel.checkpoint()
            tail = self._tail
            # Entries below the floor are removed for all readers, even if they are still in memory.
            start = max(after, self.floor - 1)
            page = tail.recent.since(start, rows, size)
            if page is not None:
                return page
            generation = tail.generation
            try:
                page = await self._reader.page(tail.epoch, start, tail.applied, rows, size)
            except DATABASE_ERRORS as error:
                raise read_error(error) from error
            if generation == tail.generation:
                if page.last == start:
                    raise Unavailable("the log is another one, and not open yet")
                return page

    async def history(self, pattern: str, *, before: int | None, limit: int) -> tuple[Sequence[Entry], bool]:
        newest = self.applied if before is None else min(before - 1, self.applied)
        await trio.lowlevel.checkpoint()
        found, rest = self._tail.recent.search(pattern, newest, self.floor, limit + 1)
        if len(found) > limit or (self.epoch and rest < self.floor):
            return found[:limit][::-1], len(found) > limit
        epoch, generation = self.epoch, self._tail.generation
        entries, more = await self._history_reader.history(epoch, pattern, newest + 1, limit)
        while entries and generation != self._tail.generation:
            # Some of them may have been erased after they were read.
            generation = self._tail.generation
            entries = await self._history_reader.without_erased(entries)
        if epoch != self.epoch:
            raise Unavailable("the log has another epoch: read again")
        return entries, more

    async def retained(
        self,
        pattern: str,
        *,
        after: str | None,
        until: int,
        rows: int = 1000,
        size: int = 1 << 20,
        newer: bool = False,
    ) -> RetainedPage:
        epoch = self.epoch
        while True:
            generation = self._tail.generation
            page = await self._history_reader.retained(epoch, pattern, after, until, rows, size, newer)
            if generation == self._tail.generation:
                return page
            # Some of them may have been erased after they were read. If the log has another epoch, the next try fails.

    async def erase(self, pattern: str, *, sender: str | None = None, before: int | None = None) -> int:
        try:
            with await self._connect() as connection:
                return await erase_messages(connection, Selection(pattern, sender, before), apply=True)
        except DATABASE_ERRORS as error:
            raise Unavailable(f"not all of it may be erased ({type(error).__name__})") from error

    def resume(self, since: int, epoch: str | None) -> Resumption:
        listener = self._listener
        if epoch is None or epoch == self.epoch:
            if since > self._tail.announced:
                listener.poll_soon()
            return Resumption(since)
        if epoch not in listener.epochs:
            listener.poll_soon()
        return listener.epochs.resume(since, epoch)

    async def finish(self) -> None:
        await self._webhooks.finish()

    async def wait_open(self) -> None:
        await self._tail.wait_epoch()

    def report(self) -> dict[str, object]:
        retention, heartbeat, tail = self._retention, self._heartbeat, self._tail
        deleted = self._listener.deleted_ranges.report
        return {
            "available": self.available,
            "server": self._server,
            "size": retention.bytes,
            "news": "polling" if self._listener.polling_interval.polling else "notifications",
            "behind": tail.announced - tail.applied,
            "missing": deleted.missing,
            "holes": [list(each) for each in deleted.ranges],
            "notify_queue": heartbeat.queue,
            "retained": {"messages": self._retained_budget.messages, "bytes": self._retained_budget.bytes},
            "roles": heartbeat.roles,
            "replicas": [
                {**replica.report, "id": replica.id, "silent": round(replica.age, 1)} for replica in heartbeat.replicas
            ],
            "retention": {
                "steps": retention.steps,
                "dropped": retention.dropped,
                "stepped": retention.stepped,
                "held": retention.held,
                "holders": retention.holders,
            },
        }

    def statistics(self) -> PostgresStatistics:
        writer, listener, tail, services = self._writer, self._listener, self._tail, self._tasks
        relay, retention = self._relay, self._retention
        return PostgresStatistics(
            commits=writer.commits,
            appended=writer.appended,
            duplicates=writer.duplicates,
            conflicts=writer.conflicts,
            moved=writer.moved,
            batch_sizes=tuple(writer.sizes),
            commit_duration=writer.commit_duration,
            publish_latency=writer.publish_latency,
            pending=writer.pending,
            pending_bytes=writer.pending_bytes,
            recent=len(tail.recent),
            recent_bytes=tail.recent.size,
            notifications=listener.notifications,
            dropped=listener.dropped,
            rejected=listener.forged.rejected,
            floods=listener.forged.floods,
            unannounced=listener.polling_interval.unannounced,
            jumps=tail.jumps,
            polls=listener.polls,
            polling=listener.polling_interval.polling,
            announced=tail.announced,
            missing=listener.deleted_ranges.report.missing,
            erasures=listener.erasures,
            retained_messages=self._retained_budget.messages,
            retained_bytes=self._retained_budget.bytes,
            unvacuumed=self._vacuum.due,
            looks=self._outbox_relay.looks,
            reads=self._reader.reads + self._history_reader.reads,
            floor=self.floor,
            table_size=retention.bytes,
            retention_steps=retention.steps,
            retention_dropped=retention.dropped,
            retention_held=retention.held,
            retention_held_by_consumer=retention.held_by_consumer,
            consumers=self._consumer_lags.consumers,
            retention_stepped=retention.stepped,
            ephemeral_sent=relay.sent,
            ephemeral_statements=relay.statements,
            ephemeral_received=relay.received,
            ephemeral_dropped=relay.dropped,
            queue=self._heartbeat.queue,
            replicas=len(self._heartbeat.replicas),
            restarts=services.restarts,
            failures=services.failures,
            stray_errors=0 if self._bridge is None else self._bridge.stray_errors,
            webhooks=self._webhooks.statistics(),
        )

    async def run(
        self,
        follower: Follower,
        describe: Callable[[], Mapping[str, Any]] = dict,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        self._tail.follow(follower)
        task_status.started()
        try:
            async with open_bridge() as self._bridge, trio.open_nursery() as nursery:
                nursery.start_soon(self._writer.expire)
                nursery.start_soon(self.roles.run)
                await self._tasks.run("schema", self._prepare)
                nursery.start_soon(self._tasks.run, "listener", self._listener.run)
                nursery.start_soon(self._tasks.run, "writer", self._writer.run)
                nursery.start_soon(self._tasks.run, "reader", self._read_missing)
                nursery.start_soon(self._tasks.run, "revocations", self.revocations.follow)
                nursery.start_soon(self._tasks.run, "relay", self._relay.run)
                nursery.start_soon(self._tasks.run, "presence writer", self.presence.writer.run)
                nursery.start_soon(self._tasks.run, "presence reader", self.presence.reader.run)
                nursery.start_soon(self._tasks.run, "outbox", self._outbox_relay.run)
                nursery.start_soon(self._tasks.run, "maintenance", partial(self._maintenance.run, describe))
                if self._webhook_settings.enabled:
                    nursery.start_soon(self._tasks.run, "webhooks", partial(self._webhooks.run, nursery))
        finally:
            self._tasks.stop()
            self._writer.abandon()
            await self._webhooks.close()

    async def _prepare(self, report_progress: ReportProgress) -> None:
        with await self._connect() as connection:
            await migrate(connection)
            self._server = f"PostgreSQL {connection.version}" + (", through TLS" if connection.encrypted else "")
        report_progress()

    async def _read_missing(self, report_progress: ReportProgress) -> None:
        """Read the entries that the tail misses, whenever it misses some."""
        tail = self._tail
        await self._reader.connect()
        report_progress()
        while True:
            after, last = await tail.wait_missing()
            generation = tail.generation
            page = await self._reader.page(tail.epoch, after, last, _ROWS, _SIZE)
            tail.fill(page, generation)
            report_progress()

    async def _connect(self) -> DatabaseConnection:
        return await self._dial(self._url)

    async def _connect_verified(self) -> DatabaseConnection:
        """Connect to the log that the tail follows, or is about to follow, and not to one that was set back since."""
        connection = await self._connect()
        try:
            with trio.move_on_after(self._settings.connect_timeout):
                await self._listener.wait_verified()
                return connection
        except BaseException:
            connection.terminate()
            raise
        connection.terminate()
        raise TimeoutError("no poll has verified that the log is still the same")

    async def _connect_listener(self) -> DatabaseConnection:
        if self._settings.listen_url is None:
            return await self._connect()
        return await self._dial(self._settings.listen_url, "listen_url")

    async def _dial(self, url: str, setting: str = "url") -> DatabaseConnection:
        if self._bridge is None:
            raise OSError("the log is not running")
        return await self._bridge.connect(url, self._settings.connect_timeout, setting=setting)
