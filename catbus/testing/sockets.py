"""A blocking WebSocket connection, for `BrokerMachine` and for tests that are no coroutines."""

from __future__ import annotations

import socket
import time
from typing import Any
from urllib.parse import urlsplit

import msgspec
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Ping, RejectConnection, Request, TextMessage

from ..errors import PeerError
from ..framing import Framer

_CHUNK = 65_536


class WebSocketConnection:
    """Opened with the URL of a broker, `ws://HOST:PORT/ws`. Raises `OSError` where there is none."""

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 80), timeout)
        self._websocket = WSConnection(ConnectionType.CLIENT)
        self._framer: Framer[dict[str, Any]] = Framer(msgspec.json.Decoder(dict[str, Any]).decode, 1 << 24)
        self._objects: list[dict[str, Any]] = []
        self._accepted = False
        self.code: int | None = None
        """With which the broker has closed it."""
        self._socket.sendall(self._websocket.send(Request(host=parts.netloc, target=parts.path or "/")))
        while not self._accepted:
            self._read(time.monotonic() + timeout)

    def send(self, data: bytes) -> None:
        """Send bytes, as one WebSocket message. Nothing happens when it is closed."""
        if self.code is None:
            self._socket.sendall(self._websocket.send(BytesMessage(data)))

    def receive(self, timeout: float) -> dict[str, Any] | None:
        """The next object; None when the broker has closed the connection. Raises `TimeoutError`."""
        deadline = time.monotonic() + timeout
        while not self._objects:
            if self.code is not None:
                return None
            self._read(deadline)
        return self._objects.pop(0)

    def close(self) -> None:
        """Close it, without a word."""
        self._socket.close()

    def _read(self, deadline: float) -> None:
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        data = self._socket.recv(_CHUNK)
        if not data:
            self.code = self.code or 1006
            return
        self._websocket.receive_data(data)
        for event in self._websocket.events():
            match event:
                case AcceptConnection():
                    self._accepted = True
                case RejectConnection():
                    raise OSError(f"HTTP status {event.status_code}")
                case Ping():
                    self._socket.sendall(self._websocket.send(event.response()))
                case TextMessage() | BytesMessage():
                    text = event.data if isinstance(event.data, str) else bytes(event.data).decode()
                    for each in self._framer.feed(text.encode()):
                        if isinstance(each, PeerError):
                            raise each
                        self._objects.append(each)
                case CloseConnection():
                    self.code = event.code
