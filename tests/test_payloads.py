"""Messages of any content, through a broker to every kind of receiver: no subscription fails."""

from __future__ import annotations

import math
import os
import subprocess

import msgspec
import trio

import catbus
from tests.brokers import SECRET, TOKEN, running
from tests.programs import CLIENT, find_module, find_program
from tests.protocol.test_vectors import PAYLOADS

VALID = [case["json"] for case in PAYLOADS["cases"] if case["valid"]]
LAST = '"the last"'


async def test_every_payload_reaches_every_receiver() -> None:
    node = find_program("nodejs", "node")
    find_module("ws")
    async with running() as (broker, place):
        url = f"ws://{place}/ws"
        async with catbus.connect(url, token=TOKEN) as bus:
            for text in [*VALID, LAST]:
                await bus.publish("a", msgspec.Raw(text.encode()))
            async with bus.subscribe("a", since=0) as messages, broker.subscribe("a", since=0) as inside:
                for text in [*VALID, LAST]:
                    for message in (await anext(messages), await anext(inside)):
                        assert message.data.decode() == text
                        # It must not raise, and neither must what one does with it.
                        repr(message), repr(message.payload)
            page = await bus.history("a", limit=1000)
            assert [message.payload for message in page.messages][-1] == "the last"
        environment = {**os.environ, "CATBUS_URL": url, "CATBUS_SECRET": SECRET}
        command = [node, "--input-type=module", "--eval", NODE]
        with trio.fail_after(30):
            done = await trio.run_process(
                command, cwd=CLIENT, env=environment, capture_stdout=True, stdin=subprocess.DEVNULL
            )
        assert done.stdout.decode() == f"{len(VALID) + 1}\n"


NODE = """
import WebSocket from 'ws';
import { CatbusClient } from './src/catbus.js';
import { sign } from './test/helpers.js';
const client = new CatbusClient({ url: process.env.CATBUS_URL, token: sign(), WebSocket, autoReconnect: false });
await client.connect();
let count = 0;
await new Promise((resolve) => client.subscribe('a', ({ payload }) => {
  count++;
  if (payload === 'the last') resolve();
}, { since: 0 }));
console.log(count);
await client.disconnect();
"""


async def test_number_that_is_too_large_becomes_infinity() -> None:
    async with (
        running() as (_, place),
        catbus.connect(f"ws://{place}/ws", token=TOKEN) as bus,
        bus.subscribe("a") as messages,
    ):
        for text, payload in (("1e400", math.inf), ("-1e400", -math.inf), ("1e-400", 0.0), ("9" * 5000, math.inf)):
            await bus.publish("a", msgspec.Raw(text.encode()))
            assert (await anext(messages)).payload == payload
