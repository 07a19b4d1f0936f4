"""The listening side: notifications as hints, one poll as the safety net, and what tells one log from another."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from hashlib import sha256
from hmac import compare_digest

import msgspec
import trio
from msgspec import Raw

from ..log import Entry
from ..loggers import get_logger
from .bridge import Connection
from .courier import EPHEMERAL, SECRET, Courier
from .epochs import Epochs
from .supervise import Working
from .tail import Tail

logger = get_logger("catbus.postgres")

CHANNEL = "catbus"
PACE = 2.0
"""Seconds between polls while every advance is announced."""
GRACE = 0.25
"""How much later than the poll a notification may come."""
PATIENCE = 3.0
"""A connection that does not answer the poll for so long is given up."""
_HEARD = 10_000
"""Notifications that may wait; for more there is the poll."""

_POSITION = "SELECT epoch, head, floor FROM catbus.position()"
_EPOCHS = "SELECT epoch, after_seq FROM catbus.epochs ORDER BY ordinal"

_enclosed = msgspec.json.Decoder(list[tuple[int, int, str, str | None, str | None, Raw]])


class Listener:
    """Keeps the tail informed, through a connection of its own. `own_pid` tells our writer's notifications apart."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        tail: Tail,
        own_pid: Callable[[], int],
        courier: Courier,
    ) -> None:
        self.epochs = Epochs()
        self.notifications = 0
        self.dropped = 0
        """Notifications for which there was no room."""
        self.polls = 0
        self.unannounced = 0
        """How often the poll found what no notification had told of."""
        self._connect = connect
        self._tail = tail
        self._own_pid = own_pid
        self._courier = courier
        self._seal = ""
        self._heard: deque[tuple[str, int, str]] = deque()
        self._news = trio.Event()
        self._doubt = trio.Event()

    def check(self) -> None:
        """Poll at once: there is reason to think that the log is another one."""
        self._doubt.set()

    async def run(self, working: Working) -> None:
        """Listen until the connection is lost. LISTEN first, then the position: nothing falls between them."""
        with await self._connect() as connection:
            self._heard.clear()
            connection.when_closed(self._hear_end)
            for channel in (CHANNEL, EPHEMERAL):
                await connection.listen(channel, partial(self._hear, channel))
            (self._seal,) = await connection.fetchrow(SECRET, timeout=PATIENCE)
            self._tail.announce(await self._look(connection))
            working()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, connection)
                await self._watch(connection, working)

    def _hear(self, channel: str, pid: int, payload: str) -> None:
        if len(self._heard) < _HEARD:
            self._heard.append((channel, pid, payload))
            self._news.set()
        else:
            self.dropped += 1

    def _hear_end(self) -> None:
        self._news.set()

    async def _follow(self, connection: Connection) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            while self._heard:
                self._take(*self._heard.popleft())
                # A burst is handed on bit by bit, so that the mailboxes are emptied in between.
                await trio.lowlevel.checkpoint()
            if connection.closed:
                raise OSError("the connection that listens was lost")

    def _take(self, channel: str, pid: int, payload: str) -> None:
        """Understand one notification, if it is one of ours: anybody who may connect to the database may notify."""
        self.notifications += 1
        try:
            if channel == EPHEMERAL:
                self._courier.take(payload, self._seal)
            else:
                self._take_hint(pid, payload)
        except (ValueError, msgspec.DecodeError):
            logger.warning("a notification that is not ours", channel=channel, length=len(payload))

    def _take_hint(self, pid: int, payload: str) -> None:
        """Understand `epoch:first:last`, perhaps followed by a seal and the entries themselves.

        A position is read before it is believed, and entries are believed when their seal was made with a secret of
        the log's owner.
        """
        head, _, rest = payload.partition(" ")
        seal, _, enclosed = rest.partition(" ")
        epoch, _, last = head.split(":")
        newest = int(last)
        if epoch != self._tail.epoch:
            self.check()
        elif pid == self._own_pid():
            self._tail.expect(newest)
        else:
            if enclosed and compare_digest(seal.encode(), sealed(head, enclosed, self._seal).encode()):
                self._tail.offer(_entries(enclosed))
            self._tail.announce(newest)

    async def _watch(self, connection: Connection, working: Working) -> None:
        while True:
            with trio.move_on_after(self._pace()):
                await self._doubt.wait()
            self._doubt = trio.Event()
            head = await self._look(connection)
            working()
            if head > self._tail.announced:
                await trio.sleep(GRACE)
                if head > self._tail.announced:
                    self.unannounced += 1
                    self._tail.announce(head)

    def _pace(self) -> float:
        """How long to wait before the next poll."""
        return PACE

    async def _look(self, connection: Connection) -> int:
        """Read the database's position and return its head. Another log than ours is opened."""
        tail = self._tail
        applied = tail.applied
        self.polls += 1
        epoch, head, floor = await connection.fetchrow(_POSITION, timeout=PATIENCE)
        if epoch != tail.epoch or head < applied:
            known = [(name, after) for name, after in await connection.fetch(_EPOCHS, timeout=PATIENCE)]
            self.epochs = Epochs(known)
            began = self.epochs.began(epoch) if tail.epoch not in ("", epoch) else None
            start = head if began is None else min(max(began, floor - 1), head)
            if tail.epoch:
                logger.warning("the log is another one now", epoch=epoch, applied=applied, head=head, after=start)
            tail.restart(epoch, start, floor)
            tail.announce(head)
        tail.floor = floor
        return int(head)


def sealed(head: str, enclosed: str, secret: str) -> str:
    """The seal that `catbus.append` puts on the entries in a notification."""
    return sha256(f"{head}{enclosed}{secret}".encode()).hexdigest()[:32]


def _entries(enclosed: str) -> list[Entry]:
    found = [
        Entry(seq, at, channel, bytes(payload), sender, None if origin is None else bytes.fromhex(origin))
        for seq, at, channel, sender, origin, payload in _enclosed.decode(enclosed)
    ]
    if not found or found[-1].seq - found[0].seq != len(found) - 1:
        raise ValueError("not a stretch of the log")
    return found
