"""One WebTransport session: the conversation on the first stream that its client opens, and streams of our own."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import trio

from ...delivery.send_queue import QueueItem, SendQueue
from ...errors import CloseCode
from ...protocol.wire_messages import ProtocolVersion
from ...session.publishing import STOPPING
from ...webtransport import (
    ConnectionLost,
    Event,
    SessionClosed,
    StreamData,
    StreamReset,
    StreamStopped,
    WebTransportConnection,
)
from .first_version_spacing import ObjectSpacer

if TYPE_CHECKING:
    from ...replica import Replica
    from ...session.driver import SessionDriver

CLOSING_TIME = 2.0
"""Seconds in which the peer must take the send queues, before it is told that the session ends."""
LEAVING_TIME = 6.0
"""Seconds for the end of the session to arrive; the connection itself gives up before that."""
STALL_TIME = 60.0
"""Seconds that a peer may take nothing of what waits for it on a stream."""

PORTION = 65_536
"""About how many bytes leave a send queue at a time, while the connection takes more."""

OWN_SHARE = 8
"""A subscription's own stream has a send queue of one part in so many of the session's: there may be a hundred of
them."""

REFUSED = 1
"""The code with which a stream that means nothing to us is refused."""

FAULT = CloseCode.INTERNAL, "internal error"
UNREAD = "nothing was read for a minute"


class StreamWriter:
    """The outlet of one send queue: a stream, which the client opens for the session and we for a subscription."""

    __slots__ = ("_flush", "acknowledged", "ending", "moved", "on_stopped", "over", "send_queue", "sent", "stream")

    send_queue: SendQueue

    def __init__(self, flush: Callable[[StreamWriter], None]) -> None:
        self.stream: int | None = None
        self.ending = False
        """Whether the stream ends after what the send queue holds."""
        self.over = False
        """Whether all that the send queue held has been handed over, and the end."""
        self.sent = 0
        self.acknowledged = 0
        """How many of the bytes that were sent the peer is known to have taken, as `check` found it."""
        self.moved = trio.current_time()
        """When that last changed, or nothing was waiting."""
        self.on_stopped: Callable[[SendQueue], None] | None = None
        self._flush = flush

    def flush(self) -> None:
        self._flush(self)


class WebTransportSession:
    """The lanes of one client, and the task that feeds the client what arrives.

    Whoever drives the connection passes its events to `handle` and calls `make_room` when something was acknowledged.
    `transmit` is called when the connection has something to send, `on_stall` for the log when a client does not read.
    """

    __slots__ = (
        "_blocked",
        "_client",
        "_connection",
        "_datagrams",
        "_ended",
        "_gone",
        "_inbox",
        "_lanes",
        "_lost",
        "_main",
        "_moved",
        "_network",
        "_news",
        "_on_fault",
        "_on_stall",
        "_replica",
        "_room",
        "_spacer",
        "_transmit",
    )

    def __init__(
        self,
        replica: Replica,
        connection: WebTransportConnection,
        transmit: Callable[[], None],
        on_fault: Callable[[str, BaseException], None],
        on_stall: Callable[[str], object],
        network: str = "",
    ) -> None:
        self._replica = replica
        self._connection = connection
        self._transmit = transmit
        self._on_fault = on_fault
        self._on_stall = on_stall
        self._network = network
        self._main = StreamWriter(self._flush)
        self._lanes: dict[int, StreamWriter] = {}
        """Those of subscriptions, by their streams, until the peer has all of theirs."""
        self._blocked: dict[StreamWriter, None] = {}
        """Those whose send queues hold what the connection did not take, the longest waiting first."""
        self._datagrams = False
        """Whether there are datagrams to be transmitted."""
        self._spacer = ObjectSpacer()
        """What waits for a first-version client, beside its send queue."""
        self._inbox: list[bytes] = []
        self._ended = False
        """Whether the peer says nothing more."""
        self._gone = False
        """Whether it hears nothing more."""
        self._lost = trio.Event()
        self._news = trio.Event()
        self._room = trio.lowlevel.ParkingLot()
        self._moved = trio.current_time()
        """When the peer last took something, of any stream."""
        self._client: SessionDriver = replica.open_session(
            self._main, transport="webtransport", streams=self, network=network
        )
        self._main.send_queue = self._client.send_queue

    @property
    def client(self) -> Hashable:
        """Whose token the peer has shown last, once it has shown one."""
        return self._client.session.usage.client

    @property
    def due(self) -> float | None:
        """When `make_room` has something to do even where nothing is acknowledged until then."""
        return self._spacer.due

    # What the connection says. None of this waits.

    def handle(self, event: Event) -> None:
        """Take an event of the session."""
        main = self._main.stream
        match event:
            case StreamData():
                self._take(event)
            case StreamReset() if event.stream == main:
                self._end()
            case StreamStopped() if event.stream == main:
                self._end(gone=True)
            case StreamStopped() if event.stream in self._lanes:
                self._stopped(self._lanes.pop(event.stream))
            case SessionClosed():
                self._end(gone=True)
            case ConnectionLost():
                self._end(gone=True)
                self._lost.set()

    def _take(self, event: StreamData) -> None:
        stream, main = event.stream, self._main
        if main.stream is None and stream % 4 == 0:
            main.stream = stream
        if stream != main.stream:
            self._connection.stop_sending(stream, REFUSED)
            self._connection.reset(stream, REFUSED)
            return
        if event.data:
            self._inbox.append(event.data)
            self._client.heard(len(event.data))
        if event.ended:
            self._ended = True
        self._news.set()

    def _end(self, *, gone: bool = False) -> None:
        """Nothing more comes. What has come is still understood, and then the client leaves."""
        self._ended = True
        self._news.set()
        if gone:
            self._gone = True
            self._blocked.clear()
            self._spacer.clear()
            # Whoever waits for room in them need not wait any more.
            for lane in (self._main, *self._lanes.values()):
                lane.send_queue.take()
            self._room.unpark_all()

    def _stopped(self, lane: StreamWriter) -> None:
        """The peer gets no more of a stream of ours, because it does not want it or does not read it."""
        lane.stream = None
        lane.send_queue.take()
        self._blocked.pop(lane, None)
        self._room.unpark_all()
        if lane.on_stopped is not None and not lane.ending:
            lane.on_stopped(lane.send_queue)

    def make_room(self) -> None:
        """The peer may have acknowledged something: hand over what has been waiting for that, for whoever transmits."""
        if self._blocked:
            for lane in list(self._blocked):
                self._fill(lane)

    # Streams and datagrams for the client's subscriptions.

    def open_stream(self, on_stopped: Callable[[SendQueue], None]) -> SendQueue | None:
        stream = self._connection.open_stream(bidirectional=False)
        if stream is None:
            return None
        lane = self._lanes[stream] = StreamWriter(self._flush)
        lane.stream = stream
        lane.on_stopped = on_stopped
        lane.send_queue = SendQueue(
            lane, self._replica.flusher.wake, self._main.send_queue.limit // OWN_SHARE, self._replica.delivery.budget
        )
        return lane.send_queue

    def end_stream(self, send_queue: SendQueue) -> None:
        lane = send_queue.writer
        assert isinstance(lane, StreamWriter)
        if lane.stream is None or lane.ending:
            return
        lane.ending = True
        if not send_queue:
            self._connection.send(lane.stream, b"", end=True)
            self._over(lane)
            self._transmit()

    def send_datagram(self, data: bytes) -> bool:
        if len(data) > self._connection.max_datagram_size:
            return False
        if self._connection.send_datagram(data):
            # The flusher sees to it, so that many leave together when there is much to do.
            self._datagrams = True
            self._replica.flusher.wake(self._main.send_queue)
        else:
            self._main.send_queue.turned_away += 1
        return True

    # The send queues.

    def _flush(self, lane: StreamWriter) -> None:
        """Send what a send queue holds, unless the peer has much to take already; then `make_room` sees to it."""
        try:
            if self._fill(lane) or self._datagrams:
                self._datagrams = False
                self._transmit()
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._on_fault("a flush failed", error)
            self._connection.close("internal error")
            self._transmit()

    def _fill(self, lane: StreamWriter) -> bool:
        send_queue, stream = lane.send_queue, lane.stream
        if self._gone or (stream is None and lane is not self._main):
            send_queue.take()
            return False
        if send_queue.protocol is ProtocolVersion.FIRST:
            return self._fill_spaced(lane)
        before = lane.sent
        while stream is not None and self._connection.writable(stream):
            items = send_queue.take(PORTION)
            if lane is self._main and self._spacer:
                # It has turned out to be a client of the specification.
                items = [*self._spacer.clear(), *items]
            if items:
                lines = join_lines(items)
                lane.sent += len(lines)
                self._connection.send(stream, lines, lane.ending and not send_queue)
            if not send_queue:
                self._blocked.pop(lane, None)
                if lane.ending:
                    self._over(lane)
                break
        if send_queue or send_queue.awaited:
            self._blocked[lane] = None
        if lane.sent == before:
            return False
        self._room.unpark_all()
        return True

    def _fill_spaced(self, lane: StreamWriter) -> bool:
        """Send one object to a first-version client, if it may be sent now."""
        self._blocked[lane] = None
        stream = lane.stream
        if stream is None or self._connection.unacknowledged(stream):
            return False
        line = self._spacer.next_line(lane.send_queue, trio.current_time())
        if not line:
            if not self._spacer:
                del self._blocked[lane]
            return False
        self._connection.send(stream, line)
        lane.sent += len(line)
        self._room.unpark_all()
        return True

    def _over(self, lane: StreamWriter) -> None:
        """All of it has been handed over. The peer may leave it unread yet."""
        lane.over = True

    def check(self, now: float) -> None:
        """Give up the streams of which the peer takes nothing, or the session when it takes nothing at all."""
        stalled: list[int] = []
        for stream, lane in list(self._lanes.items()):
            if self._is_stalled(lane, now):
                stalled.append(stream)
            elif lane.over and not self._connection.unacknowledged(stream):
                del self._lanes[stream]
        waits = self._main.stream is not None and self._is_stalled(self._main, now)
        # Streams that are not read can hold the window of the whole connection, so that others have not even begun.
        for stream in [one for one in stalled if self._lanes[one].acknowledged > 0] or stalled:
            self._on_stall("a client does not read a subscription's stream")
            self._connection.reset(stream, CloseCode.UNRESPONSIVE)
            self._stopped(self._lanes.pop(stream))
        if stalled:
            for lane in (self._main, *self._lanes.values()):
                lane.moved = now
        elif waits and now - self._moved >= STALL_TIME:
            self._on_stall("a client does not read")
            self._connection.close_session(CloseCode.UNRESPONSIVE, UNREAD, now)

    def _is_stalled(self, lane: StreamWriter, now: float) -> bool:
        unacknowledged = self._connection.unacknowledged(lane.stream)
        acknowledged = lane.sent - unacknowledged
        if acknowledged > lane.acknowledged:
            lane.acknowledged = acknowledged
            lane.moved = self._moved = now
        elif not (unacknowledged or lane in self._blocked):
            lane.moved = now
        return now - lane.moved >= STALL_TIME

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
            with self._replica.cpu_scheduler.serve(self._network):
                goodbye = await self._converse(client)
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._on_fault("a session failed", error)
            goodbye = FAULT
        except BaseException:
            client.leave()
            self._close(client.closing or (CloseCode.SHUTTING_DOWN, STOPPING))
            raise
        client.leave()
        self._close(goodbye)
        with trio.move_on_after(LEAVING_TIME):
            await self._lost.wait()

    async def _converse(self, client: SessionDriver) -> tuple[int, str]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, client)
            await client.wait_closing()
            nursery.cancel_scope.cancel()
        with trio.move_on_after(CLOSING_TIME):
            lanes = [lane for lane in (self._main, *self._lanes.values()) if lane.stream is not None]
            for lane in lanes:
                self._fill(lane)
            self._transmit()
            while (self._spacer or any(lane.send_queue for lane in lanes)) and not self._gone:
                await self._room.park()
        return client.closing or (0, "")

    def _close(self, goodbye: tuple[int, str]) -> None:
        code, reason = goodbye
        if self._connection.close_session(int(code), reason, trio.current_time()):
            self._transmit()

    async def _read(self, client: SessionDriver) -> None:
        """Feed the client until it is closing, or until the peer has ended and all that came is understood.

        Bytes are given back to the peer's windows when they are understood: while `receive` waits, it cannot send
        more than those.
        """
        try:
            while client.closing is None:
                if self._inbox:
                    await self._replica.cpu_scheduler.acquire()
                    data = b"".join(self._inbox)
                    self._inbox.clear()
                    await client.receive(data)
                    if client.proven:
                        self._connection.trust()
                    assert self._main.stream is not None
                    self._connection.consumed(self._main.stream, len(data))
                    self._fill(self._main)
                    self._transmit()
                elif self._ended:
                    client.leave()
                    return
                else:
                    self._news = trio.Event()
                    await self._news.wait()
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._on_fault("a session failed", error)
            client.close(*FAULT)


def join_lines(items: Sequence[QueueItem]) -> bytes:
    """What a send queue held, as bytes of a stream: a line each."""
    parts = [item if isinstance(item, bytes) else item.lines for item in items]
    return parts[0] if len(parts) == 1 else b"".join(parts)
