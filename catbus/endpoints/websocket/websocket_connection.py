"""One WebSocket connection, from the handshake to the last byte."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream
from wsproto.utilities import LocalProtocolError

from ...close_codes import CloseCode
from ...limits.unauthenticated import UNAUTHENTICATED_OBJECT_BYTES
from ...observability.loggers import get_logger
from ..connection_registry import ConnectionRegistry
from ..queue_writer import QueueWriter
from ..replica_interface import ReplicaInterface, SessionInterface
from ..socket_writer import limit_send_buffer
from .frame_encoder import PING, close_frame
from .frame_stream import FrameStream
from .inbound_frame_limits import InboundFrames

if TYPE_CHECKING:
    from ...config import WebSocketSettings
    from ...limits.cpu_scheduler import CpuScheduler

HANDSHAKE_TIMEOUT = 10.0
CLOSE_TIMEOUT = 2.0
"""Seconds for sending the send queue and the Close frame, and for the peer's Close frame."""
MAX_OBJECTS_PER_MESSAGE = 16
"""Objects of the largest size in one WebSocket message. The session checks the size of each object."""

INTERNAL_ERROR = CloseCode.INTERNAL, "internal error"

_RECEIVE_SIZE = 65_536
_PROTOCOL_ERRORS = frozenset({1002, 1003, 1007})

logger = get_logger("catbus.endpoints")


async def serve_websocket(
    replica: ReplicaInterface,
    registry: ConnectionRegistry,
    stream: trio.abc.Stream,
    head: bytes,
    rest: bytes,
    on_authenticated: Callable[[], None],
    network: str = "",
) -> None:
    """Serve a peer whose upgrade request was accepted, until one side closes. Does not close the stream.

    `head` is the request, and `rest` the bytes after it. `on_authenticated` is called when the peer has authenticated.
    `network` is the network of the peer.
    """
    settings = replica.config.websocket
    limit_send_buffer(stream, settings.send_buffer)
    async with trio.open_nursery() as writers:
        size = replica.config.limits.message_size
        connection = WebSocketServerConnection(
            registry, settings, replica.cpu_scheduler, size, stream, writers, head, rest, on_authenticated
        )
        try:
            with registry.count_bytes(connection.frame_stream):
                await connection.serve(replica, network)
        finally:
            connection.release()
            writers.cancel_scope.cancel()


