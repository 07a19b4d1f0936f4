"""The durable log: many replicas share it through one PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from ..config import DatabaseSettings, RetentionSettings
from ..errors import Unavailable
from ..log import Append, Entry, Follower, LogPage, RecentMessages, Rejected, Resumption
from ..log.interface import PENDING, PENDING_BYTES
from ..observability.histogram import Histogram
from .access.asyncpg_bridge import OUTAGE, Bridge, DatabaseConnection, open_bridge
from .access.migrations import migrate
from .access.reconnecting_tasks import ReconnectingTasks, ReportProgress
from .append.log_writer import LogWriter
from .ephemeral.ephemeral_relay import EphemeralRelay
from .follow.log_reader import LogReader, unavailable
from .follow.log_tail import LogTail
from .listen.notification_listener import NotificationListener
from .maintenance.heartbeat import Heartbeat
from .maintenance.log_retention import LogRetention
from .maintenance.schedule import MaintenanceSchedule
from .outbox_relay import OutboxRelay
from .roles.role_changes import RoleChanges
from .roles.role_lookup import RoleLookup

_ROWS, _SIZE = 1000, 1 << 20
"""The pages in which missing entries are read."""


@dataclass(frozen=True, slots=True)
class PostgresStatistics:
    """What a log has done since it was made. `batch_sizes`: how many batches had up to 1, 2, 4, 8, ... messages."""

    commits: int
    appended: int
    duplicates: int
    moved: int
    """Messages published from SQL that this replica has brought into the log."""
    batch_sizes: tuple[int, ...]
    commit_duration: Histogram
    publish_latency: Histogram
    pending: int
    pending_bytes: int
    recent: int
    recent_bytes: int
    notifications: int
    dropped: int
    """Notifications for which there was no room; the poll makes up for those of the log."""
    rejected: int
    """Notifications that no replica of this log has sent."""
    floods: int
    """How often there were so many of them that the replica stopped to listen for some seconds."""
    unannounced: int
    """How often the poll found what no notification had told of."""
    jumps: int
    """How often entries had to be read because those after them came first, or news came without them."""
    polls: int
    polling: bool
    """Whether news come by polling often, because notifications do not come, or do not tell of everything."""
    announced: int
    """The newest seq that is known to be committed."""
    missing: int
    """How many messages the log lacks that somebody has taken out by hand."""
    looks: int
    """How often messages published from SQL were looked for."""
    reads: int
    floor: int
    table_size: int
    """Bytes that the log took up when it was looked at last."""
    retention_steps: int
    """How often this replica closed a part of the log, or took one away."""
    retention_dropped: int
    """How many entries it took away."""
    retention_held: int
    """How often a part was to go and somebody used its table."""
    retention_stepped: int | None
    """When the last step was, in milliseconds since 1970."""
    ephemeral_sent: int
    """Ephemeral messages that went to the other replicas."""
    ephemeral_statements: int
    """How often some of them went, together."""
    ephemeral_received: int
    ephemeral_dropped: int
    """Those that did not go, or not for certain."""
    queue: float
    """How much of the database's notification queue was in use a few seconds ago, from 0 to 1."""
    replicas: int
    """How many replicas have said within the last minute that they are there."""
    restarts: int
    """How often a service was started again after an outage or a failure."""
    failures: int
    """How often because of a mistake of ours."""
    stray_errors: int


