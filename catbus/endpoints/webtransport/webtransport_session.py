"""One WebTransport session: the stream that its client opens, and the streams that the broker opens."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import trio

from ...close_codes import CloseCode
from ...delivery.encoded_messages import QueueItem
from ...delivery.send_queue import SendQueue
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
from ..replica_interface import ReplicaInterface, SessionInterface
from .first_version_spacing import ObjectSpacer

CLOSE_TIMEOUT = 2.0
"""Seconds for sending the send queues before the session is closed."""
CONNECTION_CLOSE_TIMEOUT = 6.0
"""Seconds for the end of the connection after the session was closed. QUIC's own timeout is shorter."""
STALL_TIMEOUT = 60.0
"""Seconds without progress of a stream, after which it is reset, or the session is closed."""

WRITE_SIZE = 65_536
"""Bytes taken from a send queue at a time, approximately, while the connection takes more."""

SUBSCRIPTION_QUEUE_DIVISOR = 8
"""The send queue of a subscription's own stream has one part in this many of the session's limit, because one session
may have a hundred such streams."""

STREAM_REJECTED = 1
"""The error code for a stream of the client that has no meaning in the protocol."""

INTERNAL_ERROR = CloseCode.INTERNAL, "internal error"
STALLED_REASON = "the client read nothing for a minute"


class StreamWriter:
    """Writes one send queue to a stream: the client opens the session's, the broker those of subscriptions."""

    __slots__ = (
        "_flush",
        "acknowledged",
        "end_requested",
        "finished",
        "last_progress",
        "on_stopped",
        "send_queue",
        "sent",
        "stream",
    )

    send_queue: SendQueue

    def __init__(
        self,
        flush: Callable[[StreamWriter], None],
        stream: int | None = None,
        on_stopped: Callable[[SendQueue], None] | None = None,
    ) -> None:
        self.stream = stream
        self.end_requested = False
        """Whether the stream ends after the items in the send queue."""
        self.finished = False
        """Whether QUIC has all items, and the end of the stream."""
        self.sent = 0
        self.acknowledged = 0
        """Sent bytes that the peer had acknowledged at the last `check_stalled`."""
        self.last_progress = trio.current_time()
        """The time when `acknowledged` last changed, or nothing was waiting."""
        self.on_stopped = on_stopped
        self._flush = flush

    def flush(self) -> None:
        self._flush(self)


