"""The WebTransport transport: one session with one bidirectional stream, on its own QUIC connection."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel

from ..errors import Disconnected
from ..webtransport import (
    CERTIFICATE_HASH_MISMATCH,
    ConnectionLost,
    Datagram,
    Event,
    SessionClosed,
    SessionOpened,
    SessionRefused,
    StreamData,
    StreamReset,
    StreamStopped,
    WebTransportConfiguration,
    WebTransportConnection,
    client_configuration,
)
from ..webtransport.quic_configuration import CLIENT_LIMITS
from .broker_address import BrokerAddress, is_pem
from .happy_eyeballs import race, resolve_host
from .signals import Signal
from .transport_interface import DATAGRAM, MAIN_STREAM, Chunk

CLOSE_TIMEOUT = 2.0
"""Seconds for the delivery of the sent data and the close code."""

PING_INTERVAL = 20.0
"""Seconds between QUIC pings, which keep the connection and the address translators on its path alive."""

CLOSE_CODE_TIMEOUT = 1.0
"""Seconds that the close code of a session may arrive after the end of its stream."""

QUIC_LIMITS = replace(CLIENT_LIMITS, session_timeout=60.0, close_timeout=CLOSE_TIMEOUT / 2.5)
"""The caller limits the time for opening. The two steps of closing fit into `CLOSE_TIMEOUT`."""

MAX_DATAGRAMS_PER_READ = 64
"""Datagrams that are read before the replies to them are sent."""

MAX_QUEUED_DATAGRAMS = 256
"""WebTransport datagrams that may wait for `receive`. Further ones are dropped."""

MAX_DATAGRAM_SIZE = 65_536
SOCKET_BUFFER = 1024 * 1024

_SERVER_UNIDIRECTIONAL = 3
"""The remainder of such a stream's number when divided by 4 (RFC 9000, section 2.1)."""


