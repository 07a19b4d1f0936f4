"""One WebSocket connection, from the handshake to the last byte."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream
from wsproto.utilities import LocalProtocolError

from ...delivery.send_queue import QueueItem, SendQueue, size_of_replies
from ...errors import CloseCode
from ...limits.unauthenticated import UNAUTHENTICATED_OBJECT_BYTES
from ...observability.loggers import get_logger
from ...protocol.wire_messages import ProtocolVersion
from ..connection_registry import ConnectionRegistry
from .frame_encoder import PING, close_frame
from .frame_stream import FrameStream
from .inbound_frames import InboundFrames

if TYPE_CHECKING:
    from ...config import WebSocketSettings
    from ...limits.cpu_scheduler import CpuScheduler
    from ...replica import Replica
    from ...session.driver import SessionDriver

HANDSHAKE_TIME = 10.0
CLOSING_TIME = 2.0
"""Seconds in which the send queue, the Close frame and the peer's answer to it must have passed."""
STALL_TIME = 60.0
"""Seconds that a write may make no progress."""
PORTION = 65_536
"""About how many bytes leave the send queue at a time, and only when those before have left for the kernel: what
waits in the send queue is shared with other send queues, counted, and can be had again from the log. Of what has left,
replies count: one may have a megabyte. Messages do not, of which many connections hold the same bytes."""
OBJECTS_IN_MESSAGE = 16
"""How many objects of the largest size a WebSocket message may carry; the session looks at the size of each."""

FAULT = CloseCode.INTERNAL, "internal error"

_RECEIVE_SIZE = 65_536
_PROTOCOL_ERRORS = frozenset({1002, 1003, 1007})

logger = get_logger("catbus.endpoints")


async def serve_websocket(
    replica: Replica,
    registry: ConnectionRegistry,
    stream: trio.abc.Stream,
    head: bytes,
    rest: bytes,
    prove: Callable[[], None],
    network: str = "",
) -> None:
    """Serve a peer whose request for a WebSocket, `head`, was accepted, until one of the two closes.

    `rest` is what it sent after that. `prove` is called when it has shown a token. `network` is where it is. Does not
    close the stream.
    """
    settings = replica.config.websocket
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    if isinstance(transport, trio.SocketStream):
        # Otherwise the kernel takes megabytes for a client that does not read. Trio has set TCP_NODELAY.
        transport.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, settings.send_buffer)
    async with trio.open_nursery() as writers:
        size = replica.config.limits.message_size
        connection = WebSocketServerConnection(
            registry, settings, replica.cpu_scheduler, size, stream, writers, head, rest, prove
        )
        try:
            with registry.carry(connection.outbox):
                await connection.serve(replica, network)
        finally:
            connection.release()
            writers.cancel_scope.cancel()


