"""The listening side: notifications as hints, one poll as the safety net, and what tells one log from another."""

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
from ..follow.log_tail import LogTail
from ..notifications.encryption import (
    EPHEMERAL_CHANNEL,
    LOG_CHANNEL,
    ROLES_CHANNEL,
    ForgedNotificationError,
    NotificationKeys,
)
from ..roles.role_changes import RoleChanges
from .forged_notifications import ForgedNotifications
from .polling_interval import PollingInterval

logger = get_logger("catbus.postgres")

PATIENCE = 2.5
"""Seconds after which a connection that does not answer the poll is given up: 4.5 s after it died at the latest."""
_HEARD = 10_000
"""Notifications that may wait; for more there is the poll."""
_SPACING = 0.05
"""Seconds between two polls for the sake of notifications: one that is sent again and again costs one in each."""

_TRIES = 10
"""How often the log may turn out to be yet another one before the connection is given up."""
_CLAIMS = 1.0
"""Seconds between two looks for the sake of what clients say."""

_STANDBY = "SELECT pg_is_in_recovery()"
_SEAL = "SELECT h.notification_secret FROM catbus.head AS h"
_LOOK = (
    "SELECT epoch, head, floor, fingerprint, standby, same_system, same_timeline, role_version, "
    "deleted_ranges_version, pg_postmaster_start_time(), extract(epoch FROM clock_timestamp())::double precision "
    "FROM catbus.poll($1)"
)
_MARK = "SELECT catbus.fingerprint($1)"
_NEW_EPOCH = "CALL catbus.new_epoch_transaction($1, $2, NULL, NULL, NULL)"
_KEEP_EPOCH = "SELECT catbus.keep_epoch($1)"
_EPOCHS = """
SELECT e.epoch, e.after_seq FROM catbus.epochs AS e JOIN catbus.epochs AS newest ON e.ordinal <= newest.ordinal
WHERE newest.epoch = $1 ORDER BY e.ordinal
"""


class _Look(NamedTuple):
    """The database's answer to a look, as `catbus.poll` has it."""

    epoch: str
    head: int
    floor: int
    mark: bytes | None
    standby: bool
    same_system: bool | None
    same_timeline: bool | None
    role_version: str
    holes: int | None
    server: object
    clock: float
    """The database's time in seconds since 1970."""


