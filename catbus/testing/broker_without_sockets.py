"""A broker in the test's own Trio nursery, connected without sockets, so that it runs on the test's clock."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, Unpack

import anyio
import anyio.abc
import msgspec
import trio
import trio.testing

from ..auth.grants import Grants
from ..auth.tokens import sign
from ..broker import Broker, open_broker
from ..client import Bus
from ..client.broker_address import parse_address
from ..client.bus_factory import open_bus
from ..client.websocket_transport import WebSocketTransport, perform_handshake
from ..config import AuthSettings, Config, DatabaseSettings
from ..endpoints.connection_registry import ConnectionRegistry
from ..endpoints.http.http_connection import serve_http_connection
from ..errors import Disconnected
from ..session.hooks import HookOptions

ADDRESS = parse_address("ws://memory")


class TestBroker:
    """A broker and its clients in one process, with a log in memory. `broker` is the `catbus.Broker`.

    Everything between a `Bus` and the log is real except the socket. The stream in its place has no buffer: `send`
    waits until the other side has read. While `reachable` is False, connecting fails.
    """

    __test__ = False  # pytest would collect it

    def __init__(self, broker: Broker, secret: str, registry: ConnectionRegistry, nursery: trio.Nursery) -> None:
        self.broker = broker
        self.secret = secret
        self.reachable = True
        self._registry = registry
        self._nursery = nursery
        self._streams: set[_ClientStream] = set()

    def token(
        self, client_id: str | None = "test", *, read: tuple[str, ...] = ("*",), write: tuple[str, ...] = ("*",)
    ) -> str:
        """Return a token that may read and write these patterns; by default, everything."""
        return sign(self.secret, client_id=client_id, grants=Grants(read, write))

    def connect(self, token: str | None = None, **options: Any) -> AbstractAsyncContextManager[Bus]:
        """Open a client as `catbus.connect` does, by default with a token for everything. The options are the same."""
        return open_bus(self.dial, token=token or self.token(), **options)

    async def dial(self) -> WebSocketTransport:
        """Open a connection without authenticating. Raises `Disconnected` while the broker is unreachable."""
        await trio.lowlevel.checkpoint()
        if not self.reachable:
            raise Disconnected("the broker is unreachable")
        near, far = trio.testing.lockstep_stream_pair()
        self._nursery.start_soon(self._serve, far)
        stream = _ClientStream(near, self._streams)
        try:
            return await perform_handshake(stream, ADDRESS)
        except BaseException:
            await anyio.aclose_forcefully(stream)
            raise

    def cut(self) -> None:
        """Close every connection at once, for both sides."""
        for stream in tuple(self._streams):
            stream.cut()

    async def _serve(self, stream: trio.abc.Stream) -> None:
        async with stream:
            with self._registry.admit():
                await serve_http_connection(self.broker.replica, self._registry, stream)


@asynccontextmanager
async def open_test_broker(config: Config | None = None, **hooks: Unpack[HookOptions]) -> AsyncIterator[TestBroker]:
    """Run a broker with an empty log in memory inside Trio, for the duration of the block.

        async def test_orders(autojump_clock):
            async with open_test_broker() as broker, broker.connect() as bus: ...

    Nothing in it waits for anything outside the process, so Trio's virtual clock (`trio.testing.MockClock`) can jump:
    an hour of keep-alives and pauses takes a second. `config` sets limits and times. Its database and its secrets are
    replaced. `hooks` are those of `catbus.serve`.
    """
    secret = secrets.token_urlsafe(32)
    config = msgspec.structs.replace(
        config or Config(), auth=AuthSettings(secrets=(secret,)), database=DatabaseSettings(url="memory")
    )
    settings, registry = config.websocket, ConnectionRegistry()
    async with open_broker(config, **hooks) as broker, trio.open_nursery() as nursery:
        nursery.start_soon(registry.check_connections, min(settings.ping_interval, settings.silence) / 4)
        yield TestBroker(broker, secret, registry, nursery)
        nursery.cancel_scope.cancel()


class _ClientStream(anyio.abc.ByteStream):
    """The client's end of a connection, as an AnyIO stream."""

    def __init__(self, stream: trio.StapledStream[Any, Any], all_streams: set[_ClientStream]) -> None:
        self._stream = stream
        self._all = all_streams
        all_streams.add(self)

    async def receive(self, max_bytes: int = 65_536) -> bytes:
        with _translated():
            data = await self._stream.receive_some(max_bytes)
        if not data:
            raise anyio.EndOfStream
        return bytes(data)

    async def send(self, item: bytes) -> None:
        with _translated():
            await self._stream.send_all(item)

    async def send_eof(self) -> None:
        with _translated():
            await self._stream.send_eof()

    async def aclose(self) -> None:
        self.cut()
        await anyio.lowlevel.checkpoint()

    def cut(self) -> None:
        self._all.discard(self)
        self._stream.send_stream.close()
        self._stream.receive_stream.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except trio.ClosedResourceError:
        raise anyio.ClosedResourceError from None
    except trio.BrokenResourceError:
        raise anyio.BrokenResourceError from None
