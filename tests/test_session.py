"""The session state machine without I/O: its replies, its effects, and its robustness against any input."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import inf
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from catbus.auth.grants import Grants, Identity
from catbus.close_codes import CloseCode
from catbus.delivery.send_queue import SendQueue
from catbus.delivery.subscription import Subscription
from catbus.error_codes import ErrorCode
from catbus.errors import PeerError
from catbus.log import EPHEMERAL_SIZE, Append, Committed, Rejected
from catbus.protocol.json_splitter import JsonSplitter
from catbus.protocol.wire_messages import AuthOk, Head, Subscribe, Unsubscribe, decode_client, decode_server
from catbus.session.effects import (
    AppendMessage,
    BroadcastMessage,
    Effect,
    EndSubscription,
    ReadHistory,
    SendHeads,
    StartSubscription,
    VerifyToken,
)
from catbus.session.state_machine import Session, SessionLimits, SessionState

ALICE = Identity("alice", Grants(read=("project.*",), write=("project.*",)), None)
PRODUCER = b"p" * 16


class TransportWriter:
    def flush(self) -> None:
        """Do nothing: the tests take the items themselves."""


@dataclass
class Driver:
    """Carries out effects as a replica without failures would, and records them."""

    identity: Identity | PeerError = ALICE
    wall: float = 0.0
    effects: list[Effect] = field(default_factory=list)
    appends: list[Append] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.send_queue = SendQueue(TransportWriter(), lambda _: None)
        self.session = Session(self.send_queue, SessionLimits(message_size=2000, subscriptions=3), now=100.0)

    def feed(self, data: bytes) -> None:
        for effect in self.session.receive(data):
            if effect is not None:
                self.effects.append(effect)
                self.perform(effect)

    def perform(self, effect: Effect) -> None:
        session = self.session
        match effect:
            case VerifyToken():
                try:
                    if isinstance(self.identity, PeerError):
                        raise self.identity
                    session.accept_token(self.identity, AuthOk("alice"), PRODUCER, 100.0, self.wall)
                except PeerError as error:
                    session.reject_token(error)
            case StartSubscription(request):
                session.subscribed(request, Subscription(self.send_queue), 7, "e")
            case EndSubscription(request):
                session.remove_subscription(request.pattern)
                session.unsubscribed(request, 8)
            case AppendMessage(append):
                self.appends.append(append)
            case ReadHistory(request):
                session.send_history(request, [], False)
            case SendHeads():
                session.send(Head(7, "e", 0))
            case BroadcastMessage():
                pass

    def request(self, *messages: Any) -> list[dict[str, Any]]:
        self.feed(b"\n".join(json.dumps(message).encode() for message in messages) + b"\n")
        return self.replies()

    def replies(self) -> list[dict[str, Any]]:
        replies = []
        for line in self.send_queue.take():
            assert isinstance(line, bytes)
            decoded = json.loads(line)
            assert isinstance(decoded, dict)
            replies.append(decoded)
        return replies


def open_session(protocol: int = 1, **options: Any) -> Driver:
    driver = Driver(**options)
    [reply] = driver.request({"type": "auth", "token": "t", "protocol": protocol})
    assert reply["type"] == "auth_ok"
    driver.effects.clear()
    return driver


# Arbitrary input

fields = st.fixed_dictionaries(
    {"type": st.sampled_from(["auth", "subscribe", "unsubscribe", "publish", "history", "ping", "subscribed", "x"])},
    optional={
        "token": st.text(max_size=4),
        "pattern": st.sampled_from(["project.*", "project.a", "other", "*", "a..b", "*.a", ""]),
        "channel": st.sampled_from(["project.a", "project", "other", "a.*", "\x00"]),
        "payload": st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5),
        "id": st.integers(-1, 2**64),
        "seq": st.integers() | st.text(max_size=2),
        "since": st.integers(-1, 9),
        "retry": st.booleans(),
        "ephemeral": st.booleans(),
        "ack": st.booleans(),
        "protocol": st.integers(0, 3),
        "limit": st.integers(-1, 5),
    },
)
objects = fields.map(lambda message: json.dumps(message).encode())
invalid = st.sampled_from([b"{", b"}", b'{"type":', b"[]", b"\xff", b'{"a":"\xc3"}', b"x" * 50, b'{"a":' * 90])
streams = st.lists(st.one_of(objects, objects, objects, invalid, st.binary(max_size=9)), max_size=12)


@given(streams, st.sampled_from([b"", b"\n", b" \r\n\t"]), st.integers(1, 400), st.booleans())
@example([b'{"payload":\n{"channel":"evil","type":"publish","payload":1}\n}'], b"\n", 400, True)
@example([b'{"type":"auth"}', b'{"type":"auth","token":"","protocol":1}'], b"", 400, False)
def test_session_survives_any_input(parts: list[bytes], separator: bytes, cut: int, authenticated: bool) -> None:
    """With any input, split anywhere: a session never raises, its replies are well-formed, and its errors have codes.

    Before authentication its only effects are to verify a token and to send heads. A closed session ignores input.
    """
    driver = open_session() if authenticated else Driver()
    data = separator.join(parts)
    for start in range(0, len(data), cut):
        closed = driver.session.state is SessionState.CLOSED
        unauthenticated = driver.session.identity is None
        count, size = len(driver.effects), driver.send_queue.size
        driver.feed(data[start : start + cut])
        if closed:
            assert (len(driver.effects), driver.send_queue.size) == (count, size)
        if unauthenticated and driver.session.identity is None:
            assert all(isinstance(effect, VerifyToken | SendHeads) for effect in driver.effects[count:])
    for append in driver.appends:
        assert append.channel.startswith("project.")
        append.settle(append, Committed(9))
    assert driver.session.pending == 0
    # Until `auth` is understood, replies are those of the first version.
    understood = authenticated
    for reply in driver.send_queue.take():
        assert isinstance(reply, bytes)
        understood = understood or json.loads(reply)["type"] == "auth_ok"
        message = decode_server(reply) if understood and driver.session.protocol else json.loads(reply)
        if "error" in type(message).__name__.lower():
            assert message.code in set(ErrorCode)


# Authentication


def test_requests_before_auth_are_rejected() -> None:
    driver = Driver()
    [publish, subscribe, history] = driver.request(
        {"type": "publish", "channel": "project.a", "payload": 1},
        {"type": "subscribe", "pattern": "project.*"},
        {"type": "history", "pattern": "project.*"},
    )
    assert (publish["type"], subscribe["type"], history["type"]) == ("publish_error", "subscribe_error", "error")
    assert driver.effects == []
    assert driver.session.state is SessionState.NEW


def test_open_session_outlives_a_token_that_cannot_be_verified() -> None:
    unreachable = PeerError(ErrorCode.UNAVAILABLE, "away", CloseCode.UNAVAILABLE)
    driver = open_session()
    driver.identity = unreachable
    subscribe = {"type": "subscribe", "pattern": "project.*"}
    replies = driver.request({"type": "auth", "token": "t"}, subscribe)
    assert [reply["type"] for reply in replies] == ["auth_error", "subscribed"]
    assert driver.session.closing is None

    driver = Driver(identity=unreachable)
    [reply] = driver.request({"type": "auth", "token": "t", "protocol": 1}, subscribe)
    assert (reply["type"], reply["code"]) == ("auth_error", "unavailable")
    assert driver.session.closing == (CloseCode.UNAVAILABLE, "away")


@pytest.mark.parametrize("end", ["close", "abandon"])
def test_session_that_ends_during_an_effect_has_no_more_effects(end: str) -> None:
    driver = open_session()
    data = b'{"type":"auth","token":"t"}{"type":"subscribe","pattern":"project.*"}{"type":"ping","seq":1}'
    effects = driver.session.receive(data)
    assert isinstance(next(effects), VerifyToken)
    if end == "close":
        driver.session.close(CloseCode.SHUTTING_DOWN, "stopping")
    else:
        driver.session.abandon()
    assert not any(effects)
    assert driver.replies() == []


def test_session_without_auth_ends_at_its_deadline() -> None:
    driver = Driver()
    assert driver.session.deadline == 110.0
    driver.session.check_deadline(109.9)
    assert driver.session.closing is None
    driver.session.check_deadline(110.0)
    assert driver.replies() == [{"type": "auth_error", "message": "no auth within 10 s"}]
    assert driver.session.closing == (CloseCode.AUTH_TIMEOUT, "no auth within 10 s")


def test_rejected_token_ends_the_session() -> None:
    driver = Driver(identity=PeerError(ErrorCode.UNAUTHENTICATED, "bad signature", CloseCode.UNAUTHENTICATED))
    [reply, *more] = driver.request({"type": "auth", "token": "t", "protocol": 1}, {"type": "ping", "seq": 1})
    assert reply == {"type": "auth_error", "message": "bad signature", "code": "unauthenticated"}
    assert more == [], "no later request is processed"
    assert driver.session.closing == (CloseCode.UNAUTHENTICATED, "bad signature")


def test_second_auth_renews_the_token_and_cannot_change_the_client() -> None:
    driver = open_session()
    driver.identity = Identity("alice", Grants(read=(), write=()), expires=50.0)
    assert [r["type"] for r in driver.request({"type": "auth", "token": "t2", "protocol": 1})] == ["auth_ok"]
    driver.identity = Identity("bob", ALICE.grants, None)
    [reply] = driver.request({"type": "auth", "token": "t3", "protocol": 1})
    assert (reply["type"], reply["code"]) == ("auth_error", "unauthorized")
    assert driver.session.identity is not None
    assert driver.session.identity.client_id == "alice"
    assert driver.session.closing is None


def test_narrower_grants_return_the_subscriptions_that_they_end() -> None:
    driver = open_session()
    driver.request({"type": "subscribe", "pattern": "project.a"}, {"type": "subscribe", "pattern": "project.b"})
    narrow = Identity("alice", Grants(read=("project.a",), write=()), None)
    assert driver.session.accept_token(narrow, AuthOk("alice"), PRODUCER, 100.0, 0.0) == ["project.b"]


def test_expired_token_has_a_grace_period() -> None:
    driver = open_session(identity=Identity("alice", ALICE.grants, expires=1010.0), wall=1000.0)
    assert driver.session.deadline == 100.0 + 10 + 30
    driver.session.check_deadline(140.0)
    assert driver.session.closing == (CloseCode.TOKEN_EXPIRED, "the token has expired")
    assert open_session().session.deadline == inf


# Subscribing


def test_subscribe_and_unsubscribe_have_effects() -> None:
    driver = open_session()
    assert driver.request({"type": "subscribe", "pattern": "project.*", "since": 3, "epoch": "e", "id": 4}) == [
        {"type": "subscribed", "pattern": "project.*", "seq": 7, "epoch": "e", "id": 4}
    ]
    assert driver.request({"type": "unsubscribe", "pattern": "project.*", "id": 5}) == [
        {"type": "unsubscribed", "pattern": "project.*", "seq": 8, "id": 5}
    ]
    assert driver.effects == [
        StartSubscription(Subscribe("project.*", 3, "e", id=4)),
        EndSubscription(Unsubscribe("project.*", 5)),
    ]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "subscribe", "pattern": "a..b"}, "invalid_pattern"),
        ({"type": "subscribe", "pattern": "*.a"}, "invalid_pattern"),
        ({"type": "subscribe", "pattern": "*"}, "unauthorized"),
        ({"type": "subscribe", "pattern": "project"}, "unauthorized"),
        ({"type": "unsubscribe", "pattern": "project.a"}, "invalid_pattern"),
        ({"type": "history", "pattern": "other"}, "unauthorized"),
        ({"type": "history", "pattern": ".."}, "invalid_pattern"),
        ({"type": "publish", "channel": "project.*", "payload": 1}, "invalid_channel"),
        ({"type": "publish", "channel": "x" * 300, "payload": 1}, "invalid_channel"),
        ({"type": "publish", "channel": "other", "payload": 1}, "unauthorized"),
        ({"type": "publish", "channel": "project.a", "payload": 1, "retry": True, "id": 1}, "bad_message"),
        ({"type": "publish", "channel": "project.a"}, "bad_message"),
        ({"type": "publish", "channel": "project.a", "payload": 1, "id": 2**63}, "bad_message"),
        ({"type": "nonsense"}, "bad_message"),
        ({"type": "nonsense" * 100}, "bad_message"),
        ({"pattern": "project.a"}, "bad_message"),
        ([1, 2], None),
    ],
)
def test_rejected_request_has_a_code_and_no_effect(message: Any, code: str | None) -> None:
    driver = open_session()
    [reply] = driver.request(message)
    assert driver.effects == []
    if code is None:
        assert driver.session.closing is not None
        assert driver.session.closing[0] is CloseCode.BAD_MESSAGE
        return
    assert reply["code"] == code
    assert reply["message"]
    assert len(json.dumps(reply)) < 700
    assert driver.request({"type": "ping", "seq": 5})[0] == {"type": "pong", "seq": 5}, "the session continues"


def test_subscriptions_are_limited_and_an_existing_one_may_be_replaced() -> None:
    driver = open_session()
    patterns = ["project.a", "project.b", "project.c", "project.d", "project.a"]
    replies = driver.request(*({"type": "subscribe", "pattern": pattern} for pattern in patterns))
    assert [reply.get("code") for reply in replies] == [None, None, None, "limit", None]


def test_object_over_the_limit_closes_the_session() -> None:
    driver = open_session()
    driver.feed(b'{"type":"publish","channel":"project.a","payload":"' + b"x" * 2000)
    assert [reply["code"] for reply in driver.replies()] == ["too_large"]
    assert driver.session.closing is not None
    assert driver.session.closing[0] is CloseCode.TOO_LARGE


# Publishing


def test_publish_becomes_an_append_whose_outcome_is_the_reply() -> None:
    driver = open_session()
    assert (
        driver.request({"type": "publish", "channel": "project.a", "payload": {"x": 1}, "id": 4, "echo": False}) == []
    )
    [append] = driver.appends
    assert (append.payload, append.producer, append.number) == (b'{"x": 1}', PRODUCER, 4)
    assert (append.sender, append.origin, append.after) == ("alice", PRODUCER, None)
    assert driver.session.pending == 1
    append.settle(append, Committed(12, duplicate=True))
    assert driver.replies() == [{"type": "published", "channel": "project.a", "id": 4, "seq": 12, "duplicate": True}]
    assert driver.session.pending == 0


def test_publish_without_an_id_leaves_its_key_to_the_log() -> None:
    driver = open_session()
    driver.request({"type": "publish", "channel": "project.a", "payload": 1})
    assert driver.appends[0].producer is None


def test_retry_passes_on_its_epoch_and_head() -> None:
    driver = open_session()
    message = {"type": "publish", "channel": "project.a", "payload": 1, "id": 1, "after": 3, "epoch": "e"}
    driver.request(message, {**message, "retry": True, "id": 2})
    assert [(effect.epoch, effect.append.after) for effect in driver.effects if isinstance(effect, AppendMessage)] == [
        (None, None),
        ("e", 3),
    ]


def test_publish_without_ack_is_answered_only_by_an_error() -> None:
    driver = open_session()
    message = {"type": "publish", "channel": "project.a", "payload": 1, "ack": False}
    driver.request(message, message)
    first, second = driver.appends
    first.settle(first, Committed(1))
    second.settle(second, Rejected(ErrorCode.OVERLOADED, "too much"))
    assert driver.replies() == [
        {"type": "publish_error", "channel": "project.a", "message": "too much", "code": "overloaded"}
    ]


def test_ephemeral_publish_bypasses_the_log() -> None:
    driver = open_session()
    message = {"type": "publish", "channel": "project.a", "payload": 1, "ephemeral": True, "id": 3}
    assert driver.request(message) == [{"type": "published", "channel": "project.a", "id": 3}]
    assert driver.effects == [BroadcastMessage("project.a", b"1", "alice", None)]


def test_size_of_an_ephemeral_message_is_limited() -> None:
    driver = open_session()
    driver.session._splitter = JsonSplitter(decode_client, 65_536)
    room = EPHEMERAL_SIZE - len("project.a") - len('"alice"') - len('""')
    message = {"type": "publish", "channel": "project.a", "payload": "x" * room, "ephemeral": True, "id": 1}
    assert driver.request(message) == [{"type": "published", "channel": "project.a", "id": 1}]
    larger = {**message, "payload": "x" * (room + 1), "ack": False}
    [error] = driver.request(larger)
    assert (error["type"], error["code"], error["id"]) == ("publish_error", "too_large", 1)
    assert driver.session.closing is None
    assert driver.request({**larger, "ephemeral": False}) == []
    assert len(driver.appends) == 1


def test_payload_keeps_its_bytes_but_for_line_breaks() -> None:
    driver = open_session()
    driver.feed(b'{"type":"publish","channel":"project.a","payload":{"n":\r\n 1.00e3,"s":"\\u0000\xc3\xa9"}}')
    assert driver.appends[0].payload == b'{"n":   1.00e3,"s":"\\u0000\xc3\xa9"}'


def test_publish_settled_after_the_connection_ended_has_no_reply() -> None:
    driver = open_session()
    driver.request({"type": "publish", "channel": "project.a", "payload": 1})
    driver.session.abandon()
    driver.appends[0].settle(driver.appends[0], Committed(1))
    assert driver.replies() == []
    assert driver.session.pending == 0


def test_publishes_are_acknowledged_while_the_session_is_closing() -> None:
    driver = open_session()
    driver.request({"type": "publish", "channel": "project.a", "payload": 1})
    driver.session.close(CloseCode.SHUTTING_DOWN, "stopping")
    driver.appends[0].settle(driver.appends[0], Committed(1))
    assert [reply["type"] for reply in driver.replies()] == ["published"]


# First-version clients


def test_first_version_client_gets_only_replies_of_its_version() -> None:
    driver = open_session(protocol=0)
    replies = driver.request(
        {"type": "subscribe", "pattern": "project.*", "since": 2},
        {"type": "ping", "seq": 1},
        {"type": "publish", "channel": "project.a", "payload": 1, "id": 1},
        {"type": "subscribe", "pattern": "other"},
        {"type": "history", "pattern": "project.*"},
    )
    assert replies == [
        {"type": "subscribed", "pattern": "project.*"},
        {"type": "pong", "seq": 1},
        {"type": "subscribe_error", "pattern": "other", "message": "no read grant covers this pattern"},
    ]
    assert driver.effects[0] == StartSubscription(Subscribe("project.*")), (
        "a first-version client knows no seq, so it cannot resume"
    )
    append = driver.appends[0]
    append.settle(append, Committed(3))
    driver.session.revoked("project.*", 9)
    assert driver.replies() == [
        {"type": "published", "channel": "project.a"},
        {"type": "subscribe_error", "pattern": "project.*", "message": "the permission was withdrawn"},
    ]


def test_unsubscribe_of_a_first_version_client_always_succeeds() -> None:
    driver = open_session(protocol=0)
    assert driver.request(
        {"type": "unsubscribe", "pattern": "never"}, {"type": "unsubscribe", "pattern": "project.*"}
    ) == [
        {"type": "unsubscribed", "pattern": "never"},
        {"type": "unsubscribed", "pattern": "project.*"},
    ]
    assert driver.effects == []


@pytest.mark.parametrize("kind", ["yjs_update", "yjs_awareness", "yjs_sync_request"])
@pytest.mark.parametrize("protocol", [0, 1])
def test_requests_of_the_first_version_alone_are_errors_and_the_session_continues(kind: str, protocol: int) -> None:
    driver = open_session(protocol=protocol)
    error, pong, *_ = driver.request(
        {"type": kind, "channel": "project.a", "update": "AAA="}, {"type": "ping", "seq": 1}
    )
    assert (error["type"], error.get("code")) == ("error", "bad_message" if protocol else None)
    assert kind in error["message"]
    assert pong == {"type": "pong", "seq": 1}
    assert not driver.session.closed