class NotificationListener:
    """Keeps the tail informed, through a connection of its own. `own_pid` tells our writer's notifications apart.

    Each poll also makes sure that the database's log is still the one that the tail has followed. Where it is not, or
    nobody can say, a new epoch begins. With `lossless` a standby that takes over is believed to have all of it.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[DatabaseConnection]],
        tail: LogTail,
        own_pid: Callable[[], int],
        courier: EphemeralRelay,
        role_changes: RoleChanges,
        *,
        lossless: bool = False,
    ) -> None:
        self.epochs = EpochHistory()
        self.holes = DeletedRanges()
        self.notifications = 0
        self.dropped = 0
        """Notifications for which there was no room."""
        self.polls = 0
        self.pace = PollingInterval()
        self.intruders = ForgedNotifications()
        self._connect = connect
        self._tail = tail
        self._own_pid = own_pid
        self._courier = courier
        self._role_changes = role_changes
        self._lossless = lossless
        self._heard: deque[Callable[[], None]] = deque()
        self._news = trio.Event()
        self._doubt = trio.Event()
        self._hinted = trio.Event()
        self._recognised = 0
        """Which poll was the last that found the log to be the one that is followed."""
        self._looked = trio.Event()
        self._claimed = 0.0
        self._clock = 0.0
        """The database's time at the last look, in seconds since 1970."""
        self._standby = False
        self._polling = False
        self._listening = False

    def check(self) -> None:
        """Poll at once: there is reason to think that the log is another one."""
        self._doubt.set()

    def question(self) -> None:
        """Poll soon: a client says something that may mean so, or may be wrong."""
        now = trio.current_time()
        if now >= self._claimed + _CLAIMS:
            self._claimed = now
            self.check()

    async def vouch(self) -> None:
        """Wait until a look that began after this has found the log to be the one that is followed.

        Whoever has connected before this is connected to that log, as there is only one primary; behind a pooler only
        as long as the server is the same.
        """
        wanted = self.polls + 1
        self.check()
        while self._recognised < wanted:
            await self._looked.wait()

    async def run(self, working: ReportProgress) -> None:
        """Listen until the connection is lost. LISTEN first, then the position: nothing falls between them."""
        with await self._connect() as connection:
            self._heard.clear()
            connection.when_closed(self._hear_end)
            # A standby would not even let us LISTEN.
            (standby,) = await connection.fetchrow(_STANDBY, timeout=PATIENCE)
            self._refuse_standby(standby)
            await self._read_seal(connection)
            self._listening = False
            self.pace.begin(deaf=True)
            if self._may_listen(connection):
                await self._listen(connection)
            try:
                await self._poll(connection)
                self._courier.begin()
                working()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._follow, connection)
                    nursery.start_soon(self._heed)
                    await self._watch(connection, working)
            except Exception:
                self._tail.distrust()
                self.intruders.look(trio.current_time(), PATIENCE)
                raise

    def _may_listen(self, connection: DatabaseConnection) -> bool:
        return not connection.pooled and self.intruders.may_listen(trio.current_time())

    async def _listen(self, connection: DatabaseConnection) -> None:
        self._listening = True
        self.pace.begin(deaf=False)
        for channel in (LOG_CHANNEL, EPHEMERAL_CHANNEL, ROLES_CHANNEL):
            await connection.listen(channel, partial(self._hear, channel))

    async def _read_seal(self, connection: DatabaseConnection) -> None:
        (secret,) = await connection.fetchrow(_SEAL, timeout=PATIENCE)
        self._tail.seal = NotificationKeys(secret)

    def _refuse_standby(self, standby: bool) -> None:
        if standby:
            if not self._standby:
                logger.warning("the database is a standby, waiting until it is a primary")
            self._standby = True
            raise OSError("the database is a standby")
        self._standby = False

    def _hear(self, channel: str, pid: int, payload: str) -> None:
        """Take in one notification, within the reader. What others than replicas of this log have sent ends here."""
        self.notifications += 1
        try:
            if channel == LOG_CHANNEL:
                self._hear_position(pid, payload)
            elif channel == EPHEMERAL_CHANNEL:
                if entries := self._courier.read(payload):
                    self._put(partial(self._courier.deliver, entries))
            elif payload:  # The empty one is for replicas of earlier releases.
                self._hear_role(payload)
        except ForgedNotificationError:
            if self.intruders.note():
                self._hinted.set()
        except (ValueError, msgspec.DecodeError):
            logger.warning("a notification that cannot be understood", channel=channel, length=len(payload))

    def _hear_position(self, pid: int, payload: str) -> None:
        """Understand `epoch:first:last`, perhaps with the time and the encrypted text of the entries."""
        tail = self._tail
        position, enclosed = tail.seal.verify(LOG_CHANNEL, payload)
        epoch, first, last = position.rsplit(":", 2)
        newest = int(last)
        if epoch == tail.epoch:
            self.pace.hear(newest)
            if newest <= tail.applied:
                return
        elif epoch in self.epochs:
            return
        self._put(partial(self._take, pid, epoch, int(first), newest, enclosed))

    def _hear_role(self, payload: str) -> None:
        shown, _ = self._tail.seal.verify(ROLES_CHANNEL, payload)
        if shown == "*":
            self._hinted.set()
        else:
            self._role_changes.hear(self._tail.seal.read_role(shown))

    def _put(self, take: Callable[[], None]) -> None:
        if len(self._heard) < _HEARD:
            self._heard.append(take)
            self._news.set()
        else:
            self.dropped += 1

    def _hear_end(self) -> None:
        self._news.set()

    async def _follow(self, connection: DatabaseConnection) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            while self._heard:
                self._heard.popleft()()
                # A burst is handed on bit by bit, so that the send queues are emptied in between.
                await trio.lowlevel.checkpoint()
            if connection.closed:
                raise OSError("the connection that listens was lost")

    def _take(self, pid: int, epoch: str, first: int, last: int, enclosed: str) -> None:
        """Take what a notification tells of: the entries, where they are enclosed and can be read, or the position."""
        tail = self._tail
        if epoch != tail.epoch:
            self._hinted.set()
            return
        self.pace.hear(last)
        if pid == self._own_pid():
            tail.expect(last)
            return
        at, _, token = enclosed.partition(" ")
        if token:
            try:
                entries = decode_enclosed(tail.seal.decrypt(LOG_CHANNEL, token), first, int(at))
                if len(entries) == last - first + 1:
                    tail.offer(entries)
            except (ValueError, msgspec.DecodeError):
                logger.warning("entries in a notification that cannot be read", first=first, last=last)
        tail.announce(last)

    async def _heed(self) -> None:
        """Poll at once when a notification gives reason to, and not again before some time has passed."""
        while True:
            await self._hinted.wait()
            self._hinted = trio.Event()
            self.check()
            await trio.sleep(_SPACING)

    async def _watch(self, connection: DatabaseConnection, working: ReportProgress) -> None:
        while True:
            with trio.move_on_after(self.pace.pause(trio.current_time())):
                await self._doubt.wait()
            self._doubt = trio.Event()
            began = trio.current_time()
            await self._poll(connection)
            self.intruders.look(trio.current_time(), trio.current_time() - began)
            if self._listening != self._may_listen(connection):
                await self._turn(connection)
            working()

    async def _turn(self, connection: DatabaseConnection) -> None:
        """Stop to listen while others hold everything up by what they send, or begin again."""
        if self._listening:
            self._listening = False
            await connection.unlisten(timeout=PATIENCE)
            self.pace.begin(deaf=True)
        else:
            # As on a new connection: LISTEN first, then the position.
            await self._listen(connection)
            self._courier.begin()
            self.check()

    async def _poll(self, connection: DatabaseConnection) -> None:
        began = trio.current_time()
        self.pace.ask()
        head = await self._look(connection)
        self._tail.clock_offset = self._clock - trio.current_time()
        self._role_changes.checked = began
        self._tail.announce(self.pace.note(head, trio.current_time()))
        self._say_pace(connection)

    def _say_pace(self, connection: DatabaseConnection) -> None:
        polling = self.pace.polling
        if polling == self._polling:
            return
        self._polling = polling
        if not polling:
            logger.info("notifications tell of everything again: polling less")
        elif not self._listening and not connection.pooled:
            logger.warning("others send so many notifications that this replica does not listen: polling")
        elif connection.pooled:
            logger.warning("no notifications come through a pooler: polling; [database] listen_url leads past it")
        else:
            logger.warning("there is news that no notification has told of: polling")

    async def _look(self, connection: DatabaseConnection) -> int:
        """Read the database's position and return its head; from then on the tail follows the log that is there."""
        tail = self._tail
        self.polls += 1
        number = self.polls
        for _ in range(_TRIES):
            applied, mark = tail.applied, tail.marks.newest
            look = _Look(*await connection.fetchrow(_LOOK, applied, timeout=PATIENCE))
            self._clock = look.clock
            self._refuse_standby(look.standby)
            if await self._recognise(connection, look, applied, mark):
                tail.floor = look.floor
                tail.server = look.server
                self._role_changes.look(look.epoch, look.role_version)
                if await self.holes.look(connection, look.holes, look.floor):
                    # What is gone is gone for everybody, though some of it may still be in memory.
                    tail.recent.forget(min(self.holes.report.repaired, tail.applied))
                if not tail.trusted:
                    tail.trust()
                self._recognised = number
                self._looked.set()
                self._looked = trio.Event()
                return look.head
            tail.distrust()
        raise OSError("the log turns out to be another one again and again")

    async def _recognise(self, connection: DatabaseConnection, look: _Look, applied: int, mark: bytes | None) -> bool:
        """Whether this is the log that the tail follows; if not, do what comes next, and it has to be looked at again.

        `applied` and `mark` are what the tail had applied before that look.
        """
        tail = self._tail
        # Retention may have taken the entry away, and then says so.
        intact = applied < look.floor or (applied <= look.head and look.mark == mark)
        compared = applied if intact else await self._agreement(connection, look)
        known = compared or 0
        if not (look.same_system and look.same_timeline):
            if not (look.same_system and intact and self._lossless):
                # Nobody has appended to the log since it came here: a writer waits until somebody has looked at it. So
                # a standby that took over has the beginning of the log that we know, even where we know the rest only.
                reason = "failed over" if look.same_system else "another cluster"
                blank = not tail.epoch or (look.same_system and compared is None)
                await self._begin(connection, look, reason, None if blank else known)
                return False
            await connection.fetch(_KEEP_EPOCH, look.epoch, timeout=PATIENCE)
            logger.warning("the database has failed over, without a loss as configured", epoch=look.epoch)
        if look.epoch == tail.epoch:
            if not intact:
                await self._begin(connection, look, "set back", known)
            return intact
        rows = await connection.fetch(_EPOCHS, look.epoch, timeout=PATIENCE)
        epochs = EpochHistory([(name, after) for name, after in rows])
        agreed, believed = epochs.parted(self.epochs)
        if agreed is not None and (believed is None or believed > agreed):
            # The database has lost our epoch, and what it knew then of those before it.
            await self._begin(connection, look, "set back to an older epoch", min(known, agreed))
            return False
        start = known if tail.epoch else look.head
        if tail.epoch in epochs:
            common = epochs.common(tail.epoch)
            assert common is not None
            if compared is None:
                known = min(applied, common)
            elif known < min(applied, common):
                # Who began the new epoch could not know what we do.
                await self._begin(connection, look, "set back further than another replica knew", known)
                return False
            start = min(known, common)
        elif tail.epoch and applied < look.floor:
            # Retention has left nothing to compare, so that only the epochs tell.
            start = min(known, agreed or 0, believed or 0)
        # Even below the floor: what was handed on above it has to be taken back, before retention tells of the rest.
        start = min(start, look.head)
        (there,) = await connection.fetchrow(_MARK, start, timeout=PATIENCE)
        await self._read_seal(connection)
        if tail.epoch:
            logger.warning("the log is another one now", epoch=look.epoch, applied=applied, head=look.head, after=start)
        self.epochs = epochs
        tail.restart(look.epoch, start, look.floor, mark=there)
        tail.announce(look.head)
        return True

    async def _agreement(self, connection: DatabaseConnection, look: _Look) -> int | None:
        """Up to where the database certainly has the entries that were applied here; None with nothing to compare."""

        async def mark(seq: int) -> bytes | None:
            (found,) = await connection.fetchrow(_MARK, seq, timeout=PATIENCE)
            return bytes(found) if found is not None else None

        return await self._tail.marks.agreement(mark, look.floor, look.head)

    async def _begin(self, connection: DatabaseConnection, look: _Look, reason: str, agreed: int | None) -> None:
        """Begin a new epoch, unless another replica has been faster."""
        epoch, after, made = await connection.fetchrow(_NEW_EPOCH, look.epoch, agreed, timeout=PATIENCE)
        if made:
            logger.warning("a new epoch begins", epoch=epoch, reason=reason, head=look.head, after=after)
