"""`docs/architecture.md` lists the layers, and the modules that a publish, a resume and a revocation pass."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio

from catbus.auth.role_tokens import make_role_token, role_key
from catbus.testing.blocking_connection import BlockingConnection, dial
from tests.brokers import TOKEN
from tests.postgres.server import execute
from tests.test_imports import LAYERS, MODULES
from tests.test_metrics import serving

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "catbus"
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
RUNS = 4
"""Runs of an action. A module that only some of them call belongs to a timer."""
IDLE_TIME = 1.0
"""Seconds without an action. The modules that are called then belong to timers, too, unless the document lists them."""
TIMEOUT = 20.0


def section(title: str) -> str:
    found = DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, title
    return found


def listed(title: str) -> set[str]:
    """The modules in the table of a section."""
    rows = re.findall(r"^\| \d+\. .*\|$", section(title), re.MULTILINE)
    return set(re.findall(r"`(\w+(?:/\w+)*\.py)`", "\n".join(rows)))


def test_layers_of_the_document_are_those_of_the_imports() -> None:
    rows = re.findall(r"^\| \d+ \| (.*?) \|", section("Layers"), re.MULTILINE)
    assert [set(re.findall(r"`([\w./]+)`", row)) for row in rows] == [
        {part.replace(".", "/") for part in layer} for layer in reversed(LAYERS)
    ]


def test_modules_of_the_document_exist() -> None:
    known = {str(path.relative_to(PACKAGE)) for path in MODULES.values()}
    assert not set(re.findall(r"`(\w+(?:/\w+)*\.py)`", DOCUMENT)) - known


@contextmanager
def called() -> Iterator[dict[str, None]]:
    """The modules of the package in which this thread calls a function meanwhile, in the order of their first calls."""
    modules: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            modules[str(Path(frame.f_code.co_filename).relative_to(PACKAGE))] = None

    sys.setprofile(note)
    try:
        yield modules
    finally:
        sys.setprofile(None)


async def check(
    title: str, act: Callable[[], None], prepare: Callable[[], None] = lambda: None, *, also: str | None = None
) -> None:
    """Run `act` in another thread, and compare the modules that this thread passes with those of a section.

    The modules of the section `also` may be passed, too.
    """
    found = []
    for _ in range(RUNS):
        await trio.to_thread.run_sync(prepare)
        with called() as modules:
            await trio.to_thread.run_sync(act)
        found.append(modules)
    with called() as idle:
        await trio.sleep(IDLE_TIME)
    always = [module for module in found[0] if all(module in other for other in found[1:])]
    known = listed(title) | (set() if also is None else listed(also))
    assert not set(always) - idle.keys() - known, (
        f"not in the document; all, in the order of their first calls: {always}"
    )
    unused = listed(title) - set().union(*found)
    assert not unused, f"only in the document: {sorted(unused)}"


class Client:
    """A connection that has authenticated. Its methods block."""

    def __init__(self, connection: BlockingConnection, token: str = TOKEN) -> None:
        self._connection = connection
        self._ids = count(1)
        self.ask("auth_ok", type="auth", token=token, protocol=1)

    def ask(self, *replies: str, **message: Any) -> str:
        """Send a message, and return the type of the first reply that has one of these types."""
        numbered = message if message["type"] == "auth" else {**message, "id": next(self._ids)}
        self._connection.send(json.dumps(numbered).encode() + b"\n")
        return self.wait(*replies)

    def wait(self, *replies: str) -> str:
        while True:
            found = self._connection.receive(TIMEOUT)
            assert found is not None
            if found["type"] in replies:
                return str(found["type"])


@pytest.mark.parametrize("transport", ["WebSocket", "WebTransport"])
async def test_publish_passes_the_modules_of_the_document(tmp_path: Path, database_url: str, transport: str) -> None:
    async with serving(tmp_path, database_url) as (_, address, quic, certificate):
        url, ca = (quic, certificate) if transport == "WebTransport" else (f"ws://{address}/ws", None)

        def connect() -> tuple[Client, Client]:
            publisher, subscriber = Client(dial(url, ca=ca)), Client(dial(url, ca=ca))
            subscriber.ask("subscribed", type="subscribe", pattern="orders.*")
            return publisher, subscriber

        publisher, subscriber = await trio.to_thread.run_sync(connect)

        def publish() -> None:
            publisher.ask("published", type="publish", channel="orders.1", payload=1)
            subscriber.wait("message")

        await trio.to_thread.run_sync(publish)
        same = "A publish over WebSocket" if transport == "WebTransport" else None
        await check(f"A publish over {transport}", publish, also=same)


async def test_resume_passes_the_modules_of_the_document(tmp_path: Path, database_url: str) -> None:
    async with serving(tmp_path, database_url) as (broker, address, _, _):
        client = await trio.to_thread.run_sync(lambda: Client(dial(f"ws://{address}/ws")))

        def publish() -> None:
            client.ask("published", type="publish", channel="orders.1", payload=1)

        def resume() -> None:
            client.ask("live", type="subscribe", pattern="orders.*", since=0, epoch=broker.replica.log.epoch)

        await check("A resume", resume, publish)


async def test_revocation_passes_the_modules_of_the_document(tmp_path: Path, database_url: str) -> None:
    token = make_role_token()
    key = role_key(token)
    assert key is not None
    role = f"'\\x{key.hex()}'"
    grant = f"INSERT INTO catbus.role_grants (role, permission, pattern) VALUES ({role}, 'read', 'orders.*')"
    create = f"INSERT INTO catbus.roles (key, client_id) VALUES ({role}, 'alice')"
    await trio.to_thread.run_sync(execute, database_url, create)
    async with serving(tmp_path, database_url) as (_, address, _, _):
        client = await trio.to_thread.run_sync(lambda: Client(dial(f"ws://{address}/ws"), token))

        def subscribe() -> None:
            execute(database_url, grant)
            while client.ask("subscribed", "subscribe_error", type="subscribe", pattern="orders.*") != "subscribed":
                pass

        def revoke() -> None:
            execute(database_url, f"DELETE FROM catbus.role_grants WHERE role = {role}")
            client.wait("revoked")

        await check("A revocation", revoke, subscribe)
