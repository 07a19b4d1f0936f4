"""The courier: takes ephemeral messages to the other replicas at once, or not at all, and hands on theirs."""

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

PACE = 0.01
"""Seconds between statements, in which messages gather."""
AGE = 1.0
"""Older messages are nobody's any more."""
PATIENCE = 3.0
"""Seconds for one statement; after that the connection is given up, and so is what it was to send."""
MESSAGES = 10_000
BYTES = 1 << 20
"""How much may gather."""

# Nobody waits for a disk or a standby here, and nobody waits long for the lock that a commit with a notification holds,
# which another's commit may hold while it does wait for them. As in catbus.append, a listener that has stopped must not
# fill the queue of notifications.
_NOTIFY = """
SELECT set_config('synchronous_commit', 'off', true),
       set_config('lock_timeout', '1s', true),
       CASE WHEN pg_notification_queue_usage() <= 0.5
            THEN (SELECT count(pg_notify($1, card)) FROM unnest($2::text[]) AS card)
       END
"""


class EphemeralRelay:
    """Carries ephemeral messages at most once: what cannot go just now is dropped, and so is what was in doubt."""

    def __init__(self, connect: Callable[[], Awaitable[DatabaseConnection]], tail: LogTail) -> None:
        self.sent = 0
        self.received = 0
        self.dropped = 0
        """Messages that were not sent, or not for certain."""
        self.statements = 0
        """How often messages were sent."""
        self._connect = connect
        self._tail = tail
        self._post = EphemeralEncoder()
        self._gathered: deque[tuple[float, bytes]] = deque()
        """Messages that are to be sent, each with the time it came."""
        self._size = 0
        self._work = trio.Event()

    def broadcast(self, entry: Entry) -> None:
        """Have a message sent with the next statement, if there is room for it."""
        now = trio.current_time()
        self._drop_old(now)
        message = encode_message(entry)
        if len(self._gathered) >= MESSAGES or self._size + len(message) > BYTES:
            self.dropped += 1
            return
        self._gathered.append((now, message))
        self._size += len(message)
        self._work.set()

    def begin(self) -> None:
        """A connection begins to listen for what other replicas send."""
        self._post.begin(self._tail.database_time())

    def read(self, card: str) -> list[Entry]:
        """What another replica has sent. Raises as `Post.read` does."""
        tail = self._tail
        return self._post.read(card, tail.epoch, tail.seal, tail.database_time())

    def deliver(self, entries: Sequence[Entry]) -> None:
        """Hand on what was read."""
        for entry in entries:
            self.received += 1
            self._tail.broadcast(entry)

    async def run(self, working: ReportProgress) -> None:
        """Send what gathers until that fails, on a connection that is made when there is something to send."""
        await self._tail.wait_epoch()
        while True:
            await self._wait_work()
            with await self._connect() as connection:
                while not connection.closed:
                    pause = trio.current_time() + PACE
                    await self._send(connection)
                    working()
                    await trio.sleep_until(pause)
                    await self._wait_work()

    async def _wait_work(self) -> None:
        while not self._gathered:
            self._work = trio.Event()
            await self._work.wait()

    async def _send(self, connection: DatabaseConnection) -> None:
        """Send all that has gathered. Whether that succeeds or not, it is not sent again."""
        self._drop_old(trio.current_time())
        messages = [message for _, message in self._gathered]
        self._gathered.clear()
        self._size = 0
        sent = 0
        try:
            tail = self._tail
            cards, number = self._post.write(messages, tail.epoch, tail.seal, tail.database_time())
            if cards:
                self.statements += 1
                *_, notified = await connection.fetchrow(_NOTIFY, EPHEMERAL_CHANNEL, cards, timeout=PATIENCE)
                sent = number if notified else 0
        finally:
            self.sent += sent
            self.dropped += len(messages) - sent

    def _drop_old(self, now: float) -> None:
        gathered = self._gathered
        while gathered and gathered[0][0] < now - AGE:
            _, message = gathered.popleft()
            self._size -= len(message)
            self.dropped += 1
