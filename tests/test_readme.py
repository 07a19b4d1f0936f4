"""The examples in the READMEs do what they say, as they are written there, but for where the broker is."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

import catbus
from tests.brokers import TOKEN, running
from tests.programs import CLIENT, find_module, find_program

ROOT = Path(__file__).parent.parent


def examples(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)


PYTHON = examples(ROOT / "README.md", "python")
JAVASCRIPT = {
    "README.md": examples(ROOT / "README.md", "js")[0],
    "clients/javascript/README.md": examples(CLIENT / "README.md", "js")[0],
}


async def carry_out(example: str, **names: Any) -> None:
    """Run it as if it stood in an async function."""
    code = compile(example, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    running = eval(code, {"catbus": catbus, **names})
    if running is not None:
        await running


async def test_the_python_client(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = [each for each in PYTHON if "ws://127.0.0.1:8080/ws" in each]
    async with running() as (_, address), trio.open_nursery() as nursery:
        example = example.replace("127.0.0.1:8080", address)
        nursery.start_soon(lambda: carry_out(example, token=TOKEN, cursor=0))
        printed = ""
        while "\n" not in printed:
            await trio.sleep(0.01)
            printed += capsys.readouterr().out
        nursery.cancel_scope.cancel()
    assert printed == "1 project.42.notes {'text': 'hello'}\n"


async def test_a_broker_in_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = [each for each in PYTHON if "catbus.open_broker" in each]
    with trio.fail_after(10):
        await carry_out(example)
    assert "orders.42" in capsys.readouterr().out


SURROUNDINGS = """
import WebSocket from 'ws';
globalThis.WebSocket = WebSocket;
const [token, cursor] = [process.env.TOKEN, 0];
globalThis.fetch = async () => ({ text: async () => token });
"""


@pytest.mark.parametrize("place", JAVASCRIPT)
async def test_the_javascript_client(place: str, tmp_path: Path) -> None:
    node = find_program("nodejs", "node")
    example = JAVASCRIPT[place].replace("'@catbus/client'", f"'{CLIENT}/src/catbus.js'")
    script = find_module("ws").parent / f".example-{tmp_path.name}.mjs"
    async with running() as (_, address):
        urls = re.findall(r"'wss?://[^']+'", example)
        assert len(urls) == 1
        # Who goes on for ever is ended when it has said what there is to say.
        ending = "\nwhile (!said) await new Promise((resolve) => setTimeout(resolve, 5));\nprocess.exit();\n"
        told = "let said = 0; const log = console.log; console.log = (...all) => (log(...all), said++);\n"
        script.write_text(SURROUNDINGS + told + example.replace(urls[0], f"'ws://{address}/ws'") + ending)
        try:
            done = await trio.run_process(
                [node, script], env={"TOKEN": TOKEN, "PATH": "/usr/bin:/bin"}, stdin=subprocess.DEVNULL,
                capture_stdout=True,
            )  # fmt: skip
        finally:
            script.unlink()
    assert "1 project.42.notes { text: 'hello' }\n" in done.stdout.decode()
    if "committed as" in example:
        assert "committed as 1\nfrom the log { text: 'hello' }\n" in done.stdout.decode()
