"""`docs/migrating.md`: the blocks of the JavaScript client run, each with a client of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio

from tests.brokers import TOKEN, running
from tests.programs import CLIENT, find_module, find_program
from tests.test_readme import examples

BLOCKS = examples(Path(__file__).parent.parent / "docs" / "migrating.md", "js here")
SURROUNDINGS = f"""
import WebSocket from 'ws';
globalThis.WebSocket = WebSocket;
const {{ CatbusClient }} = await import('{CLIENT}/src/catbus.js');
const client = new CatbusClient({{ url: process.env.URL, token: process.env.TOKEN }});
const log = console.log;
console.log = (text) => (log(text), process.exit());
await client.connect();
"""


def test_page_has_a_block_for_each_system() -> None:
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS, ids=["socket.io", "supabase", "centrifugo"])
async def test_block_publishes_and_receives(block: str, tmp_path: Path) -> None:
    script = find_module("ws").parent / f".migration-{tmp_path.name}.mjs"
    script.write_text(SURROUNDINGS + block + "setTimeout(() => {}, 30_000);\n")
    try:
        async with running() as (_, address):
            environment = {"TOKEN": TOKEN, "URL": f"ws://{address}/ws", "PATH": "/usr/bin:/bin"}
            command = [find_program("nodejs", "node"), script]
            done = await trio.run_process(command, env=environment, stdin=subprocess.DEVNULL, capture_stdout=True)
    finally:
        script.unlink()
    assert done.stdout == b"hello\n"
