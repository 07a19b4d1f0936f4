"""The client's end of WebTransport: one stream of one session on a QUIC connection of its own."""

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
from .broker_address import Address, is_pem
from .happy_eyeballs import look_up, race
from .signals import Bell
from .transport_interface import DATAGRAM, MAIN, Chunk

GOODBYE = 2.0
"""How long, in seconds, what has been sent and our closing code have to arrive."""

PING = 20.0
"""Seconds between pings of QUIC, which keep the connection and the address translators in between awake."""

LAST_WORDS = 1.0
"""How long, in seconds, a stream that has ended waits for the closing code of its session."""

LIMITS = replace(CLIENT_LIMITS, session_timeout=60.0, close_timeout=GOODBYE / 2.5)
"""Whoever connects limits the opening; the two steps of the closing fit into `GOODBYE`."""

BATCH = 64
"""How many datagrams are read before what they set off is sent."""

DATAGRAMS = 256
"""How many datagrams may wait to be received; what comes beyond that is dropped."""

LARGEST = 65_536
SOCKET_BUFFER = 1024 * 1024

_SERVER_UNIDIRECTIONAL = 3
"""What the number of such a stream leaves when divided by 4 (RFC 9000 section 2.1)."""


class WebTransport:
    """A `Transport`, and `Driven`: `run` carries the datagrams. `open_webtransport` makes one whose session is open.

    Nothing waits while it holds half a change, so being cancelled leaves everything as it was.
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
        self._readable = Bell()
        self._writable = Bell()
        self._end: Disconnected | None = None
        self._lost = anyio.Event()
        self._next_ping = anyio.current_time() + PING
        self._hung_up: float | None = None
        self._driver: anyio.CancelScope | None = None
        self._nap: anyio.CancelScope | None = None
        self._closing = False
        self._closed = False

    async def run(self) -> None:
        """Carry datagrams both ways until the connection is lost or closed. One task at a time."""
        # Whoever closes it before this has begun sees to the rest.
        if not self._closing:
            await self._drive(lambda: False)

    async def open(self) -> None:
        """Wait until the session is open. Raises `Disconnected`."""
        await self._drive(lambda: self._stream is not None or self._end is not None)
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
        stream = self._stream if chunk.stream == MAIN else chunk.stream
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
                with anyio.move_on_after(GOODBYE):
                    await (self._drive(lambda: False) if self._driver is None else self._lost.wait())
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close at once; all that the peer hears is that nobody is here any more."""
        self._closing = True
        if self._closed:
            return
        self._connection.close()
        self._flush()
        self._closed = True
        if self._driver is None:
            self._socket.close()
        else:
            # Nobody may be waiting for a socket that is closed: the driver closes it on leaving.
            self._driver.cancel()

    # Sending and receiving datagrams

    async def _drive(self, enough: Callable[[], bool]) -> None:
        try:
            with anyio.CancelScope() as self._driver:
                self._flush()
                while not enough() and not self._lost.is_set():
                    with anyio.CancelScope(deadline=self._next()) as self._nap:
                        await anyio.wait_readable(self._socket)
                    self._nap = None
                    self._fill()
                    self._tick()
                    self._flush()
        finally:
            self._nap = None
            self._driver = None
            if self._closed:
                self._socket.close()

    def _next(self) -> float:
        """When there is something to do even if no datagram comes."""
        times = (self._connection.timer, self._next_ping, self._hung_up)
        return min(time for time in times if time is not None)

    def _fill(self) -> None:
        """Take what the socket has, up to a batch."""
        for _ in range(BATCH):
            try:
                data = self._socket.recv(LARGEST)
            except BlockingIOError:
                return
            except OSError as error:
                self._troubled(error)
                return
            self._connection.receive_datagram(data, self._peer, anyio.current_time())

    def _tick(self) -> None:
        """Do what is due."""
        now = anyio.current_time()
        timer = self._connection.timer
        if timer is not None and timer <= now:
            self._connection.handle_timer(now)
        if self._next_ping <= now:
            self._next_ping = now + PING
            self._connection.ping()
        if self._hung_up is not None and self._hung_up <= now:
            self._hung_up = None
            self._fail("the broker ended its stream without a word")

    def _flush(self) -> None:
        """Send what there is to send, without waiting: what the socket has no room for is lost, and QUIC repeats it."""
        if self._closed:
            return
        for data, _ in self._connection.datagrams_to_send(anyio.current_time()):
            try:
                self._socket.send(data)
            except BlockingIOError:
                continue
            except OSError as error:
                self._troubled(error)
        for event in self._connection.events():
            self._handle(event)
        if self._end is not None or (self._stream is not None and self._connection.writable(self._stream)):
            self._writable.ring()
        if self._nap is not None:
            self._nap.deadline = self._next()

    def _troubled(self, error: OSError) -> None:
        """The network's word that nobody is there. It can be forged or pass, so an open session goes by its silence."""
        if self._stream is None:
            self._fail(_no_connection(self._url, error), cause=error)

    # Events

    def _handle(self, event: Event) -> None:
        match event:
            case SessionOpened():
                self._stream = self._connection.open_stream(bidirectional=True)
                if self._stream is None:
                    self._fail(f"{self._url} lets us open no stream")
                else:
                    self._flush()
            case SessionRefused():
                self._fail(f"{self._url} refused the session: HTTP status {event.status}")
            case StreamData() if event.stream == self._stream:
                if event.data:
                    self._take(Chunk(event.data))
                if event.ended:
                    self._hang_up()
            case StreamReset() | StreamStopped() if event.stream == self._stream:
                self._hang_up()
            case StreamData() if event.stream % 4 == _SERVER_UNIDIRECTIONAL:
                self._take(Chunk(event.data, event.stream, event.ended))
            case StreamData():
                self._connection.stop_sending(event.stream, 0)
                self._connection.reset(event.stream, 0)
            case StreamReset() if event.stream % 4 == _SERVER_UNIDIRECTIONAL:
                self._take(Chunk(b"", event.stream, reset=True))
            case Datagram() if self._datagrams < DATAGRAMS:
                self._datagrams += 1
                self._take(Chunk(event.data, DATAGRAM))
            case SessionClosed(code=None):
                self._fail("the broker broke off the session")
            case SessionClosed():
                reason = event.reason or "no reason given"
                self._fail(f"the broker closed the connection: {reason}", event.code)
            case ConnectionLost():
                self._lost.set()
                self._fail(self._describe(event.reason), cause=event.fault)

    def _take(self, chunk: Chunk) -> None:
        self._received.append(chunk)
        self._readable.ring()

    def _hang_up(self) -> None:
        """The stream ends a moment before its session does, which says why."""
        if self._hung_up is None:
            self._hung_up = anyio.current_time() + LAST_WORDS

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

    # Inside

    def _send(self, data: bytes) -> bool:
        if self._stream is None or not self._connection.send(self._stream, data):
            return False
        self._flush()
        return True

    def _fail(self, message: str, code: int | None = None, cause: Exception | None = None) -> None:
        """Nothing more can be sent, or received beyond what is there. The first reason stands."""
        if self._end is None:
            self._end = Disconnected(message, code)
            self._end.__cause__ = cause
            self._hung_up = None
            self._readable.ring()
            self._writable.ring()

    def _check(self) -> None:
        if self._end is not None:
            raise Disconnected(str(self._end), self._end.code) from self._end.__cause__


