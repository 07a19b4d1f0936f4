"""A TCP relay between a client and a broker that cuts connections where a test says so, on asyncio and on Trio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
import anyio.abc


class CuttingRelay:
    """`url` leads to the address `broker`. `connections` counts the connections so far."""

    def __init__(self, broker: str, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.connections = 0
        self.drop_responses = 0
        """For so many connections the broker's response is read, and the connection cut instead of passing it on."""
        self.limits: list[int] = []
        """Bytes of the broker's response after which the next connections are cut."""
        self.requests: list[bytes] = []
        """The first bytes of each connection."""
        address = urlsplit(broker)
        self.broker = str(address.hostname), int(address.port or 0)
        self._open: set[anyio.CancelScope] = set()

    def cut(self) -> None:
        """Cut all connections."""
        for scope in self._open:
            scope.cancel()

    async def serve(self, client: anyio.abc.SocketStream) -> None:
        self.connections += 1
        drop = self.drop_responses > 0
        self.drop_responses -= drop
        left = self.limits.pop(0) if self.limits else 1 << 62
        async with client, await anyio.connect_tcp(*self.broker) as broker, anyio.create_task_group() as group:
            self._open.add(group.cancel_scope)
            try:
                group.start_soon(self._forward_requests, client, broker)
                try:
                    while True:
                        data = await broker.receive()
                        if drop:
                            break
                        await client.send(data[:left])
                        left -= len(data)
                        if left <= 0:
                            break
                except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                    pass
                group.cancel_scope.cancel()
            finally:
                self._open.discard(group.cancel_scope)

    async def _forward_requests(self, client: anyio.abc.SocketStream, broker: anyio.abc.SocketStream) -> None:
        first = True
        try:
            while True:
                data = await client.receive()
                if first:
                    self.requests.append(data)
                first = False
                await broker.send(data)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass


@asynccontextmanager
async def open_relay(broker: str) -> AsyncIterator[CuttingRelay]:
    """Relay to the broker at a URL."""
    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as group:
        relay = CuttingRelay(broker, listener.extra(anyio.abc.SocketAttribute.local_port))
        group.start_soon(listener.serve, relay.serve)
        yield relay
        group.cancel_scope.cancel()
