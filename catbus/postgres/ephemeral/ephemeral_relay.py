"""The ephemeral relay: sends ephemeral messages to other replicas by NOTIFY, and delivers theirs."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence

import trio

from ...log import Entry
from ..access.asyncpg_bridge import DatabaseConnection
from ..access.reconnecting_tasks import ReportProgress
from ..follow.log_tail import LogTail
from ..notifications.encryption import EPHEMERAL_CHANNEL
from .encoding import EphemeralEncoder, encode_message

SEND_INTERVAL = 0.01
"""Seconds between statements. Messages queue in between."""
MAX_WAIT = 1.0
"""Seconds after which a queued message is dropped."""
SEND_TIMEOUT = 3.0
"""Seconds for one statement. After that the connection and the messages of the statement are dropped."""
QUEUED_MESSAGES = 10_000
QUEUED_BYTES = 1 << 20
"""The limits of the queue."""

# The commit waits for no disk and no standby. It does not wait long for the lock of commits with notifications either,
# which another transaction may hold while that one waits for a standby. As in catbus.notify, a listener that does not
# read must not fill the notification queue.
_NOTIFY = """
SELECT set_config('synchronous_commit', 'off', true),
       set_config('lock_timeout', '1s', true),
       CASE WHEN pg_notification_queue_usage() <= 0.5
            THEN (SELECT count(pg_notify($1, text)) FROM unnest($2::text[]) AS text)
       END
"""


class EphemeralRelay:
    """Sends each message at most once: a message that cannot be sent soon is dropped, and so is one in doubt."""

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]], tail: LogTail) -> None:
        self.sent = 0
        self.received = 0
        self.dropped = 0
        """Messages that were not sent, or not with certainty."""
        self.statements = 0
        """Statements that have sent messages."""
        self._connect = connect
        self._tail = tail
        self._encoder = EphemeralEncoder()
        self._queued: deque[tuple[float, bytes]] = deque()
        """The messages to send, each with the time at which it was queued."""
        self._size = 0
        self._has_queued = trio.Event()

    def broadcast(self, entry: Entry) -> None:
        """Queue a message for the next statement. If the queue is full, the message is dropped."""
        now = trio.current_time()
        self._drop_old(now)
        message = encode_message(entry)
        if len(self._queued) >= QUEUED_MESSAGES or self._size + len(message) > QUEUED_BYTES:
            self.dropped += 1
            return
        self._queued.append((now, message))
        self._size += len(message)
        self._has_queued.set()

    def begin_listening(self) -> None:
        """A connection begins to listen. Messages that were sent before are ignored."""
        self._encoder.begin(self._tail.database_time())

    def decode(self, text: str) -> list[Entry]:
        """The messages in a notification of another replica. Raises as `EphemeralEncoder.decode` does."""
        tail = self._tail
        return self._encoder.decode(text, tail.epoch, tail.keys, tail.database_time())

    def deliver(self, entries: Sequence[Entry]) -> None:
        """Deliver the messages of another replica."""
        for entry in entries:
            self.received += 1
            self._tail.broadcast(entry)

    async def run(self, report_progress: ReportProgress) -> None:
        """Send queued messages until that fails. The connection is opened when there is something to send."""
        await self._tail.wait_epoch()
        while True:
            await self._wait_queued()
            with await self._connect() as connection:
                while not connection.closed:
                    pause = trio.current_time() + SEND_INTERVAL
                    await self._send(connection)
                    report_progress()
                    await trio.sleep_until(pause)
                    await self._wait_queued()

    async def _wait_queued(self) -> None:
        while not self._queued:
            self._has_queued = trio.Event()
            await self._has_queued.wait()

    async def _send(self, connection: DatabaseConnection) -> None:
        """Send all queued messages. They are not sent again, whether that succeeds or not."""
        self._drop_old(trio.current_time())
        messages = [message for _, message in self._queued]
        self._queued.clear()
        self._size = 0
        sent = 0
        try:
            tail = self._tail
            texts, number = self._encoder.encode(messages, tail.epoch, tail.keys, tail.database_time())
            if texts:
                self.statements += 1
                *_, notified = await connection.fetchrow(_NOTIFY, EPHEMERAL_CHANNEL, texts, timeout=SEND_TIMEOUT)
                sent = number if notified else 0
        finally:
            self.sent += sent
            self.dropped += len(messages) - sent

    def _drop_old(self, now: float) -> None:
        queued = self._queued
        while queued and queued[0][0] < now - MAX_WAIT:
            _, message = queued.popleft()
            self._size -= len(message)
            self.dropped += 1
