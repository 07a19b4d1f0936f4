"""The JavaScript client and replicas that are killed or paused: it continues with the other replica."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tests.postgres.processes import open_replicas, token
from tests.programs import find_module, find_program

PROGRAM = Path(__file__).with_name("publishing_client.mjs")


class NodeClient:
    """The client in Node, which executes commands and reports events."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._lines = self._read()

    async def _read(self) -> AsyncIterator[dict[str, Any]]:
        assert self._process.stdout is not None
        begun = b""
        async for data in self._process.stdout:
            *lines, begun = (begun + data).split(b"\n")
            for line in lines:
                yield json.loads(line)

    async def send_command(self, *words: str) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(" ".join(words).encode() + b"\n")

    async def wait_for(self, name: str, value: object = None) -> Any:
        """Wait for the next event of this name, or for the next one with this value."""
        async for event in self._lines:
            if name in event and value in (None, event[name]):
                return event
        raise AssertionError("the client has ended")

    async def wait_for_progress(self) -> None:
        """Wait until the client has received more of its messages."""
        await self.send_command("more")
        await self.wait_for("more")


async def test_client_survives_a_paused_and_a_killed_replica(database_url: str) -> None:
    find_module("ws")
    node = find_program("nodejs", "node")
    environment = {**os.environ, "TOKEN": token("javascript")}
    with trio.fail_after(30):
        async with open_replicas(database_url, 2) as (one, other), trio.open_nursery() as nursery:
            run = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            process = await nursery.start(run, [node, PROGRAM, one.url])
            client = NodeClient(process)
            await client.wait_for("state", "connected")
            await client.wait_for_progress()
            await client.send_command("dial", other.url)
            one.pause()
            await client.wait_for("state", "connected")
            # Publishes that the replica had received may still be committed, without the client.
            one.resume()
            await client.wait_for_progress()
            await client.send_command("dial", one.url)
            other.kill()
            await client.wait_for("state", "connected")
            await client.wait_for_progress()
            await client.send_command("finish")
            event = await client.wait_for("received")
    received, acknowledged = event["received"], event["acknowledged"]
    assert received == sorted(received)
    assert received == sorted(acknowledged)
    assert len({payload for _, payload in received}) == len(received)
