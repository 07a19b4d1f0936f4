"""A client finds a broker by a name of this machine, whichever of its addresses the broker listens on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import msgspec
import pytest
import trio

import catbus
from catbus.config import WebSocketSettings
from catbus.errors import Disconnected
from tests.brokers import CONFIG, SECRET, TOKEN, running
from tests.endpoints.test_tls import Renewed, serving
from tests.programs import CLIENT, find_module, find_program

ADDRESSES = ("127.0.0.1", "[::1]")
NAMES = ("localhost", "bus.localhost")


def listening_on(address: str) -> catbus.Config:
    return msgspec.structs.replace(CONFIG, websocket=WebSocketSettings(bind=(f"{address}:0",)))


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("name", NAMES)
async def test_client_and_command_try_both_loopback_addresses(address: str, name: str) -> None:
    async with running(listening_on(address)) as (_, place):
        url = f"ws://{place.replace(address, name)}/ws"
        async with catbus.connect(url, token=TOKEN, reconnect=False) as bus:
            assert await bus.publish("a", 1) == 1
        command = [sys.executable, "-m", "catbus", "pub", "a", "2", "--url", url, "--token", TOKEN]
        await trio.run_process(command, capture_stdout=True)


@pytest.mark.parametrize("address", ADDRESSES)
async def test_certificate_of_localhost_is_verified_at_either_address(address: str, tmp_path: Path) -> None:
    certificate = Renewed(tmp_path)
    config = msgspec.structs.replace(
        certificate.config(), websocket=WebSocketSettings(bind=(f"{address}:0",), tls=True)
    )
    async with serving(config) as (_, urls):
        # It names localhost and 127.0.0.1.
        url = urls.websocket.replace(address, "localhost")
        async with catbus.connect(url, token=TOKEN, ca=certificate.authority, reconnect=False) as bus:
            assert await bus.publish("a", 1) == 1
        with pytest.raises(Disconnected, match="the certificate is not accepted: Hostname mismatch"):
            async with catbus.connect(
                url.replace("localhost", "bus.localhost"), token=TOKEN, ca=certificate.authority, reconnect=False
            ):
                pass


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("name", NAMES)
async def test_client_in_node_tries_both_loopback_addresses(address: str, name: str) -> None:
    node = find_program("nodejs", "node")
    find_module("ws")
    async with running(listening_on(address)) as (_, place):
        url = f"ws://{place.replace(address, name)}/ws"
        environment = {**os.environ, "CATBUS_URL": url, "CATBUS_SECRET": SECRET}
        command = [node, "--input-type=module", "--eval", NODE]
        done = await trio.run_process(command, cwd=CLIENT, env=environment, capture_stdout=True)
        assert done.stdout == b"1\n"


NODE = """
import WebSocket from 'ws';
import { CatbusClient } from './src/catbus.js';
import { sign } from './test/helpers.js';
const client = new CatbusClient({ url: process.env.CATBUS_URL, token: sign(), WebSocket, autoReconnect: false });
await client.connect();
console.log((await client.publish('a', 1)).seq);
await client.disconnect();
"""
