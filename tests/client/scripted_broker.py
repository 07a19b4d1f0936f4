"""A scripted broker: a function plays the other end of a client's connection."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Ping, Pong, Request, TextMessage

from catbus.client import Bus, connect, open_bus
from catbus.client.transport_interface import Chunk
from catbus.errors import Disconnected
from catbus.protocol.channels import matches
from catbus.protocol.json_splitter import JsonSplitter

LIMIT = 5.0
"""Seconds after which a test that waits has failed."""

EPOCH = "e1"
AUTH_OK = {
    "type": "auth_ok",
    "client_id": "alice",
    "producer": "p1",
    "epoch": EPOCH,
    "head": 100,
    "floor": 1,
    "limits": {"message_size": 65536, "subscriptions": 1000, "pending_publishes": 1000},
}

Script = Callable[["Peer"], Awaitable[None]]


class Gone(Exception):
    """The client has disconnected."""


class Peer:
    """The broker's end of one connection, in objects."""

    def __init__(self) -> None:
        self.frames = 0
        """How many frames (or chunks) of objects have come in."""
        self.pongs: list[bytes] = []
        self.closed: tuple[int, str | None] | None = None
        """The close code and reason of the client."""
        self._framer: JsonSplitter[dict[str, Any]] = JsonSplitter(msgspec.json.Decoder(dict[str, Any]).decode, 1 << 24)
        self._objects: deque[dict[str, Any]] = deque()

    async def receive(self) -> dict[str, Any]:
        """The next object; raises `Gone` when there is none to come."""
        while not self._objects:
            for message in self._framer.feed(await self.read()):
                assert isinstance(message, dict), message
                self._objects.append(message)
        return self._objects.popleft()

    async def expect(self, kind: str) -> dict[str, Any]:
        message = await self.receive()
        assert message.get("type") == kind, message
        return message

    async def send(self, *messages: dict[str, Any]) -> None:
        """Send objects together."""
        await self.write(b"".join(msgspec.json.encode(message) + b"\n" for message in messages))

    async def admit(self, **fields: Any) -> dict[str, Any]:
        auth = await self.expect("auth")
        await self.send({**AUTH_OK, **fields})
        return auth

    async def subscribed(self, seq: int = 100) -> dict[str, Any]:
        """Receive a `subscribe` and reply to it."""
        request = await self.expect("subscribe")
        await self.send({"type": "subscribed", "pattern": request["pattern"], "seq": seq, "id": request["id"]})
        return request

    async def published(self, seq: int) -> dict[str, Any]:
        """Receive a `publish` and reply to it."""
        request = await self.expect("publish")
        await self.send({"type": "published", "channel": request["channel"], "id": request["id"], "seq": seq})
        return request

    async def linger(self) -> None:
        """Wait until the client disconnects."""
        while True:
            await self.read()

    async def read(self) -> bytes:
        raise NotImplementedError

    async def write(self, data: bytes) -> None:
        raise NotImplementedError

    async def close(self, code: int = 1000, reason: str = "") -> None:
        raise NotImplementedError


def message(seq: int | None, payload: Any = None, pattern: str = "a.*", channel: str = "a.b") -> dict[str, Any]:
    fields = {"type": "message", "channel": channel, "payload": payload, "pattern": pattern, "at": 1_700_000_000_000}
    return fields if seq is None else {**fields, "seq": seq}