def make_configuration(
    address: Address, ca: str | os.PathLike[str] | None = None, certificate_hash: bytes | None = None
) -> WebTransportConfiguration:
    """Verify against the usual authorities, or those in `ca`, PEM or a file of it, or only by the certificate's hash.

    Raises `OSError` and `ConfigError`.
    """
    # A file that is not there is the caller's OSError, as it is for wss://.
    pem = None if ca is None else str(ca) if is_pem(ca) else Path(ca).read_bytes()
    name = address.host if ":" in address.host else address.host.encode("idna").decode()
    return client_configuration(name, ca=pem, certificate_hash=certificate_hash, limits=LIMITS)


async def open_webtransport(address: Address, configuration: WebTransportConfiguration) -> WebTransport:
    """Open a session at the first of the host's addresses that answers. Raises `Disconnected`.

    Cancelling it leaves nothing open.
    """
    try:
        places = await look_up(address.host, address.port)
    except OSError as error:
        raise Disconnected(_no_connection(address.url, error)) from error
    attempts = [partial(_open, address, configuration, family, where) for family, where in places]
    return await race(attempts, WebTransport.abandon)


async def _open(address: Address, configuration: WebTransportConfiguration, family: int, where: Any) -> WebTransport:
    try:
        udp = _connect(family, where)
    except OSError as error:
        raise Disconnected(_no_connection(address.url, error)) from error
    now = anyio.current_time()
    connection = WebTransportConnection.client(
        configuration, where, now, authority=address.authority, path=address.target
    )
    transport = WebTransport(address.url, connection, where, udp)
    try:
        await transport.open()
    except BaseException:
        transport.abandon()
        raise
    return transport


def _connect(family: int, where: Any) -> socket.socket:
    """A socket that hears only from there, and of its absence. Waits for nothing."""
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
