"""What happens to sessions: log lines, and with `[events] sessions` messages on reserved channels.

An open and a close of each authenticated session is published on `_catbus.sessions.CLIENT`, in the log like any other
message. They wait in a bounded queue, and one task appends them in batches, so that a thousand clients that connect at
once delay no publish. When the queue is full, the oldest are dropped, and a later message says how many.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from hashlib import sha256
from itertools import count
from typing import NamedTuple

import msgspec
import trio
from msgspec import Struct

from ..error_codes import ErrorCode
from ..errors import PeerError
from ..log import Append, Log, Outcome, Rejected
from ..protocol.channels import check_channel
from .session_log import SessionLog
from .session_report import OpenSession

PREFIX = "_catbus.sessions."
NAMELESS = PREFIX + "-"
"""The channel of sessions without a client_id, and of events about no session."""
SENDER = "_catbus"

BATCH_INTERVAL = 0.1
"""Seconds between two batches."""
BATCH_SIZE = 500
"""Events in a batch. Two thousand sessions per second open and close at most, so the queue fills only in an outage."""
MAX_WAITING = 10_000
"""Events that wait to be appended."""
RETRY_INTERVAL = 1.0
"""Seconds before events are appended again that the log did not take."""

_REPEATED = frozenset({ErrorCode.UNAVAILABLE, ErrorCode.OVERLOADED, ErrorCode.UNKNOWN, ErrorCode.SHUTTING_DOWN})
"""After these errors, events are appended again. Their key tells the log which of them it has already."""

CONNECTION_ENDED = "the connection ended"
"""The reason for which a session closes that the broker did not close."""


class SessionEvent(Struct):
    """What the payloads of events about one session have in common."""

    session: int
    """The id of the session on its replica."""
    replica: str
    client_id: str | None
    transport: str
    at: int
    """In milliseconds since 1970, by the clock of the replica."""


class OpenEvent(SessionEvent, tag="open", tag_field="event"):
    """A session was authenticated."""


class CloseEvent(SessionEvent, tag="close", tag_field="event"):
    """An authenticated session has ended."""

    code: int | None
    """Why the broker closed it; None if the client closed the connection, or it was lost."""
    reason: str
    duration: float
    """Seconds since the connection opened the session."""
    messages_in: int
    messages_out: int


class LostEvents(Struct, tag="lost", tag_field="event"):
    """A number of older events of this replica were dropped."""

    number: int
    replica: str
    at: int


def channel_of(client_id: str | None) -> str:
    """Return the channel for the sessions of a client.

    The client_id itself is the end of the channel if that makes a channel, and if it does not begin with `-`. For any
    other it is `-` and the SHA-256 of the client_id in hexadecimal digits.
    """
    if not client_id:
        return NAMELESS
    channel = PREFIX + client_id
    if not client_id.startswith("-"):
        try:
            check_channel(channel)
        except PeerError:
            pass
        else:
            return channel
    return f"{NAMELESS}{sha256(client_id.encode()).hexdigest()}"


class WaitingEvent(NamedTuple):
    """An event that is not in the log yet. `number` is its key there."""

    number: int
    channel: str
    payload: bytes


class SessionEvents:
    """Logs the opens and closes of the sessions of one replica, and publishes them if `publish` is true."""

    def __init__(self, replica: str, log: Log, *, publish: bool) -> None:
        self.counts = {"published": 0, "dropped": 0}
        """Events by outcome. One that says how many were lost counts as well."""
        self._replica = replica
        self._log = log
        self._publish = publish
        self._lines = SessionLog()
        self._numbers = count(1)
        # It begins with the time, as the producers of clients do: the log's index of keys then grows at its end.
        self._producer = (time.time_ns() // 1_000_000).to_bytes(6, "big") + os.urandom(10)
        self._queue: deque[WaitingEvent] = deque()
        self._lost = 0
        """Events that were dropped and that no message has named yet."""
        self._appending = False
        self._arrived = trio.Event()
        self._progress = trio.lowlevel.ParkingLot()

    @property
    def waiting(self) -> int:
        """Events in the queue. A batch that is being appended is not among them."""
        return len(self._queue)

    def opened(self, session: OpenSession) -> None:
        """Note that a session was authenticated for the first time."""
        driver = session.driver
        self._lines.opened(
            trio.current_time(),
            session.client_id,
            session.network,
            session=session.id,
            transport=driver.transport,
            auth=driver.token_kind,
        )
        if self._publish:
            self._put(
                OpenEvent(session.id, self._replica, session.client_id, driver.transport, time.time_ns() // 1_000_000)
            )

    def closed(self, session: OpenSession) -> None:
        """Note that a session has ended. Call it while the session still knows why."""
        driver, now = session.driver, trio.current_time()
        closing = driver.session.closing
        code, reason = (None, CONNECTION_ENDED) if closing is None else (int(closing[0]), closing[1])
        about = {"session": session.id, "transport": driver.transport, "auth": driver.token_kind}
        if not driver.authenticated:
            if closing is not None:
                self._lines.refused(now, session.network, **about, code=code, reason=reason)
            return
        event = CloseEvent(
            session=session.id,
            replica=self._replica,
            client_id=session.client_id,
            transport=driver.transport,
            at=time.time_ns() // 1_000_000,
            code=code,
            reason=reason,
            duration=round(now - session.began, 3),
            messages_in=driver.session.published,
            messages_out=driver.send_queue.count.messages,
        )
        for name in ("code", "reason", "duration", "messages_in", "messages_out"):
            about[name] = getattr(event, name)
        self._lines.closed(now, session.client_id, session.network, **about)
        if self._publish:
            self._put(event)

    def _put(self, event: SessionEvent) -> None:
        if len(self._queue) >= MAX_WAITING:
            self._queue.popleft()
            self._drop()
        self._queue.append(WaitingEvent(next(self._numbers), channel_of(event.client_id), msgspec.json.encode(event)))
        self._arrived.set()

    def _drop(self) -> None:
        self.counts["dropped"] += 1
        self._lost += 1

    def _take(self) -> list[WaitingEvent]:
        """Take the oldest events out of the queue, with the number of those that were dropped before them."""
        batch: list[WaitingEvent] = []
        if self._lost:
            lost = LostEvents(self._lost, self._replica, time.time_ns() // 1_000_000)
            batch.append(WaitingEvent(next(self._numbers), NAMELESS, msgspec.json.encode(lost)))
            self._lost = 0
        while self._queue and len(batch) < BATCH_SIZE:
            batch.append(self._queue.popleft())
        return batch

    async def run(self) -> None:
        """Append events until cancelled: at most one batch every `BATCH_INTERVAL`."""
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            while batch := self._take():
                self._appending = True
                again = await self._append(batch)
                while again:
                    await trio.sleep(RETRY_INTERVAL)
                    again = await self._append(again)
                self._appending = False
                self._progress.unpark_all()
                await trio.sleep(BATCH_INTERVAL)

    async def _append(self, events: Sequence[WaitingEvent]) -> list[WaitingEvent]:
        """Append a batch, and return the events that have to be appended again, in order."""
        again: list[WaitingEvent] = []
        unsettled = len(events)
        done = trio.Event()

        def settle(event: WaitingEvent, _: Append, outcome: Outcome) -> None:
            nonlocal unsettled
            if not isinstance(outcome, Rejected):
                self.counts["published"] += 1
            elif outcome.code in _REPEATED:
                again.append(event)
            else:
                self._drop()
            unsettled -= 1
            if not unsettled:
                done.set()

        for event in events:
            # As one client, it has a fair share of the log, however many events there are.
            self._log.submit(
                Append(
                    event.channel,
                    event.payload,
                    partial(settle, event),
                    self._producer,
                    event.number,
                    SENDER,
                    client=self,
                )
            )
        await done.wait()
        return sorted(again)

    async def flush(self) -> None:
        """Wait until all events so far are in the log, or dropped. `run` must be running."""
        while self._queue or self._lost or self._appending:
            await self._progress.park()
