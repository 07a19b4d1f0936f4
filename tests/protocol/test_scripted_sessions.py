"""The sessions of the test vectors with a real broker: over both transports, by the Python and the example client."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from catbus.client.broker_address import parse_address
from catbus.client.websocket_transport import open_websocket
from catbus.client.webtransport_transport import make_configuration, open_webtransport
from tests.brokers import SECRET
from tests.programs import find_program
from tests.protocol.python_client import open_client
from tests.protocol.scripted_sessions import SESSIONS, Mismatch, ScriptedSession, over
from tests.test_both_transports import running

CANNOT_BE_SENT = {
    "a publish that is sent again appears once": ["auth", "publish", "publish"],  # it sends again by itself
    "requests without a grant are rejected, and the session continues": ["ping", "unsubscribe", "nonsense"],
    "a first-version client gets only what it knows": [
        "auth",
        "subscribe",
        "publish",
        "unsubscribe",
        "yjs_update",
        "yjs_awareness",
        "yjs_sync_request",
        "ping",
    ],
    "a value other than an object ends the session": ["[1]"],
    "the last of two values with one name counts": ['{"type":"ping","seq":4,"type":"nothing"}'],
    "retained messages come first, and a publish over another one is a conflict": [
        *["publish"] * 6,
        "subscribe",
        "publish",
    ],
    "an object that does not decode is rejected by its id": [*["unknown"] * 6, '{"type":undefined,"id":10}'],
    "members of a channel join, change and leave": ["subscribe", "join", "join", "members", "leave", "leave"],
    "wrong requests about members are rejected, and the session continues": [
        "join",
        "join",
        "join",
        "join",
        "members",
        "members",
        "members",
    ],
}
"""The messages for which the clients have no call, by session. Both clients send all others."""

EXAMPLE = Path(__file__).parents[2] / "protocol" / "examples" / "client.mjs"


@pytest.mark.parametrize("transport", ["websocket", "webtransport"])
async def test_broker_replies_as_in_the_vectors(tmp_path: Path, transport: str) -> None:
    async with running(tmp_path) as (_, websocket, found):

        async def dial() -> Any:
            if transport == "websocket":
                return await open_websocket(parse_address(websocket))
            address = parse_address(found["webtransport"])
            return await open_webtransport(address, make_configuration(address, found["certificate"]))

        for session in SESSIONS:
            await ScriptedSession(session, over(dial), SECRET).run()


async def test_every_expected_object_is_compared(tmp_path: Path) -> None:
    """Each step that receives an object fails if the object is another one."""
    async with running(tmp_path) as (_, websocket, _):

        async def dial() -> Any:
            return await open_websocket(parse_address(websocket))

        session = SESSIONS[0]
        for number, step in enumerate(session["steps"]):
            if "object" in step and "receive" in step:
                other = copy.deepcopy(session)
                other["steps"][number]["object"]["type"] = "something else"
                with pytest.raises(Mismatch, match=f"step {number + 1}, "):
                    await ScriptedSession(other, over(dial), SECRET).run()


@pytest.mark.parametrize("transport", ["websocket", "webtransport"])
async def test_python_client_runs_the_vectors(tmp_path: Path, transport: str) -> None:
    """The client sends by calls of `Bus`; their results and those of its subscriptions are the received objects."""
    passed_over: dict[str, list[str]] = {}
    async with running(tmp_path) as (_, _, found):
        where = {"url": found[transport], "ca": found["certificate"] if transport == "webtransport" else None}
        for session in SESSIONS:
            # After a rejected `auth` the client reports the error and not the closing code.
            steps = [step for step in session["steps"] if "closed" not in step]
            script = ScriptedSession({**session, "steps": steps}, lambda nursery: open_client(nursery, **where), SECRET)
            await script.run()
            if script.passed_over:
                passed_over[session["name"]] = script.passed_over
    assert passed_over == CANNOT_BE_SENT


async def test_example_client_runs_the_vectors(tmp_path: Path) -> None:
    node = find_program("nodejs", "node")
    async with running(tmp_path) as (_, websocket, _):
        with trio.fail_after(60):
            done = await trio.run_process(
                [node, EXAMPLE, websocket, SECRET], capture_stdout=True, stdin=subprocess.DEVNULL, check=False
            )
    report = done.stdout.decode()
    assert done.returncode == 0, report
    assert report.splitlines()[-1] == f"{len(SESSIONS)} of {len(SESSIONS)} sessions"
