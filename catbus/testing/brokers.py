"""A broker in the test's own Trio nursery, reached without sockets: it lives on whatever clock the test has."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import anyio
import anyio.abc
import msgspec
import trio
import trio.testing

from ..auth.tokens import Grants, sign
from ..broker import Broker, open_broker
from ..client import Bus
from ..client.connecting import open_bus
from ..client.transport import parse_address
from ..client.websocket import WebSocket, shake_hands
from ..config import AuthSettings, Config, DatabaseSettings
from ..endpoints.http import serve_connection
from ..endpoints.roster import Roster
from ..errors import Disconnected

ADDRESS = parse_address("ws://memory")


class TestBroker:
    """A broker with clients in the same process. Its log is in memory, and `broker` is its inside.

    Everything between a `Bus` and the log is real but the socket, which holds nothing: whoever sends waits until the
    other side has read. While `reachable` is False no connection can be made.
    """

    __test__ = False  # for pytest, which takes it for a test

    def __init__(self, broker: Broker, secret: str, roster: Roster, nursery: trio.Nursery) -> None:
        self.broker = broker
        self.secret = secret
        self.reachable = True
        self._roster = roster
        self._nursery = nursery
        self._streams: set[_Stream] = set()

    def token(
        self, client_id: str | None = "test", *, read: tuple[str, ...] = ("*",), write: tuple[str, ...] = ("*",)
    ) -> str:
        """A token for whoever may read and write these patterns; for everything unless said otherwise."""
        return sign(self.secret, client_id=client_id, grants=Grants(read, write))

    def connect(self, token: str | None = None, **options: Any) -> AbstractAsyncContextManager[Bus]:
        """As `catbus.connect`, with a token for everything unless another one is given; see there for the options."""
        return open_bus(self.dial, token=token or self.token(), **options)

    async def dial(self) -> WebSocket:
        """A connection on which nobody has authenticated. Raises `Disconnected` while the broker is out of reach."""
        await trio.lowlevel.checkpoint()
        if not self.reachable:
            raise Disconnected("the broker is out of reach")
        near, far = trio.testing.lockstep_stream_pair()
        self._nursery.start_soon(self._serve, far)
        stream = _Stream(near, self._streams)
        try:
            return await shake_hands(stream, ADDRESS)
        except BaseException:
            await anyio.aclose_forcefully(stream)
            raise

    def cut(self) -> None:
        """Every connection is lost at this moment, for both sides."""
        for stream in tuple(self._streams):
            stream.cut()

    async def _serve(self, stream: trio.abc.Stream) -> None:
        async with stream:
            with self._roster.admit():
                await serve_connection(self.broker.hub, self._roster, stream)


@asynccontextmanager
async def open_test_broker(config: Config | None = None) -> AsyncIterator[TestBroker]:
    """Run a broker with an empty log in memory for as long as the block lasts, within Trio.

        async def test_orders(autojump_clock):
            async with open_test_broker() as broker, broker.connect() as bus: ...

    Nothing in it waits for anything outside of the program, so Trio's virtual clock (`trio.testing.MockClock`) may run
    ahead: an hour of keep-alives and pauses takes a second. `config` is for its limits and times; where its log is
    and what tokens are signed with is seen to.
    """
    secret = secrets.token_urlsafe(32)
    config = msgspec.structs.replace(
        config or Config(), auth=AuthSettings(secrets=(secret,)), database=DatabaseSettings(url="memory")
    )
    settings, roster = config.websocket, Roster()
    async with open_broker(config) as broker, trio.open_nursery() as nursery:
        nursery.start_soon(roster.keep_alive, min(settings.ping_interval, settings.silence) / 4)
        yield TestBroker(broker, secret, roster, nursery)
        nursery.cancel_scope.cancel()


class _Stream(anyio.abc.ByteStream):
    """The client's end, as the client takes it."""

    def __init__(self, stream: trio.StapledStream[Any, Any], all_streams: set[_Stream]) -> None:
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
