"""Real brokers for tests: real sockets on loopback, a log in memory unless told otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio

import catbus
from catbus import Broker, Config
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.config import AuthSettings, DrainSettings, WebSocketSettings
from tests.endpoints.raw_peer import Peer, Response

SECRET = "a secret of the tests"
TOKEN = sign(SECRET, client_id="alice", grants=Grants.ALL)
CONFIG = Config(
    auth=AuthSettings(secrets=(SECRET,)),
    websocket=WebSocketSettings(bind=("127.0.0.1:0",)),
    drain=DrainSettings(delay=0, window=0, deadline=5),
)


@asynccontextmanager
async def running(config: Config = CONFIG, *, seconds: float = 60, **hooks: Any) -> AsyncIterator[tuple[Broker, str]]:
    """A broker that is serving, and its address; stopped in order at the end. A minute is more than any test needs.

    `hooks`: those of `catbus.serve`.
    """
    with trio.fail_after(seconds):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(partial(catbus.serve, config, **hooks))
            [(kind, address)] = broker.addresses
            assert kind == "websocket"
            yield broker, address
            broker.stop()


async def request(address: str, target: str, token: str = TOKEN, *, method: str = "GET", body: bytes = b"") -> Response:
    """The response to an HTTP request on a connection of its own. Without a `token`, none is sent."""
    host, _, port = address.rpartition(":")
    lines = [f"{method} {target} HTTP/1.1", f"Host: {address}", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"Authorization: Bearer {token}"] if token else []
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        peer = Peer(stream)
        await peer.send("\r\n".join([*lines, "", ""]).encode() + body)
        return await peer.response(head=method == "HEAD")
