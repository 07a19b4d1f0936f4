"""The writer: gathers what is published, appends it batch by batch, and answers each message once."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import count
from operator import attrgetter

import trio

from ...log import Append, Committed, Entry, Rejected
from ...log.append_queue import AppendQueue
from ...log.interface import (
    CONFLICT,
    OVERHEAD,
    OVERLOADED,
    PENDING,
    PENDING_BYTES,
    REFUSED,
    SHUTTING_DOWN,
    UNAVAILABLE,
    UNDECIDED,
    UNKNOWN,
    Outcome,
    not_taken,
)
from ...observability.histogram import Histogram
from ...observability.loggers import RateLimitedLog, get_logger
from ..access.asyncpg_bridge import DatabaseConnection, Row, sqlstate
from ..access.reconnecting_tasks import ReportProgress
from ..follow.log_tail import LogTail
from ..notifications.encryption import LOG_CHANNEL, NotificationEncrypter
from .append_batch import MOVE, AppendBatch

logger = get_logger("catbus.postgres")

_deadline = attrgetter("deadline")

BATCH_ENTRIES = 1000
BATCH_COST = 4 << 20
"""How much one append may cost while one client alone publishes."""
SHARED_TIME = 0.01
"""Seconds that an append should take while several clients wait for their turn."""
SHARED_COST = 64 << 10
"""What an append may cost then at the least, however slow the database is."""
PATIENCE = 4.5
"""Seconds for one append; after that the connection is given up and the same batch sent again."""
EPOCH_PATIENCE = 5.0

_ANOTHER_EPOCH = "CB001"
_FAULTY_ENTRY = ("21", "22", "23", "54")
"""Classes of SQLSTATE that name a fault of what was sent. After any other error the same is sent again."""


class LogWriter:
    """Owns what is pending and what is in flight. One append is under way at a time, which makes it a group commit."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[DatabaseConnection]],
        tail: LogTail,
        recheck: Callable[[], None],
        *,
        synchronous_commit: str = "on",
        timeout: float = 5.0,
        pending: int = PENDING,
        pending_bytes: int = PENDING_BYTES,
    ) -> None:
        self.commits = 0
        self.appended = 0
        self.duplicates = 0
        self.moved = 0
        """Messages that were moved from the outbox into the log."""
        self.sizes = [0] * (BATCH_ENTRIES.bit_length() + 1)
        """How many batches had up to 1, 2, 4, 8, ... messages."""
        self.commit_duration = Histogram()
        """Seconds for each append, from sending it to the answer."""
        self.publish_latency = Histogram()
        """Seconds from taking a message to its being committed and handed on: of the oldest of each batch."""
        self.pid = 0
        """The database's process that appends for us; 0 where that is not known."""
        self._connect = connect
        self._tail = tail
        self._recheck = recheck
        self._synchronous_commit = synchronous_commit
        self._timeout = timeout
        self._queue = AppendQueue(pending, pending_bytes)
        self._speed = BATCH_COST / SHARED_TIME
        """What was appended in a second, by the cost of the last batches."""
        self._flight: deque[AppendBatch] = deque()
        self._incarnation = secrets.token_bytes(16)
        self._numbers = count(1)
        self._sealer = NotificationEncrypter(LOG_CHANNEL)
        self._work = trio.Event()
        self._moving = False
        """Whether messages are known to wait in the outbox."""
        self._tried = trio.Event()
        self._refusal: Exception | None = None
        self._closed = False
        self._refusals = RateLimitedLog(logger.error)
        self._failed = False
        """Whether the last try to write has ended with an error."""
        self._epoch = ""
        """The one in which all that is queued was submitted, as far as it is retries."""

    @property
    def pending(self) -> int:
        return len(self._queue)

    @property
    def pending_bytes(self) -> int:
        return self._queue.size

    @property
    def allowance(self) -> int:
        return self._queue.allowance(self._budget)

    @property
    def _budget(self) -> int:
        """What the next append may cost."""
        if self._queue.clients <= 1:
            return BATCH_COST
        return min(BATCH_COST, max(SHARED_COST, int(self._speed * SHARED_TIME)))

    def submit(self, append: Append) -> None:
        """Queue a message, or answer at once that there is no room for it."""
        self._note_epoch()
        if self._closed:
            append.settle(append, not_taken(append, SHUTTING_DOWN))
            return
        append.deadline = trio.current_time() + self._timeout
        append.known = self._tail.announced if self._tail.epoch else None
        if self._queue.offer(append):
            self._work.set()
        else:
            append.settle(append, not_taken(append, OVERLOADED))

    def withdraw(self, client: Hashable, unwanted: Callable[[Append], bool], refusal: Rejected) -> None:
        for append in self._queue.withdraw(unwanted, client):
            append.settle(append, not_taken(append, refusal))

    async def move(self) -> None:
        """Have messages moved from the outbox into the log, with the next append or without one; wait for the try.

        Raises what the database has refused it with.
        """
        self._moving = True
        self._tried = trio.Event()
        self._refusal = None
        self._work.set()
        await self._tried.wait()
        if self._refusal is not None:
            raise self._refusal

    # Answers that do not wait for the database

    async def expire(self) -> None:
        """Answer every message in time, whatever the database does; when cancelled, close the door behind it."""
        try:
            while True:
                now = trio.current_time()
                await trio.sleep_until(self._expire(now) or now + self._timeout)
        finally:
            self.close()

    def close(self) -> None:
        """Take nothing more, and hand over nothing more. What is in flight may still end."""
        self._closed = True
        self._reject_queue(SHUTTING_DOWN)

    def abandon(self) -> None:
        """Answer what is in doubt: its call was not answered, and nobody is left to send it again."""
        self.close()
        for batch in self._flight:
            batch.settle_all(UNKNOWN)
        self._flight.clear()

    def _expire(self, now: float) -> float | None:
        deadlines = [batch.expire(now) for batch in self._flight]
        self._reject_queue(UNAVAILABLE, now)
        return min((due for due in (*deadlines, self._queue.deadline) if due is not None), default=None)

    def _reject_queue(self, outcome: Rejected, now: float = float("inf")) -> None:
        """Answer whatever is queued with a deadline up to `now`."""
        for append in self._queue.expire(now):
            append.settle(append, not_taken(append, outcome))

    # Appending

    async def run(self, working: ReportProgress) -> None:
        """Append what comes until the connection is lost. What was in flight then is sent again first, unchanged."""
        await self._tail.wait_epoch()
        with await self._connect() as connection:
            connection.when_closed(self._wake)
            # Behind a pooler the same process serves others too.
            self.pid = 0 if connection.pooled else connection.pid
            try:
                if self._failed and not self._flight:
                    # That one can connect does not show that one can write.
                    await self._move(connection)
                if not self._flight:
                    working()
                while True:
                    await self._gather(connection)
                    if self._flight:
                        await self._send(connection, self._flight[0])
                    else:
                        await self._move(connection)
                    self._failed = False
                    working()
            except Exception:
                self._failed = True
                raise
            finally:
                self.pid = 0
                self._tail.resolve()

    def _wake(self) -> None:
        self._work.set()

    async def _gather(self, connection: DatabaseConnection) -> None:
        """Wait until there is something to send, or only something to move."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._flight:
            batch = self._take()
            if batch is not None:
                self._flight.append(batch)
            elif self._queue:
                continue
            elif connection.closed:
                raise OSError("the connection that appends was lost")
            elif self._moving:
                return
            else:
                self._work = trio.Event()
                await self._work.wait()

    def _take(self) -> AppendBatch | None:
        """The next batch: as much as is queued and fits. A key stands in it once."""
        self._reject_queue(UNAVAILABLE, trio.current_time())
        self._note_epoch()
        appends = self._queue.take(BATCH_ENTRIES, self._budget)
        if not appends:
            return None
        # Turns decide which messages go together; among those, the order in which they came is kept.
        appends.sort(key=_deadline)
        batch = self._number(appends)
        try:
            batch.call(self._encrypt)
        except UnicodeDecodeError:
            self._refusals.log(trio.current_time(), "a message that is not UTF-8 has come this far")
            sound = batch.part(_is_sound)
            for append in appends:
                if not _is_sound(append):
                    append.settle(append, REFUSED)
            return sound
        return batch

    def _number(self, appends: Sequence[Append]) -> AppendBatch:
        """Give a key to those who have none."""
        numbers = self._numbers
        return AppendBatch(
            appends,
            [next(numbers) if append.producer is None else append.number for append in appends],
            self._incarnation,
            self._epoch,
            # While one of them has waited here, a retry of it may have come into the log by another replica.
            min([self._tail.announced, *[append.known for append in appends if append.known is not None]]),
        )

    def _encrypt(self, text: bytes) -> str:
        return self._sealer.encrypt(self._tail.seal, text)

    async def _send(self, connection: DatabaseConnection, batch: AppendBatch) -> None:
        """Append a batch and answer. Never cancelled: only a lost connection ends it before its answer or its time."""
        epoch, generation, moving = self._tail.epoch, self._tail.generation, self._moving
        if batch.epoch != epoch:
            self._carry_over(batch)
            return
        try:
            statement, args = batch.call(self._encrypt, move=moving)
            began = trio.current_time()
            with trio.CancelScope(shield=True):
                at, first, seqs, *moves = await self._call(connection, epoch, statement, *args)
        except Exception as error:
            self._end_move()
            state = sqlstate(error)
            if state == _ANOTHER_EPOCH:
                await self._wait_epoch(epoch)
            elif not state.startswith(_FAULTY_ENTRY):
                raise
            elif moving:
                # The fault may be that of either: each is tried by itself.
                await self._move(connection)
            else:
                self._isolate(batch, error)
            return
        entries = [
            Entry(seq, at, append.channel, append.payload, append.sender, append.origin)
            for append, seq in zip(batch.appends, seqs, strict=True)
            if seq >= first
        ]
        took = trio.current_time() - began
        self.commit_duration.observe(took)
        cost = sum([append.size for append in batch.appends]) + len(batch.appends) * OVERHEAD
        self._speed += (cost / max(took, 1e-6) - self._speed) / 4
        self.commits += 1
        self.appended += len(entries)
        self.duplicates += len(seqs) - len(entries)
        self.sizes[(len(seqs) - 1).bit_length()] += 1
        if generation == self._tail.generation:
            if entries:
                self._tail.offer(entries)
            self._tail.announce(max(seqs))
            self._tail.resolve()
        else:
            self._recheck()
        if moving:
            self._note_moves(generation, *moves)
        self.publish_latency.observe(trio.current_time() - batch.appends[0].deadline + self._timeout)
        if len(entries) == len(seqs):
            batch.settle([Committed(seq) for seq in seqs])
        else:
            batch.settle([_outcome(seq, first) for seq in seqs])
        self._flight.popleft()

    async def _move(self, connection: DatabaseConnection) -> None:
        """Move messages from the outbox without a batch before them. Never cancelled, as an append is not."""
        epoch, generation = self._tail.epoch, self._tail.generation
        try:
            with trio.CancelScope(shield=True):
                moved, last, more = await self._call(connection, epoch, MOVE)
        except Exception as error:
            self._end_move()
            state = sqlstate(error)
            if state == _ANOTHER_EPOCH:
                await self._wait_epoch(epoch)
            elif state.startswith(_FAULTY_ENTRY):
                self._refusal = error
            else:
                raise
        else:
            self.commits += moved > 0
            self._note_moves(generation, moved, last, more)

    def _note_moves(self, generation: int, moved: int, last: int | None, more: bool) -> None:
        """Take in what `MOVE` has returned. What was moved is read from the table, as on every other replica."""
        self.moved += moved
        if last is not None:
            if generation == self._tail.generation:
                self._tail.announce(last)
            else:
                self._recheck()
        self._end_move(more)

    def _end_move(self, more: bool = False) -> None:
        self._moving = more
        self._tried.set()

    async def _call(self, connection: DatabaseConnection, epoch: str, statement: str, *args: object) -> Row:
        """The one row of a statement that does nothing where the server is not the one that was looked at.

        Behind a pooler a connection outlives the server that it led to, and nobody may append to a log that was set
        back until that has been found out: what came in the place of what was lost would be taken for the same.
        """
        settings = self._synchronous_commit, epoch
        row = await connection.fetchrow(statement, *settings, *args, self._tail.server, timeout=PATIENCE)
        if row[0] is None:
            raise OSError("this is another server than the one that was looked at")
        return row

    def _isolate(self, batch: AppendBatch, error: BaseException) -> None:
        """One entry that the database refuses must not fail its neighbours: halve the batch until it is alone."""
        self._flight.popleft()
        if len(batch.appends) > 1:
            self._flight.extendleft(reversed(batch.halves()))
        else:
            text, channel = str(error), batch.appends[0].channel
            now = trio.current_time()
            self._refusals.log(now, "the database refused a message", kind=text, channel=channel, error=text)
            batch.settle_all(REFUSED)

    # Epochs

    async def _wait_epoch(self, epoch: str) -> None:
        """Wait until the log has been opened in another epoch than the one that the database has refused."""
        self._recheck()
        with trio.move_on_after(EPOCH_PATIENCE):
            await self._tail.wait_epoch(epoch)
            return
        raise TimeoutError(f"the database refused epoch {epoch}, and names no other")

    def _carry_over(self, batch: AppendBatch) -> None:
        """Take a batch over into another epoch. Of a retry nothing can be known any more; the rest keeps its keys."""
        self._flight.popleft()
        rest = batch.part(lambda append: append.after is None)
        retries = batch.part(lambda append: append.after is not None)
        if rest is not None:
            rest.epoch, rest.after = self._tail.epoch, min(batch.after, self._tail.announced)
            self._flight.appendleft(rest)
        if retries is not None:
            retries.settle_all(UNDECIDED)

    def _note_epoch(self) -> None:
        """Whenever something is about to be queued, or taken: of retries from another epoch nothing can be known."""
        previous, self._epoch = self._epoch, self._tail.epoch
        if previous in ("", self._epoch):
            return
        for append in self._queue.withdraw(lambda append: append.after is not None):
            append.settle(append, UNDECIDED)


def _outcome(seq: int, first: int) -> Outcome:
    if seq > 0:
        return Committed(seq, seq < first)
    return UNDECIDED if seq else CONFLICT


def _is_sound(append: Append) -> bool:
    try:
        append.payload.decode()
    except UnicodeDecodeError:
        return False
    return True