class WebSocketServerConnection:
    """The outlet of one client's send queue, and the task that feeds the client what arrives."""

    __slots__ = (
        "_client",
        "_conversing",
        "_give_up",
        "_goodbye",
        "_inbound",
        "_largest",
        "_last_busy",
        "_listening",
        "_packer",
        "_pinged",
        "_prove",
        "_registry",
        "_send_queue",
        "_settings",
        "outbox",
    )

    def __init__(
        self,
        registry: ConnectionRegistry,
        settings: WebSocketSettings,
        cpu_scheduler: CpuScheduler,
        message_size: int,
        stream: trio.abc.Stream,
        writers: trio.Nursery,
        head: bytes,
        rest: bytes,
        prove: Callable[[], None],
    ) -> None:
        self._prove = prove
        self._registry = registry
        self._settings = settings
        self._packer = registry.packer
        self._client: SessionDriver | None = None
        self._send_queue: SendQueue | None = None
        self._conversing = trio.CancelScope()
        self._listening = trio.CancelScope()
        self._inbound = InboundFrames(message_size, UNAUTHENTICATED_OBJECT_BYTES)
        self._largest = OBJECTS_IN_MESSAGE * message_size
        self.outbox = FrameStream(
            stream,
            writers,
            refill=self._take,
            reading=self._conversing,
            inbound=self._inbound,
            cpu_scheduler=cpu_scheduler,
            head=head,
            rest=rest,
        )
        self._pinged = self._last_busy = self.outbox.last_heard
        self._goodbye: tuple[int, str] | None = None
        self._give_up = inf

    def release(self) -> None:
        """Give up what is left of the connection, so that it is freed at once: the garbage collector comes seldom."""
        self.outbox.abort()
        self._client = self._send_queue = None

    def flush(self) -> None:
        """Send what the send queue holds, as far as the kernel takes it. While the writer is at work, it sees to
        that."""
        outbox, send_queue = self.outbox, self._send_queue
        if send_queue is not None and not outbox.busy:
            items = send_queue.take(PORTION)
            while items:
                outbox.write(self._pack(items, send_queue.protocol))
                if outbox.busy:
                    send_queue.count_unsent(size_of_replies(items))
                items = send_queue.take(PORTION) if send_queue.size and not outbox.busy else []

    def _take(self) -> bytes:
        send_queue = self._send_queue
        if send_queue is None:
            return b""
        items = send_queue.take(PORTION)
        send_queue.count_unsent(size_of_replies(items))
        return self._pack(items, send_queue.protocol)

    def _pack(self, items: list[QueueItem], protocol: ProtocolVersion) -> bytes:
        try:
            return self._packer.pack(items, protocol)
        except Exception as error:  # noqa: BLE001 (it is logged)
            self._registry.fault("a flush failed", error)
            self.outbox.abort()
            return b""

    def check(self, now: float) -> None:
        """Ping a peer that has been silent for a while, and give up one that has been for long.

        A peer for which something waits is not silent: no ping gets past that. It has `STALL_TIME` to take some of it,
        and then as long as others to answer a ping. A peer that takes nothing is past being told.
        """
        outbox, client = self.outbox, self._client
        if client is None:
            return
        if outbox.busy:
            self._last_busy = now
        silent = now - max(outbox.last_heard, self._last_busy)
        if outbox.busy:
            if now - outbox.last_moved >= STALL_TIME:
                self._registry.remark("a client does not read", seconds=STALL_TIME)
                outbox.abort()
        elif silent >= self._settings.silence:
            client.close(CloseCode.UNRESPONSIVE, f"nothing heard for {silent:.0f} s")
        elif min(silent, now - self._pinged) >= self._settings.ping_interval:
            self._pinged = now
            outbox.write(PING)

    async def serve(self, replica: Replica, network: str) -> None:
        """Serve the peer until the connection has been closed, or nothing more can be done about it."""
        try:
            await self._converse(replica, network)
        except* (LocalProtocolError, ConnectionClosed):
            # The library's reader raises these at a peer that goes on after its Close frame.
            logger.debug("a peer broke the protocol while closing", exc_info=True)
        except* Exception as error:  # noqa: BLE001 (it is logged)
            self._registry.fault("a connection failed", error)
            self.outbox.close(close_frame(*FAULT))
        with trio.move_on_at(min(self._give_up, trio.current_time() + CLOSING_TIME)):
            await self.outbox.finish()

    async def _converse(self, replica: Replica, network: str) -> None:
        with self._conversing:
            async with trio.open_nursery() as library:
                with trio.move_on_after(HANDSHAKE_TIME) as limit:
                    websocket = await self._shake_hands(library, replica.config.limits.message_size)
                if limit.cancelled_caught:
                    library.cancel_scope.cancel()
                    return
                self._client = client = replica.open_session(self, transport="websocket", network=network)
                self._send_queue = client.send_queue
                self.outbox.on_received = client.heard
                try:
                    with self._registry.watch(self):
                        library.start_soon(self._read, websocket, client)
                        await client.wait_closing()
                        if goodbye := client.closing or self._goodbye:
                            self.outbox.close(close_frame(*goodbye))
                finally:
                    client.leave()
                # `_read` and the library's reader end when the peer has closed.
                self._listening.cancel()
                library.cancel_scope.deadline = self._give_up = trio.current_time() + CLOSING_TIME

    async def _shake_hands(self, nursery: trio.Nursery, message_size: int) -> WebSocketConnection:
        request = await wrap_server_stream(
            nursery,
            self.outbox,
            max_message_size=OBJECTS_IN_MESSAGE * message_size,
            receive_buffer_size=_RECEIVE_SIZE,
        )
        return await request.accept()

    async def _read(self, websocket: WebSocketConnection, client: SessionDriver) -> None:
        """Feed the client until it is closing; then read on for the library's sake, which waits for the peer's Close.

        The library keeps one message and then reads nothing, pings included, so it has to be read whatever happens.
        Only while `receive` waits is it not: until a publish has been answered or a token looked up, which takes 5 s at
        most, or until the peer takes what is waiting for it, which `check` sees to.
        """
        try:
            try:
                with self._listening:
                    await self._listen(websocket, client)
            except ConnectionClosed:
                raise
            except Exception as error:  # noqa: BLE001 (it is logged)
                self._registry.fault("a session failed", error)
                client.close(*FAULT)
            while True:
                await websocket.get_message()
        except ConnectionClosed as closed:
            if closed.reason is not None and closed.reason.code in _PROTOCOL_ERRORS:
                # The library only closes; the peer had better know why.
                self._goodbye = closed.reason.code, closed.reason.reason or ""
            client.leave()

    async def _listen(self, websocket: WebSocketConnection, client: SessionDriver) -> None:
        while client.closing is None:
            message = await websocket.get_message()
            await client.receive(message.encode() if isinstance(message, str) else message)
            if client.proven and self._inbound.largest != self._largest:
                self._inbound.largest = self._largest
                self.outbox.on_received = None
                self._prove()
            self.flush()
