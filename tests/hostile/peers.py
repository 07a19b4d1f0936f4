"""The connections of attackers, on plain sockets."""

from __future__ import annotations

import base64
import hmac
import json
import os
import select
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any

from catbus.webtransport import (
    ConnectionLost,
    SessionOpened,
    SessionRefused,
    StreamData,
    client_configuration,
)
from catbus.webtransport import (
    WebTransportConnection as WebTransport,
)

from . import packets
from .attacks import Ended, Target

PATIENCE = 20.0
"""Seconds after which an attacker without progress reconnects."""
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
FINAL = 0x80
POST = b"POST /publish HTTP/1.1\r\nHost: bus.example\r\n"
GET = b"GET %b HTTP/1.1\r\nHost: bus.example\r\n\r\n"
LARGEST = 2048
"""Bytes of the largest datagram that the broker reads."""
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: bus.example\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: %b\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def frame(payload: bytes, opcode: int = TEXT, *, final: bool = True) -> bytes:
    """Make a client's WebSocket frame. Its mask is zero, which is valid."""
    size = len(payload)
    head = bytes((opcode | (FINAL if final else 0),))
    if size < 126:
        length = bytes((0x80 | size,))
    elif size < 65_536:
        length = b"\xfe" + size.to_bytes(2, "big")
    else:
        length = b"\xff" + size.to_bytes(8, "big")
    return head + length + bytes(4) + payload


def request(kind: str, **fields: object) -> bytes:
    """Encode an object of the protocol as a line."""
    return json.dumps({"type": kind, **fields}).encode() + b"\n"


class Peer:
    """A TCP connection, with TLS if the port uses it."""

    def __init__(
        self, target: Target, port: int | None = None, *, tls: bool | None = None, address: str = "127.0.0.1"
    ) -> None:
        self.target = target
        self.read = b""
        """The last received bytes."""
        self.socket = socket.create_connection(
            ("127.0.0.1", port or target.port), timeout=PATIENCE, source_address=(address, 0)
        )
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.tls if tls is None else tls:
            self.socket = client_context().wrap_socket(self.socket)
        target.tally.opened()

    def send(self, data: bytes, units: int = 1) -> None:
        """Send everything. Raises `Ended` if the broker has closed the connection."""
        try:
            self.socket.sendall(data)
        except TimeoutError:
            raise Ended from None
        except OSError:
            self.end()
        self.target.tally.sent(len(data), units)

    def receive(self, timeout: float = PATIENCE) -> bytes:
        """Return the next bytes; empty after the timeout. Raises `Ended` at the end."""
        self.socket.settimeout(timeout)
        try:
            data = self.socket.recv(1 << 18)
        except (TimeoutError, ssl.SSLWantReadError, BlockingIOError):
            return b""
        except OSError:
            data = b""
        finally:
            self.socket.settimeout(PATIENCE)
        if not data:
            self.end()
        self.read = (self.read + data)[-(1 << 18) :]
        return data

    def drain(self) -> None:
        """Drop received bytes."""
        while readable(self.socket, 0):
            self.receive()

    def wait_for(self, text: bytes) -> bytes:
        """Read until these bytes have arrived. Returns all bytes read."""
        data, deadline = b"", time.monotonic() + PATIENCE
        while text not in data:
            if time.monotonic() > deadline:
                raise Ended
            data = (data + self.receive(1))[-(4 << 20) :]
        return data

    def end(self) -> None:
        """Count the connection as closed, with the code of a Close frame if the broker sent one."""
        self.socket.settimeout(0.2)
        try:
            while data := self.socket.recv(1 << 16):
                self.read = (self.read + data)[-(1 << 18) :]
        except OSError:
            pass
        self.target.tally.ended(close_code(self.read))
        self.socket.close()
        raise Ended

    def close(self) -> None:
        self.socket.close()


def readable(sock: socket.socket, timeout: float) -> bool:
    """Whether bytes arrive before the deadline. `select` would be limited to 1,024 files."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def client_context() -> ssl.SSLContext:
    """Make a context that verifies nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Pump:
    """Sends the same bytes on one connection repeatedly, as far as it need not wait."""

    def __init__(self, peer: Peer, data: bytes) -> None:
        self.peer = peer
        self._data = data
        self._sent = 0

    def turn(self) -> bool:
        """Send, and drop received bytes. Returns whether anything was sent. Raises `Ended`."""
        self.peer.drain()
        self.peer.socket.setblocking(False)
        try:
            size = self.peer.socket.send(self._data[self._sent :])
        except BlockingIOError:
            return False
        except OSError:
            self.peer.end()
        self._sent = (self._sent + size) % len(self._data)
        self.peer.target.tally.sent(size)
        return True


def pump(peers: Sequence[Peer], data: bytes) -> None:
    """Send the same on all connections while one is open."""
    pumps = [Pump(peer, data) for peer in peers]
    while pumps:
        went = False
        for each in tuple(pumps):
            try:
                went = each.turn() or went
            except Ended:
                pumps.remove(each)
        if not went:
            time.sleep(0.002)


def close_code(data: bytes) -> int | None:
    """Return the code of the Close frame at the end of received bytes."""
    start = data.rfind(b"\x88", max(0, len(data) - 127))
    while start >= 0:
        if len(data) - start >= 4 and data[start + 1] == len(data) - start - 2:
            return int.from_bytes(data[start + 2 : start + 4], "big")
        start = data.rfind(b"\x88", max(0, len(data) - 127), start)
    return None


