"""Members of channels at a client, without I/O: its state is that of the broker, and changes are true ones."""

from __future__ import annotations

from typing import Any

import pytest

from catbus.client.live_state import Change
from catbus.client.message_queue import QueuePhase
from catbus.client.presence_queue import PresenceQueue
from catbus.client.protocol_connection import ProtocolConnection
from catbus.client.server_messages import MemberKey, PresentMember
from catbus.error_codes import ErrorCode
from tests.client.scripted_broker import EPOCH, message
from tests.client.test_lost_connections import Client
from tests.client.test_protocol_connection import lines, sent, seqs, subscribed


def do_nothing() -> None:
    pass


def keep(client: Client) -> PresenceQueue:
    queue = PresenceQueue("a.*", do_nothing)
    client.subscriptions.add(queue)
    return queue


def member(name: str, sessions: int = 1, **fields: Any) -> dict[str, Any]:
    return {"channel": "a.b", "client_id": name, "sessions": sessions, **fields}


def page(*members: dict[str, Any], complete: bool = True) -> dict[str, Any]:
    return {"type": "members", "pattern": "a.*", "members": members, "complete": complete}


def change(action: str, found: dict[str, Any]) -> dict[str, Any]:
    return {"type": "presence", "pattern": "a.*", "action": action, **found}


def state(queue: PresenceQueue) -> dict[str | None, int]:
    return {key.client_id or key.session: found.sessions for key, found in queue.state.entries.items()}


def begin(client: Client) -> tuple[ProtocolConnection, PresenceQueue]:
    """A connection with a live map that has alice and bob."""
    protocol = client.go_on()
    queue = keep(client)
    [request] = sent(protocol)
    assert (request["presence"], "since" in request, "retained" in request) == (True, False, False)
    protocol.receive(lines(subscribed(110, request["id"]), page(member("alice", 2, info={"n": 1}), member("bob"))))
    assert (queue.ready, state(queue)) == (True, {"alice": 2, "bob": 1})
    return protocol, queue


def test_map_is_ready_when_the_snapshot_is_complete() -> None:
    client = Client()
    protocol = client.go_on()
    queue = keep(client)
    [request] = sent(protocol)
    protocol.receive(lines(subscribed(110, request["id"]), page(member("alice"), complete=False)))
    assert not queue.ready
    # Between two pages, what happened to members of the first.
    protocol.receive(lines(change("update", member("alice", 2)), change("join", member("adam")), page(member("bob"))))
    assert (queue.ready, state(queue)) == (True, {"alice": 2, "adam": 1, "bob": 1})


def test_members_have_their_info_and_key() -> None:
    client = Client()
    protocol, queue = begin(client)
    anonymous = {"channel": "a.c", "session": "x1", "sessions": 1, "info": None}
    protocol.receive(lines(change("join", anonymous)))
    assert queue.state.entries[MemberKey("a.b", "alice", None)] == PresentMember("a.b", 2, "alice", info={"n": 1})
    assert queue.state.entries[MemberKey("a.c", None, "x1")] == PresentMember("a.c", 1, session="x1")


def test_changes_are_true_ones() -> None:
    client = Client()
    protocol, queue = begin(client)
    changes: list[Change[MemberKey, PresentMember]] = []
    queue.state.callbacks[0] = changes.append
    again = change("join", member("bob")), change("leave", member("eve", 0))
    protocol.receive(lines(*again, change("update", member("bob", info=[])), change("leave", member("alice", 0))))
    assert [(c.key.client_id, c.value and c.value.info) for c in changes] == [("bob", []), ("alice", None)]
    assert state(queue) == {"bob": 1}


