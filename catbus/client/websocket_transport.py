"""The WebSocket transport: wsproto over an anyio stream."""

from __future__ import annotations

import os
import ssl

import anyio
import anyio.abc
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.utilities import RemoteProtocolError

from ..errors import Disconnected
from .broker_address import BrokerAddress
from .happy_eyeballs import names_to_resolve
from .transport_interface import Chunk

CLOSE_TIMEOUT = 2.0
"""Seconds that the broker has to answer a Close frame."""

RECEIVE_SIZE = 65_536

STREAM_ERRORS = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)


class WebSocketTransport:
    """A `Transport` over a stream on which the opening handshake has succeeded."""

    kind = "websocket"

    def __init__(self, stream: anyio.abc.ByteStream, connection: WSConnection) -> None:
        self.binary = False
        """Send binary messages, which may be split within a character."""
        self._stream = stream
        self._connection = connection
        self._ping: Ping | None = None
        self._unread = True
        self._end: Disconnected | None = None
        self._reply: CloseConnection | None = None
        self._frame_incomplete = False
        self._closed = False

    @property
    def pending(self) -> bool:
        return self._ping is not None

    async def send(self, data: bytes) -> None:
        if self._end is not None:
            raise Disconnected(str(self._end), self._end.code)
        frames = b""
        if self._ping is not None:
            frames = self._connection.send(self._ping.response())
            self._ping = None
        if data:
            frames += self._connection.send(BytesMessage(data) if self.binary else TextMessage(data.decode()))
        # If this is cancelled, only part of a frame may be sent, and no frame can follow it.
        self._frame_incomplete = True
        try:
            await self._stream.send(frames)
        except STREAM_ERRORS as error:
            raise Disconnected(f"the connection was lost: {describe(error)}") from error
        self._frame_incomplete = False

    async def receive(self) -> Chunk:
        while True:
            if self._unread:
                # The first bytes may have arrived with the response to the handshake.
                self._unread = False
            elif self._end is not None:
                raise self._end
            else:
                await self._receive_bytes()
            data = self._process_events()
            if data or self.pending:
                return Chunk(data)

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if not self._frame_incomplete:
                with anyio.move_on_after(CLOSE_TIMEOUT):
                    await self._close_handshake(self._reply or CloseConnection(code, reason))
        finally:
            await anyio.aclose_forcefully(self._stream)

    async def _close_handshake(self, close_frame: CloseConnection) -> None:
        try:
            await self._stream.send(self._connection.send(close_frame))
            # A socket that is closed with unread data resets the connection, and the Close frame may be lost. So read
            # until the broker has closed.
            while self._end is None:
                await self._receive_bytes()
                self._process_events()
        except (*STREAM_ERRORS, Disconnected):
            pass

    async def _receive_bytes(self) -> None:
        try:
            self._connection.receive_data(await self._stream.receive(RECEIVE_SIZE))
        except anyio.EndOfStream:
            raise Disconnected("the broker ended the connection without a Close frame") from None
        except STREAM_ERRORS as error:
            raise Disconnected(f"the connection was lost: {describe(error)}") from error

    def _process_events(self) -> bytes:
        """Process the events of wsproto and return the data of messages. A message may come in several pieces."""
        parts = []
        for event in self._connection.events():
            match event:
                case TextMessage():
                    parts.append(event.data.encode())
                case BytesMessage():
                    parts.append(bytes(event.data))
                case Ping():
                    # Only the last ping needs a pong, so one is enough memory.
                    self._ping = event
                case CloseConnection():
                    self._reply = event.response()
                    if self._connection.state is ConnectionState.OPEN:
                        # wsproto reports a protocol error in the form of a Close.
                        self._end = Disconnected(f"the broker violated the WebSocket protocol: {event.reason}")
                    else:
                        reason = event.reason or "no reason given"
                        self._end = Disconnected(f"the broker closed the connection: {reason}", int(event.code))
        return b"".join(parts)


async def open_websocket(address: BrokerAddress, ssl_context: ssl.SSLContext | None = None) -> WebSocketTransport:
    """Connect, and perform the opening handshake. Raises `Disconnected`. Cancelling it leaves nothing open."""
    try:
        stream = await _connect(address, ssl_context)
    except STREAM_ERRORS as error:
        raise Disconnected(f"cannot connect to {address.url}: {describe(error)}") from error
    try:
        return await perform_handshake(stream, address)
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise


async def _connect(address: BrokerAddress, ssl_context: ssl.SSLContext | None) -> anyio.abc.ByteStream:
    if address.socket is not None:
        return await anyio.connect_unix(address.socket)
    *others, last = names_to_resolve(address.host)
    for name in others:
        # A loopback address refuses at once, so attempts one after another are fast enough.
        try:
            return await _connect_to(name, address, ssl_context)
        except ssl.SSLError:
            raise
        except OSError:
            continue
    return await _connect_to(last, address, ssl_context)


async def _connect_to(name: str, address: BrokerAddress, ssl_context: ssl.SSLContext | None) -> anyio.abc.ByteStream:
    if address.secure:
        # WebSocket has its own close handshake, so the one of TLS is left out, as with HTTPS.
        return await anyio.connect_tcp(
            name,
            address.port,
            tls=True,
            ssl_context=ssl_context,
            tls_standard_compatible=False,
            tls_hostname=address.host,
        )
    return await anyio.connect_tcp(name, address.port)


async def perform_handshake(stream: anyio.abc.ByteStream, address: BrokerAddress) -> WebSocketTransport:
    """Perform the opening handshake on a new stream. If it raises `Disconnected`, the caller closes the stream."""
    connection = WSConnection(ConnectionType.CLIENT)
    try:
        await stream.send(connection.send(Request(host=address.authority, target=address.target)))
        while True:
            connection.receive_data(await stream.receive(RECEIVE_SIZE))
            for event in connection.events():
                if isinstance(event, AcceptConnection):
                    return WebSocketTransport(stream, connection)
                if isinstance(event, RejectConnection):
                    raise Disconnected(f"{address.url} rejected the handshake: HTTP status {event.status_code}")
    except RemoteProtocolError as error:
        raise Disconnected(f"{address.url} is not a WebSocket endpoint: {error}") from error
    except STREAM_ERRORS as error:
        raise Disconnected(f"{address.url} ended the connection during the handshake") from error


def describe(error: BaseException) -> str:
    """Describe an error in the words of the operating system."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error)
    cause = error.__cause__
    if isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, OSError):
        return describe(cause)
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
