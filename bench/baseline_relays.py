"""The cost of fan-out without a broker: loops that only relay what a publisher sends to all subscribers."""

from __future__ import annotations

import select
import socket
import time
from heapq import heappop, heappush
from math import inf
from os import write

import harness
from aioquic.h3.connection import H3Connection
from aioquic.h3.events import HeadersReceived, WebTransportStreamDataReceived
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionIdIssued

from catbus.endpoints.webtransport.udp_socket import SOCKET_BUFFER_SIZE, UdpSocket, send_datagrams
from catbus.webtransport import WebTransportConfiguration
from catbus.webtransport.connectionless_packets import ID_LENGTH, read_header

READ = 65_536
HELLO = b"hello\n"
WELCOME = b"welcome\n"


def websocket_relay(listener: socket.socket) -> None:
    """Relay what the last client sends, which asked for `/publish`, to all clients that connected before it."""
    peers: list[socket.socket] = []
    while True:
        peer, _ = listener.accept()
        request = harness.wait_for(peer, b"\r\n\r\n")
        peer.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        if request.startswith(b"GET /publish "):
            break
        peers.append(peer)
    files = [each.fileno() for each in peers]
    while data := peer.recv(READ):
        for file in files:
            write(file, data)


def webtransport_relay(listener: socket.socket, sock: socket.socket, configuration: WebTransportConfiguration) -> None:
    """Relay what a TCP client sends to all clients that have sent HELLO on a WebTransport stream."""
    sock.setblocking(False)
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_SIZE)
    loop = _Loop(UdpSocket(sock), configuration)
    publisher: socket.socket | None = None
    poll = select.epoll()
    poll.register(sock, select.EPOLLIN)
    poll.register(listener, select.EPOLLIN)
    while True:
        for file, _ in poll.poll(loop.patience()):
            if file == sock.fileno():
                loop.receive()
            elif file == listener.fileno():
                publisher, _ = listener.accept()
                poll.register(publisher, select.EPOLLIN)
            elif publisher is not None:
                data = publisher.recv(READ)
                if not data:
                    return
                loop.publish(data)
        loop.handle_timers()


class _Peer:
    __slots__ = ("alarm", "http", "quic", "stream")

    def __init__(self, quic: QuicConnection) -> None:
        self.quic = quic
        self.http = H3Connection(quic, enable_webtransport=True)
        self.stream: int | None = None
        self.alarm = inf


class _Loop:
    """The least that a server on aioquic can do: route packets to connections, acknowledge, handle timers."""

    def __init__(self, port: UdpSocket, configuration: WebTransportConfiguration) -> None:
        self._port = port
        self._configuration = configuration.quic
        self._peers: list[_Peer] = []
        self._routes: dict[bytes, int] = {}
        self._timers: list[tuple[float, int]] = []

    def patience(self) -> float | None:
        return max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None

    def receive(self) -> None:
        touched: dict[int, None] = {}
        now = time.monotonic()
        for data, place in self._port.receive(128):
            number = self._routes.get(data[1 : 1 + ID_LENGTH])
            if number is None:
                number = self._accept(data)
                if number is None:
                    continue
            self._peers[number].quic.receive_datagram(data, place, now)
            touched[number] = None
        for number in touched:
            self._send(number)

    def publish(self, data: bytes) -> None:
        for number, peer in enumerate(self._peers):
            if peer.stream is not None:
                peer.quic.send_stream_data(peer.stream, data)
                self._send(number)

    def handle_timers(self) -> None:
        timers, now = self._timers, time.monotonic()
        while timers and timers[0][0] <= now:
            _, number = heappop(timers)
            self._peers[number].alarm = inf
            self._peers[number].quic.handle_timer(now)
            self._send(number)

    def _accept(self, data: bytes) -> int | None:
        header = read_header(data)
        if header is None or header.version is None:
            return None
        number = self._routes.get(header.destination)
        if number is None and header.is_initial:
            quic = QuicConnection(
                configuration=self._configuration, original_destination_connection_id=header.destination
            )
            number = len(self._peers)
            self._peers.append(_Peer(quic))
            self._routes[header.destination] = self._routes[quic.host_cid] = number
        return number

    def _send(self, number: int) -> None:
        peer = self._peers[number]
        quic = peer.quic
        while (event := quic.next_event()) is not None:
            if isinstance(event, ConnectionIdIssued):
                self._routes[event.connection_id] = number
            elif peer.stream is None:
                self._greet(peer, event)
        datagrams = quic.datagrams_to_send(time.monotonic())
        if datagrams:
            send_datagrams(datagrams)
        timer = quic.get_timer()
        if timer is not None and timer < peer.alarm:
            peer.alarm = timer
            heappush(self._timers, (timer, number))

    def _greet(self, peer: _Peer, event: object) -> None:
        for one in peer.http.handle_event(event):
            if isinstance(one, HeadersReceived):
                peer.http.send_headers(one.stream_id, [(b":status", b"200")])
            elif isinstance(one, WebTransportStreamDataReceived) and one.data.endswith(HELLO):
                peer.stream = one.stream_id
                peer.quic.send_stream_data(peer.stream, WELCOME)
