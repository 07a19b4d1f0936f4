"""A WebTransport client on a real UDP socket, and a server to connect it to."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

from catbus.auth.tokens import Authenticator
from catbus.config import Config
from catbus.endpoints.webtransport.packet_router import PacketRouter
from catbus.endpoints.webtransport.quic_endpoint import QuicEndpoint, serve_quic
from catbus.log import MemoryLog
from catbus.replica import Replica
from catbus.webtransport import (
    ConnectionLimits,
    ConnectionLost,
    Datagram,
    Event,
    SessionClosed,
    SessionOpened,
    SessionRefused,
    StreamData,
    StreamReset,
    StreamStopped,
    Terminated,
    WebTransportConnection,
)
from catbus.webtransport.connection_ids import ALL_CONNECTION_IDS, ConnectionIdShare
from tests.brokers import CONFIG, TOKEN
from tests.endpoints.raw_peer import patience
from tests.webtransport.simulated_link import client_config, server_config


class Lost(Exception):
    """The connection has ended."""


class Own:
    """A subscription's stream. Received data is consumed while `reads` is true."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.ended = False
        self.reads = True
        self.unread = 0
        self.rest = b""


class Client:
    """One connection with one stream. Consumes received data while `reads` is true, and sends with `say`."""

    def __init__(self, address: str, limits: ConnectionLimits | None = None, origin: str | None = None) -> None:
        host, _, port = address.rpartition(":")
        self.address = host.strip("[]"), int(port)
        family = socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
        self.socket = trio.socket.socket(family, socket.SOCK_DGRAM)
        now = trio.current_time()
        self.connection = WebTransportConnection.client(
            client_config(limits), self.address, now, authority="localhost", path="/any", origin=origin
        )
        self.stream: int | None = None
        self.reads = True
        self.deaf = False
        """Whether it neither receives nor sends a datagram."""
        self.events: list[Event] = []
        self.lines: list[dict[str, Any]] = []
        self.own: dict[int, Own] = {}
        """The streams that the broker opened, by number."""
        self.own_reads = True
        """Whether new streams are read."""
        self.datagrams: list[dict[str, Any]] = []
        self.unread = 0
        self.retried = False
        self._rest = b""
        self._changed = trio.lowlevel.ParkingLot()
        self._alarm = trio.CancelScope()

    async def run(self) -> None:
        with self.socket:
            await self.socket.bind(("::1" if ":" in self.address[0] else "127.0.0.1", 0))
            await self._run()

    async def _run(self) -> None:
        self.transmit()
        while not self.saw(Terminated):
            data = None
            timer = self.connection.timer
            with trio.CancelScope(deadline=float("inf") if timer is None or self.deaf else timer) as self._alarm:
                data, _ = await self.socket.recvfrom(4096)
            if self.deaf:
                continue
            now = trio.current_time()
            if data is not None:
                self.retried |= data[0] & 0xF0 == 0xF0
                self.connection.receive_datagram(data, self.address, now)
            self.connection.handle_timer(now)
            self.transmit()

    def transmit(self) -> None:
        if self.deaf:
            return
        self._take_events()
        for data, address in self.connection.datagrams_to_send(trio.current_time()):
            # The inner socket of the standard library does not wait.
            socket.socket.sendto(self.socket._sock, data, address)  # type: ignore[attr-defined]
        self._take_events()
        if (timer := self.connection.timer) is not None:
            self._alarm.deadline = min(self._alarm.deadline, timer)
        self._changed.unpark_all()

    def _take_events(self) -> None:
        for event in self.connection.events():
            self.events.append(event)
            if isinstance(event, StreamData) and event.stream == self.stream:
                if self.reads:
                    self.connection.consumed(event.stream, len(event.data))
                    *whole, self._rest = (self._rest + event.data).split(b"\n")
                    self.lines += [json.loads(line) for line in whole]
                else:
                    self.unread += len(event.data)
            elif isinstance(event, StreamData):
                self._take_own(event)
            elif isinstance(event, Datagram):
                self.datagrams.append(json.loads(event.data))

    def _take_own(self, event: StreamData) -> None:
        if event.stream not in self.own:
            self.own[event.stream] = Own()
            self.own[event.stream].reads = self.own_reads
        own = self.own[event.stream]
        own.ended |= event.ended
        *whole, own.rest = (own.rest + event.data).split(b"\n")
        own.lines += [json.loads(line) for line in whole]
        own.unread += len(event.data)
        if own.reads:
            self.take(event.stream)

    def take(self, stream: int) -> None:
        """Consume data of one of the broker's streams, which opens its window."""
        own = self.own[stream]
        self.connection.consumed(stream, own.unread)
        own.unread = 0

    def saw(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    async def until(self, condition: Callable[[], object]) -> None:
        while not condition():
            await self._changed.park()

    async def open(self) -> None:
        """Wait for the session, and open the stream."""
        await self.until(lambda: self.saw(SessionOpened) or self.saw(ConnectionLost) or self.saw(SessionRefused))
        if not self.saw(SessionOpened):
            raise Lost(self.events)
        self.stream = self.connection.open_stream(bidirectional=True)
        assert self.stream is not None

    def write(self, data: bytes, *, end: bool = False) -> None:
        assert self.stream is not None
        assert self.connection.send(self.stream, data, end)
        self.transmit()

    def say(self, **message: object) -> None:
        self.write(json.dumps(message).encode())

    async def line(self) -> dict[str, Any]:
        """Return the next line."""
        await self.until(lambda: self.lines or self.saw(ConnectionLost))
        if not self.lines:
            raise Lost(self.events)
        return self.lines.pop(0)

    async def heard(self, kind: str) -> dict[str, Any]:
        """Return the next line of this type, and drop others."""
        while (line := await self.line())["type"] != kind:
            pass
        return line

    async def log_in(self, *patterns: str, protocol: int | None = 1) -> None:
        await self.open()
        self.say(type="auth", token=TOKEN, **({} if protocol is None else {"protocol": protocol}))
        assert (await self.line())["type"] == "auth_ok"
        for pattern in patterns:
            self.say(type="subscribe", pattern=pattern)
            await self.heard("subscribed")

    async def lost(self) -> tuple[int | None, str]:
        """Wait for the end. Returns how the session was closed."""
        await self.until(lambda: self.saw(ConnectionLost))
        closed = self.saw(SessionClosed)
        return (closed[0].code, closed[0].reason) if closed else (None, self.saw(ConnectionLost)[0].reason)

    def stopped_streams(self) -> set[int]:
        return {event.stream for event in self.events if isinstance(event, StreamStopped | StreamReset)}


class Server:
    """A replica with a WebTransport port, and clients that connect to it."""

    def __init__(
        self, replica: Replica, endpoint: QuicEndpoint, nursery: trio.Nursery, scope: trio.CancelScope
    ) -> None:
        self.replica = replica
        self.endpoint = endpoint
        self.nursery = nursery
        self.scope = scope
        """The task that serves the endpoint."""
        self.ended = trio.Event()

    @property
    def address(self) -> str:
        return self.endpoint.addresses[0]

    @property
    def router(self) -> PacketRouter:
        return self.endpoint._router

    def connect(self, limits: ConnectionLimits | None = None, origin: str | None = None) -> Client:
        client = Client(self.address, limits, origin)
        self.nursery.start_soon(client.run)
        return client

    async def log_in(self, *patterns: str, limits: ConnectionLimits | None = None, protocol: int | None = 1) -> Client:
        client = self.connect(limits)
        await client.log_in(*patterns, protocol=protocol)
        return client

    async def empty(self) -> None:
        """Wait until no client is connected."""
        while self.endpoint.statistics().connections or self.replica.sessions:
            await trio.sleep(0.01)


@asynccontextmanager
async def serving(
    config: Config = CONFIG,
    bind: str = "127.0.0.1:0",
    limits: ConnectionLimits | None = None,
    share: ConnectionIdShare = ALL_CONNECTION_IDS,
) -> AsyncIterator[Server]:
    """Open a port with a real replica and a log in memory. Connection IDs are in `share`."""
    log = MemoryLog(config.limits.recent)
    replica = Replica(config, log, Authenticator(config.auth.secrets))
    with patience():
        async with trio.open_nursery() as nursery, trio.open_nursery() as sessions:
            await nursery.start(log.run, replica.delivery)
            nursery.start_soon(replica.delivery.run)
            nursery.start_soon(replica.flusher.run)
            scope = trio.CancelScope()
            ended = trio.Event()

            async def serve(*, task_status: trio.TaskStatus[QuicEndpoint]) -> None:
                with scope:
                    configuration = partial(server_config, limits)
                    await serve_quic(replica, [bind], configuration, sessions, share=share, task_status=task_status)
                ended.set()

            endpoint: QuicEndpoint = await nursery.start(serve)
            server = Server(replica, endpoint, nursery, scope)
            server.ended = ended
            yield server
            faults = endpoint.statistics().internal_errors
            scope.cancel()
            await ended.wait()
            sessions.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
    assert not faults
