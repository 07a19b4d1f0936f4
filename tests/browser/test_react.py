"""The React hooks of the JavaScript client, under StrictMode, in real browsers, with React 18 and 19."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import trio

from catbus.auth.grants import Grants
from catbus.auth.tokens import sign
from tests.brokers import SECRET, running
from tests.browser.driver import Browser
from tests.programs import CLIENT, find_module

APPLICATION = Path(__file__).parent / "react_app.js"
WAIT_FOR_TEXT = """
    const began = Date.now();
    while (text(args[0]) !== args[1]) {
        if (Date.now() - began > 30_000) throw new Error(`${args[0]}: ${text(args[0])}, and not ${args[1]}`);
        await new Promise((resolve) => setTimeout(resolve, 5));
    }
"""


@pytest.fixture(scope="module", params=["18", "19"])
def application(request: pytest.FixtureRequest) -> str:
    release = "18" if request.param == "18" else ""
    alias = [f"--alias:{name}={find_module(name + release)}" for name in ("react", "react-dom")]
    command: list[str | Path] = [find_module(".bin/esbuild"), APPLICATION, "--bundle", "--log-level=error", *alias]
    command.append('--define:process.env.NODE_ENV="development"')
    return subprocess.run(command, cwd=CLIENT, capture_output=True, text=True, check=True).stdout


def token(client_id: str) -> str:
    return sign(SECRET, client_id=client_id, grants=Grants.ALL)


async def shows(browser: Browser, *, live: bool = True, **rooms: list[object]) -> None:
    for name, payloads in rooms.items():
        wanted = json.dumps([payloads, live, None], separators=(",", ":"))
        await browser.run(WAIT_FOR_TEXT, name, wanted)


async def test_components_share_a_subscription_and_follow_their_props_and_their_user(
    browser: Browser, application: str
) -> None:
    with trio.fail_after(60):
        async with running() as (broker, address):
            await browser.goto(f"http://{address}/health")
            await browser.run(application)
            for number in range(1, 6):
                await broker.publish("room.a", number)
            await broker.publish("room.b", "other")
            shown = {"url": f"ws://{address}/ws", "user": "alice", "token": token("alice"), "pattern": "room.a"}
            await browser.run("show(args[0])", shown)
            await browser.run(WAIT_FOR_TEXT, "state", "connected")
            # One subscription gives both rooms the last three messages. The counter has received no old message.
            await shows(browser, one=[3, 4, 5], two=[3, 4, 5])
            assert broker.replica.delivery.statistics().live == 1
            await browser.run("await publish('room.a', 6)")
            await shows(browser, one=[4, 5, 6], two=[4, 5, 6])
            assert await browser.run("return counted") == [6]
            # Another pattern, and a larger number of messages.
            await browser.run("show(args[0])", {**shown, "pattern": "room.b"})
            await shows(browser, one=["other"], two=["other"])
            await browser.run("show(args[0])", {**shown, "last": 5})
            await shows(browser, one=[2, 3, 4, 5, 6], two=[2, 3, 4, 5, 6])
            await browser.run("show(args[0])", {**shown, "last": 5, "rooms": 1})
            await broker.publish("room.a", 7)
            await shows(browser, one=[3, 4, 5, 6, 7])
            # Signed out, and signed in as another user.
            await browser.run("show({})")
            await browser.run(WAIT_FOR_TEXT, "state", "signed out")
            while broker.replica.sessions:
                await trio.sleep(0.01)
            await broker.publish("room.a", 8)
            await browser.run("show(args[0])", {**shown, "user": "bob", "token": token("bob")})
            await shows(browser, one=[6, 7, 8], two=[6, 7, 8])
            assert await browser.run("return counted") == [6, 7]
            # StrictMode mounts twice, and the connection that the first mount began may not have ended yet.
            identities = [client.session.identity for client in broker.replica.sessions]
            assert [identity.client_id for identity in identities if identity] == ["bob"]


async def test_hooks_show_retained_messages_and_members(browser: Browser, application: str) -> None:
    with trio.fail_after(60):
        async with running() as (broker, address):
            await browser.goto(f"http://{address}/health")
            await browser.run(application)
            shown = {
                "url": f"ws://{address}/ws",
                "user": "alice",
                "token": token("alice"),
                "shared": ["room.*", "room.*"],
            }
            await browser.run("show(args[0])", shown)
            await browser.run(WAIT_FOR_TEXT, "shared", "[[],[],true,null]")
            # One subscription has both kinds of state for both components.
            assert broker.replica.delivery.statistics().live == 1
            await browser.run("await publish('room.a', 1, {retain: true})")
            await browser.run("return await join('alice', 'room.a')")
            wanted = [[["room.a", 1]], [["room.a", "alice", 1]], True, None]
            await browser.run(WAIT_FOR_TEXT, "shared", json.dumps(wanted, separators=(",", ":")))
            await browser.run("show(args[0])", {**shown, "shared": ["other.*"]})
            await browser.run(WAIT_FOR_TEXT, "shared", "[[],[],true,null]")
            await browser.run("show(args[0])", {**shown, "shared": ["room.a"]})
            await browser.run(WAIT_FOR_TEXT, "shared", json.dumps(wanted, separators=(",", ":")))
            await browser.run("await publish('room.a', null, {retain: true})")
            await browser.run(WAIT_FOR_TEXT, "shared", '[[],[["room.a","alice",1]],true,null]')
