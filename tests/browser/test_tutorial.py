"""`docs/tutorial.md`, followed literally: its files, its commands, and two windows of a browser."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio

from tests.browser.driver import Browser
from tests.postgres.sql import wait_until
from tests.programs import find_program

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
STEPS = re.split(r"^## \d+\. ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
BLOCK = re.compile(r"^```(?:html|js|sh) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

WINDOWS = """
    window.frames_ = {};
    for (const [name, url] of Object.entries(args[0])) {
        frames_[name] = document.body.appendChild(document.createElement('iframe'));
        frames_[name].src = url;
    }
    window.page = (name) => frames_[name].contentDocument;
    window.text = (name, selector = '#list') => page(name)?.querySelector(selector)?.textContent ?? '';
    window.until = async (condition) => {
        for (const began = Date.now(); !condition();) {
            const shown = () => Object.keys(frames_).map((name) => text(name, 'body'));
            if (Date.now() - began > 30_000) throw new Error(`${condition}: ${shown()}`);
            await new Promise((resolve) => setTimeout(resolve, 5));
        }
    };
    window.isReady = (name) => text(name, '#state') === 'connected' && page(name).querySelector('#add').onsubmit;
    window.add = (name, item) => {
        const form = page(name).querySelector('#add');
        form.elements.text.value = item;
        form.requestSubmit();
    };
    window.reload = async () => {
        for (const frame of Object.values(frames_)) {
            const loaded = new Promise((resolve) => { frame.onload = resolve; });
            frame.contentWindow.location.reload();
            await loaded;
            frame.contentWindow.alert = (said) => { window.said = said; };
        }
        await until(() => Object.keys(frames_).every(isReady));
    };
    await until(() => Object.keys(frames_).every(isReady));
"""
SHARE = """
    add('ada', 'cheese');
    await until(() => text('ada').includes('cheese') && text('bob').includes('cheese'));
"""
CHANGE = """
    await reload();
    await until(() => text('bob').includes('milk'));
    const box = (name) => page(name).querySelector('#list input');
    await until(() => box('ada') && box('bob'));
    box('ada').click();
    await until(() => box('bob')?.checked);
    // Both change it before either has seen the other's change, so one of them is told.
    const [one, other] = [box('ada'), box('bob')];
    one.click();
    other.click();
    await until(() => window.said?.includes('faster') && box('ada') !== one && box('bob') !== other);
    page('bob').querySelector('#list li button').click();
    await until(() => !text('ada').includes('cheese') && text('ada').includes('milk'));
"""
MEET = """
    await reload();
    await until(() => ['ada', 'bob'].every((name) => text(name, '#people') === 'Here: ada, bob'));
"""
WAIT_FOR_BREAD = "await until(() => text('ada').includes('bread') && text('bob').includes('bread'));"
GO_AWAY = """
    await until(() => text('ada', '#state') === 'reconnecting');
    add('ada', 'jam');
    return text('ada').includes('bread');
"""
COME_BACK = """
    await until(() => text('ada').includes('jam') && text('bob').includes('jam'));
    return text('bob').split('jam').length - 1;
"""


async def accepts(port: int) -> bool:
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        return False
    await stream.aclose()
    return True


@asynccontextmanager
async def running_broker(port: int, environment: dict[str, str]) -> AsyncIterator[None]:
    """What `make run` starts, with its WebSocket at this port."""
    command = [sys.executable, "-m", "catbus", "run", "--database", "embedded", "--ws-bind", f"127.0.0.1:{port}"]
    process = await trio.lowlevel.open_process(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        await wait_until(lambda: accepts(port))
        yield
    finally:
        process.send_signal(signal.SIGINT)
        with trio.CancelScope(shield=True):
            await process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Guide:
    """Somebody who follows the page in one shell after the other, below a directory."""

    def __init__(self, directory: Path) -> None:
        self.broker_port, self.page_port = free_port(), free_port()
        self.printed = ""
        """The output of all commands."""
        self._directory = directory
        self._page = directory / "todo"
        self._places = {
            "127.0.0.1:8080": f"127.0.0.1:{self.broker_port}",
            "127.0.0.1:8000": f"127.0.0.1:{self.page_port}",
            "http.server 8000": f"http.server {self.page_port}",
            "/tmp/todo": str(self._page),
            "$PWD/.venv/bin": str(Path(sys.executable).parent),
            "psql ": f"{shlex.quote(find_program('postgresql-client', 'psql'))} ",
        }
        # For root, PostgreSQL runs as another user, who has to reach its directory.
        directory.chmod(0o755)
        state = directory / "state"
        state.mkdir()
        url = f"ws://127.0.0.1:{self.broker_port}/ws"
        # What one shell keeps from block to block.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**os.environ, "CATBUS_STATE": str(state), "CATBUS_URL": url, "PATH": path}
        self._servers: list[trio.Process] = []

    async def follow(self, step: str) -> None:
        """Write the files of a step, and run its commands."""
        for name, text in BLOCK.findall(step):
            for place, here in self._places.items():
                text = text.replace(place, here)
            if name:
                (self._page / name).write_text(text)
            elif text.endswith(" &\n"):
                command = ["sh", "-c", "exec " + text.removesuffix(" &\n")]
                self._servers.append(await trio.lowlevel.open_process(command, stderr=subprocess.DEVNULL))
                await wait_until(lambda: accepts(self.page_port))
            else:
                where = self._page if self._page.exists() else self._directory
                command = ["bash", "-ec", text]
                done = await trio.run_process(command, cwd=where, env=self.environment, capture_stdout=True)
                self.printed += done.stdout.decode()

    async def stop(self) -> None:
        with trio.CancelScope(shield=True):
            for server in self._servers:
                server.kill()
                await server.wait()


@pytest.mark.parametrize("running_browser", ["chromium"], indirect=True)
async def test_tutorial_works_as_it_is_written(browser: Browser) -> None:
    with trio.fail_after(120), TemporaryDirectory() as directory:
        guide = Guide(Path(directory))
        try:
            async with running_broker(guide.broker_port, guide.environment):
                for step in STEPS[:2]:
                    await guide.follow(step)
                links = dict(zip(("ada", "bob"), re.findall(r"http://\S+", guide.printed), strict=True))
                # A page of the same origin, for the windows to be in.
                await browser.goto(f"http://127.0.0.1:{guide.page_port}/client.js")
                await browser.run(WINDOWS, links)
                await browser.run(SHARE)
                await guide.follow(STEPS[2])
                await browser.run(CHANGE)
                await guide.follow(STEPS[3])
                await browser.run(MEET)
                await guide.follow(STEPS[4])
                await browser.run(WAIT_FOR_BREAD)
            assert await browser.run(GO_AWAY)
            async with running_broker(guide.broker_port, guide.environment):
                assert await browser.run(COME_BACK) == 1
                await browser.goto("about:blank")
        finally:
            await guide.stop()