class WebTransportSession:
    """The streams of one session, and the task that passes received bytes to it.

    The owner of the connection passes its events to `handle_event`, and calls `send_blocked` after acknowledgements.
    The session calls `transmit` when the connection has something to send, and `on_stall` when a client does not read.
    """

    __slots__ = (
        "_blocked",
        "_connection",
        "_datagrams_waiting",
        "_driver",
        "_ended",
        "_last_progress",
        "_lost",
        "_network",
        "_on_internal_error",
        "_on_stall",
        "_peer_closed",
        "_progress",
        "_receive_event",
        "_received",
        "_replica",
        "_session_writer",
        "_spacer",
        "_subscription_writers",
        "_transmit",
    )

    def __init__(
        self,
        replica: ReplicaInterface,
        connection: WebTransportConnection,
        transmit: Callable[[], None],
        on_internal_error: Callable[[str, BaseException], None],
        on_stall: Callable[[str], object],
        network: str = "",
    ) -> None:
        self._replica = replica
        self._connection = connection
        self._transmit = transmit
        self._on_internal_error = on_internal_error
        self._on_stall = on_stall
        self._network = network
        self._session_writer = StreamWriter(self._flush)
        self._subscription_writers: dict[int, StreamWriter] = {}
        """The writers of subscriptions by stream, until the peer has acknowledged everything."""
        self._blocked: dict[StreamWriter, None] = {}
        """Writers with items that the connection did not take, the longest waiting first."""
        self._datagrams_waiting = False
        """Whether datagrams wait for `transmit`."""
        self._spacer = ObjectSpacer()
        """Lines for a first-version client that have left its send queue."""
        self._received: list[bytes] = []
        self._ended = False
        """Whether the peer sends nothing more."""
        self._peer_closed = False
        """Whether the peer receives nothing more."""
        self._lost = trio.Event()
        self._receive_event = trio.Event()
        self._progress = trio.lowlevel.ParkingLot()
        self._last_progress = trio.current_time()
        """The time when the peer last acknowledged data of any stream."""
        self._driver: SessionInterface = replica.open_session(
            self._session_writer, transport="webtransport", streams=self, network=network
        )
        self._session_writer.send_queue = self._driver.send_queue

    @property
    def client(self) -> Hashable:
        """The client of the last valid token."""
        return self._driver.client

    @property
    def next_send_time(self) -> float | None:
        """The time at which `send_blocked` can send even without an acknowledgement."""
        return self._spacer.next_send_time

    # Events of the connection. Nothing here waits.

    def handle_event(self, event: Event) -> None:
        """Process an event of the session."""
        main = self._session_writer.stream
        match event:
            case StreamData():
                self._receive_data(event)
            case StreamReset() if event.stream == main:
                self._end_of_input()
            case StreamStopped() if event.stream == main:
                self._end_of_input(peer_closed=True)
            case StreamStopped() if event.stream in self._subscription_writers:
                self._on_stream_stopped(self._subscription_writers.pop(event.stream))
            case SessionClosed():
                self._end_of_input(peer_closed=True)
            case ConnectionLost():
                self._end_of_input(peer_closed=True)
                self._lost.set()

    def _receive_data(self, event: StreamData) -> None:
        stream, main = event.stream, self._session_writer
        if main.stream is None and stream % 4 == 0:
            main.stream = stream
        if stream != main.stream:
            self._connection.stop_sending(stream, STREAM_REJECTED)
            self._connection.reset(stream, STREAM_REJECTED)
            return
        if event.data:
            self._received.append(event.data)
            self._driver.count_received(len(event.data))
        if event.ended:
            self._ended = True
        self._receive_event.set()

    def _end_of_input(self, *, peer_closed: bool = False) -> None:
        """Note that nothing more arrives. Bytes that have arrived are still processed."""
        self._ended = True
        self._receive_event.set()
        if peer_closed:
            self._peer_closed = True
            self._blocked.clear()
            self._spacer.clear()
            # Empty the send queues, because tasks wait until they have room.
            for writer in (self._session_writer, *self._subscription_writers.values()):
                writer.send_queue.take()
            self._progress.unpark_all()

    def _on_stream_stopped(self, writer: StreamWriter) -> None:
        """End a subscription's stream that the peer has stopped, or does not read."""
        writer.stream = None
        writer.send_queue.take()
        self._blocked.pop(writer, None)
        self._progress.unpark_all()
        if writer.on_stopped is not None and not writer.end_requested:
            writer.on_stopped(writer.send_queue)

    def send_blocked(self) -> None:
        """Give QUIC the items that waited for acknowledgements. The caller transmits them."""
        if self._blocked:
            for writer in list(self._blocked):
                self._write(writer)

    # Streams and datagrams for subscriptions.

    def open_stream(self, on_stopped: Callable[[SendQueue], None]) -> SendQueue | None:
        stream = self._connection.open_stream(bidirectional=False)
        if stream is None:
            return None
        writer = self._subscription_writers[stream] = StreamWriter(self._flush, stream, on_stopped)
        writer.send_queue = SendQueue(
            writer,
            self._replica.flusher.wake,
            self._session_writer.send_queue.limit // SUBSCRIPTION_QUEUE_DIVISOR,
            self._replica.delivery.budget,
            self._session_writer.send_queue.count,
        )
        return writer.send_queue

    def end_stream(self, send_queue: SendQueue) -> None:
        writer = send_queue.writer
        assert isinstance(writer, StreamWriter)
        if writer.stream is None or writer.end_requested:
            return
        writer.end_requested = True
        if not send_queue:
            self._connection.send(writer.stream, b"", end=True)
            self._finish_stream(writer)
            self._transmit()

    def send_datagram(self, data: bytes) -> bool:
        if len(data) > self._connection.max_datagram_size:
            return False
        if self._connection.send_datagram(data):
            # The flusher calls `transmit`, so that under load many datagrams leave together.
            self._datagrams_waiting = True
            self._replica.flusher.wake(self._session_writer.send_queue)
        else:
            self._session_writer.send_queue.rejected += 1
        return True

    # The send queues.

    def _flush(self, writer: StreamWriter) -> None:
        """Send a send queue, as far as the connection takes it. `send_blocked` sends the rest later."""
        try:
            if self._write(writer) or self._datagrams_waiting:
                self._datagrams_waiting = False
                self._transmit()
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._on_internal_error("a flush failed", error)
            self._connection.close("internal error")
            self._transmit()

    def _write(self, writer: StreamWriter) -> bool:
        send_queue, stream = writer.send_queue, writer.stream
        if self._peer_closed or (stream is None and writer is not self._session_writer):
            send_queue.take()
            return False
        if send_queue.protocol is ProtocolVersion.FIRST:
            return self._write_spaced(writer)
        before = writer.sent
        while stream is not None and self._connection.writable(stream):
            items = send_queue.take(WRITE_SIZE)
            if writer is self._session_writer and self._spacer:
                # The client has turned out to speak `catbus.v1`.
                items = [*self._spacer.clear(), *items]
            if items:
                lines = join_lines(items)
                writer.sent += len(lines)
                self._connection.send(stream, lines, writer.end_requested and not send_queue)
            if not send_queue:
                self._blocked.pop(writer, None)
                if writer.end_requested:
                    self._finish_stream(writer)
                break
        if send_queue or send_queue.awaited:
            self._blocked[writer] = None
        if writer.sent == before:
            return False
        self._progress.unpark_all()
        return True

    def _write_spaced(self, writer: StreamWriter) -> bool:
        """Send one object to a first-version client if it may be sent now."""
        self._blocked[writer] = None
        stream = writer.stream
        if stream is None or self._connection.unacknowledged(stream):
            return False
        line = self._spacer.next_object(writer.send_queue, trio.current_time())
        if not line:
            if not self._spacer:
                del self._blocked[writer]
            return False
        self._connection.send(stream, line)
        writer.sent += len(line)
        self._progress.unpark_all()
        return True

    def _finish_stream(self, writer: StreamWriter) -> None:
        """Note that QUIC has everything. The peer may not have read it yet."""
        writer.finished = True

    def check_stalled(self, now: float) -> None:
        """Reset the streams that the peer does not read, or close the session if it reads nothing at all."""
        stalled: list[int] = []
        for stream, writer in list(self._subscription_writers.items()):
            if self._is_stalled(writer, now):
                stalled.append(stream)
            elif writer.finished and not self._connection.unacknowledged(stream):
                del self._subscription_writers[stream]
        waits = self._session_writer.stream is not None and self._is_stalled(self._session_writer, now)
        # Unread streams can fill the window of the whole connection, so that other streams could not even begin.
        for stream in [one for one in stalled if self._subscription_writers[one].acknowledged > 0] or stalled:
            self._on_stall("a client does not read a subscription's stream")
            self._connection.reset(stream, CloseCode.UNRESPONSIVE)
            self._on_stream_stopped(self._subscription_writers.pop(stream))
        if stalled:
            for writer in (self._session_writer, *self._subscription_writers.values()):
                writer.last_progress = now
        elif waits and now - self._last_progress >= STALL_TIMEOUT:
            self._on_stall("a client does not read")
            self._connection.close_session(CloseCode.UNRESPONSIVE, STALLED_REASON, now)

    def _is_stalled(self, writer: StreamWriter, now: float) -> bool:
        unacknowledged = self._connection.unacknowledged(writer.stream)
        acknowledged = writer.sent - unacknowledged
        if acknowledged > writer.acknowledged:
            writer.acknowledged = acknowledged
            writer.last_progress = self._last_progress = now
        elif not (unacknowledged or writer in self._blocked):
            writer.last_progress = now
        return now - writer.last_progress >= STALL_TIMEOUT

    def stop(self) -> None:
        """Close the session because the endpoint stops."""
        self._connection.close_session(CloseCode.SHUTTING_DOWN, STOPPING, trio.current_time())

    def abandon(self) -> None:
        """Close a session whose task could not be started."""
        self._driver.end()
        self.stop()

    # The task.

    async def run(self) -> None:
        """Serve the client until the connection is lost. Raises no exception but cancellation."""
        client = self._driver
        try:
            with self._replica.cpu_scheduler.serve(self._network):
                close_reason = await self._run_session(client)
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._on_internal_error("a session failed", error)
            close_reason = INTERNAL_ERROR
        except BaseException:
            client.end()
            self._close(client.closing or (CloseCode.SHUTTING_DOWN, STOPPING))
            raise
        client.end()
        self._close(close_reason)
        with trio.move_on_after(CONNECTION_CLOSE_TIMEOUT):
            await self._lost.wait()

    async def _run_session(self, client: SessionInterface) -> tuple[int, str]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, client)
            await client.wait_closing()
            nursery.cancel_scope.cancel()
        with trio.move_on_after(CLOSE_TIMEOUT):
            writers = [
                writer
                for writer in (self._session_writer, *self._subscription_writers.values())
                if writer.stream is not None
            ]
            for writer in writers:
                self._write(writer)
            self._transmit()
            while (self._spacer or any(writer.send_queue for writer in writers)) and not self._peer_closed:
                await self._progress.park()
        return client.closing or (0, "")

    def _close(self, close_reason: tuple[int, str]) -> None:
        code, reason = close_reason
        if self._connection.close_session(int(code), reason, trio.current_time()):
            self._transmit()

    async def _read(self, client: SessionInterface) -> None:
        """Pass received bytes to the session until it is closing, or until the peer has ended its stream.

        QUIC's flow control window opens after bytes were processed. So while `receive` waits, the peer cannot send more
        than the window.
        """
        try:
            while client.closing is None:
                if self._received:
                    await self._replica.cpu_scheduler.acquire()
                    data = b"".join(self._received)
                    self._received.clear()
                    await client.receive(data)
                    if client.authenticated:
                        self._connection.trust()
                    assert self._session_writer.stream is not None
                    self._connection.consumed(self._session_writer.stream, len(data))
                    self._write(self._session_writer)
                    self._transmit()
                elif self._ended:
                    client.end()
                    return
                else:
                    self._receive_event = trio.Event()
                    await self._receive_event.wait()
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._on_internal_error("a session failed", error)
            client.close(*INTERNAL_ERROR)


def join_lines(items: Sequence[QueueItem]) -> bytes:
    """Return items of a send queue as lines."""
    parts = [item if isinstance(item, bytes) else item.lines for item in items]
    return parts[0] if len(parts) == 1 else b"".join(parts)
