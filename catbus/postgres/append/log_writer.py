"""The writer: queues publishes, appends them in batches, and replies to each once."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from itertools import count
from operator import attrgetter

import trio

from ...log import Append, Committed, Entry, Rejected, conflict
from ...log.append_queue import AppendQueue
from ...log.interface import (
    APPEND_OVERHEAD,
    FAILED,
    KEY_REUSED,
    MAX_PENDING,
    MAX_PENDING_BYTES,
    OVERLOADED,
    RETAINED_FULL,
    SHUTTING_DOWN,
    UNAVAILABLE,
    UNDECIDED,
    UNKNOWN,
    Outcome,
    rejection_of,
)
from ...observability.histogram import Histogram
from ...observability.loggers import RateLimitedLog, get_logger
from ..access.asyncpg_bridge import DatabaseConnection, Row, sqlstate
from ..access.reconnecting_tasks import ReportProgress
from ..follow.log_tail import LogTail
from ..notifications.encryption import LOG_CHANNEL, NotificationEncrypter
from .append_batch import MAX_BATCH_COST, MAX_BATCH_MESSAGES, MOVE, AppendBatch

logger = get_logger("catbus.postgres")

_deadline = attrgetter("deadline")

SHARED_TIME = 0.01
"""Seconds that an append should take while several clients publish."""
SHARED_COST = 64 << 10
"""The lowest cost limit of an append while several clients publish, however slow the database is."""
APPEND_TIMEOUT = 4.5
"""Seconds for one append. After that the connection is dropped, and the same batch is sent again."""
EPOCH_TIMEOUT = 5.0
"""Seconds to wait for the new epoch after the database has rejected the old one."""

_CONFLICT = -2
_REJECTIONS = {0: KEY_REUSED, -1: UNDECIDED, -3: RETAINED_FULL}
"""What `catbus.append` returns instead of a seq, together with `_CONFLICT`."""
_WRONG_EPOCH = "CB001"
_DATA_ERRORS = ("21", "22", "23", "54")
"""SQLSTATE classes of faulty data. After any other error the same batch is sent again."""


class LogWriter:
    """Queues publishes and appends them. One append runs at a time, so that waiting publishes share the next commit."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[DatabaseConnection]],
        tail: LogTail,
        poll_now: Callable[[], None],
        *,
        synchronous_commit: str = "on",
        timeout: float = 5.0,
        pending: int = MAX_PENDING,
        pending_bytes: int = MAX_PENDING_BYTES,
    ) -> None:
        self.commits = 0
        self.appended = 0
        self.duplicates = 0
        self.conflicts = 0
        """Messages that were rejected because of another retained message than the expected one."""
        self.moved = 0
        """Messages that were moved from the outbox into the log."""
        self.sizes = [0] * (MAX_BATCH_MESSAGES.bit_length() + 1)
        """How many batches had up to 1, 2, 4, 8, ... messages."""
        self.commit_duration = Histogram()
        """Seconds of each append, from the call to its result."""
        self.publish_latency = Histogram()
        """Seconds from the submission of a message to its commit and delivery, for the oldest message of each batch."""
        self.pid = 0
        """The database process that appends; 0 if unknown."""
        self._connect = connect
        self._tail = tail
        self._poll_now = poll_now
        self._synchronous_commit = synchronous_commit
        self._timeout = timeout
        self._queue = AppendQueue(pending, pending_bytes)
        self._speed = MAX_BATCH_COST / SHARED_TIME
        """The cost appended per second, a moving average."""
        self._in_flight: deque[AppendBatch] = deque()
        self._incarnation = secrets.token_bytes(16)
        self._numbers = count(1)
        self._encrypter = NotificationEncrypter(LOG_CHANNEL)
        self._has_work = trio.Event()
        self._moving = False
        """Whether messages wait in the outbox."""
        self._move_ended = trio.Event()
        self._move_error: Exception | None = None
        self._closed = False
        self._rejections = RateLimitedLog(logger.error)
        self._failed = False
        """Whether the last attempt to write has failed."""
        self._epoch = ""
        """The epoch in which all queued retries were submitted."""

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
        """The cost limit of the next append."""
        if self._queue.clients <= 1:
            return MAX_BATCH_COST
        return min(MAX_BATCH_COST, max(SHARED_COST, int(self._speed * SHARED_TIME)))

    def submit(self, append: Append) -> None:
        """Queue a message, or reject it at once if the queue is full."""
        self._note_epoch()
        if self._closed:
            append.settle(append, rejection_of(append, SHUTTING_DOWN))
            return
        append.deadline = trio.current_time() + self._timeout
        append.known = self._tail.announced if self._tail.epoch else None
        if self._queue.offer(append):
            self._has_work.set()
        else:
            append.settle(append, rejection_of(append, OVERLOADED))

    def withdraw(self, client: Hashable, unwanted: Callable[[Append], bool], rejected: Rejected) -> None:
        for append in self._queue.withdraw(unwanted, client):
            append.settle(append, rejection_of(append, rejected))

    async def move(self) -> None:
        """Request that messages move from the outbox into the log, with the next append or alone. Wait for the attempt.

        Raises the error with which the database has rejected it.
        """
        self._moving = True
        self._move_ended = trio.Event()
        self._move_error = None
        self._has_work.set()
        await self._move_ended.wait()
        if self._move_error is not None:
            raise self._move_error

    # Replies that do not wait for the database

    async def expire(self) -> None:
        """Reply to every message before its deadline, whatever the database does. When cancelled, close the writer."""
        try:
            while True:
                now = trio.current_time()
                await trio.sleep_until(self._expire(now) or now + self._timeout)
        finally:
            self.close()

    def close(self) -> None:
        """Accept no more messages, and reject the queued ones. Appends in flight may still end."""
        self._closed = True
        self._reject_queue(SHUTTING_DOWN)

    def abandon(self) -> None:
        """Reply `unknown` to messages in flight: their call has no result, and it will not be sent again."""
        self.close()
        for batch in self._in_flight:
            batch.settle_all(UNKNOWN)
        self._in_flight.clear()

    def _expire(self, now: float) -> float | None:
        deadlines = [batch.expire(now) for batch in self._in_flight]
        self._reject_queue(UNAVAILABLE, now)
        return min((due for due in (*deadlines, self._queue.deadline) if due is not None), default=None)

    def _reject_queue(self, outcome: Rejected, now: float = float("inf")) -> None:
        """Reject queued messages whose deadline is `now` or earlier."""
        for append in self._queue.expire(now):
            append.settle(append, rejection_of(append, outcome))

    # Appending

    async def run(self, report_progress: ReportProgress) -> None:
        """Append queued messages until the connection is lost. Batches in flight are sent again first, unchanged."""
        await self._tail.wait_epoch()
        with await self._connect() as connection:
            connection.when_closed(self._wake)
            # Behind a pooler the same process serves other clients, too.
            self.pid = 0 if connection.pooled else connection.pid
            try:
                if self._failed and not self._in_flight:
                    # A successful connection does not show that the database accepts writes.
                    await self._move(connection)
                if not self._in_flight:
                    report_progress()
                while True:
                    await self._next_batch(connection)
                    if self._in_flight:
                        await self._send(connection, self._in_flight[0])
                    else:
                        await self._move(connection)
                    self._failed = False
                    report_progress()
            except Exception:
                self._failed = True
                raise
            finally:
                self.pid = 0
                self._tail.resolve()

    def _wake(self) -> None:
        self._has_work.set()

    async def _next_batch(self, connection: DatabaseConnection) -> None:
        """Wait until there is a batch to append, or only something to move."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._in_flight:
            batch = self._take_queued()
            if batch is not None:
                self._in_flight.append(batch)
            elif self._queue:
                continue
            elif connection.closed:
                raise OSError("the connection that appends was lost")
            elif self._moving:
                return
            else:
                self._has_work = trio.Event()
                await self._has_work.wait()

    def _take_queued(self) -> AppendBatch | None:
        """The next batch: as many queued messages as fit. Each key occurs once in it."""
        self._reject_queue(UNAVAILABLE, trio.current_time())
        self._note_epoch()
        appends = self._queue.take(MAX_BATCH_MESSAGES, self._budget)
        if not appends:
            return None
        # The queue takes clients in turn, which decides what is in the batch. Within it, the order of arrival is kept.
        appends.sort(key=_deadline)
        batch = self._assign_keys(appends)
        try:
            batch.build_call(self._encrypt)
        except UnicodeDecodeError:
            self._rejections.log(trio.current_time(), "a message that is not UTF-8 has come this far")
            sound = batch.select(_is_sound)
            for append in appends:
                if not _is_sound(append):
                    append.settle(append, FAILED)
            return sound
        return batch

    def _assign_keys(self, appends: Sequence[Append]) -> AppendBatch:
        """Make a batch, with new keys for messages without a producer."""
        numbers = self._numbers
        return AppendBatch(
            appends,
            [next(numbers) if append.producer is None else append.number for append in appends],
            self._incarnation,
            self._epoch,
            # While a message waited here, another replica may have appended a retry of it.
            min([self._tail.announced, *[append.known for append in appends if append.known is not None]]),
        )

    def _encrypt(self, text: bytes) -> str:
        return self._encrypter.encrypt(self._tail.keys, text)

    async def _send(self, connection: DatabaseConnection, batch: AppendBatch) -> None:
        """Append a batch and reply. Never cancelled: only a lost connection or the timeout ends it without a result."""
        epoch, generation, moving = self._tail.epoch, self._tail.generation, self._moving
        if batch.epoch != epoch:
            self._move_to_epoch(batch)
            return
        try:
            statement, args = batch.build_call(self._encrypt, move=moving)
            began = trio.current_time()
            with trio.CancelScope(shield=True):
                at, first, seqs, present, *moves = await self._fetch_row(connection, epoch, statement, *args)
        except Exception as error:
            self._end_move()
            state = sqlstate(error)
            if state == _WRONG_EPOCH:
                await self._wait_epoch(epoch)
            elif not state.startswith(_DATA_ERRORS):
                raise
            elif moving:
                # Either part may be at fault: try each of them alone.
                await self._move(connection)
            else:
                self._split_rejected(batch, error)
            return
        entries = [
            Entry(seq, at, append.channel, append.payload, append.sender, append.origin, append.retain)
            for append, seq in zip(batch.appends, seqs, strict=True)
            if seq >= first
        ]
        took = trio.current_time() - began
        self.commit_duration.observe(took)
        cost = sum([append.size for append in batch.appends]) + len(batch.appends) * APPEND_OVERHEAD
        self._speed += (cost / max(took, 1e-6) - self._speed) / 4
        self.commits += 1
        self.appended += len(entries)
        self.sizes[(len(seqs) - 1).bit_length()] += 1
        if generation == self._tail.generation:
            if entries:
                self._tail.offer(entries)
            self._tail.announce(max(seqs))
            self._tail.resolve()
        else:
            self._poll_now()
        if moving:
            self._note_moves(generation, *moves)
        self.publish_latency.observe(trio.current_time() - batch.appends[0].deadline + self._timeout)
        if len(entries) == len(seqs):
            batch.settle([Committed(seq) for seq in seqs])
        else:
            outcomes = [
                _outcome(seq, first, held) for seq, held in zip(seqs, present or [None] * len(seqs), strict=True)
            ]
            self.conflicts += seqs.count(_CONFLICT)
            self.duplicates += sum([isinstance(outcome, Committed) for outcome in outcomes]) - len(entries)
            batch.settle(outcomes)
        self._in_flight.popleft()

    async def _move(self, connection: DatabaseConnection) -> None:
        """Move messages from the outbox without a batch. Never cancelled, like an append."""
        epoch, generation = self._tail.epoch, self._tail.generation
        try:
            with trio.CancelScope(shield=True):
                moved, last, more = await self._fetch_row(connection, epoch, MOVE)
        except Exception as error:
            self._end_move()
            state = sqlstate(error)
            if state == _WRONG_EPOCH:
                await self._wait_epoch(epoch)
            elif state.startswith(_DATA_ERRORS):
                self._move_error = error
            else:
                raise
        else:
            self.commits += moved > 0
            self._note_moves(generation, moved, last, more)

    def _note_moves(self, generation: int, moved: int, last: int | None, more: bool) -> None:
        """Process the result of `MOVE`. Moved messages are read from the table, as on every other replica."""
        self.moved += moved
        if last is not None:
            if generation == self._tail.generation:
                self._tail.announce(last)
            else:
                self._poll_now()
        self._end_move(more)

    def _end_move(self, more: bool = False) -> None:
        self._moving = more
        self._move_ended.set()

    async def _fetch_row(self, connection: DatabaseConnection, epoch: str, statement: str, *args: object) -> Row:
        """The one row of a statement, which does nothing on a server that was not verified.

        Behind a pooler a connection outlives the server behind it. Nothing may be appended to a log that was set back
        until a poll has detected that: new entries would be taken for the lost ones under the same seqs.
        """
        settings = self._synchronous_commit, epoch
        row = await connection.fetchrow(statement, *settings, *args, self._tail.server, timeout=APPEND_TIMEOUT)
        if row[0] is None:
            raise OSError("this is another server than the one that was verified")
        return row

    def _split_rejected(self, batch: AppendBatch, error: BaseException) -> None:
        """Split a batch that the database has rejected, until the faulty message is alone and only that is rejected."""
        self._in_flight.popleft()
        if len(batch.appends) > 1:
            self._in_flight.extendleft(reversed(batch.split()))
        else:
            text, channel = str(error), batch.appends[0].channel
            now = trio.current_time()
            self._rejections.log(now, "the database refused a message", kind=text, channel=channel, error=text)
            batch.settle_all(FAILED)

    # Epochs

    async def _wait_epoch(self, epoch: str) -> None:
        """Wait until the log is open in another epoch than the one that the database has rejected."""
        self._poll_now()
        with trio.move_on_after(EPOCH_TIMEOUT):
            await self._tail.wait_epoch(epoch)
            return
        raise TimeoutError(f"the database rejected epoch {epoch}, and no other epoch has begun")

    def _move_to_epoch(self, batch: AppendBatch) -> None:
        """Move a batch to another epoch. Retries are undecidable there; all other messages keep their keys."""
        self._in_flight.popleft()
        rest = batch.select(lambda append: append.after is None)
        retries = batch.select(lambda append: append.after is not None)
        if rest is not None:
            rest.epoch, rest.after = self._tail.epoch, min(batch.after, self._tail.announced)
            self._in_flight.appendleft(rest)
        if retries is not None:
            retries.settle_all(UNDECIDED)

    def _note_epoch(self) -> None:
        """Before anything is queued or taken: reply `unknown` to queued retries of another epoch."""
        previous, self._epoch = self._epoch, self._tail.epoch
        if previous in ("", self._epoch):
            return
        for append in self._queue.withdraw(lambda append: append.after is not None):
            append.settle(append, UNDECIDED)


def _outcome(seq: int, first: int, present: int | None) -> Outcome:
    """The outcome of an entry, from its element of `seqs` and of `present`."""
    if seq > 0:
        return Committed(seq, seq < first)
    if seq == _CONFLICT:
        assert present is not None
        return conflict(present)
    return _REJECTIONS[seq]


def _is_sound(append: Append) -> bool:
    try:
        append.payload.decode()
    except UnicodeDecodeError:
        return False
    return True
