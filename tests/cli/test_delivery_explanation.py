"""What `catbus why` says, for answers of replicas that are written down."""

from __future__ import annotations

from typing import Any

import pytest

from catbus.cli.delivery_explanation import explain

FOUND = {"state": "in the log", "channel": "a.x", "at": 0, "sender": "alice"}


def report(replica: str = "one:1", head: int = 9, message: Any = FOUND, sessions: Any = ()) -> dict[str, Any]:
    return {"replica": replica, "head": head, "floor": 4, "message": message, "sessions": list(sessions)}


def session(fate: str, **fields: Any) -> dict[str, Any]:
    about = {"session": 5, "transport": "websocket", "opened": 0, "pattern": "a.*", "behind": 0, "queued": 0}
    return {**about, "ephemeral_dropped": 0, "fate": fate, **fields}


def first(*reports: dict[str, Any], seq: int | None = 7) -> str:
    return next(explain(reports, seq, "a.x", "bob"))


@pytest.mark.parametrize(
    ("fate", "said"),
    [
        (session("sent"), "delivered: message 7 was sent to bob by one:1"),
        (session("queued", queued=9), "delivered: message 7 was sent to bob by one:1, or is in its send queue"),
        (session("lagging", behind=3), "lagging: message 7 comes to bob, after 3 other messages of the log"),
        (session("earlier"), "not delivered: bob subscribed after message 7, without a cursor before it"),
        (session("not subscribed"), "not delivered: bob is connected, and not subscribed to its channel"),
        (session("not permitted"), "not delivered: bob has no permission to read its channel, and no subscription"),
    ],
)
def test_each_fate_has_a_sentence(fate: dict[str, Any], said: str) -> None:
    assert first(report(sessions=[fate])) == said


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("erased", "message 7 was erased"),
        ("removed by retention", "message 7 was removed by retention"),
        ("deleted", "message 7 was deleted from the log by hand"),
        ("unknown", "never published: the newest message is 9"),
    ],
)
def test_message_that_is_not_in_the_log_has_a_reason(state: str, said: str) -> None:
    assert first(report(message={"state": state})).startswith(said)


def test_best_fate_of_all_replicas_counts() -> None:
    other = report("two:2", sessions=[session("not subscribed"), session("sent")])
    lines = list(explain([report(sessions=[session("lagging")]), other], 7, None, "bob"))
    assert lines[0] == "delivered: message 7 was sent to bob by two:2"
    assert len(lines) == 5


def test_replica_that_is_behind_does_not_count() -> None:
    behind = report("two:2", head=6, message={"state": "unknown"})
    assert first(behind, report(sessions=[session("sent")])).startswith("delivered")


def test_client_without_a_session_is_not_guessed_about() -> None:
    assert first(report(), report("two:2")).startswith("no session of bob is open on one:1, two:2")


@pytest.mark.parametrize(
    ("fate", "said"),
    [
        (session("sent"), "subscribed: bob receives an ephemeral message on a.x"),
        (session("sent", ephemeral_dropped=2), "perhaps dropped: full send queues of bob had no room for 2"),
        (session("not permitted"), "not delivered: bob has no permission"),
    ],
)
def test_ephemeral_message_has_no_number(fate: dict[str, Any], said: str) -> None:
    assert first(report(message=None, sessions=[fate]), seq=None).startswith(said)


def test_names_of_clients_do_not_command_a_terminal() -> None:
    assert "\x1b" not in "\n".join(explain([report()], 7, None, "\x1b[2J"))
