"""A receiver of webhooks: a real HTTP server that keeps the requests, and responds as the test wants."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import trio

from tests.log.harness import TEST_TIMEOUT


@dataclass(frozen=True)
class Delivery:
    """A request that came."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def seqs(self) -> list[int]:
        return [message["seq"] for message in self.event["data"]["messages"]]


@dataclass(frozen=True)
class Reply:
    """What the receiver does: respond, or close the connection if the status is None."""

    status: int | None = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


Decide = Callable[[Delivery], Awaitable[Reply]]


async def accept(delivery: Delivery) -> Reply:
    """Accept everything."""
    return Reply()


class Receiver:
    """The requests that came, oldest first, and those that were accepted."""

    def __init__(self, decide: Decide) -> None:
        self.decide = decide
        self.url = ""
        self.deliveries: list[Delivery] = []
        self.accepted: list[Delivery] = []
        self.connections = 0
        self._changed = trio.Event()

    @property
    def seqs(self) -> list[int]:
        """The seqs of the messages that were accepted."""
        return [seq for delivery in self.accepted for seq in delivery.seqs]

    async def wait_until(self, reached: Callable[[Receiver], object]) -> None:
        with trio.fail_after(TEST_TIMEOUT):
            while not reached(self):
                await self._changed.wait()

    async def serve(self, stream: trio.abc.Stream) -> None:
        self.connections += 1
        connection = h11.Connection(h11.SERVER)
        try:
            async with stream:
                while await self._serve_request(connection, stream):
                    connection.start_next_cycle()
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
            pass

    async def _serve_request(self, connection: h11.Connection, stream: trio.abc.Stream) -> bool:
        request: h11.Request | None = None
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await stream.receive_some())
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                break
            else:
                return False
        assert request is not None
        headers = {name.decode(): value.decode() for name, value in request.headers}
        delivery = Delivery(request.target.decode(), headers, bytes(body))
        self.deliveries.append(delivery)
        self._note()
        reply = await self.decide(delivery)
        if reply.status is None:
            return False
        if 200 <= reply.status < 300:
            self.accepted.append(delivery)
            self._note()
        length = ("Content-Length", str(len(reply.body)))
        head = h11.Response(status_code=reply.status, headers=[*reply.headers, length])
        for part in (head, h11.Data(data=reply.body), h11.EndOfMessage()):
            await stream.send_all(connection.send(part) or b"")
        return connection.our_state is h11.DONE

    def _note(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


@asynccontextmanager
async def open_receiver(decide: Decide = accept, context: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    """Serve on a port of this machine, with TLS if there is a context for it."""
    receiver = Receiver(decide)

    async def serve(stream: trio.SocketStream) -> None:
        secured = (
            stream if context is None else trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        )
        await receiver.serve(secured)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        scheme = "http" if context is None else "https"
        receiver.url = f"{scheme}://127.0.0.1:{listeners[0].socket.getsockname()[1]}/hook"
        yield receiver
        nursery.cancel_scope.cancel()
