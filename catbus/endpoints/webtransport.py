"""One WebTransport session: the conversation on the first stream that its client opens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import trio

from ..errors import CloseCode
from ..hub import STOPPING
from ..loggers import get_logger
from ..mailbox import Item
from ..webtransport import Connection, ConnectionLost, Event, SessionClosed, StreamData, StreamReset, StreamStopped
from ..wire import Protocol

if TYPE_CHECKING:
    from ..hub import Client, Hub

CLOSING_TIME = 2.0
"""Seconds in which the peer must take the mailbox, before it is told that the session ends."""
LEAVING_TIME = 6.0
"""Seconds for the end of the session to arrive; the connection itself gives up before that."""
STALL_TIME = 60.0
"""Seconds that a peer may take nothing of what waits for it."""

REFUSED = 1
"""The code with which a stream that means nothing to us is refused."""

FAULT = CloseCode.INTERNAL, "internal error"

logger = get_logger("catbus.endpoints")


class Conversation:
    """The outlet of one client's mailbox, and the task that feeds the client what arrives.

    Whoever drives the connection passes its events to `handle` and calls `make_room` when something was acknowledged.
    `transmit` is called when the connection has something to send.
    """

    __slots__ = (
        "_acknowledged",
        "_client",
        "_connection",
        "_ended",
        "_gone",
        "_inbox",
        "_lost",
        "_moved",
        "_news",
        "_on_fault",
        "_room",
        "_sent",
        "_stream",
        "_transmit",
    )

    def __init__(
        self, hub: Hub, connection: Connection, transmit: Callable[[], None], on_fault: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._transmit = transmit
        self._on_fault = on_fault
        self._stream: int | None = None
        self._inbox: list[bytes] = []
        self._ended = False
        """Whether the peer says nothing more."""
        self._gone = False
        """Whether it hears nothing more."""
        self._lost = trio.Event()
        self._news = trio.Event()
        self._room = trio.lowlevel.ParkingLot()
        self._sent = 0
        self._acknowledged = -1
        self._moved = trio.current_time()
        self._client: Client = hub.open_client(self, transport="webtransport")

    # What the connection says. None of this waits.

    def handle(self, event: Event) -> None:
        """Take an event of the session."""
        match event:
            case StreamData():
                self._take(event)
            case StreamReset() if event.stream == self._stream:
                self._end()
            case StreamStopped() if event.stream == self._stream:
                self._end(gone=True)
            case SessionClosed():
                self._end(gone=True)
            case ConnectionLost():
                self._end(gone=True)
                self._lost.set()

    def _take(self, event: StreamData) -> None:
        stream = event.stream
        if self._stream is None and stream % 4 == 0:
            self._stream = stream
        if stream != self._stream:
            self._connection.stop_sending(stream, REFUSED)
            self._connection.reset(stream, REFUSED)
            return
        if event.data:
            self._inbox.append(event.data)
        if event.ended:
            self._ended = True
        self._news.set()

    def _end(self, *, gone: bool = False) -> None:
        """Nothing more comes. What has come is still understood, and then the client leaves."""
        self._ended = True
        self._news.set()
        if gone:
            self._gone = True
            self._client.mailbox.take()  # Whoever waits for room in it need not wait any more.
            self._room.unpark_all()

    def make_room(self) -> None:
        """The peer may have acknowledged something: hand over what has been waiting for that, for whoever transmits."""
        if self._client.mailbox:
            self._fill()

    # The mailbox.

    def flush(self) -> None:
        """Send what the mailbox holds, unless the peer has much to take already; then `make_room` sees to it."""
        try:
            if self._fill():
                self._transmit()
        except Exception:
            logger.exception("a flush failed")
            self._on_fault()
            self._connection.close("internal error")
            self._transmit()

    def _fill(self) -> bool:
        mailbox, stream = self._client.mailbox, self._stream
        if self._gone:
            mailbox.take()
        elif stream is not None and mailbox and self._connection.writable(stream):
            lines = join_lines(mailbox.take(), mailbox.protocol)
            self._sent += len(lines)
            self._connection.send(stream, lines)
            self._room.unpark_all()
            return True
        return False

    def check(self, now: float) -> None:
        """Give up a peer that takes nothing of what waits for it."""
        waiting = self._connection.unacknowledged(self._stream) if self._stream is not None else 0
        acknowledged = self._sent - waiting
        if acknowledged != self._acknowledged or not self._client.mailbox:
            self._acknowledged, self._moved = acknowledged, now
        elif now - self._moved >= STALL_TIME:
            logger.info("a client does not read", seconds=STALL_TIME)
            self._connection.close("nothing was read")

    def stop(self) -> None:
        """The endpoint is about to end."""
        self._connection.close_session(CloseCode.SHUTTING_DOWN, STOPPING, trio.current_time())

    def abandon(self) -> None:
        """There will be no task."""
        self._client.leave()
        self.stop()

    # The task.

    async def run(self) -> None:
        """Serve the client until the connection is lost. No exception comes out of it."""
        client = self._client
        try:
            goodbye = await self._converse(client)
        except Exception:
            logger.exception("a session failed")
            self._on_fault()
            goodbye = FAULT
        except BaseException:
            client.leave()
            self._close(client.closing or (CloseCode.SHUTTING_DOWN, STOPPING))
            raise
        client.leave()
        self._close(goodbye)
        with trio.move_on_after(LEAVING_TIME):
            await self._lost.wait()

    async def _converse(self, client: Client) -> tuple[int, str]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, client)
            await client.wait_closing()
            nursery.cancel_scope.cancel()
        with trio.move_on_after(CLOSING_TIME):
            self.flush()
            while client.mailbox and self._stream is not None and not self._gone:
                await self._room.park()
        return client.closing or (0, "")

    def _close(self, goodbye: tuple[int, str]) -> None:
        code, reason = goodbye
        if self._connection.close_session(int(code), reason, trio.current_time()):
            self._transmit()

    async def _read(self, client: Client) -> None:
        """Feed the client until it is closing, or until the peer has ended and all that came is understood.

        Bytes are given back to the peer's windows when they are understood: while `receive` waits, it cannot send
        more than those.
        """
        try:
            while client.closing is None:
                if self._inbox:
                    data = b"".join(self._inbox)
                    self._inbox.clear()
                    await client.receive(data)
                    assert self._stream is not None
                    self._connection.consumed(self._stream, len(data))
                    self._fill()
                    self._transmit()
                elif self._ended:
                    client.leave()
                    return
                else:
                    self._news = trio.Event()
                    await self._news.wait()
        except Exception:
            logger.exception("a session failed")
            self._on_fault()
            client.close(*FAULT)


def join_lines(items: Sequence[Item], protocol: Protocol) -> bytes:
    """What a mailbox held, as bytes of a stream: a line each."""
    if protocol is Protocol.V1:
        parts = [item if isinstance(item, bytes) else item.lines for item in items]
        return parts[0] if len(parts) == 1 else b"".join(parts)
    lines: list[bytes] = []
    for item in items:
        lines += (item,) if isinstance(item, bytes) else item.first_version_lines
    return b"".join(lines)
