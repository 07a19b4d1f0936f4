"""The broker's WebSocket endpoint with an echo in place of the session, as the Autobahn suite needs it.

All parts below the session are those of the broker: listener socket, TLS, HTTP, handshake, `InboundFrames`,
`FrameStream`, closing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import patch

import msgspec
import trio_websocket

from catbus.config import LimitSettings, WebSocketSettings, WebTransportSettings
from catbus.endpoints.replica_interface import SessionInterface
from catbus.endpoints.websocket import websocket_connection
from catbus.endpoints.websocket.frame_encoder import text_header
from tests.brokers import CONFIG, running

MESSAGE_SIZE = 1 << 20
"""The object size in bytes with which all messages of the suite pass: the largest has 16 MiB."""

SUITE_TIMEOUT = 3600
"""Seconds; the suite takes less."""

_BINARY = b"\x82"


class Echo(websocket_connection.WebSocketServerConnection):
    """A connection that sends each message back unchanged. It requires no authentication."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._inbound.max_message_size = self._max_message_size

    async def _receive_messages(self, websocket: trio_websocket.WebSocketConnection, driver: SessionInterface) -> None:
        while driver.closing is None:
            message = await websocket.get_message()
            if isinstance(message, str):
                data = message.encode()
                self.frame_stream.write(text_header(len(data)) + data)
            else:
                self.frame_stream.write(_BINARY + text_header(len(message))[1:] + message)
            await self.frame_stream.wait_send_all_might_not_block()


@asynccontextmanager
async def serve_echo(size: int = MESSAGE_SIZE, certificate: tuple[str, str] | None = None) -> AsyncIterator[str]:
    """Serve an echo and yield its URL. With a certificate and its key, the echo uses TLS.

    `size` is the largest object; a message may have 16 times as many bytes.
    """
    tls = certificate is not None
    config = msgspec.structs.replace(
        CONFIG,
        websocket=WebSocketSettings(bind=("127.0.0.1:0",), tls=tls),
        webtransport=WebTransportSettings(bind=(), cert=certificate[0], key=certificate[1])
        if certificate
        else WebTransportSettings(bind=()),
        limits=LimitSettings(message_size=size, auth_timeout=SUITE_TIMEOUT),
    )
    with patch.object(websocket_connection, "WebSocketServerConnection", Echo):
        async with running(config, seconds=SUITE_TIMEOUT) as (_, address):
            yield f"{'wss' if tls else 'ws'}://{address}/ws"
