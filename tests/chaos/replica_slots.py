"""Places for replicas as in a cluster: processes come and go behind proxies that stay and can be blocked."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio

from catbus.cli.development_credentials import CERTIFICATE_FILE
from catbus.client import Transport
from catbus.client.broker_address import parse_address
from catbus.client.websocket_transport import open_websocket
from catbus.client.webtransport_transport import make_configuration, open_webtransport
from tests.postgres.bouncer import Bouncer
from tests.postgres.processes import ROOT, SECRET, Replica
from tests.postgres.proxy import Proxy

from .udp_relay import UdpRelay

CONFIG = Path(__file__).with_name("chaos.toml")

BROKER_MODULE = ("catbus",)
"""The module that is run, and its arguments before `run`."""


class ReplicaSlot:
    """A place for a replica: its process, the proxies from clients to it, and the proxies from it to the database.

    With a `bouncer` it reaches the database only through PgBouncer, and receives no notifications. Otherwise it has a
    connection for notifications through a proxy of its own.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        url: str,
        on_event: Callable[[str, dict[str, Any]], None],
        rng: random.Random,
        program: Sequence[str] = BROKER_MODULE,
    ) -> None:
        self.name = name
        self.ready = False
        """Its latest reply to /ready."""
        self.replica: Replica | None = None
        self.websocket = Proxy("ws://127.0.0.1:9/")
        self.webtransport = UdpRelay(rng)
        self.database = Proxy(url)
        self.notifications = Proxy(url)
        self.bouncer: Bouncer | None = None
        self.unexpected_exits: list[int] = []
        """Exit statuses of processes that ended unexpectedly."""
        self._directory = directory
        self._on_event = on_event
        self._program = program
        self._start_requested = trio.Event()
        self._up = trio.Event()
        self._exit_expected = False

    @property
    def database_proxies(self) -> list[Proxy]:
        """The proxies from here to the database."""
        return [self.database] if self.bouncer is not None else [self.database, self.notifications]

    async def open(self, nursery: trio.Nursery) -> None:
        """Start the proxies; `start` starts the process."""
        for way in (self.websocket, self.webtransport, self.database, self.notifications):
            await nursery.start(way.run)
        self._directory.mkdir(exist_ok=True)
        nursery.start_soon(self._run)
        nursery.start_soon(self._watch)

    # The process

    def start(self) -> None:
        self._start_requested.set()

    def kill(self) -> None:
        """Kill the process."""
        self._end(Replica.kill)

    def terminate(self) -> None:
        """Ask the process to stop, as an operator does."""
        self._end(Replica.terminate)

    def _end(self, how: Callable[[Replica], None]) -> None:
        self._start_requested = trio.Event()
        self._exit_expected = True
        if self.replica is not None:
            how(self.replica)

    async def wait_down(self) -> None:
        if self.replica is not None:
            await self.replica.wait()

    async def wait_ready(self) -> None:
        while not self.ready:
            await trio.sleep(0.05)

    async def _run(self) -> None:
        while True:
            await self._start_requested.wait()
            self.replica = Replica(await self._open(), self._handle_log_event)
            try:
                await self.replica.listen(task_status=trio.TASK_STATUS_IGNORED)
                status = await self.replica.wait()
            finally:
                with trio.CancelScope(shield=True), suppress(ProcessLookupError):
                    self.replica.kill()
                    await self.replica.wait()
            self.replica = None
            if not self._exit_expected:
                self.unexpected_exits.append(status)
                await trio.sleep(1)
            self._exit_expected = False

    async def _open(self) -> trio.Process:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CATBUS_", "RUST_LOG"))}
        settings = {
            "CATBUS_SECRET": SECRET,
            "CATBUS_BIND": "127.0.0.1:0",
            "CATBUS_STATE": str(self._directory),
            "PYTHONPATH": str(ROOT),
            "DATABASE_URL": self.database.url if self.bouncer is None else self.bouncer.url,
        }
        if self.bouncer is None:
            settings["CATBUS_LISTEN_URL"] = self.notifications.url
        command = [sys.executable, "-m", *self._program, "run", "--config", str(CONFIG)]
        with (self._directory / "stderr").open("ab") as errors:
            return await trio.lowlevel.open_process(
                command, env=inherited | settings, stdout=subprocess.PIPE, stderr=errors
            )

    def _handle_log_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "serving":
            tcp, udp = [urlsplit(url) for url in event["urls"]]
            self.websocket.open(f"ws://127.0.0.1:{tcp.port}/")
            self.webtransport.set_target(("127.0.0.1", udp.port or 0))
        self._on_event(self.name, event)

    async def _watch(self) -> None:
        """Poll /ready, as a load balancer does."""
        while True:
            ready = False
            with trio.move_on_after(0.5), suppress(OSError, AssertionError, IndexError, trio.BrokenResourceError):
                replica = self.replica
                ready = replica is not None and await replica.is_ready()
            self.ready = ready
            await trio.sleep(0.1)

    # Connections of clients

    @property
    def http_port(self) -> int:
        """The port of the proxy to its HTTP endpoint, which is also the one for WebSocket."""
        return urlsplit(self.websocket.url).port or 0

    async def dial(self, transport: str) -> Transport:
        """Connect over "websocket" or "webtransport". Raises `Disconnected`."""
        if transport == "websocket":
            return await open_websocket(parse_address(f"ws://127.0.0.1:{self.http_port}/ws"))
        address = parse_address(f"https://127.0.0.1:{self.webtransport.port}/")
        certificate = await trio.to_thread.run_sync((self._directory / CERTIFICATE_FILE).read_bytes)
        return await open_webtransport(address, make_configuration(address, certificate.decode()))

    def cut_clients(self) -> None:
        """Block everything between the clients and the replica, without closing connections."""
        self.websocket.block()
        self.webtransport.loss = 1.0

    def block_replies(self) -> None:
        """Block everything from the replica to the clients, but not the other way."""
        self.websocket.block_answers()
        self.webtransport.drop_replies = True

    def unblock_clients(self) -> None:
        self.websocket.unblock()
        self.webtransport.drop_replies = False
        self.webtransport.loss = 0.0


async def open_slots(
    names: Sequence[str],
    directory: Path,
    url: str,
    on_event: Callable[[str, dict[str, Any]], None],
    rng: random.Random,
    program: Sequence[str],
    nursery: trio.Nursery,
) -> list[ReplicaSlot]:
    """Create places for replicas, none of which runs yet. The last is behind PgBouncer."""
    slots = [ReplicaSlot(name, directory / name, url, on_event, random.Random(rng.random()), program) for name in names]
    for slot in slots:
        await slot.open(nursery)
    pooled = slots[-1]
    directory_of_pooler = directory / "pooler"
    directory_of_pooler.mkdir()
    pooled.bouncer = Bouncer(pooled.database.url, 8, directory_of_pooler)
    nursery.start_soon(partial(_hold, pooled.bouncer))
    await pooled.bouncer.wait_ready()
    return slots


async def _hold(bouncer: Bouncer) -> None:
    try:
        await trio.sleep_forever()
    finally:
        bouncer.kill()
