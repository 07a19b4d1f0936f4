"""Clients of others, each in a process of its own that carries out one command after another."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tests.browser.driver import Browser, open_browser
from tests.programs import CLIENT, find_for_conformance, find_module, find_program

CLIENTS = Path(__file__).with_name("clients")
PATIENCE = 20
"""Seconds that a command may take."""


class Unable(Exception):
    """The client has no way to do what it was told."""


class Failed(Exception):
    """The client could not do what it was told."""


class Puppet:
    """A client that carries out the commands of `clients/libraries.py`."""

    async def call(self, do: str, **fields: Any) -> Any:
        raise NotImplementedError

    async def load(self, url: str) -> None:
        """Open a page, where the client has such."""


class Process(Puppet):
    """A program that takes commands as lines of JSON."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._rest = b""

    async def call(self, do: str, **fields: Any) -> Any:
        assert self._process.stdin is not None
        with trio.fail_after(PATIENCE):
            await self._process.stdin.send_all(json.dumps({"do": do, **fields}).encode() + b"\n")
            answer = json.loads(await self._line())
        if "unable" in answer:
            raise Unable(answer["unable"])
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["result"]

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            data = await self._process.stdout.receive_some()
            if not data:
                raise Failed("the client has gone")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


class Page(Puppet):
    """A page of a browser, whose WebSocket takes no headers, and tells of no pings."""

    UNABLE = {"fragments": "sends no fragments", "ping": "sends no pings", "pause": "always reads"}

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    async def load(self, url: str) -> None:
        self._browser.open_page()
        await self._browser.goto(url)
        await self._browser.run((CLIENTS / "page.js").read_text())

    async def call(self, do: str, **fields: Any) -> Any:
        if do in self.UNABLE:
            raise Unable(self.UNABLE[do])
        if fields.get("headers"):
            raise Unable("sends no headers of a page's own")
        with trio.fail_after(PATIENCE):
            try:
                return await self._browser.run(f"return (await puppet.{do}(args[0])) ?? null", fields)
            except AssertionError as error:
                raise Failed(str(error)) from None


@asynccontextmanager
async def running_process(*command: str | Path) -> AsyncIterator[Puppet]:
    run = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(run, [str(part) for part in command])
        yield Process(process)
        process.terminate()


def library(name: str) -> Callable[[], AbstractAsyncContextManager[Puppet]]:
    return lambda: running_process(find_for_conformance("python"), CLIENTS / "libraries.py", name)


def ws() -> AbstractAsyncContextManager[Puppet]:
    find_module("ws")
    return running_process(find_program("nodejs", "node"), CLIENTS / "ws.mjs", CLIENT / "package.json")


def browser(name: str) -> Callable[[], AbstractAsyncContextManager[Puppet]]:
    @asynccontextmanager
    async def running() -> AsyncIterator[Puppet]:
        with open_browser(name, any_certificate=True) as opened:
            yield Page(opened)

    return running


PUPPETS: dict[str, Callable[[], AbstractAsyncContextManager[Puppet]]] = {
    "websockets": library("websockets"),
    "aiohttp": library("aiohttp"),
    "websocket-client": library("websocket-client"),
    "ws": ws,
    "Chromium": browser("chromium"),
    "Firefox": browser("firefox"),
    "niquests": library("niquests"),
}
EXTENDED_CONNECT = "niquests"
"""The client that knows WebSocket over HTTP/2 and is played with nothing else."""
