"""`catbus get`, `catbus set` and `catbus presence`, with a broker in a process of its own."""

from __future__ import annotations

import json
import signal
import subprocess
from typing import Any

import pytest
import trio

from catbus.cli.development_credentials import find_token
from catbus.client import connect

from .conftest import Command, Outcome, Running, Start
from .test_commands import PATIENCE, end


def values(outcome: Outcome) -> list[tuple[str, Any, int]]:
    assert (outcome.status, outcome.errors) == (0, "")
    found = [json.loads(line) for line in outcome.output.splitlines()]
    assert all(each.keys() == {"channel", "payload", "seq", "at", "sender"} for each in found)
    return [(each["channel"], each["payload"], each["seq"]) for each in found]


def test_values_are_set_printed_and_removed(broker: Running, catbus: Command) -> None:
    url = "--url", broker.url
    assert catbus("set", "todo.b", '{"n": 1}', *url) == (0, '{"channel":"todo.b","seq":1}\n', "")
    assert catbus("set", "todo.a", "2", "--expect", "0", *url).status == 0
    assert catbus("pub", "todo.a", '"not kept"', *url).status == 0
    assert values(catbus("get", "todo.*", *url)) == [("todo.a", 2, 2), ("todo.b", {"n": 1}, 1)]
    assert values(catbus("get", "todo.a", *url)) == [("todo.a", 2, 2)]
    assert values(catbus("get", "other", *url)) == []
    assert catbus("set", "todo.b", "null", "--expect", "1", *url).status == 0
    assert values(catbus("get", "*", *url)) == [("todo.a", 2, 2)]


def test_conflict_has_an_exit_status_and_the_present_seq(broker: Running, catbus: Command) -> None:
    url = "--url", broker.url
    assert catbus("set", "a", "1", "--expect", "7", *url) == (
        3,
        "",
        "catbus: conflict: the retained message of a is not there (seq 0), not 7\n",
    )
    assert catbus("set", "a", "1", *url).status == 0
    assert catbus("set", "a", "2", "--expect", "0", *url) == (
        3,
        "",
        "catbus: conflict: the retained message of a has seq 1, and none was expected\n",
    )
    assert catbus("set", "a", "2", "--expect", "9", *url).errors == (
        "catbus: conflict: the retained message of a has seq 1, not 9\n"
    )
    assert values(catbus("get", "a", *url)) == [("a", 1, 1)]
    assert catbus("set", "a", "2", "--expect", "1", *url).status == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("get", "a..b"), "a..b"),
        (("presence", ""), "pattern"),
        (("set", "a.*", "1"), "a.*"),
        (("set", "a", "text"), "a JSON string needs its own quotes"),
        (("set", "a", "1", "--expect", "-1"), "--expect"),
        (("get", "a", "--timeout", "0"), "--timeout"),
    ],
)
def test_wrong_usage_is_explained(catbus: Command, arguments: tuple[str, ...], text: str) -> None:
    status, output, errors = catbus(*arguments, "--token", "t")
    assert (status, output) == (2, "")
    assert text in errors


@pytest.mark.parametrize("command", ["get a", "presence a", "presence a --follow"])
def test_command_gives_up_after_its_timeout(start: Start, broker: Running, command: str) -> None:
    broker.process.send_signal(signal.SIGSTOP)
    try:
        process = start(*command.split(), "--timeout", "0.1", "--url", broker.url)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        broker.process.send_signal(signal.SIGCONT)
    assert process.returncode == 1
    assert errors.startswith("catbus: ")
    assert errors.endswith(" within 0.1 s\n")


def test_presence_prints_members_and_then_changes(broker: Running, start: Start) -> None:
    async def line_of(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        found: dict[str, Any] = json.loads(await trio.to_thread.run_sync(process.stdout.readline))
        return found

    async def members_come_and_go() -> None:
        token = find_token(broker.url)
        assert token is not None
        async with connect(broker.url, token=token) as bus, bus.join("room.1", {"name": "Ann"}) as membership:
            present = {"channel": "room.1", "client_id": "development", "sessions": 1, "info": {"name": "Ann"}}
            printer = start("presence", "room.*", "--url", broker.url)
            output, errors = await trio.to_thread.run_sync(printer.communicate)
            assert ([json.loads(line) for line in output.splitlines()], errors) == ([present], "")
            follower = start("presence", "room.*", "--follow", "--timeout", f"{PATIENCE}", "--url", broker.url)
            assert await line_of(follower) == {"action": "present", **present}
            await membership.update("busy")
            changed = await line_of(follower)
            assert (changed["action"], changed["info"]) == ("update", "busy")
            async with bus.join("room.2"):
                joined = await line_of(follower)
                assert (joined["action"], joined["channel"], "info" in joined) == ("join", "room.2", False)
            left = await line_of(follower)
            assert (left["action"], left["channel"], left["sessions"]) == ("leave", "room.2", 0)
            status, rest, errors = await trio.to_thread.run_sync(end, follower, signal.SIGINT)
            assert (status, rest, errors) == (0, "", "")

    trio.run(members_come_and_go)
