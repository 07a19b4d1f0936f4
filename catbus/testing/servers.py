"""A real broker for a test: its log in memory, its ports on loopback, in a thread of its own."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from tempfile import TemporaryDirectory
from typing import Any

import trio

from ..auth.tokens import Grants, sign
from ..broker import Broker, serve
from ..config import AuthSettings, Config, DrainSettings, WebSocketSettings, WebTransportSettings

PATIENCE = 30.0
"""Seconds for it to start, and to stop."""


class TestServer:
    """A broker that serves. Any thread and any event loop may use what is here.

    `url` is its WebSocket, `http_url` the origin of its HTTP, `webtransport_url` where it serves WebTransport, if it
    does, with a `certificate` of its own (PEM, for `ca`).
    """

    __test__ = False  # for pytest, which takes it for a test

    def __init__(self, broker: Broker, secret: str, token: trio.lowlevel.TrioToken) -> None:
        addresses, certificates = dict(broker.addresses), broker.hub.certificates
        self.url = f"ws://{addresses['websocket']}/ws"
        self.http_url = f"http://{addresses['websocket']}"
        self.webtransport_url = f"https://{addresses['webtransport']}" if "webtransport" in addresses else None
        made = None if certificates is None else certificates.self_made(datetime.now(UTC))
        self.certificate = None if made is None else made.certificate_pem
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
def open_test_server(*, webtransport: bool = False) -> Iterator[TestServer]:
    """Run a broker for as long as the block lasts: a real one, with an empty log, on a port that was free.

    With `webtransport` on another one, too: that takes some 100 ms longer.

        with open_test_server() as broker:
            async with catbus.connect(broker.url, token=broker.token("alice")) as bus: ...

    Whatever event loop the test has, or none. Raises what keeps it from starting.
    """
    with TemporaryDirectory(prefix="catbus-test-") as state:
        yield from _run(state, ("127.0.0.1:0",) if webtransport else ())


def _run(state: str, quic: tuple[str, ...]) -> Iterator[TestServer]:
    secret = secrets.token_urlsafe(32)
    config = Config(
        state=state,
        auth=AuthSettings(secrets=(secret,)),
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
            await broker.hub.log.wait_open()
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
    if not started.wait(PATIENCE):
        raise TimeoutError(f"the broker has not started within {PATIENCE:g} s")
    if failures:
        raise failures[0]
    [found] = running
    try:
        yield found
    finally:
        if thread.is_alive():
            found._token.run_sync_soon(found._broker.stop)
            thread.join(PATIENCE)
    if failures:
        raise failures[0]
