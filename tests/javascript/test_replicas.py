"""The JavaScript client over replicas that are killed and that stand still: it goes on with the other one."""

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

PROGRAM = Path(__file__).with_name("outlive.mjs")


class Client:
    """The client in Node, which is told something and tells what happens to it."""

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

    async def tell(self, *words: str) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(" ".join(words).encode() + b"\n")

    async def wait_for(self, name: str, value: object = None) -> Any:
        """What it tells next of that name, or until it tells that."""
        async for told in self._lines:
            if name in told and value in (None, told[name]):
                return told
        raise AssertionError("it has ended")

    async def go_on(self) -> None:
        """Wait until it has heard more of what it publishes."""
        await self.tell("more")
        await self.wait_for("more")


async def test_client_survives_a_paused_and_a_killed_replica(
    database_url: str,
) -> None:
    find_module("ws")
    node = find_program("nodejs", "node")
    environment = {**os.environ, "TOKEN": token("javascript")}
    with trio.fail_after(30):
        async with open_replicas(database_url, 2) as (one, other), trio.open_nursery() as nursery:
            run = partial(trio.run_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            process = await nursery.start(run, [node, PROGRAM, one.url])
            client = Client(process)
            await client.wait_for("state", "connected")
            await client.go_on()
            await client.tell("dial", other.url)
            one.pause()
            await client.wait_for("state", "connected")
            # What it has under way goes on behind the client's back.
            one.resume()
            await client.go_on()
            await client.tell("dial", one.url)
            other.kill()
            await client.wait_for("state", "connected")
            await client.go_on()
            await client.tell("finish")
            told = await client.wait_for("heard")
    heard, acknowledged = told["heard"], told["acknowledged"]
    assert heard == sorted(heard)
    assert heard == sorted(acknowledged)
    assert len({payload for _, payload in heard}) == len(heard)
