"""A real Chromium for tests on Trio."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tests.programs import find_program

DRIVER = Path(__file__).parent / "driver.py"


class Browser:
    """One page."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout
        self._rest = b""

    async def goto(self, url: str) -> None:
        """Open a page; what is `run` then has the rights of its origin."""
        await self._ask("goto", url)

    async def run(self, script: str, *arguments: Any) -> Any:
        """Run the body of an async function of `args`, and return what it returns."""
        return await self._ask("run", script, *arguments)

    async def _ask(self, what: str, text: str, *arguments: Any) -> Any:
        await self._stdin.send_all(json.dumps({"what": what, "text": text, "arguments": arguments}).encode() + b"\n")
        while b"\n" not in self._rest:
            data = await self._stdout.receive_some()
            assert data, "the browser has gone"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["result"]


@asynccontextmanager
async def open_browser() -> AsyncIterator[Browser]:
    """Start Chromium, and end it."""
    start = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, shell=False)
    async with trio.open_nursery() as nursery:
        process = await nursery.start(
            start,
            [sys.executable, str(DRIVER), find_program("chromium", "chromium", "chromium-browser", "google-chrome")],
        )
        async with process.stdin:
            yield Browser(process)
        # At the end of its input it closes the browser and leaves.
