"""The listener: notifications as hints, polls as the fallback, and the detection of another log."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

import msgspec
import trio

from ...observability.loggers import get_logger
from ..access.asyncpg_bridge import DatabaseConnection
from ..access.reconnecting_tasks import ReportProgress
from ..append.append_batch import decode_enclosed
from ..ephemeral.ephemeral_relay import EphemeralRelay
from ..follow.deleted_ranges import DeletedRanges
from ..follow.epoch_history import EpochHistory
from ..follow.fingerprints import same_entry
from ..follow.log_tail import LogTail
from ..notifications.encryption import (
    EPHEMERAL_CHANNEL,
    LOG_CHANNEL,
    PRESENCE_CHANNEL,
    ROLES_CHANNEL,
    ForgedNotificationError,
    NotificationKeys,
)
from ..revocations.stored_revocations import StoredRevocations
from ..roles.role_changes import RoleChanges
from .forged_notifications import ForgedNotifications
from .polling_interval import PollingInterval

logger = get_logger("catbus.postgres")

POLL_TIMEOUT = 2.5
"""Seconds for a poll. After that the connection is dropped: at the latest 4.5 s after it died."""
_QUEUE_LENGTH = 10_000
"""Notifications that may wait. Further ones are dropped, and polls replace them."""
_HINTED_POLL_INTERVAL = 0.05
"""Seconds between polls that notifications cause: a repeated notification causes one poll in each interval."""

_MAX_ATTEMPTS = 10
"""How often the log may turn out to be yet another one before the connection is dropped."""
_QUESTION_INTERVAL = 1.0
"""Seconds between polls that the cursors of clients cause."""

_STANDBY = "SELECT pg_is_in_recovery()"
_READ_SECRET = "SELECT h.notification_secret FROM catbus.head AS h"
_POLL = (
    "SELECT epoch, head, floor, fingerprint, standby, same_system, same_timeline, role_version, "
    "revocation_version, deleted_ranges_version, erasure, pg_postmaster_start_time(), "
    "extract(epoch FROM clock_timestamp())::double precision "
    "FROM catbus.poll($1)"
)
_ERASED_SEQS = "SELECT catbus.erased_seqs($1, $2), (SELECT p.floor FROM catbus.log_position() AS p)"
_FINGERPRINT = "SELECT catbus.fingerprint($1)"
_NEW_EPOCH = "CALL catbus.new_epoch_transaction($1, $2, NULL, NULL, NULL)"
_KEEP_EPOCH = "SELECT catbus.keep_epoch($1)"
_EPOCHS = """
SELECT e.epoch, e.after_seq FROM catbus.epochs AS e JOIN catbus.epochs AS newest ON e.ordinal <= newest.ordinal
WHERE newest.epoch = $1 ORDER BY e.ordinal
"""


class _PollResult(NamedTuple):
    """The columns of `catbus.poll`, and of the server."""

    epoch: str
    head: int
    floor: int
    fingerprint: bytes | None
    standby: bool
    same_system: bool | None
    same_timeline: bool | None
    role_version: str
    revocation_version: str
    deleted_ranges_version: int | None
    erasure: int
    server: object
    clock: float
    """The database's time in seconds since 1970."""


