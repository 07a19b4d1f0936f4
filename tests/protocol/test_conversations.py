"""Whole conversations with a real broker, over both transports, and by a client in another language."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from catbus.client.transport import parse_address
from catbus.client.websocket import open_websocket
from catbus.client.webtransport import make_configuration, open_webtransport
from tests.brokers import SECRET
from tests.programs import find_program
from tests.protocol.conversations import CONVERSATIONS, Mismatch, Player, over
from tests.protocol.python_client import open_client
from tests.test_both_transports import running

CANNOT_BE_SAID = {
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
    "an object that does not decode is rejected by its id": [*["unknown"] * 6, '{"type":undefined,"id":10}'],
}
"""What there is no call for in a client, by conversation; all else both clients say."""

EXAMPLE = Path(__file__).parents[2] / "protocol" / "examples" / "client.mjs"


@pytest.mark.parametrize("transport", ["websocket", "webtransport"])
async def test_the_broker_says_what_it_should(tmp_path: Path, transport: str) -> None:
    async with running(tmp_path) as (_, websocket, found):

        async def dial() -> Any:
            if transport == "websocket":
                return await open_websocket(parse_address(websocket))
            address = parse_address(found["webtransport"])
            return await open_webtransport(address, make_configuration(address, found["certificate"]))

        for conversation in CONVERSATIONS:
            await Player(conversation, over(dial), SECRET).play()


async def test_what_is_said_otherwise_is_noticed(tmp_path: Path) -> None:
    """Each step of each conversation that hears something bites."""
    async with running(tmp_path) as (_, websocket, _):

        async def dial() -> Any:
            return await open_websocket(parse_address(websocket))

        conversation = CONVERSATIONS[0]
        for number, step in enumerate(conversation["steps"]):
            if "object" in step and "hear" in step:
                other = copy.deepcopy(conversation)
                other["steps"][number]["object"]["type"] = "something else"
                with pytest.raises(Mismatch, match=f"step {number + 1}, "):
                    await Player(other, over(dial), SECRET).play()


@pytest.mark.parametrize("transport", ["websocket", "webtransport"])
async def test_the_python_client_understands_what_the_broker_says(tmp_path: Path, transport: str) -> None:
    """What is said is said by calls of `Bus`, and what is heard is what they and the subscriptions give."""
    passed_over: dict[str, list[str]] = {}
    async with running(tmp_path) as (_, _, found):
        where = {"url": found[transport], "ca": found["certificate"] if transport == "webtransport" else None}
        for conversation in CONVERSATIONS:
            # Of a refused `auth` the client tells the refusal, and not the closing code.
            told = [step for step in conversation["steps"] if "closed" not in step]
            player = Player({**conversation, "steps": told}, lambda nursery: open_client(nursery, **where), SECRET)
            await player.play()
            if player.passed_over:
                passed_over[conversation["name"]] = player.passed_over
    assert passed_over == CANNOT_BE_SAID


async def test_a_client_in_another_language_that_knows_the_specification_only(tmp_path: Path) -> None:
    node = find_program("nodejs", "node")
    async with running(tmp_path) as (_, websocket, _):
        with trio.fail_after(60):
            done = await trio.run_process(
                [node, EXAMPLE, websocket, SECRET], capture_stdout=True, stdin=subprocess.DEVNULL, check=False
            )
    report = done.stdout.decode()
    assert done.returncode == 0, report
    assert report.splitlines()[-1] == f"{len(CONVERSATIONS)} of {len(CONVERSATIONS)} conversations"
