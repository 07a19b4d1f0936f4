"""Real brokers for tests: real sockets on loopback, a log in memory unless told otherwise."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

import catbus
from catbus import Broker, Config
from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from catbus.config import AuthSettings, DrainSettings, WebSocketSettings

SECRET = "a secret of the tests"
TOKEN = sign(SECRET, client_id="alice", grants=Grants.ALL)
CONFIG = Config(
    auth=AuthSettings(secrets=(SECRET,)),
    websocket=WebSocketSettings(bind=("127.0.0.1:0",)),
    drain=DrainSettings(delay=0, window=0, deadline=5),
)


@asynccontextmanager
async def running(config: Config = CONFIG, *, seconds: float = 60) -> AsyncIterator[tuple[Broker, str]]:
    """A broker that is serving, and its address; stopped in order at the end. A minute is more than any test needs."""
    with trio.fail_after(seconds):
        async with trio.open_nursery() as nursery:
            broker = await nursery.start(catbus.serve, config)
            [(kind, address)] = broker.addresses
            assert kind == "websocket"
            yield broker, address
            broker.stop()
