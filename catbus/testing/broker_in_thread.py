"""A real broker for a test: a log in memory, ports on loopback, its own thread."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from tempfile import TemporaryDirectory
from typing import Any

import trio

from ..auth.grants import Grants
from ..auth.tokens import sign
from ..broker import Broker, serve
from ..config import AuthSettings, Config, DatabaseSettings, DrainSettings, WebSocketSettings, WebTransportSettings

START_TIMEOUT = 30.0
"""Seconds that starting, and stopping, may take."""


class TestServer:
    """A running broker. Its methods may be called from any thread and from any event loop.

    `url` is its WebSocket URL, `http_url` the origin of its HTTP endpoint. With WebTransport, `webtransport_url` is its
    URL and `certificate` its own certificate (PEM, for `ca`); otherwise both are None.
    """

    __test__ = False  # pytest would collect it

    def __init__(self, broker: Broker, secret: str, token: trio.lowlevel.TrioToken) -> None:
        addresses, certificates = dict(broker.addresses), broker.replica.certificates
        self.url = f"ws://{addresses['websocket']}/ws"
        self.http_url = f"http://{addresses['websocket']}"
        self.webtransport_url = f"https://{addresses['webtransport']}" if "webtransport" in addresses else None
        made = None if certificates is None else certificates.development(datetime.now(UTC))
        self.certificate = None if made is None else made.certificate_pem
        self.secret = secret
        self._broker = broker
        self._token = token

    def token(
        self, client_id: str | None = "test", *, read: tuple[str, ...] = ("*",), write: tuple[str, ...] = ("*",)
    ) -> str:
        """Return a token that may read and write these patterns; by default, everything."""
        return sign(self.secret, client_id=client_id, grants=Grants(read, write))

    def publish(self, channel: str, payload: Any) -> int | None:
        """Publish as the broker itself, and return the seq. Blocks: not for coroutines. Raises `Refused`."""
        return trio.from_thread.run(self._broker.publish, channel, payload, trio_token=self._token)


@contextmanager
def open_test_server(*, webtransport: bool = False, database_url: str = "memory") -> Iterator[TestServer]:
    """Run a broker on a free port, with an empty log, for the duration of the block.

        with open_test_server() as broker:
            async with catbus.connect(broker.url, token=broker.token("alice")) as bus: ...

    Works with any event loop, and without one. `webtransport` adds a WebTransport endpoint, which takes some 100 ms.
    With a `database_url` the log is in that PostgreSQL.
    Raises the error that kept the broker from starting.
    """
    with TemporaryDirectory(prefix="catbus-test-") as state:
        yield from _run(state, ("127.0.0.1:0",) if webtransport else (), database_url)


def _run(state: str, quic: tuple[str, ...], database_url: str) -> Iterator[TestServer]:
    secret = secrets.token_urlsafe(32)
    config = Config(
        state=state,
        auth=AuthSettings(secrets=(secret,)),
        database=DatabaseSettings(url=database_url),
        websocket=WebSocketSettings(bind=("127.0.0.1:0",)),
        webtransport=WebTransportSettings(bind=quic),
        drain=DrainSettings(delay=0, window=0, deadline=5),
    )
    started = threading.Event()
    running: list[TestServer] = []
    failures: list[BaseException] = []

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            broker: Broker = await nursery.start(serve, config)
            await broker.replica.log.wait_open()
            running.append(TestServer(broker, secret, trio.lowlevel.current_trio_token()))
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
    if not started.wait(START_TIMEOUT):
        raise TimeoutError(f"the broker has not started within {START_TIMEOUT:g} s")
    if failures:
        raise failures[0]
    [found] = running
    try:
        yield found
    finally:
        if thread.is_alive():
            found._token.run_sync_soon(found._broker.stop)
            thread.join(START_TIMEOUT)
    if failures:
        raise failures[0]