class WebSocketPeer(Peer):
    """Open a WebSocket, and authenticate if there is a token."""

    def __init__(self, target: Target, token: str | None = None, port: int | None = None, *, protocol: int = 1) -> None:
        super().__init__(target, port)
        self._prepare(UPGRADE % base64.b64encode(os.urandom(16)))
        if b" 101 " not in self.wait_for(b"\r\n\r\n"):
            self.target.tally.ended(None)
            raise Ended
        if token is not None:
            self.ask(request("auth", token=token, protocol=protocol), b'"auth_ok"')

    def ask(self, said: bytes, expected: bytes) -> bytes:
        """Send objects in a frame, and wait for a reply."""
        self._prepare(frame(said))
        return self.wait_for(expected)

    def _prepare(self, data: bytes) -> None:
        """Send a request, and wait for its reply."""
        self.socket.sendall(data)
        self.target.tally.prepared(len(data))

    def subscribe_all(self, patterns: list[str], **more: object) -> None:
        """Open all connections, a hundred at a time."""
        for start in range(0, len(patterns), 100):
            some = patterns[start : start + 100]
            self.ask(
                b"".join([request("subscribe", pattern=pattern, **more) for pattern in some])
                + request("ping", seq=start + 1),
                b'"pong","seq":%d' % (start + 1),
            )


def keep(peers: list[WebSocketPeer], first: bytes) -> None:
    """Send this on all connections, and return those that are still open."""
    for peer in tuple(peers):
        try:
            peer.send(first)
        except Ended:
            peers.remove(peer)
    while peers:
        time.sleep(0.5)
        for peer in tuple(peers):
            try:
                peer.drain()
            except Ended:
                peers.remove(peer)


def pour(peer: WebSocketPeer, lines: bytes, units: int = 1) -> None:
    """Send the same frame forever, as fast as the broker takes it, and drop replies."""
    data = frame(lines)
    while True:
        peer.send(data, units)
        peer.drain()


def base64url(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def jwt_of(secret: str, claims: dict[str, object]) -> str:
    """Make a valid token, signed with the broker's secret (HS256)."""
    text = base64url(b'{"alg":"HS256"}') + b"." + base64url(json.dumps(claims, separators=(",", ":")).encode())
    return (text + b"." + base64url(hmac.digest(secret.encode(), text, "sha256"))).decode()


class QuicPeer:
    """A WebTransport client on a UDP socket. With `token`, it authenticates on its first stream.

    With `open=False` it has sent nothing yet: the caller calls `transmit`.
    """

    def __init__(self, target: Target, token: str | None = None, *, open: bool = True) -> None:  # noqa: A002
        self.target = target
        self.address = "127.0.0.1", target.quic_port
        self.socket = udp(target)
        configuration = client_configuration("127.0.0.1", ca=target.ca)
        self.connection = WebTransport.client(
            configuration, self.address, time.monotonic(), authority=f"127.0.0.1:{target.quic_port}"
        )
        self.stream = -1
        self.opened = False
        self.read = b""
        if open:
            self.open(token)

    @property
    def quic(self) -> Any:
        """The connection beneath, for bytes that our own code would not send."""
        return self.connection._quic

    def open(self, token: str | None) -> None:
        deadline = time.monotonic() + PATIENCE
        self.transmit()
        while not self.opened:
            self.turn(0.2)
            if time.monotonic() > deadline:
                raise Ended
        stream = self.connection.open_stream(bidirectional=True)
        assert stream is not None
        self.stream = stream
        if token is not None:
            self.say(request("auth", token=token, protocol=1))
            while b'"auth_ok"' not in self.read:
                self.turn(0.2)
                if time.monotonic() > deadline:
                    raise Ended

    def say(self, data: bytes) -> None:
        self.connection.send(self.stream, data)
        self.transmit()

    def turn(self, timeout: float) -> None:
        """Receive until the time is over or a timer is due, and send what is due."""
        timer = self.connection.timer
        if timer is not None:
            timeout = min(timeout, max(0.0, timer - time.monotonic()))
        if readable(self.socket, timeout):
            try:
                while True:
                    self.connection.receive_datagram(self.socket.recv(65_536), self.address, time.monotonic())
            except OSError:
                pass
        self.connection.handle_timer(time.monotonic())
        self.take_events()
        self.transmit()

    def take_events(self) -> None:
        for event in self.connection.events():
            match event:
                case StreamData():
                    self.read = (self.read + event.data)[-65_536:]
                    self.connection.consumed(event.stream, len(event.data))
                case SessionOpened():
                    self.opened = True
                case SessionRefused() | ConnectionLost():
                    self.target.tally.ended(None)
                    raise Ended

    def transmit(self) -> None:
        for data, _ in self.connection.datagrams_to_send(time.monotonic()):
            self.throw(data)

    def throw(self, data: bytes) -> None:
        """Send a datagram, or drop it."""
        throw(self.socket, self.target, data)

    def inject(self, frames: bytes) -> None:
        """Send a packet with these frames, without the knowledge of our own code."""
        self.throw(packets.one_rtt(self.quic, frames))


def udp(target: Target, address: str = "") -> socket.socket:
    """Open a socket to the broker's QUIC port from one of this machine's addresses."""
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if address:
        made.bind((address, 0))
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    made.setblocking(False)
    made.connect(("127.0.0.1", target.quic_port))
    return made


def throw(sock: socket.socket, target: Target, data: bytes) -> None:
    try:
        sock.send(data)
    except OSError:
        return  # Lost, as on any network.
    target.tally.sent(len(data))