class WebSocketServerConnection(QueueWriter):
    """Writes the send queue of one session to a WebSocket, and passes what arrives to the session."""

    __slots__ = (
        "_close_deadline",
        "_close_reason",
        "_driver",
        "_inbound",
        "_last_ping",
        "_last_writing",
        "_max_message_size",
        "_on_authenticated",
        "_receive_scope",
        "_session_scope",
        "_settings",
        "frame_stream",
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
        on_authenticated: Callable[[], None],
    ) -> None:
        super().__init__(registry, registry.frame_encoder)
        self._on_authenticated = on_authenticated
        self._settings = settings
        self._driver: SessionInterface | None = None
        self._session_scope = trio.CancelScope()
        self._receive_scope = trio.CancelScope()
        self._inbound = InboundFrames(message_size, UNAUTHENTICATED_OBJECT_BYTES)
        self._max_message_size = MAX_OBJECTS_PER_MESSAGE * message_size
        self._writer = self.frame_stream = FrameStream(
            stream,
            writers,
            take_more=self.take_more,
            read_scope=self._session_scope,
            on_received=self._count_received,
            inbound=self._inbound,
            cpu_scheduler=cpu_scheduler,
            head=head,
            rest=rest,
        )
        self._last_ping = self._last_writing = self.frame_stream.last_received
        self._close_reason: tuple[int, str] | None = None
        self._close_deadline = inf

    def release(self) -> None:
        """Break the connection and its reference cycles, as `QueueWriter.release` does."""
        super().release()
        self._driver = None

    def _count_received(self, size: int) -> None:
        """Count bytes against the memory of unauthenticated peers, until the client has authenticated."""
        if self._driver is not None and not self._driver.authenticated:
            self._driver.count_received(size)

    def check(self, now: float) -> None:
        """Ping a peer that was silent for `ping_interval`, and close the connection after `silence`.

        While bytes are unsent, the peer does not count as silent, because a ping would wait behind them.
        """
        frame_stream, driver = self.frame_stream, self._driver
        if driver is None:
            return
        if frame_stream.writing:
            self._last_writing = now
        silent = now - max(frame_stream.last_received, self._last_writing)
        if frame_stream.writing:
            self.abort_if_stalled(now)
        elif silent >= self._settings.silence:
            driver.close(CloseCode.UNRESPONSIVE, f"nothing heard for {silent:.0f} s")
        elif min(silent, now - self._last_ping) >= self._settings.ping_interval:
            self._last_ping = now
            frame_stream.write(PING)

    async def serve(self, replica: ReplicaInterface, network: str) -> None:
        """Serve the peer until the connection is closed or broken."""
        try:
            await self._run_session(replica, network)
        except* (LocalProtocolError, ConnectionClosed):
            # The library's reader raises these if a peer sends more after its Close frame.
            logger.debug("a peer broke the protocol while closing", exc_info=True)
        except* Exception as error:  # noqa: BLE001 (it is logged)
            self._registry.log_internal_error("a connection failed", error)
            self.frame_stream.close(close_frame(*INTERNAL_ERROR))
        with trio.move_on_at(min(self._close_deadline, trio.current_time() + CLOSE_TIMEOUT)):
            await self.frame_stream.wait_closed()

    async def _run_session(self, replica: ReplicaInterface, network: str) -> None:
        with self._session_scope:
            async with trio.open_nursery() as library:
                with trio.move_on_after(HANDSHAKE_TIMEOUT) as limit:
                    websocket = await self._accept_handshake(library, replica.config.limits.message_size)
                if limit.cancelled_caught:
                    library.cancel_scope.cancel()
                    return
                self._driver = driver = replica.open_session(self, transport="websocket", network=network)
                self._send_queue = driver.send_queue
                try:
                    with self._registry.kept_alive(self, self._registry.websockets):
                        library.start_soon(self._read_messages, websocket, driver)
                        await driver.wait_closing()
                        if close_reason := driver.closing or self._close_reason:
                            self.frame_stream.close(close_frame(*close_reason))
                finally:
                    driver.end()
                # `_read_messages` and the library's reader end when the peer has closed.
                self._receive_scope.cancel()
                library.cancel_scope.deadline = self._close_deadline = trio.current_time() + CLOSE_TIMEOUT

    async def _accept_handshake(self, nursery: trio.Nursery, message_size: int) -> WebSocketConnection:
        request = await wrap_server_stream(
            nursery,
            self.frame_stream,
            max_message_size=MAX_OBJECTS_PER_MESSAGE * message_size,
            receive_buffer_size=_RECEIVE_SIZE,
        )
        return await request.accept()

    async def _read_messages(self, websocket: WebSocketConnection, driver: SessionInterface) -> None:
        """Pass messages to the session until it is closing; then read on, because the library waits for a Close frame.

        The library buffers one message and then reads nothing, not even pings, so messages must always be taken. They
        are not taken while `receive` waits: for a publish or the lookup of a token, which take 5 s at most, or for the
        peer to read its replies, which `check` enforces.
        """
        try:
            try:
                with self._receive_scope:
                    await self._receive_messages(websocket, driver)
            except ConnectionClosed:
                raise
            except Exception as error:  # noqa: BLE001 (it is logged)
                self._registry.log_internal_error("a session failed", error)
                driver.close(*INTERNAL_ERROR)
            while True:
                await websocket.get_message()
        except ConnectionClosed as closed:
            if closed.reason is not None and closed.reason.code in _PROTOCOL_ERRORS:
                # The library closes without a reason, so send one to the peer.
                self._close_reason = closed.reason.code, closed.reason.reason or ""
            driver.end()

    async def _receive_messages(self, websocket: WebSocketConnection, driver: SessionInterface) -> None:
        while driver.closing is None:
            message = await websocket.get_message()
            await driver.receive(message.encode() if isinstance(message, str) else message)
            if driver.authenticated and self._inbound.max_message_size != self._max_message_size:
                self._inbound.max_message_size = self._max_message_size
                self._on_authenticated()
            self.flush()
