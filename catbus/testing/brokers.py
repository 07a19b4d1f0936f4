"""A real broker for a test: its log in memory, its ports on loopback, in a thread of its own."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import trio

from ..auth import Grants, sign
from ..broker import Broker, serve
from ..config import Auth, Config, Drain, WebSocket, WebTransport

PATIENCE = 30.0
"""Seconds for it to start, and to stop."""


class TestBroker:
    """A broker that serves. Any thread and any event loop may use what is here.

    `url` is its WebSocket, `http_url` the origin of its HTTP.
    """

    __test__ = False  # for pytest, which takes it for a test

    def __init__(self, address: str, secret: str, broker: Broker, token: trio.lowlevel.TrioToken) -> None:
        self.url = f"ws://{address}/ws"
        self.http_url = f"http://{address}"
        self.secret = secret
        self._broker = broker
        self._token = token

    def token(
        self, client_id: str | None = "test", *, read: tuple[str, ...] = ("*",), write: tuple[str, ...] = ("*",)
    ) -> str:
        """A token for whoever may read and write these patterns; for everything unless said otherwise."""
        return sign(self.secret, client_id=client_id, grants=Grants(read, write))

    def publish(self, channel: str, payload: Any) -> int | None:
        """Publish as the broker itself, and return the seq. Blocks; raises `Refused`. Not from an event loop's task."""
        return trio.from_thread.run(self._broker.publish, channel, payload, trio_token=self._token)


@contextmanager
def open_test_broker() -> Iterator[TestBroker]:
    """Run a broker for as long as the block lasts: a real one, with an empty log, on a port that was free.

        with open_test_broker() as broker:
            async with catbus.connect(broker.url, token=broker.token("alice")) as bus: ...

    Whatever event loop the test has, or none. Raises what keeps it from starting.
    """
    secret = secrets.token_urlsafe(32)
    config = Config(
        auth=Auth(secrets=(secret,)),
        websocket=WebSocket(bind=("127.0.0.1:0",)),
        webtransport=WebTransport(bind=()),
        drain=Drain(delay=0, window=0, deadline=5),
    )
    started = threading.Event()
    running: list[TestBroker] = []
    failures: list[BaseException] = []

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            broker: Broker = await nursery.start(serve, config)
            await broker.hub.log.wait_open()
            [(_, address)] = broker.addresses
            running.append(TestBroker(address, secret, broker, trio.lowlevel.current_trio_token()))
            started.set()

    def work() -> None:
        try:
            trio.run(run)
        except BaseException as error:  # noqa: BLE001  # raised by whoever waits
            failures.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=work, name="catbus test broker", daemon=True)
    thread.start()
    if not started.wait(PATIENCE):
        raise TimeoutError(f"the broker has not started within {PATIENCE:g} s")
    if failures:
        raise failures[0]
    [found] = running
    try:
        yield found
    finally:
        if thread.is_alive():
            trio.from_thread.run_sync(found._broker.stop, trio_token=found._token)
            thread.join(PATIENCE)
    if failures:
        raise failures[0]