class NotificationListener:
    """Feeds the tail, through a connection of its own. `own_pid` identifies notifications of the own writer.

    Each poll also verifies that the database still has the log that the tail has followed. If it has another one, or
    nothing shows which one it has, a new epoch begins. With `lossless`, a promoted standby is trusted to have all
    entries.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[DatabaseConnection]],
        tail: LogTail,
        own_pid: Callable[[], int],
        relay: EphemeralRelay,
        role_changes: RoleChanges,
        revocations: StoredRevocations,
        note_presence: Callable[[int], None],
        *,
        lossless: bool = False,
    ) -> None:
        self.epochs = EpochHistory()
        self.deleted_ranges = DeletedRanges()
        self.notifications = 0
        self.dropped = 0
        """Notifications that were dropped because too many waited."""
        self.polls = 0
        self.erasures = 0
        """How often messages were erased that this replica might have in memory."""
        self.polling_interval = PollingInterval()
        self.forged = ForgedNotifications()
        self._connect = connect
        self._tail = tail
        self._own_pid = own_pid
        self._relay = relay
        self._role_changes = role_changes
        self._revocations = revocations
        self._note_presence = note_presence
        self._lossless = lossless
        self._received: deque[Callable[[], None]] = deque()
        self._has_received = trio.Event()
        self._poll_requested = trio.Event()
        self._poll_hinted = trio.Event()
        self._verified_poll = 0
        """The number of the last poll that verified the log."""
        self._verified = trio.Event()
        self._questioned = 0.0
        self._database_time = 0.0
        """The database's time at the last poll, in seconds since 1970."""
        self._erasure: tuple[str, int] | None = None
        """The newest erasure that is applied to the memory of this replica, and its epoch; None before the first poll.
        """
        self._standby = False
        self._polling = False
        self._listening = False

    def poll_now(self) -> None:
        """Poll at once, as the database may have another log."""
        self._poll_requested.set()

    def poll_soon(self) -> None:
        """Poll soon: the cursor of a client suggests another log, or is wrong."""
        now = trio.current_time()
        if now >= self._questioned + _QUESTION_INTERVAL:
            self._questioned = now
            self.poll_now()

    async def wait_verified(self) -> None:
        """Wait until a poll that begins after this has verified the log.

        A connection that was opened before leads to the verified log, as there is only one primary. Behind a pooler
        that is true while the server is the same.
        """
        wanted = self.polls + 1
        self.poll_now()
        while self._verified_poll < wanted:
            await self._verified.wait()

    async def run(self, report_progress: ReportProgress) -> None:
        """Listen until the connection is lost. LISTEN comes before the first poll, so that nothing is missed."""
        with await self._connect() as connection:
            self._received.clear()
            connection.when_closed(self._note_closed)
            # A standby rejects LISTEN.
            (standby,) = await connection.fetchrow(_STANDBY, timeout=POLL_TIMEOUT)
            self._refuse_standby(standby)
            await self._read_keys(connection)
            self._listening = False
            self.polling_interval.begin(listening=False)
            if self._may_listen(connection):
                await self._listen(connection)
            try:
                await self._poll(connection)
                self._relay.begin_listening()
                report_progress()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._apply_received, connection)
                    nursery.start_soon(self._poll_on_hints)
                    await self._poll_repeatedly(connection, report_progress)
            except Exception:
                self._tail.distrust()
                self.forged.note_poll(trio.current_time(), POLL_TIMEOUT)
                raise

    def _may_listen(self, connection: DatabaseConnection) -> bool:
        return not connection.pooled and self.forged.may_listen(trio.current_time())

    async def _listen(self, connection: DatabaseConnection) -> None:
        self._listening = True
        self.polling_interval.begin(listening=True)
        for channel in (LOG_CHANNEL, EPHEMERAL_CHANNEL, ROLES_CHANNEL, PRESENCE_CHANNEL):
            await connection.listen(channel, partial(self._receive, channel))

    async def _read_keys(self, connection: DatabaseConnection) -> None:
        (secret,) = await connection.fetchrow(_READ_SECRET, timeout=POLL_TIMEOUT)
        self._tail.keys = NotificationKeys(secret)

    def _refuse_standby(self, standby: bool) -> None:
        if standby:
            if not self._standby:
                logger.warning("the database is a standby, waiting until it is a primary")
            self._standby = True
            raise OSError("the database is a standby")
        self._standby = False

    def _receive(self, channel: str, pid: int, payload: str) -> None:
        """Process one notification while the connection is read. Forged ones are counted and dropped."""
        self.notifications += 1
        try:
            if channel == LOG_CHANNEL:
                self._receive_position(pid, payload)
            elif channel == EPHEMERAL_CHANNEL:
                if entries := self._relay.decode(payload):
                    self._enqueue(partial(self._relay.deliver, entries))
            elif channel == PRESENCE_CHANNEL:
                version, _ = self._tail.keys.verify(PRESENCE_CHANNEL, payload)
                self._note_presence(int(version))
            elif payload:  # The empty one is for replicas of earlier releases.
                self._receive_role(payload)
        except ForgedNotificationError:
            if self.forged.note():
                self._poll_hinted.set()
        except (ValueError, msgspec.DecodeError):
            logger.warning("a notification cannot be decoded", channel=channel, length=len(payload))

    def _receive_position(self, pid: int, payload: str) -> None:
        """Process `epoch:first:last`, which may be followed by the time and the encrypted text of the entries."""
        tail = self._tail
        position, enclosed = tail.keys.verify(LOG_CHANNEL, payload)
        epoch, first, last = position.rsplit(":", 2)
        newest = int(last)
        if epoch == tail.epoch:
            self.polling_interval.note_notification(newest)
            if newest <= tail.applied:
                return
        elif epoch in self.epochs:
            return
        self._enqueue(partial(self._apply, pid, epoch, int(first), newest, enclosed))

    def _receive_role(self, payload: str) -> None:
        shown, _ = self._tail.keys.verify(ROLES_CHANNEL, payload)
        if shown == "*":
            self._poll_hinted.set()
        else:
            self._role_changes.note_role(self._tail.keys.unmask_role(shown))

    def _enqueue(self, take: Callable[[], None]) -> None:
        if len(self._received) < _QUEUE_LENGTH:
            self._received.append(take)
            self._has_received.set()
        else:
            self.dropped += 1

    def _note_closed(self) -> None:
        self._has_received.set()

    async def _apply_received(self, connection: DatabaseConnection) -> None:
        while True:
            await self._has_received.wait()
            self._has_received = trio.Event()
            while self._received:
                self._received.popleft()()
                # Apply a burst one by one, so that send queues are flushed in between.
                await trio.lowlevel.checkpoint()
            if connection.closed:
                raise OSError("the connection that listens was lost")

    def _apply(self, pid: int, epoch: str, first: int, last: int, enclosed: str) -> None:
        """Apply a notification: its entries, if they are enclosed and readable, or its position."""
        tail = self._tail
        if epoch != tail.epoch:
            self._poll_hinted.set()
            return
        self.polling_interval.note_notification(last)
        if pid == self._own_pid():
            tail.expect(last)
            return
        at, _, token = enclosed.partition(" ")
        if token:
            try:
                entries = decode_enclosed(tail.keys.decrypt(LOG_CHANNEL, token), first, int(at))
                if len(entries) == last - first + 1:
                    tail.offer(entries)
            except (ValueError, msgspec.DecodeError):
                logger.warning("entries in a notification cannot be decoded", first=first, last=last)
        tail.announce(last)

    async def _poll_on_hints(self) -> None:
        """Poll at once when a notification is a reason to, and wait for a while before the next such poll."""
        while True:
            await self._poll_hinted.wait()
            self._poll_hinted = trio.Event()
            self.poll_now()
            await trio.sleep(_HINTED_POLL_INTERVAL)

    async def _poll_repeatedly(self, connection: DatabaseConnection, report_progress: ReportProgress) -> None:
        while True:
            with trio.move_on_after(self.polling_interval.seconds_to_next(trio.current_time())):
                await self._poll_requested.wait()
            self._poll_requested = trio.Event()
            began = trio.current_time()
            await self._poll(connection)
            self.forged.note_poll(trio.current_time(), trio.current_time() - began)
            if self._listening != self._may_listen(connection):
                await self._toggle_listening(connection)
            report_progress()

    async def _toggle_listening(self, connection: DatabaseConnection) -> None:
        """Stop listening during a flood of forged notifications, or begin again."""
        if self._listening:
            self._listening = False
            await connection.unlisten(timeout=POLL_TIMEOUT)
            self.polling_interval.begin(listening=False)
        else:
            # As on a new connection: LISTEN first, then poll.
            await self._listen(connection)
            self._relay.begin_listening()
            self.poll_now()

    async def _poll(self, connection: DatabaseConnection) -> None:
        began = trio.current_time()
        self.polling_interval.begin_poll()
        head = await self._follow_log(connection)
        self._tail.clock_offset = self._database_time - trio.current_time()
        self._role_changes.checked = began
        self._tail.announce(self.polling_interval.note_poll(head, trio.current_time()))
        self._log_polling(connection)

    def _log_polling(self, connection: DatabaseConnection) -> None:
        polling = self.polling_interval.polling
        if polling == self._polling:
            return
        self._polling = polling
        if not polling:
            logger.info("notifications announce everything again: polling less")
        elif not self._listening and not connection.pooled:
            logger.warning("a flood of forged notifications: this replica stops listening and polls")
        elif connection.pooled:
            logger.warning("a pooler passes no notifications on: polling often; [database] listen_url leads past it")
        else:
            logger.warning("a poll found commits that no notification had announced: polling often")

    async def _follow_log(self, connection: DatabaseConnection) -> int:
        """Poll the database and return its head. From then on the tail follows the log of the database."""
        tail = self._tail
        self.polls += 1
        number = self.polls
        for _ in range(_MAX_ATTEMPTS):
            applied, fingerprint = tail.applied, tail.fingerprints.newest
            result = _PollResult(*await connection.fetchrow(_POLL, applied, timeout=POLL_TIMEOUT))
            self._database_time = result.clock
            self._refuse_standby(result.standby)
            if await self._is_followed(connection, result, applied, fingerprint):
                tail.floor = result.floor
                tail.server = result.server
                self._role_changes.note_version(result.epoch, result.role_version)
                self._revocations.note_version(result.epoch, result.revocation_version)
                if await self.deleted_ranges.update(connection, result.deleted_ranges_version, result.floor):
                    # Repaired ranges are gaps for all subscriptions, even if their entries are still in memory.
                    tail.recent.forget(min(self.deleted_ranges.report.repaired, tail.applied))
                await self._apply_erasure(connection, result)
                if not tail.trusted:
                    tail.trust()
                self._verified_poll = number
                self._verified.set()
                self._verified = trio.Event()
                return result.head
            tail.distrust()
        raise OSError("the log has changed again and again")

    async def _apply_erasure(self, connection: DatabaseConnection, result: _PollResult) -> None:
        """Erase from memory what was erased from the log since the last poll."""
        newest = result.epoch, result.erasure
        if self._erasure is not None and self._erasure != newest:
            lowest = self._tail.begin_erasure(result.head)
            seqs, floor = await connection.fetchrow(_ERASED_SEQS, lowest - 1, result.head, timeout=POLL_TIMEOUT)
            # Of rows that retention has deleted, the table no longer says whether they were erased.
            self._tail.recent.forget(floor - 1)
            for _ in self._tail.erase(frozenset(seqs)):
                await trio.lowlevel.checkpoint()
            self.erasures += 1
        self._erasure = newest

    async def _is_followed(
        self, connection: DatabaseConnection, result: _PollResult, applied: int, fingerprint: bytes | None
    ) -> bool:
        """Whether this is the log that the tail follows. If not, take the next step; another poll has to follow.

        `applied` and `fingerprint` are those of the tail before the poll.
        """
        tail = self._tail
        # If retention has removed the entry, the floor shows it.
        intact = applied < result.floor or (applied <= result.head and same_entry(fingerprint, result.fingerprint))
        compared = applied if intact else await self._common_seq(connection, result)
        known = compared or 0
        if not (result.same_system and result.same_timeline):
            if not (result.same_system and intact and self._lossless):
                # Nothing was appended to the log here: writers wait until a poll has verified it. So a promoted standby
                # has the beginning of the known log, even if only later entries can be compared.
                reason = "failed over" if result.same_system else "another cluster"
                blank = not tail.epoch or (result.same_system and compared is None)
                await self._begin_epoch(connection, result, reason, None if blank else known)
                return False
            await connection.fetch(_KEEP_EPOCH, result.epoch, timeout=POLL_TIMEOUT)
            logger.warning("the database has failed over, without a loss as configured", epoch=result.epoch)
        if result.epoch == tail.epoch:
            if not intact:
                await self._begin_epoch(connection, result, "set back", known)
            return intact
        rows = await connection.fetch(_EPOCHS, result.epoch, timeout=POLL_TIMEOUT)
        epochs = EpochHistory([(name, after) for name, after in rows])
        agreed, believed = epochs.divergence(self.epochs)
        if agreed is not None and (believed is None or believed > agreed):
            # The database has lost the epoch of this replica, and entries of earlier epochs.
            await self._begin_epoch(connection, result, "set back to an older epoch", min(known, agreed))
            return False
        start = known if tail.epoch else result.head
        if tail.epoch in epochs:
            common = epochs.common_seq(tail.epoch)
            assert common is not None
            if compared is None:
                known = min(applied, common)
            elif known < min(applied, common):
                # The replica that began the new epoch knew fewer entries than this one.
                await self._begin_epoch(connection, result, "set back further than another replica knew", known)
                return False
            start = min(known, common)
        elif tail.epoch and applied < result.floor:
            # Retention has left nothing to compare. Only the epochs show what is common.
            start = min(known, agreed or 0, believed or 0)
        # Also below the floor: entries that were delivered above it are revoked before retention explains the rest.
        start = min(start, result.head)
        (there,) = await connection.fetchrow(_FINGERPRINT, start, timeout=POLL_TIMEOUT)
        await self._read_keys(connection)
        if tail.epoch:
            logger.warning(
                "the log is another one now", epoch=result.epoch, applied=applied, head=result.head, after=start
            )
        self.epochs = epochs
        tail.restart(result.epoch, start, result.floor, fingerprint=there)
        tail.announce(result.head)
        return True

    async def _common_seq(self, connection: DatabaseConnection, result: _PollResult) -> int | None:
        """The seq up to which the database certainly has the applied entries; None if nothing can be compared."""

        async def fetch_fingerprint(seq: int) -> bytes | None:
            (found,) = await connection.fetchrow(_FINGERPRINT, seq, timeout=POLL_TIMEOUT)
            return bytes(found) if found is not None else None

        return await self._tail.fingerprints.common_seq(fetch_fingerprint, result.floor, result.head)

    async def _begin_epoch(
        self, connection: DatabaseConnection, result: _PollResult, reason: str, agreed: int | None
    ) -> None:
        """Begin a new epoch, unless another replica has begun one already."""
        epoch, after, made = await connection.fetchrow(_NEW_EPOCH, result.epoch, agreed, timeout=POLL_TIMEOUT)
        if made:
            logger.warning("a new epoch begins", epoch=epoch, reason=reason, head=result.head, after=after)
