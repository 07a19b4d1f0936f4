"""`docs/embedding.md` and `examples/embedding.py`: the examples run, and the page shows the code of the application."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

import catbus
from catbus import ErrorCode
from tests.test_readme import examples

ROOT = Path(__file__).parent.parent
APPLICATION = ROOT / "examples" / "embedding.py"
PAGE = ROOT / "docs" / "embedding.md"
EXAMPLES = examples(PAGE, "python")


@asynccontextmanager
async def shop() -> AsyncIterator[httpx.AsyncClient]:
    """The application as a process. It must end in order when it is told to."""
    environment = {**os.environ, "CATBUS_WS_BIND": "127.0.0.1:0", "WEB_BIND": "127.0.0.1:0", "PYTHONWARNINGS": "error"}
    async with trio.open_nursery() as nursery:
        command = [sys.executable, str(APPLICATION)]
        start = partial(trio.run_process, command, env=environment, stderr=subprocess.PIPE)
        process: trio.Process = await nursery.start(start)
        assert process.stderr is not None
        output = b""
        while (found := re.search(rb"Running on (http://[\d.:]+) ", output)) is None:
            data = await process.stderr.receive_some()
            assert data, output
            output += data
        async with httpx.AsyncClient(base_url=found[1].decode()) as client:
            yield client
        process.send_signal(signal.SIGTERM)
        async for data in process.stderr:
            output += data
    assert b"Traceback" not in output
    assert process.returncode == 0


async def test_application_and_broker_are_one_process_with_one_login() -> None:
    async def ask(method: str, path: str, **options: Any) -> Any:
        response = await web.request(method, path, **options)
        assert response.status_code == 200
        return response.json()

    with trio.fail_after(60):
        async with shop() as web:
            login = await ask("POST", "/login", json={"user": "ann"})
            async with catbus.connect(login["url"], token=login["token"]) as bus, bus.subscribe("chat") as chat:
                assert await ask("GET", "/online") == {"users": ["ann"]}
                async with bus.subscribe("orders.*") as orders:
                    assert await ask("POST", "/orders/7") == {"seq": 1}
                    message = await anext(orders)
                assert (message.channel, message.payload, message.sender) == ("orders.7", {"status": "paid"}, "shop")
                assert await ask("GET", "/orders/7") == {"events": [{"status": "paid"}]}
                await bus.publish("chat", {"text": " hello "})
                assert (await anext(chat)).payload == {"text": "hello"}
                with pytest.raises(catbus.Refused) as caught:
                    await bus.publish("chat", {"text": "x" * 501})
                assert caught.value.code is ErrorCode.BAD_MESSAGE
            while (await ask("GET", "/online"))["users"]:
                await trio.sleep(0.01)


def test_page_shows_the_code_of_the_application() -> None:
    application = APPLICATION.read_text()
    *shown, _ = EXAMPLES
    assert len(shown) == 2
    for example in shown:
        assert example.rstrip() in application, textwrap.shorten(example, 60)


async def test_example_of_a_test_passes(autojump_clock: MockClock) -> None:
    names: dict[str, Any] = {}
    exec(compile(EXAMPLES[-1], "embedding.md", "exec"), names)
    await names["test_user_may_only_read"](autojump_clock)
