"""Third-party WebSocket clients. Each runs in a process of its own, which executes one command after another."""

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

PROGRAMS = Path(__file__).with_name("clients")
COMMAND_TIMEOUT = 20
"""Seconds to wait for the result of a command."""


class Unsupported(Exception):
    """The client has no API for this command."""


class CommandFailed(Exception):
    """The command failed in the client."""


class ThirdPartyClient:
    """A client that executes the commands of `clients/libraries.py`."""

    async def call(self, do: str, **fields: Any) -> Any:
        raise NotImplementedError

    async def load(self, url: str) -> None:
        """Open a page, if the client is a browser."""


class ClientProcess(ThirdPartyClient):
    """A program that takes commands as lines of JSON."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._rest = b""

    async def call(self, do: str, **fields: Any) -> Any:
        assert self._process.stdin is not None
        with trio.fail_after(COMMAND_TIMEOUT):
            await self._process.stdin.send_all(json.dumps({"do": do, **fields}).encode() + b"\n")
            result = json.loads(await self._line())
        if "unsupported" in result:
            raise Unsupported(result["unsupported"])
        if "error" in result:
            raise CommandFailed(result["error"])
        return result["result"]

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            data = await self._process.stdout.receive_some()
            if not data:
                raise CommandFailed("the client has ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line


class ClientPage(ThirdPartyClient):
    """A page of a browser. Its WebSocket API has no headers, fragments and pings."""

    UNSUPPORTED = {"fragments": "sends no fragments", "ping": "sends no pings", "pause": "always reads"}

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    async def load(self, url: str) -> None:
        self._browser.open_page()
        await self._browser.goto(url)
        await self._browser.run((PROGRAMS / "page.js").read_text())

    async def call(self, do: str, **fields: Any) -> Any:
        if do in self.UNSUPPORTED:
            raise Unsupported(self.UNSUPPORTED[do])
        if fields.get("headers"):
            raise Unsupported("cannot set headers")
        with trio.fail_after(COMMAND_TIMEOUT):
            try:
                return await self._browser.run(f"return (await commands.{do}(args[0])) ?? null", fields)
            except AssertionError as error:
                raise CommandFailed(str(error)) from None


@asynccontextmanager
async def run_client_process(*command: str | Path) -> AsyncIterator[ThirdPartyClient]:
    run = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(run, [str(part) for part in command])
        yield ClientProcess(process)
        process.terminate()


def library_driver(name: str) -> Callable[[], AbstractAsyncContextManager[ThirdPartyClient]]:
    return lambda: run_client_process(find_for_conformance("python"), PROGRAMS / "libraries.py", name)


def ws_driver() -> AbstractAsyncContextManager[ThirdPartyClient]:
    find_module("ws")
    return run_client_process(find_program("nodejs", "node"), PROGRAMS / "ws.mjs", CLIENT / "package.json")


def browser_driver(name: str) -> Callable[[], AbstractAsyncContextManager[ThirdPartyClient]]:
    @asynccontextmanager
    async def run() -> AsyncIterator[ThirdPartyClient]:
        with open_browser(name, any_certificate=True) as opened:
            yield ClientPage(opened)

    return run


CLIENTS: dict[str, Callable[[], AbstractAsyncContextManager[ThirdPartyClient]]] = {
    "websockets": library_driver("websockets"),
    "aiohttp": library_driver("aiohttp"),
    "websocket-client": library_driver("websocket-client"),
    "ws": ws_driver,
    "Chromium": browser_driver("chromium"),
    "Firefox": browser_driver("firefox"),
    "niquests": library_driver("niquests"),
}
EXTENDED_CONNECT = "niquests"
"""The client of WebSocket over HTTP/2. It runs only on paths that support this."""
