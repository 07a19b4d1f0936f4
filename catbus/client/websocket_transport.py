"""The client's end of a WebSocket: wsproto over an anyio stream."""

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
from .broker_address import Address
from .happy_eyeballs import names_of
from .transport_interface import Chunk

GOODBYE = 2.0
"""How long, in seconds, the broker has to answer our Close."""

CHUNK = 65_536

STREAM_ERRORS = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)


class WebSocket:
    """A `Transport`. The handshake has been made."""

    kind = "websocket"

    def __init__(self, stream: anyio.abc.ByteStream, connection: WSConnection) -> None:
        self.binary = False
        """Send binary messages: their pieces need not be whole characters."""
        self._stream = stream
        self._connection = connection
        self._ping: Ping | None = None
        self._unread = True
        self._end: Disconnected | None = None
        self._reply: CloseConnection | None = None
        self._torn = False
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
        # Until all of it is out, nothing else can follow without being mixed into a frame.
        self._torn = True
        try:
            await self._stream.send(frames)
        except STREAM_ERRORS as error:
            raise Disconnected(f"the connection was lost: {describe(error)}") from error
        self._torn = False

    async def receive(self) -> Chunk:
        while True:
            if self._unread:
                # The first bytes may have come with the answer to the handshake.
                self._unread = False
            elif self._end is not None:
                raise self._end
            else:
                await self._fill()
            data = self._read()
            if data or self.pending:
                return Chunk(data)

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if not self._torn:
                with anyio.move_on_after(GOODBYE):
                    await self._say_goodbye(self._reply or CloseConnection(code, reason))
        finally:
            await anyio.aclose_forcefully(self._stream)

    async def _say_goodbye(self, goodbye: CloseConnection) -> None:
        try:
            await self._stream.send(self._connection.send(goodbye))
            # Closed with something unread, a socket takes back what it has sent: read until the broker has heard us.
            while self._end is None:
                await self._fill()
                self._read()
        except (*STREAM_ERRORS, Disconnected):
            pass

    async def _fill(self) -> None:
        try:
            self._connection.receive_data(await self._stream.receive(CHUNK))
        except anyio.EndOfStream:
            raise Disconnected("the broker ended the connection without a word") from None
        except STREAM_ERRORS as error:
            raise Disconnected(f"the connection was lost: {describe(error)}") from error

    def _read(self) -> bytes:
        """What wsproto makes of what it has been given. Text arrives in the pieces that the network made of it."""
        parts = []
        for event in self._connection.events():
            match event:
                case TextMessage():
                    parts.append(event.data.encode())
                case BytesMessage():
                    parts.append(bytes(event.data))
                case Ping():
                    # Only the last one needs an answer, and one is all that we keep.
                    self._ping = event
                case CloseConnection():
                    self._reply = event.response()
                    if self._connection.state is ConnectionState.OPEN:
                        # wsproto's own verdict, in the form of a Close.
                        self._end = Disconnected(f"what the broker sent is no WebSocket: {event.reason}")
                    else:
                        reason = event.reason or "no reason given"
                        self._end = Disconnected(f"the broker closed the connection: {reason}", int(event.code))
        return b"".join(parts)


async def open_websocket(address: Address, ssl_context: ssl.SSLContext | None = None) -> WebSocket:
    """Connect and make the handshake. Raises `Disconnected`. Cancelling it leaves nothing open."""
    try:
        stream = await _connect(address, ssl_context)
    except STREAM_ERRORS as error:
        raise Disconnected(f"cannot connect to {address.url}: {describe(error)}") from error
    try:
        return await shake_hands(stream, address)
    except BaseException:
        await anyio.aclose_forcefully(stream)
        raise


async def _connect(address: Address, ssl_context: ssl.SSLContext | None) -> anyio.abc.ByteStream:
    if address.socket is not None:
        return await anyio.connect_unix(address.socket)
    *others, last = names_of(address.host)
    for name in others:
        # This machine refuses at once, so there is no need to try them beside each other, as anyio does for a name.
        try:
            return await _connect_to(name, address, ssl_context)
        except ssl.SSLError:
            raise
        except OSError:
            continue
    return await _connect_to(last, address, ssl_context)


async def _connect_to(name: str, address: Address, ssl_context: ssl.SSLContext | None) -> anyio.abc.ByteStream:
    if address.secure:
        # WebSocket says goodbye for itself; TLS's own goodbye is left out, as with HTTPS.
        return await anyio.connect_tcp(
            name,
            address.port,
            tls=True,
            ssl_context=ssl_context,
            tls_standard_compatible=False,
            tls_hostname=address.host,
        )
    return await anyio.connect_tcp(name, address.port)


async def shake_hands(stream: anyio.abc.ByteStream, address: Address) -> WebSocket:
    """Turn a fresh stream into a WebSocket. Raises `Disconnected`; the stream stays the caller's then."""
    connection = WSConnection(ConnectionType.CLIENT)
    try:
        await stream.send(connection.send(Request(host=address.authority, target=address.target)))
        while True:
            connection.receive_data(await stream.receive(CHUNK))
            for event in connection.events():
                if isinstance(event, AcceptConnection):
                    return WebSocket(stream, connection)
                if isinstance(event, RejectConnection):
                    raise Disconnected(f"{address.url} is no WebSocket: HTTP status {event.status_code}")
    except RemoteProtocolError as error:
        raise Disconnected(f"{address.url} is no WebSocket: {error}") from error
    except STREAM_ERRORS as error:
        raise Disconnected(f"{address.url} ended the connection during the handshake") from error


def describe(error: BaseException) -> str:
    """What went wrong, in the system's words."""
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
