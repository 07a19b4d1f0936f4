"""Drives pages of Firefox by lines of JSON on stdin, and answers each on stdout, as `chromium` does.

By WebDriver BiDi, which Firefox speaks itself: Playwright wants a Firefox of its own, and geckodriver is one more
program.
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

LISTENING = b"WebDriver BiDi listening on "

QUIET = {
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


class Failed(Exception):
    """The browser could not do it."""


class Session:
    """A session of WebDriver BiDi, with one page at a time."""

    def __init__(self, socket: WebSocketConnection) -> None:
        self._socket = socket
        self._numbers = count(1)
        self._page = ""

    async def open_page(self) -> None:
        """A new page in the place of the one before."""
        old = self._page
        self._page = (await self.call("browsingContext.create", type="tab"))["context"]
        if old:
            await self.call("browsingContext.close", context=old)

    async def carry_out(self, what: str, text: str, arguments: list[Any]) -> Any:
        if what == "open":
            return await self.open_page()
        if what == "goto":
            await self.call("browsingContext.navigate", context=self._page, url=text, wait="complete")
            return None
        # Whatever there is in JavaScript crosses as JSON, as it does with Playwright.
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
            raise Failed(found["exceptionDetails"]["text"])
        return json.loads(found["result"]["value"]) if "value" in found["result"] else None

    async def call(self, method: str, **parameters: Any) -> Any:
        number = next(self._numbers)
        await self._socket.send_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(await self._socket.get_message())
            if answer.get("id") == number:
                if answer["type"] == "error":
                    raise Failed(answer["message"])
                return answer["result"]


async def main(path: str, any_certificate: str = "") -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in QUIET.items()]
        await trio.Path(profile, "user.js").write_text("\n".join(lines), encoding="utf-8")
        command = [path, "--headless", "--no-remote", "--profile", profile, "--remote-debugging-port", "0"]
        firefox = await trio.lowlevel.open_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            url = await find_url(firefox)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(drain, firefox)
                async with open_websocket_url(f"{url}/session") as socket:
                    session = Session(socket)
                    trusting = {"alwaysMatch": {"acceptInsecureCerts": True}} if any_certificate else {}
                    await session.call("session.new", capabilities=trusting)
                    await serve(session)
                    await session.call("browser.close")
                await firefox.wait()
                nursery.cancel_scope.cancel()
        finally:
            if firefox.returncode is None:
                firefox.kill()
                await firefox.wait()


async def find_url(firefox: trio.Process) -> str:
    assert firefox.stderr is not None
    said = b""
    while not (said.rpartition(LISTENING)[1] and said.endswith(b"\n")):
        data = await firefox.stderr.receive_some()
        if not data:
            raise Failed(said.decode("utf-8", "replace"))
        said += data
    return said.rpartition(LISTENING)[2].split()[0].decode()


async def drain(firefox: trio.Process) -> None:
    """A browser that nobody listens to stops when its pipe is full."""
    assert firefox.stderr is not None
    async for _ in firefox.stderr:
        pass


async def serve(session: Session) -> None:
    while line := await trio.to_thread.run_sync(sys.stdin.readline):
        try:
            answer: Any = {"result": await session.carry_out(**json.loads(line))}
        except Failed as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2])
