"""Connectors of subscribers over WebSocket, server-sent events and WebTransport."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

import harness

from catbus.webtransport import (
    ConnectionLost,
    SessionOpened,
    SessionRefused,
    StreamData,
    WebTransportConfiguration,
    WebTransportConnection,
    client_configuration,
)

OPENING_TIME = 30.0
"""Seconds within which one must be connected."""

Steps = Sequence[tuple[bytes, bytes]]
"""What a client sends, piece by piece, and what must arrive after each."""


class ConnectionClosed(Exception):
    """The server has closed a connection."""


@dataclass(frozen=True, slots=True)
class WebSocketConnector:
    port: int
    path: str
    steps: Steps
    alive: bytes
    """What is sent to stay connected."""

    def connect_one(self) -> socket.socket:
        """Return a non-blocking socket that has taken the steps."""
        peer = harness.connect(self.port, self.path)
        for said, expected in self.steps:
            peer.sendall(said)
            harness.wait_for(peer, expected)
        peer.setblocking(False)
        return peer

    def open(self, poll: select.epoll) -> SocketSubscribers:
        return SocketSubscribers(self, poll)


@dataclass(frozen=True, slots=True)
class EventStreamConnector:
    port: int
    target: str
    """The path and the query of the request, with the token."""
    alive: bytes = b""

    def connect_one(self) -> socket.socket:
        """Return a non-blocking socket on which the stream has begun."""
        peer = socket.create_connection(("127.0.0.1", self.port), timeout=OPENING_TIME)
        peer.sendall(f"GET {self.target} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n\r\n".encode())
        harness.wait_for(peer, b"\nid: ")
        peer.setblocking(False)
        return peer

    def open(self, poll: select.epoll) -> SocketSubscribers:
        return SocketSubscribers(self, poll)


class SocketSubscribers:
    """Subscribers over TCP."""

    def __init__(self, connector: WebSocketConnector | EventStreamConnector, poll: select.epoll) -> None:
        self._connector = connector
        self._poll = poll
        self._sockets: list[socket.socket] = []
        self._numbers: dict[int, int] = {}

    def connect_one(self) -> None:
        peer = self._connector.connect_one()
        self._poll.register(peer, select.EPOLLIN)
        self._numbers[peer.fileno()] = len(self._sockets)
        self._sockets.append(peer)

    def __len__(self) -> int:
        return len(self._sockets)

    def receive(self, timeout: float) -> Iterator[tuple[int, bytes]]:
        for file, _ in self._poll.poll(timeout):
            if (number := self._numbers.get(file)) is not None:
                data = self._sockets[number].recv(1 << 18)
                if not data:
                    raise ConnectionClosed
                yield number, data

    def keep_alive(self) -> None:
        for peer in self._sockets:
            peer.send(self._connector.alive)


@dataclass(frozen=True, slots=True)
class WebTransportConnector:
    port: int
    ca: str
    """The server's own certificate."""
    steps: Steps

    def open(self, poll: select.epoll) -> WebTransportSubscribers:
        return WebTransportSubscribers(self, poll)


class WebTransportSubscribers:
    """Subscribers with a UDP socket each, so that the kernel drops no datagrams of one because of the others."""

    def __init__(self, connector: WebTransportConnector, poll: select.epoll) -> None:
        self._connector = connector
        self._poll = poll
        self._configuration = client_configuration("127.0.0.1", ca=connector.ca)
        self._peers: list[WebTransportClient] = []
        self._numbers: dict[int, int] = {}
        self._timers: list[tuple[float, int]] = []

    def connect_one(self) -> None:
        peer = WebTransportClient(self._configuration, self._connector.port)
        number = len(self._peers)
        self._poll.register(peer.socket, select.EPOLLIN)
        self._numbers[peer.socket.fileno()] = number
        self._peers.append(peer)
        deadline = time.monotonic() + OPENING_TIME
        self._send(number)
        while peer.stream is None:
            self._wait(number, deadline)
        for said, expected in self._connector.steps:
            peer.connection.send(peer.stream, said)
            self._send(number)
            reply = b""
            while expected not in reply:
                reply += self._wait(number, deadline)

    def __len__(self) -> int:
        return len(self._peers)

    def receive(self, timeout: float) -> Iterator[tuple[int, bytes]]:
        if self._timers:
            timeout = min(timeout, max(0.0, self._timers[0][0] - time.monotonic()))
        for file, _ in self._poll.poll(timeout):
            if (number := self._numbers.get(file)) is not None:
                data = self._peers[number].receive()
                if data:
                    yield number, data
                self._send(number)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, number = heappop(self._timers)
            self._peers[number].alarm = inf
            self._peers[number].handle_timer(now)
            self._send(number)

    def keep_alive(self) -> None:
        for number, peer in enumerate(self._peers):
            peer.connection.ping()
            self._send(number)

    def _send(self, number: int) -> None:
        peer = self._peers[number]
        peer.transmit()
        # A timer that is moved to later fires at its old time all the same, and is set again.
        timer = peer.connection.timer
        if timer is not None and timer < peer.alarm:
            peer.alarm = timer
            heappush(self._timers, (timer, number))

    def _wait(self, number: int, deadline: float) -> bytes:
        if time.monotonic() > deadline:
            raise ConnectionClosed("nobody has let it in")
        return b"".join([data for each, data in self.receive(0.5) if each == number])


class WebTransportClient:
    """One connection with one stream, which it opens as soon as possible."""

    def __init__(self, configuration: WebTransportConfiguration, port: int) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._address = "127.0.0.1", port
        self.socket.connect(self._address)
        now = time.monotonic()
        self.connection = WebTransportConnection.client(
            configuration, self._address, now, authority=f"127.0.0.1:{port}"
        )
        self.stream: int | None = None
        self.alarm = inf
        self.consumes = True
        """Whether it grants the server more flow-control credit as it reads."""

    def receive(self) -> bytes:
        """Return what has arrived on the stream."""
        connection, address, now = self.connection, self._address, time.monotonic()
        recv = self.socket.recv
        try:
            while True:
                connection.receive_datagram(recv(65_536), address, now)
        except OSError:
            pass  # Nothing is left; or the server has gone, which the connection's timer will tell.
        return self._take_events()

    def handle_timer(self, now: float) -> None:
        self.connection.handle_timer(now)
        self._take_events()

    def transmit(self) -> None:
        """Send what is due."""
        for data, _ in self.connection.datagrams_to_send(time.monotonic()):
            try:
                self.socket.send(data)
            except OSError:
                return  # Lost, as on any network.

    def _take_events(self) -> bytes:
        found: list[bytes] = []
        for event in self.connection.events():
            match event:
                case StreamData():
                    found.append(event.data)
                    if self.consumes:
                        self.connection.consumed(event.stream, len(event.data))
                case SessionOpened():
                    self.stream = self.connection.open_stream(bidirectional=True)
                case SessionRefused() | ConnectionLost():
                    raise ConnectionClosed(event)
        return b"".join(found)