class WebSocketPeer(Peer):
    """Over a real socket."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        super().__init__()
        self.stream = stream
        self.connection = WSConnection(ConnectionType.SERVER)
        self.target = ""

    async def perform_handshake(self) -> None:
        while True:
            await self.fill()
            for event in self.connection.events():
                assert isinstance(event, Request)
                self.target = event.target
                await self.stream.send(self.connection.send(AcceptConnection()))
                return

    async def read(self) -> bytes:
        while True:
            await self.fill()
            data = b""
            heard = False
            for event in self.connection.events():
                match event:
                    case TextMessage():
                        data += event.data.encode()
                        self.frames += event.message_finished
                    case Ping():
                        await self.stream.send(self.connection.send(event.response()))
                    case Pong():
                        self.pongs.append(bytes(event.payload))
                        heard = True
                    case CloseConnection():
                        self.closed = (event.code, event.reason)
                        if self.connection.state is ConnectionState.REMOTE_CLOSING:
                            await self.stream.send(self.connection.send(event.response()))
                        raise Gone
                    case BytesMessage():
                        raise AssertionError("the client sends text")
            if data or heard:
                return data

    async def fill(self) -> None:
        try:
            self.connection.receive_data(await self.stream.receive())
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            raise Gone from None

    async def write(self, data: bytes) -> None:
        await self.stream.send(self.connection.send(TextMessage(data=data.decode())))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self.stream.send(self.connection.send(CloseConnection(code, reason)))


class MemoryPeer(Peer):
    """Over a `Pipe`."""

    def __init__(
        self, outbound: MemoryObjectSendStream[bytes | Disconnected], inbound: MemoryObjectReceiveStream[bytes]
    ) -> None:
        super().__init__()
        self._outbound = outbound
        self._inbound = inbound

    async def read(self) -> bytes:
        try:
            data = await self._inbound.receive()
        except anyio.EndOfStream:
            raise Gone from None
        self.frames += 1
        return data

    async def write(self, data: bytes) -> None:
        await self._outbound.send(data)

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self._outbound.send(Disconnected(f"the broker closed the connection: {reason}", code))

    def hang_up(self) -> None:
        self._outbound.close()
        self._inbound.close()


class Pipe:
    """A transport in memory: what is sent is taken at once while `open_gate`, and waits for ever otherwise."""

    kind = "websocket"
    pending = False

    def __init__(self) -> None:
        outbound, self._inbound = anyio.create_memory_object_stream[bytes | Disconnected](1000)
        self._outbound, inbound = anyio.create_memory_object_stream[bytes](1000)
        self.peer = MemoryPeer(outbound, inbound)
        self.open_gate = True
        self.closed: tuple[int, str] | None = None

    async def send(self, data: bytes) -> None:
        if not self.open_gate:
            await anyio.sleep_forever()
        try:
            await self._outbound.send(data)
        except anyio.BrokenResourceError:
            raise Disconnected("the broker is gone") from None

    async def receive(self) -> Chunk:
        try:
            item = await self._inbound.receive()
        except anyio.EndOfStream:
            raise Disconnected("the broker ended the connection without a Close frame") from None
        if isinstance(item, Disconnected):
            raise item
        return Chunk(item)

    async def aclose(self, code: int = 1000, reason: str = "") -> None:
        self.closed = (code, reason)
        self._outbound.close()
        self._inbound.close()
        await anyio.lowlevel.checkpoint()


async def play(script: Script, peer: Peer) -> None:
    """Play a script to its end, then wait until the client disconnects."""
    try:
        await script(peer)
        await peer.linger()
    except Gone:
        pass


@asynccontextmanager
async def serve(script: Script, *, handshake: bool = True) -> AsyncIterator[str]:
    """The URL of a broker on a real socket that plays the script on each connection."""
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)

    async def handshake_first(peer: Peer) -> None:
        assert isinstance(peer, WebSocketPeer)
        await peer.perform_handshake()
        await script(peer)

    async def handle(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await play(handshake_first if handshake else script, WebSocketPeer(stream))

    with anyio.fail_after(LIMIT):
        async with listener, anyio.create_task_group() as tasks:
            tasks.start_soon(listener.serve, handle)
            yield f"ws://127.0.0.1:{port}"
            tasks.cancel_scope.cancel()


@asynccontextmanager
async def talk_to(broker: Script, **options: Any) -> AsyncIterator[Bus]:
    """A client that is connected to a broker on a real socket, without reconnects."""
    async with serve(broker) as url, connect(url, token="t", **{"reconnect": False, **options}) as bus:
        yield bus


@asynccontextmanager
async def talk(script: Script, **options: Any) -> AsyncIterator[Bus]:
    """The same, where the broker has admitted the client before the script begins."""

    async def admit_first(peer: Peer) -> None:
        await peer.admit()
        await script(peer)

    async with talk_to(admit_first, **options) as bus:
        yield bus


@asynccontextmanager
async def talk_in_memory(script: Script, **options: Any) -> AsyncIterator[tuple[Bus, Pipe]]:
    """The same without a socket."""
    pipe = Pipe()

    async def dial() -> Pipe:
        return pipe

    async def run() -> None:
        try:
            await pipe.peer.admit()
            await play(script, pipe.peer)
        finally:
            pipe.peer.hang_up()

    with anyio.fail_after(LIMIT):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            async with open_bus(dial, token="t", reconnect=False, **options) as bus:
                yield bus, pipe
            tasks.cancel_scope.cancel()


class Honest:
    """A small correct broker: a log, subscriptions with `since`, replies in order."""

    def __init__(self, head: int = 100) -> None:
        self.log: list[dict[str, Any]] = []
        self.floor = head + 1
        self.page = 1000
        """The largest number of messages in a page of history."""
        self.head = head
        self.published: list[dict[str, Any]] = []
        self.subscribes: list[dict[str, Any]] = []
        self.unsubscribes = 0
        self.held: dict[str, None] = {}

    def append(self, channel: str, payload: Any) -> int:
        self.head += 1
        self.log.append({"channel": channel, "payload": payload, "seq": self.head})
        return self.head

    async def __call__(self, peer: Peer) -> None:
        self.held.clear()
        while True:
            for replies in self.answer(await peer.receive()):
                await peer.send(*replies)

    def answer(self, request: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """The replies to a request, in chunks that are sent one by one."""
        match request:
            case {"type": "auth"}:
                return [[{**AUTH_OK, "head": self.head}]]
            case {"type": "publish", "channel": channel, "id": number}:
                self.published.append(request)
                if request.get("ephemeral"):
                    return [[{"type": "published", "channel": channel, "id": number}]]
                seq = self.append(channel, request["payload"])
                echo = [self.copy(self.log[-1], pattern) for pattern in self.held if matches(pattern, channel)]
                return [[*echo, {"type": "published", "channel": channel, "id": number, "seq": seq}]]
            case {"type": "subscribe", "pattern": pattern, "id": number}:
                self.subscribes.append(request)
                self.held[pattern] = None
                replies = [{"type": "subscribed", "pattern": pattern, "seq": self.head, "id": number}]
                since = request.get("since")
                if since is not None:
                    missed = [
                        entry for entry in self.log if entry["seq"] > since and matches(pattern, entry["channel"])
                    ]
                    replies += [self.copy(entry, pattern) for entry in missed]
                    replies += [{"type": "live", "pattern": pattern, "seq": self.head}]
                return [replies[at : at + 100] for at in range(0, len(replies), 100)]
            case {"type": "unsubscribe", "pattern": pattern, "id": number}:
                self.unsubscribes += 1
                del self.held[pattern]
                return [[{"type": "unsubscribed", "pattern": pattern, "seq": self.head, "id": number}]]
            case {"type": "history", "pattern": pattern, "id": number}:
                before = request.get("before", self.head + 1)
                kept = [entry for entry in self.log if entry["seq"] < before and matches(pattern, entry["channel"])]
                found = [self.copy(entry, pattern) for entry in kept]
                limit = min(request.get("limit", 100), self.page)
                page = {"messages": found[-limit:], "more": len(found) > limit}
                return [[{"type": "history", "id": number, **page}]]
            case {"type": "ping", "seq": number}:
                return [[{"type": "pong", "seq": number}, {"type": "head", "seq": self.head, "epoch": EPOCH, "at": 1}]]
        raise AssertionError(request)

    def copy(self, entry: dict[str, Any], pattern: str) -> dict[str, Any]:
        return message(entry["seq"], entry["payload"], pattern, entry["channel"])