class PostgresLog:
    """A `Log` in PostgreSQL.

    `url` takes the place of the one in the settings. `recent`: how many bytes of the newest entries stay in memory;
    `pending`, `pending_bytes`: how much may wait to be written.
    """

    def __init__(
        self,
        settings: DatabaseSettings,
        retention: RetentionSettings | None = None,
        *,
        url: str | None = None,
        recent: int = 64 << 20,
        pending: int = PENDING,
        pending_bytes: int = PENDING_BYTES,
    ) -> None:
        self._settings = settings
        self._url = url or settings.url
        self._role_changes = RoleChanges()
        self.roles = RoleLookup(self._connect_vouched, self._role_changes)
        """Where those who show a role token are looked up, while the log runs."""
        self._server = ""
        self._bridge: Bridge | None = None
        self._services = ReconnectingTasks("schema", "listener", "writer", "reader")
        self._tail = LogTail(RecentMessages(recent))
        self._courier = EphemeralRelay(self._connect, self._tail)
        self._listener = NotificationListener(
            self._connect_listener,
            self._tail,
            lambda: self._writer.pid,
            self._courier,
            self._role_changes,
            lossless=settings.failover == "lossless",
        )
        self._reader = LogReader(self._connect_vouched)
        self._historian = LogReader(self._connect)
        self.describe: Callable[[], Mapping[str, Any]] = dict
        """What this replica has to say of itself to whoever asks any of them; as it is written in JSON."""
        self._roll = Heartbeat(lambda: self.describe())
        self._retention = LogRetention(retention or RetentionSettings())
        self._housekeeping = MaintenanceSchedule(self._connect, self._retention, self._roll)
        self._writer = LogWriter(
            self._connect_vouched,
            self._tail,
            self._listener.check,
            synchronous_commit=settings.synchronous_commit,
            timeout=settings.publish_timeout,
            pending=pending,
            pending_bytes=pending_bytes,
        )
        self._outbox = OutboxRelay(self._connect, self._writer.move)

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
    def recent(self) -> int:
        return self._tail.recent.first

    @property
    def available(self) -> bool:
        return self._services.available

    @property
    def trouble(self) -> str:
        if not self.available:
            return "database"
        return "messages are missing" if self._listener.holes.report.holes else ""

    @property
    def allowance(self) -> int:
        return self._writer.allowance

    def submit(self, append: Append) -> None:
        self._writer.submit(append)

    def withdraw(self, client: Hashable, unwanted: Callable[[Append], bool], refusal: Rejected) -> None:
        self._writer.withdraw(client, unwanted, refusal)

    def broadcast(self, entry: Entry) -> None:
        self._courier.broadcast(entry)

    async def read(self, after: int, *, rows: int = 1000, size: int = 1 << 20) -> LogPage:
        while True:
            await trio.lowlevel.checkpoint()
            tail = self._tail
            # What is below the floor is gone for everybody, though some of it may still be in memory.
            start = max(after, self.floor - 1)
            page = tail.recent.since(start, rows, size)
            if page is not None:
                return page
            generation = tail.generation
            try:
                page = await self._reader.page(start, tail.applied, rows, size)
            except OUTAGE as error:
                raise unavailable(error) from error
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
        return await self._historian.history(pattern, newest + 1, limit)

    def resume(self, since: int, epoch: str | None) -> Resumption:
        listener = self._listener
        if epoch is None or epoch == self.epoch:
            if since > self._tail.announced:
                listener.question()
            return Resumption(since)
        if epoch not in listener.epochs:
            listener.question()
        return listener.epochs.resume(since, epoch)

    async def wait_open(self) -> None:
        await self._tail.wait_epoch()

    def report(self) -> dict[str, object]:
        retention, roll, tail = self._retention, self._roll, self._tail
        holes = self._listener.holes.report
        return {
            "available": self.available,
            "server": self._server,
            "size": retention.bytes,
            "news": "polling" if self._listener.pace.polling else "notifications",
            "behind": tail.announced - tail.applied,
            "missing": holes.missing,
            "holes": [list(hole) for hole in holes.ranges],
            "notify_queue": roll.queue,
            "roles": roll.roles,
            "replicas": [
                {**replica.report, "id": replica.id, "silent": round(replica.silent, 1)} for replica in roll.replicas
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
        writer, listener, tail, services = self._writer, self._listener, self._tail, self._services
        courier, retention = self._courier, self._retention
        return PostgresStatistics(
            commits=writer.commits,
            appended=writer.appended,
            duplicates=writer.duplicates,
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
            rejected=listener.intruders.rejected,
            floods=listener.intruders.floods,
            unannounced=listener.pace.unannounced,
            jumps=tail.jumps,
            polls=listener.polls,
            polling=listener.pace.polling,
            announced=tail.announced,
            missing=listener.holes.report.missing,
            looks=self._outbox.looks,
            reads=self._reader.reads + self._historian.reads,
            floor=self.floor,
            table_size=retention.bytes,
            retention_steps=retention.steps,
            retention_dropped=retention.dropped,
            retention_held=retention.held,
            retention_stepped=retention.stepped,
            ephemeral_sent=courier.sent,
            ephemeral_statements=courier.statements,
            ephemeral_received=courier.received,
            ephemeral_dropped=courier.dropped,
            queue=self._roll.queue,
            replicas=len(self._roll.replicas),
            restarts=services.restarts,
            failures=services.failures,
            stray_errors=0 if self._bridge is None else self._bridge.stray_errors,
        )

    async def run(self, follower: Follower, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._tail.follow(follower)
        task_status.started()
        try:
            async with open_bridge() as self._bridge, trio.open_nursery() as nursery:
                nursery.start_soon(self._writer.expire)
                nursery.start_soon(self.roles.run)
                await self._services.run("schema", self._prepare)
                nursery.start_soon(self._services.run, "listener", self._listener.run)
                nursery.start_soon(self._services.run, "writer", self._writer.run)
                nursery.start_soon(self._services.run, "reader", self._read_missing)
                nursery.start_soon(self._services.run, "courier", self._courier.run)
                nursery.start_soon(self._services.run, "outbox", self._outbox.run)
                nursery.start_soon(self._services.run, "housekeeping", self._housekeeping.run)
        finally:
            self._services.stop()
            self._writer.abandon()

    async def _prepare(self, working: ReportProgress) -> None:
        with await self._connect() as connection:
            await migrate(connection)
            self._server = f"PostgreSQL {connection.version}" + (", through TLS" if connection.encrypted else "")
        working()

    async def _read_missing(self, working: ReportProgress) -> None:
        """Read what the tail lacks, whenever it lacks something."""
        tail = self._tail
        await self._reader.connect()
        working()
        while True:
            after, last = await tail.wait_missing()
            generation = tail.generation
            page = await self._reader.page(after, last, _ROWS, _SIZE)
            tail.fill(page, generation)
            working()

    async def _connect(self) -> DatabaseConnection:
        return await self._dial(self._url)

    async def _connect_vouched(self) -> DatabaseConnection:
        """A connection to the log that the tail follows, or is about to follow: not to one that was set back since."""
        connection = await self._connect()
        try:
            with trio.move_on_after(self._settings.connect_timeout):
                await self._listener.vouch()
                return connection
        except BaseException:
            connection.terminate()
            raise
        connection.terminate()
        raise TimeoutError("nobody can say whether the log is still the same")

    async def _connect_listener(self) -> DatabaseConnection:
        if self._settings.listen_url is None:
            return await self._connect()
        return await self._dial(self._settings.listen_url, "listen_url")

    async def _dial(self, url: str, setting: str = "url") -> DatabaseConnection:
        if self._bridge is None:
            raise OSError("the log is not running")
        return await self._bridge.connect(url, self._settings.connect_timeout, setting=setting)
