"""The broker's WebSocket endpoint with an echo in the place of its sessions, for a suite that wants one.

Everything up to the session is the broker's own: listener socket, TLS, HTTP, handshake, `InboundFrames`,
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
from catbus.endpoints.websocket import websocket_connection
from catbus.endpoints.websocket.frame_encoder import text_header
from catbus.session.driver import SessionDriver
from tests.brokers import CONFIG, running

SIZE = 1 << 20
"""Bytes of an object with which all of the suite's messages pass: the largest has 16 MiB."""

HOUR = 3600
"""Seconds: more than the suite takes."""

_BINARY = b"\x82"


class Echo(websocket_connection.WebSocketServerConnection):
    """Sends back each message as it came. Its peer has nothing to show, and is not silent for long."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._inbound.largest = self._largest

    async def _listen(self, websocket: trio_websocket.WebSocketConnection, client: SessionDriver) -> None:
        while client.closing is None:
            message = await websocket.get_message()
            if isinstance(message, str):
                data = message.encode()
                self.outbox.write(text_header(len(data)) + data)
            else:
                self.outbox.write(_BINARY + text_header(len(message))[1:] + message)
            await self.outbox.wait_send_all_might_not_block()


@asynccontextmanager
async def echoing(size: int = SIZE, certificate: tuple[str, str] | None = None) -> AsyncIterator[str]:
    """Serve an echo, with TLS where there is a certificate and its key, and yield its URL.

    `size` is the largest object; a message may have 16 times as many bytes.
    """
    tls = certificate is not None
    config = msgspec.structs.replace(
        CONFIG,
        websocket=WebSocketSettings(bind=("127.0.0.1:0",), tls=tls),
        webtransport=WebTransportSettings(bind=(), cert=certificate[0], key=certificate[1])
        if certificate
        else WebTransportSettings(bind=()),
        limits=LimitSettings(message_size=size, auth_timeout=HOUR),
    )
    with patch.object(websocket_connection, "Connection", Echo):
        async with running(config, seconds=HOUR) as (_, address):
            yield f"{'wss' if tls else 'ws'}://{address}/ws"
