"""Replicas as an operator runs them: processes of `catbus run`, each with its own port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("replica.toml")
SECRET = "a secret that all replicas share"


def token(client_id: str) -> str:
    """A token that allows every channel."""
    return sign(SECRET, client_id=client_id, grants=Grants(("*",), ("*",)))


class Replica:
    """A process that serves at `url`."""

    def __init__(self, process: trio.Process, on_event: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.url = ""
        self.urls: list[str] = []
        """`url`, and the WebTransport URL if WebTransport is served."""
        self.events: list[dict[str, Any]] = []
        """The lines of its log."""
        self._process = process
        self._on_event = on_event

    @property
    def complaints(self) -> list[dict[str, Any]]:
        """The log lines that report a problem."""
        return [event for event in self.events if event["level"] not in ("debug", "info")]

    def terminate(self) -> None:
        """Send SIGTERM, as an operator does."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.send_signal(signal.SIGKILL)

    def pause(self) -> None:
        """Pause the process with SIGSTOP: it does not reply, and its connections stay open."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def wait(self) -> int:
        """Wait until the process has ended, and return its exit status."""
        return await self._process.wait()

    async def listen(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Read its log. Started when the log names the address."""
        stdout = self._process.stdout
        assert stdout is not None
        begun = b""
        async for data in stdout:
            *lines, begun = (begun + data).split(b"\n")
            for line in lines:
                event = json.loads(line)
                self.events.append(event)
                if self._on_event is not None:
                    self._on_event(event)
                if event["event"] == "serving":
                    self.urls = event["urls"]
                    self.url = self.urls[0]
                    task_status.started()

    async def wait_ready(self) -> None:
        """Wait until the replica is ready for clients."""
        while not await self.is_ready():
            await trio.sleep(0.02)

    async def is_ready(self) -> bool:
        """Whether the replica is ready for clients. Raises `OSError`."""
        address = urlsplit(self.url)
        assert address.hostname and address.port
        async with await trio.open_tcp_stream(address.hostname, address.port) as stream:
            await stream.send_all(b"GET /ready HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
            answer = b"".join([data async for data in stream])
        return answer.split(b" ", 2)[1] == b"200"


@asynccontextmanager
async def open_replicas(
    database_url: str, count: int, state: Path | None = None, *, module: str = "catbus", **variables: str
) -> AsyncIterator[list[Replica]]:
    """Run `count` replicas on one database, and kill those that still run at the end.

    With a directory for a certificate they serve WebTransport, too. `variables` are added to their environment.
    `module`: what to run instead of the command.
    """
    replicas: list[Replica] = []
    async with trio.open_nursery() as nursery:
        try:
            while len(replicas) < count:
                replicas.append(Replica(await _start(database_url, state, variables, module)))
            for replica in replicas:
                await nursery.start(replica.listen)
                await replica.wait_ready()
            yield replicas
        finally:
            with trio.CancelScope(shield=True):
                for replica in replicas:
                    replica.kill()
                    await replica.wait()


async def _start(database_url: str, state: Path | None, variables: Mapping[str, str], module: str) -> trio.Process:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CATBUS_", "RUST_LOG"))}
    settings = {"DATABASE_URL": database_url, "CATBUS_SECRET": SECRET, "PYTHONPATH": str(ROOT), **variables}
    if state is not None:
        settings |= {"CATBUS_BIND": "127.0.0.1:0", "CATBUS_STATE": str(state)}
    command = [sys.executable, "-m", module, "run", "--config", str(CONFIG)]
    return await trio.lowlevel.open_process(command, env=inherited | settings, stdout=subprocess.PIPE)