class WebTransportTransport:
    """A `DrivenTransport`: `run` carries the datagrams. `open_webtransport` makes one whose session is open.

    No method waits in the middle of a change, so each is safe to cancel.
    """

    kind = "webtransport"
    pending = False

    def __init__(self, url: str, connection: WebTransportConnection, peer: Any, udp: socket.socket) -> None:
        self._url = url
        self._connection = connection
        self._peer = peer
        self._socket = udp
        self._stream: int | None = None
        self._received: deque[Chunk] = deque()
        self._datagrams = 0
        self._readable = Signal()
        self._writable = Signal()
        self._end: Disconnected | None = None
        self._lost = anyio.Event()
        self._next_ping = anyio.current_time() + PING_INTERVAL
        self._stream_ended_at: float | None = None
        self._driver: anyio.CancelScope | None = None
        self._wait_scope: anyio.CancelScope | None = None
        self._closing = False
        self._closed = False

    async def run(self) -> None:
        """Carry datagrams both ways until the connection is lost or closed. One task at a time."""
        # If it was closed before this task began, `aclose` does the rest.
        if not self._closing:
            await self._run_until(lambda: False)

    async def open(self) -> None:
        """Wait until the session is open. Raises `Disconnected`."""
        await self._run_until(lambda: self._stream is not None or self._end is not None)
        self._check()

    async def send(self, data: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        self._check()
        while data and not self._send(data):
            await self._writable.wait()
            self._check()

    async def receive(self) -> Chunk:
        await anyio.lowlevel.checkpoint()
        while not self._received:
            self._check()
            await self._readable.wait()
        received = self._received
        chunk = received.popleft()
        if chunk.stream == DATAGRAM:
            self._datagrams -= 1
            return chunk
        if received and received[0].stream == chunk.stream:
            parts = [chunk.data]
            while received and received[0].stream == chunk.stream:
                parts.append((chunk := received.popleft()).data)
            chunk = chunk._replace(data=b"".join(parts))
        stream = self._stream if chunk.stream == MAIN_STREAM else chunk.stream
        assert stream is not None
        self._connection.consumed(stream, len(chunk.data))
        self._flush()
        return chunk

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        if self._closing:
            return
        self._closing = True
        self._fail("it has been closed on this side")
        try:
            if self._connection.close_session(code, reason, anyio.current_time()):
                self._flush()
                with anyio.move_on_after(CLOSE_TIMEOUT):
                    await (self._run_until(lambda: False) if self._driver is None else self._lost.wait())
        finally:
            self.abort()

    def abort(self) -> None:
        """Close at once. The peer receives only the close of the QUIC connection."""
        self._closing = True
        if self._closed:
            return
        self._connection.close()
        self._flush()
        self._closed = True
        if self._driver is None:
            self._socket.close()
        else:
            # A socket must not be closed while a task waits for it, so the driver closes it on leaving.
            self._driver.cancel()

    # Sending and receiving datagrams

    async def _run_until(self, enough: Callable[[], bool]) -> None:
        try:
            with anyio.CancelScope() as self._driver:
                self._flush()
                while not enough() and not self._lost.is_set():
                    with anyio.CancelScope(deadline=self._next_timeout()) as self._wait_scope:
                        await anyio.wait_readable(self._socket)
                    self._wait_scope = None
                    self._receive_datagrams()
                    self._handle_timers()
                    self._flush()
        finally:
            self._wait_scope = None
            self._driver = None
            if self._closed:
                self._socket.close()

    def _next_timeout(self) -> float:
        """Return when the next timer expires."""
        times = (self._connection.timer, self._next_ping, self._stream_ended_at)
        return min(time for time in times if time is not None)

    def _receive_datagrams(self) -> None:
        """Read datagrams from the socket, up to a limit."""
        for _ in range(MAX_DATAGRAMS_PER_READ):
            try:
                data = self._socket.recv(MAX_DATAGRAM_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                self._socket_error(error)
                return
            self._connection.receive_datagram(data, self._peer, anyio.current_time())

    def _handle_timers(self) -> None:
        """Handle the timers that have expired."""
        now = anyio.current_time()
        timer = self._connection.timer
        if timer is not None and timer <= now:
            self._connection.handle_timer(now)
        if self._next_ping <= now:
            self._next_ping = now + PING_INTERVAL
            self._connection.ping()
        if self._stream_ended_at is not None and self._stream_ended_at <= now:
            self._stream_ended_at = None
            self._fail("the broker ended its stream without a close code")

    def _flush(self) -> None:
        """Send without waiting, and handle events. QUIC repeats what the socket has no room for."""
        if self._closed:
            return
        for data, _ in self._connection.datagrams_to_send(anyio.current_time()):
            try:
                self._socket.send(data)
            except BlockingIOError:
                continue
            except OSError as error:
                self._socket_error(error)
        for event in self._connection.events():
            self._handle(event)
        if self._end is not None or (self._stream is not None and self._connection.writable(self._stream)):
            self._writable.notify()
        if self._wait_scope is not None:
            self._wait_scope.deadline = self._next_timeout()

    def _socket_error(self, error: OSError) -> None:
        """Handle an error from the network. It can be forged or transient, so it does not end an open session."""
        if self._stream is None:
            self._fail(_no_connection(self._url, error), cause=error)

    # Events

    def _handle(self, event: Event) -> None:
        match event:
            case SessionOpened():
                self._stream = self._connection.open_stream(bidirectional=True)
                if self._stream is None:
                    self._fail(f"{self._url} permits no stream")
                else:
                    self._flush()
            case SessionRefused():
                self._fail(f"{self._url} rejected the session: HTTP status {event.status}")
            case StreamData() if event.stream == self._stream:
                if event.data:
                    self._queue_chunk(Chunk(event.data))
                if event.ended:
                    self._stream_ended()
            case StreamReset() | StreamStopped() if event.stream == self._stream:
                self._stream_ended()
            case StreamData() if event.stream % 4 == _SERVER_UNIDIRECTIONAL:
                self._queue_chunk(Chunk(event.data, event.stream, event.ended))
            case StreamData():
                self._connection.stop_sending(event.stream, 0)
                self._connection.reset(event.stream, 0)
            case StreamReset() if event.stream % 4 == _SERVER_UNIDIRECTIONAL:
                self._queue_chunk(Chunk(b"", event.stream, reset=True))
            case Datagram() if self._datagrams < MAX_QUEUED_DATAGRAMS:
                self._datagrams += 1
                self._queue_chunk(Chunk(event.data, DATAGRAM))
            case SessionClosed(code=None):
                self._fail("the broker reset the session")
            case SessionClosed():
                reason = event.reason or "no reason given"
                self._fail(f"the broker closed the connection: {reason}", event.code)
            case ConnectionLost():
                self._lost.set()
                self._fail(self._describe(event.reason), cause=event.fault)

    def _queue_chunk(self, chunk: Chunk) -> None:
        self._received.append(chunk)
        self._readable.notify()

    def _stream_ended(self) -> None:
        """Wait for the close code: the stream ends shortly before its session."""
        if self._stream_ended_at is None:
            self._stream_ended_at = anyio.current_time() + CLOSE_CODE_TIMEOUT

    def _describe(self, reason: str) -> str:
        if self._stream is not None:
            return f"the connection was lost: {reason}"
        if reason == CERTIFICATE_HASH_MISMATCH:
            return f"the certificate of {self._url} is not the one whose hash was given (certificate_hash)"
        if "certificate" in reason.lower() or "hostname" in reason or "issuer" in reason:
            return (
                f"the certificate of {self._url} is not accepted: {reason}. If it is your own, or signed by an "
                "authority of your own, name that certificate's file: --ca FILE, in Python ca="
            )
        return f"cannot connect to {self._url}: {reason}"

    # Helpers

    def _send(self, data: bytes) -> bool:
        if self._stream is None or not self._connection.send(self._stream, data):
            return False
        self._flush()
        return True

    def _fail(self, message: str, code: int | None = None, cause: Exception | None = None) -> None:
        """End the connection for `send`, and for `receive` once its data is taken. The first reason counts."""
        if self._end is None:
            self._end = Disconnected(message, code)
            self._end.__cause__ = cause
            self._stream_ended_at = None
            self._readable.notify()
            self._writable.notify()

    def _check(self) -> None:
        if self._end is not None:
            raise Disconnected(str(self._end), self._end.code) from self._end.__cause__


def make_configuration(
    address: BrokerAddress, ca: str | os.PathLike[str] | None = None, certificate_hash: bytes | None = None
) -> WebTransportConfiguration:
    """Make a configuration that verifies by the usual authorities, by `ca` (PEM or a file), or only by a hash.

    Raises `OSError` and `ConfigError`.
    """
    # A missing file is an OSError for the caller, as with wss://.
    pem = None if ca is None else str(ca) if is_pem(ca) else Path(ca).read_bytes()
    name = address.host if ":" in address.host else address.host.encode("idna").decode()
    return client_configuration(name, ca=pem, certificate_hash=certificate_hash, limits=QUIC_LIMITS)


async def open_webtransport(address: BrokerAddress, configuration: WebTransportConfiguration) -> WebTransportTransport:
    """Open a session at the first address of the host that answers. Raises `Disconnected`.

    Cancelling it leaves nothing open.
    """
    try:
        places = await resolve_host(address.host, address.port)
    except OSError as error:
        raise Disconnected(_no_connection(address.url, error)) from error
    attempts = [partial(_open, address, configuration, family, where) for family, where in places]
    return await race(attempts, WebTransportTransport.abort)


async def _open(
    address: BrokerAddress, configuration: WebTransportConfiguration, family: int, where: Any
) -> WebTransportTransport:
    try:
        udp = _connect(family, where)
    except OSError as error:
        raise Disconnected(_no_connection(address.url, error)) from error
    now = anyio.current_time()
    connection = WebTransportConnection.client(
        configuration, where, now, authority=address.authority, path=address.target
    )
    transport = WebTransportTransport(address.url, connection, where, udp)
    try:
        await transport.open()
    except BaseException:
        transport.abort()
        raise
    return transport


def _connect(family: int, where: Any) -> socket.socket:
    """Make a connected socket, which receives only from that address, and ICMP errors about it. Does not wait."""
    udp = socket.socket(family, socket.SOCK_DGRAM)
    try:
        udp.setblocking(False)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            udp.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        udp.connect(where)
    except OSError:
        udp.close()
        raise
    return udp


def _no_connection(url: str, error: OSError) -> str:
    return f"cannot connect to {url}: {error.strerror or error}"
