"""A real browser for tests on Trio. Another process drives it, and this one sends commands to it as lines of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from tests.programs import find_program

HERE = Path(__file__).parent

PROGRAMS = {
    "chromium": ("chromium", "chromium", "chromium-browser", "google-chrome"),
    "firefox": ("firefox-esr", "firefox-esr", "firefox"),
}
"""For each browser the package of the distribution, and the possible names of its program."""


class Browser:
    """A browser with one page."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._process = process

    def open_page(self) -> None:
        """Replace the page by a new one. Blocks the thread, so that a fixture without Trio may call it."""
        self._exchange("open", "", ())

    async def goto(self, url: str) -> None:
        """Load a URL. Later scripts have the rights of its origin."""
        await self._call("goto", url)

    async def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of an async function of `args`, and return its result."""
        return await self._call("run", script, *arguments)

    async def _call(self, command: str, text: str, *arguments: Any) -> Any:
        return await trio.to_thread.run_sync(self._exchange, command, text, arguments, abandon_on_cancel=True)

    def _exchange(self, command: str, text: str, arguments: tuple[Any, ...]) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"command": command, "text": text, "arguments": arguments}) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, f"{self.name} has ended"
        reply = json.loads(line)
        assert "error" not in reply, reply["error"]
        return reply["result"]


@contextmanager
def open_browser(name: str, *, any_certificate: bool = False) -> Iterator[Browser]:
    """Run "chromium" or "firefox" until the block ends. With `any_certificate`, it accepts every certificate."""
    command = [sys.executable, str(HERE / f"{name}.py"), find_program(*PROGRAMS[name])]
    command += ["any certificate"] * any_certificate
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Browser(name, process)
            # At the end of its input the driver closes the browser and ends.
            assert process.stdin is not None
            process.stdin.close()
            process.wait(20)
        finally:
            process.terminate()
