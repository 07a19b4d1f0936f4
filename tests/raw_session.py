"""A client that sends and receives objects of the protocol as they are, over WebSocket or WebTransport."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import trio

from catbus.client.broker_address import parse_address
from catbus.client.transport_interface import DrivenTransport, Transport
from catbus.client.websocket_transport import open_websocket
from catbus.client.webtransport_transport import make_configuration, open_webtransport
from catbus.protocol.json_splitter import JsonSplitter

Message = dict[str, Any]


class RawSession:
    """One session. What no call has waited for is kept for the next one."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._splitter: JsonSplitter[Message] = JsonSplitter(msgspec.json.Decoder(Message).decode, 1 << 24)
        self._received: list[Message] = []

    async def send(self, **fields: Any) -> None:
        await self.transport.send(json.dumps(fields).encode())

    async def receive(self, *types: str) -> Message:
        """Return the next object of one of these types. Raises `Disconnected`."""
        while True:
            for number, message in enumerate(self._received):
                if message["type"] in types:
                    return self._received.pop(number)
            for found in self._splitter.feed((await self.transport.receive()).data):
                assert isinstance(found, dict)
                self._received.append(found)

    async def request(self, reply: str, **fields: Any) -> Message:
        """Send a request, and return its reply, which has this type."""
        await self.send(**fields)
        found = await self.receive(reply, "error", "subscribe_error", "auth_error")
        assert found["type"] == reply, found
        return found


@asynccontextmanager
async def open_session(url: str, token: str, certificate: str | None = None) -> AsyncIterator[RawSession]:
    """Connect and authenticate. A `certificate` is needed for WebTransport."""
    address = parse_address(url)
    async with trio.open_nursery() as nursery:
        if certificate is None:
            transport: Transport = await open_websocket(address)
        else:
            transport = await open_webtransport(address, make_configuration(address, certificate))
        if isinstance(transport, DrivenTransport):
            nursery.start_soon(transport.run)
        session = RawSession(transport)
        try:
            await session.request("auth_ok", type="auth", token=token, protocol=1)
            yield session
        finally:
            with trio.CancelScope(shield=True):
                await transport.aclose()
        nursery.cancel_scope.cancel()
