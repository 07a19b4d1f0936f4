"""A real browser for tests on Trio: a process beside this one drives it, by lines of JSON."""

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
"""The package of the distribution that has each, and what its program may be called."""


class Browser:
    """One page."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name = name
        self._process = process

    def open_page(self) -> None:
        """A new page in the place of the one before, for the next test. Waits without Trio."""
        self._exchange("open", "", ())

    async def goto(self, url: str) -> None:
        """Open a page; what is `run` then has the rights of its origin."""
        await self._ask("goto", url)

    async def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of an async function of `args`, and return what it returns."""
        return await self._ask("run", script, *arguments)

    async def _ask(self, what: str, text: str, *arguments: Any) -> Any:
        return await trio.to_thread.run_sync(self._exchange, what, text, arguments, abandon_on_cancel=True)

    def _exchange(self, what: str, text: str, arguments: tuple[Any, ...]) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"what": what, "text": text, "arguments": arguments}) + "\n")
        stdin.flush()
        line = stdout.readline()
        assert line, f"{self.name} has gone"
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["result"]


@contextmanager
def open_browser(name: str, *, any_certificate: bool = False) -> Iterator[Browser]:
    """Start "chromium" or "firefox", and end it. With `any_certificate`, it trusts every one that it is shown."""
    command = [sys.executable, str(HERE / f"{name}.py"), find_program(*PROGRAMS[name])]
    command += ["any certificate"] * any_certificate
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Browser(name, process)
            # At the end of its input it closes the browser and leaves.
            assert process.stdin is not None
            process.stdin.close()
            process.wait(20)
        finally:
            process.terminate()