def test_later_snapshot_replaces_the_state_when_it_is_complete() -> None:
    client = Client()
    protocol, queue = begin(client)
    changes: list[Change[MemberKey, PresentMember]] = []
    queue.state.callbacks[0] = changes.append
    protocol.receive(lines(page(member("alice", 2, info={"n": 1}), complete=False)))
    assert state(queue) == {"alice": 2, "bob": 1}
    protocol.receive(lines(page(member("carol"))))
    assert state(queue) == {"alice": 2, "carol": 1}
    assert sorted((c.key.client_id, c.value is None) for c in changes) == [("bob", True), ("carol", False)]


@pytest.mark.parametrize("complete", [True, False])
def test_next_connection_begins_with_a_snapshot(complete: bool) -> None:
    client = Client()
    old, queue = begin(client)
    old.receive(lines(page(member("dave"), complete=complete)))
    before = state(queue)
    old.connection_lost("gone")
    new = client.go_on()
    [request] = sent(new)
    assert (request["presence"], "since" in request) == (True, False)
    new.receive(lines(subscribed(110, request["id"]), page(member("bob"), complete=False)))
    assert state(queue) == before
    new.receive(lines(page(member("eve"))))
    assert state(queue) == {"bob": 1, "eve": 1}


def test_old_connection_tells_changes_until_the_new_one_replies() -> None:
    client = Client()
    old, queue = begin(client)
    new = client.connect()
    new.resume_subscriptions()
    [request] = sent(new)
    old.receive(lines(change("join", member("carol"))))
    assert state(queue) == {"alice": 2, "bob": 1, "carol": 1}
    new.receive(lines(subscribed(110, request["id"])))
    old.receive(lines(change("leave", member("alice", 0))))
    new.receive(lines(page(member("bob"))))
    assert state(queue) == {"bob": 1}


def test_messages_are_dropped() -> None:
    client = Client()
    protocol, queue = begin(client)
    protocol.receive(lines(message(111), message(None, "psst")))
    assert not queue.items
    protocol.connection_lost("gone")
    assert "since" not in sent(client.go_on())[0]


def test_presence_beside_a_subscription_resumes_at_its_cursor() -> None:
    client = Client()
    protocol = client.go_on()
    reader = client.subscribe()
    protocol.receive(lines(subscribed(100, sent(protocol)[0]["id"]), message(101)))
    queue = keep(client)
    [request] = sent(protocol)
    # The new queue begins at the head that the connection knows, if that is older.
    assert (request["presence"], request["since"], request["epoch"]) == (True, 100, EPOCH)
    live = {"type": "live", "pattern": "a.*", "seq": 102}
    protocol.receive(lines(subscribed(102, request["id"]), page(member("bob")), message(101), message(102), live))
    assert seqs(reader) == [101, 102]
    assert state(queue) == {"bob": 1}
    client.subscriptions.unsubscribe(queue)
    [request] = sent(protocol)
    assert ("presence" in request, request["since"]) == (False, 102)
    protocol.receive(lines(subscribed(102, request["id"]), {**live, "seq": 103}, message(104)))
    assert seqs(reader) == [101, 102, 104]


def test_second_map_of_a_pattern_gets_a_snapshot_of_its_own() -> None:
    client = Client()
    protocol, first = begin(client)
    second = keep(client)
    [request] = sent(protocol)
    protocol.receive(lines(subscribed(110, request["id"]), page(member("bob"))))
    assert state(first) == state(second) == {"bob": 1}
    client.subscriptions.unsubscribe(second)
    [request] = sent(protocol)
    assert request["presence"]
    protocol.receive(lines(subscribed(110, request["id"]), page()))
    assert state(first) == {}
    client.subscriptions.unsubscribe(first)
    assert [request["type"] for request in sent(protocol)] == ["unsubscribe"]


def test_revoked_map_ends() -> None:
    client = Client()
    protocol, queue = begin(client)
    protocol.receive(lines({"type": "revoked", "pattern": "a.*", "seq": 120}))
    assert queue.error is not None
    assert queue.error.code is ErrorCode.REVOKED
    assert queue.phase is QueuePhase.ENDED
    assert sent(protocol) == []
