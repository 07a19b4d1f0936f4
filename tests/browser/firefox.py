"""A driver of pages in Firefox, with the commands and replies of `chromium.py`.

It uses WebDriver BiDi, which Firefox implements itself. Playwright would need its own build of Firefox, and geckodriver
would be another program to install.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from itertools import count
from typing import Any

import trio
from trio_websocket import WebSocketConnection, open_websocket_url

LISTENING_PREFIX = b"WebDriver BiDi listening on "

BACKGROUND_OFF = {
    "app.normandy.enabled": False,
    "app.update.disabledForTesting": True,
    "browser.safebrowsing.downloads.remote.enabled": False,
    "browser.safebrowsing.malware.enabled": False,
    "browser.safebrowsing.phishing.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.policy.dataSubmissionEnabled": False,
    "extensions.update.enabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "toolkit.telemetry.enabled": False,
}


class CommandFailed(Exception):
    """The browser rejected a command, or a script raised an exception."""


class BidiSession:
    """A session of WebDriver BiDi with one page."""

    def __init__(self, socket: WebSocketConnection) -> None:
        self._socket = socket
        self._numbers = count(1)
        self._page = ""

    async def open_page(self) -> None:
        """Replace the page by a new one."""
        old = self._page
        self._page = (await self.call("browsingContext.create", type="tab"))["context"]
        if old:
            await self.call("browsingContext.close", context=old)

    async def execute(self, command: str, text: str, arguments: list[Any]) -> Any:
        if command == "open":
            return await self.open_page()
        if command == "goto":
            await self.call("browsingContext.navigate", context=self._page, url=text, wait="complete")
            return None
        # Arguments and results are JSON, as with Playwright.
        function = (
            "async (given) => { const args = JSON.parse(given);"
            f" return JSON.stringify(await (async () => {{ {text} }})()); }}"
        )
        found = await self.call(
            "script.callFunction",
            functionDeclaration=function,
            arguments=[{"type": "string", "value": json.dumps(arguments)}],
            target={"context": self._page},
            awaitPromise=True,
            userActivation=False,
        )
        if found["type"] == "exception":
            raise CommandFailed(found["exceptionDetails"]["text"])
        return json.loads(found["result"]["value"]) if "value" in found["result"] else None

    async def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        await self._socket.send_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            reply = json.loads(await self._socket.get_message())
            if reply.get("id") == number:
                if reply["type"] == "error":
                    raise CommandFailed(reply["message"])
                return reply["result"]


async def main(path: str, any_certificate: str = "") -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in BACKGROUND_OFF.items()]
        await trio.Path(profile, "user.js").write_text("\n".join(lines), encoding="utf-8")
        command = [path, "--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0"]
        firefox = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            url = await find_url(firefox)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drain, firefox)
                async with open_websocket_url(f"{url}/session") as socket:
                    session = BidiSession(socket)
                    capabilities = {"alwaysMatch": {"acceptInsecureCerts": True}} if any_certificate else {}
                    await session.call("session.new", capabilities=capabilities)
                    await execute_commands(session)
                    await session.call("browser.close")
                await firefox.wait()
                nursery.cancel_scope.cancel()
        finally:
            if firefox.returncode is None:
                firefox.kill()
                await firefox.wait()


async def find_url(firefox: trio.Process) -> str:
    assert firefox.stderr is not None
    output = b""
    while not (output.rpartition(LISTENING_PREFIX)[1] and output.endswith(b"\n")):
        data = await firefox.stderr.receive_some()
        if not data:
            raise CommandFailed(output.decode("utf-8", "replace"))
        output += data
    return output.rpartition(LISTENING_PREFIX)[2].split()[0].decode()


async def drain(firefox: trio.Process) -> None:
    """Read and drop the output. Firefox would block when the pipe is full."""
    assert firefox.stderr is not None
    async for _ in firefox.stderr:
        pass


async def execute_commands(session: BidiSession) -> None:
    while line := await trio.to_thread.run_sync(sys.stdin.readline):
        try:
            reply: Any = {"result": await session.execute(**json.loads(line))}
        except CommandFailed as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], "".join(sys.argv[2:]))
