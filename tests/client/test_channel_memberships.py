"""The channels that a client joins, without I/O: each session joins them again, with the newest info."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from msgspec import Raw

from catbus.client.channel_memberships import MembershipHandle
from catbus.client.in_flight_requests import PendingReply
from catbus.client.membership import encode_info
from catbus.client.protocol_connection import ProtocolConnection
from catbus.error_codes import ErrorCode
from catbus.errors import Refused
from tests.client.test_lost_connections import Client
from tests.client.test_protocol_connection import lines, sent


def join(client: Client, info: Any = None, handle: MembershipHandle | None = None) -> PendingReply[str]:
    return client.memberships.join(handle or MembershipHandle("room"), Raw(msgspec.json.encode(info)))


def joined(number: int) -> dict[str, Any]:
    return {"type": "joined", "channel": "room", "id": number}


def left(number: int | None = None) -> dict[str, Any]:
    return {"type": "left", "channel": "room", **({} if number is None else {"id": number})}


def refused(number: int, code: str) -> dict[str, Any]:
    return {"type": "error", "id": number, "code": code, "message": "no"}


def code(reply: PendingReply[str]) -> Any:
    return reply.value.code if isinstance(reply.value, Refused) else reply.value


def requests(protocol: ProtocolConnection) -> list[tuple[Any, ...]]:
    return [(r["type"], r["id"], r.get("info")) for r in sent(protocol)]


def begin(client: Client, info: Any = 1) -> tuple[ProtocolConnection, MembershipHandle]:
    protocol = client.go_on()
    handle = MembershipHandle("room")
    reply = join(client, info, handle)
    [(_, number, _)] = requests(protocol)
    protocol.receive(lines(joined(number)))
    assert reply.value == "room"
    return protocol, handle


def test_membership_without_info_names_none() -> None:
    client = Client()
    protocol = client.go_on()
    join(client)
    assert sent(protocol) == [{"type": "join", "channel": "room", "id": 1}]
    assert protocol.awaiting_reply


def test_next_connection_joins_with_the_newest_info() -> None:
    client = Client()
    old, handle = begin(client)
    reply = join(client, 2, handle)
    [(_, number, _)] = requests(old)
    old.receive(lines(joined(number)))
    assert reply.value == "room"
    old.connection_lost("gone")
    new = client.go_on()
    assert requests(new) == [("join", 3, 2)]
    new.receive(lines(joined(3)))
    assert not new.awaiting_reply


def test_updates_without_a_reply_are_answered_by_the_next_connection() -> None:
    client = Client()
    old, handle = begin(client)
    replies = [join(client, info, handle) for info in (2, 3)]
    old.connection_lost("gone")
    replies.append(join(client, 4, handle))
    new = client.go_on()
    assert requests(new) == [("join", 5, 4)]
    new.receive(lines(joined(5)))
    assert [reply.value for reply in replies] == ["room"] * 3


def test_first_join_waits_for_a_connection() -> None:
    client = Client()
    reply = join(client, 1)
    protocol = client.go_on()
    assert requests(protocol) == [("join", 2, 1)]
    protocol.receive(lines(joined(2)))
    assert reply.value == "room"


def test_session_leaves_with_the_last_handle() -> None:
    client = Client()
    protocol, first = begin(client)
    second = MembershipHandle("room")
    join(client, 2, second)
    [(_, number, _)] = requests(protocol)
    protocol.receive(lines(joined(number)))
    client.memberships.leave(second)
    assert requests(protocol) == []
    client.memberships.leave(first)
    client.memberships.leave(first)
    [(kind, number, _)] = requests(protocol)
    assert kind == "leave"
    protocol.receive(lines(left(number)))
    protocol.connection_lost("gone")
    assert requests(client.go_on()) == []


def test_cancelled_join_is_undone() -> None:
    client = Client()
    protocol = client.go_on()
    handle = MembershipHandle("room")
    join(client, 1, handle)
    client.memberships.leave(handle)
    assert [(kind, number) for kind, number, _ in requests(protocol)] == [("join", 1), ("leave", 2)]
    protocol.receive(lines(joined(1), left(2)))
    protocol.connection_lost("gone")
    assert requests(client.go_on()) == []


def test_rejected_join_is_an_error_of_that_call() -> None:
    client = Client()
    protocol = client.go_on()
    handle = MembershipHandle("room")
    reply = join(client, 1, handle)
    protocol.receive(lines(refused(1, "unauthorized")))
    assert code(reply) is ErrorCode.UNAUTHORIZED
    assert handle.error is None
    client.memberships.leave(handle)
    sent(protocol)
    protocol.connection_lost("gone")
    assert requests(client.go_on()) == []


def test_rejected_update_leaves_the_info_before() -> None:
    client = Client()
    old, handle = begin(client)
    reply = join(client, 2, handle)
    [(_, number, _)] = requests(old)
    old.receive(lines(refused(number, "too_large")))
    assert (code(reply), handle.error) == (ErrorCode.TOO_LARGE, None)
    old.connection_lost("gone")
    assert requests(client.go_on()) == [("join", 3, 1)]


def test_update_that_the_next_connection_rejects_leaves_the_info_before() -> None:
    client = Client()
    old, handle = begin(client)
    reply = join(client, 2, handle)
    old.connection_lost("gone")
    new = client.go_on()
    assert requests(new) == [("join", 3, 2)]
    new.receive(lines(refused(3, "too_large")))
    assert (code(reply), handle.error) == (ErrorCode.TOO_LARGE, None)
    assert requests(new) == [("join", 4, 1)]


def test_next_connection_tries_again_after_a_passing_error() -> None:
    client = Client()
    old, handle = begin(client)
    old.connection_lost("gone")
    new = client.go_on()
    [(_, number, _)] = requests(new)
    new.receive(lines(refused(number, "unavailable")))
    assert (client.memberships.retry_pending, handle.error, requests(new)) == (True, None, [])
    client.memberships.retry()
    [(kind, number, info)] = requests(new)
    assert (kind, info) == ("join", 1)
    new.receive(lines(joined(number)))
    client.memberships.retry()
    assert requests(new) == []


def test_final_error_of_the_next_connection_ends_the_membership() -> None:
    client = Client()
    old, handle = begin(client)
    old.connection_lost("gone")
    new = client.go_on()
    [(_, number, _)] = requests(new)
    new.receive(lines(refused(number, "unauthorized")))
    assert handle.error is not None
    assert handle.error.code is ErrorCode.UNAUTHORIZED
    client.memberships.leave(handle)
    assert requests(new) == []
    new.connection_lost("gone")
    assert requests(client.go_on()) == []


def test_revocation_ends_the_membership() -> None:
    client = Client()
    protocol, handle = begin(client)
    protocol.receive(lines(left()))
    assert handle.error is not None
    assert handle.error.code is ErrorCode.REVOKED
    protocol.connection_lost("gone")
    assert requests(client.go_on()) == []


@pytest.mark.parametrize("again", [True, False])
def test_reply_to_a_join_after_a_revocation_counts(again: bool) -> None:
    client = Client()
    protocol, handle = begin(client)
    join(client, 2, handle)
    [(_, number, _)] = requests(protocol)
    protocol.receive(lines(left(), joined(number) if again else refused(number, "unauthorized")))
    if not again:
        # The info before is tried too.
        [(_, number, info)] = requests(protocol)
        assert info == 1
        protocol.receive(lines(refused(number, "unauthorized")))
    assert (handle.error is None) is again


def test_replies_of_a_membership_that_has_ended_are_ignored() -> None:
    client = Client()
    protocol, first = begin(client)
    client.memberships.leave(first)
    reply = join(client, 5)
    assert [(kind, number) for kind, number, _ in requests(protocol)] == [("leave", 2), ("join", 3)]
    protocol.receive(lines(left(2), joined(3), joined(99), left(98)))
    assert reply.value == "room"
    protocol.connection_lost("gone")
    assert requests(client.go_on()) == [("join", 4, 5)]


def test_reply_of_the_old_connection_counts_during_a_move() -> None:
    client = Client()
    old, handle = begin(client)
    reply = join(client, 2, handle)
    [(_, number, _)] = requests(old)
    new = client.connect()
    new.resume_subscriptions()
    old.receive(lines(joined(number)))
    assert reply.value == "room"
    old.connection_lost("closed")
    new.resume_requests()
    assert requests(new) == [("join", 3, 2)]


def test_info_has_a_largest_size_and_depth() -> None:
    assert bytes(encode_info("x" * 1022)) == b'"' + b"x" * 1022 + b'"'
    with pytest.raises(Refused) as caught:
        encode_info("x" * 1023)
    assert caught.value.code is ErrorCode.TOO_LARGE
    deep: Any = 1
    for _ in range(63):
        deep = [deep]
    encode_info(deep)
    with pytest.raises(Refused) as caught:
        encode_info([deep])
    assert caught.value.code is ErrorCode.BAD_MESSAGE
    with pytest.raises(TypeError, match="no JSON form"):
        encode_info(object())


def test_client_joins_no_more_channels_than_the_broker_allows() -> None:
    client = Client()
    protocol = client.go_on(limits={"joined_channels": 2})
    rooms = [MembershipHandle(name) for name in ("room", "hall", "yard")]
    replies = [join(client, 1, room) for room in rooms]
    assert [request["channel"] for request in sent(protocol)] == ["room", "hall"]
    assert isinstance(replies[2].value, Refused)
    assert (replies[2].value.code, "join 2 channels" in str(replies[2].value)) == (ErrorCode.LIMIT, True)
    # Another use of a channel, and new info, need no room. A channel that was left makes room.
    join(client, 2)
    client.memberships.leave(rooms[1])
    client.memberships.leave(rooms[2])
    join(client, 1, rooms[2])
    assert [(request["type"], request["channel"]) for request in sent(protocol)] == [
        ("join", "room"),
        ("leave", "hall"),
        ("join", "yard"),
    ]
